"""What a conversion may be asked for. Every value is checked when it is set, with code E505."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout


@dataclass(frozen=True)
class SolverOptions:
    """Options of the solver for one matrix.

    weight_bits 2, 3 or 4; group_size a multiple of 16 columns; statistics "bilevel" or "direct".
    outlier_share: fraction of the weights stored as outliers, met exactly (rounded to whole weights).
    outlier_threshold: instead, an outlier is kept where leaving it out of its group lowers the loss by more than this
    times the layer's mean loss of dropping a weight (SpQR's relative threshold). At most one of the two.
    damping: fraction of the mean Hessian diagonal that is added to the diagonal.
    rounds: joint searches of statistics and codes per group; sweeps: passes of coordinate descent by groups over the
    whole matrix after error feedback (calibrated only); drift: share, 0..1, of the correction for inputs that earlier
    quantised layers have already changed (calibrated only).
    """

    weight_bits: int = 3
    group_size: int = 16
    statistics: str = "bilevel"
    outlier_share: float | None = None
    outlier_threshold: float | None = None
    damping: float = 0.01
    rounds: int = 3
    sweeps: int = 2
    drift: float = 1.0

    def __post_init__(self) -> None:
        def need(fine: bool, name: str, expected: str) -> None:
            if not fine:
                raise SpqrError("E505", name, f"{getattr(self, name)!r}: {expected}")

        need(self.weight_bits in (2, 3, 4), "weight_bits", "expected 2, 3 or 4")
        need(
            isinstance(self.group_size, int) and self.group_size > 0 and self.group_size % 16 == 0,
            "group_size", "expected a positive multiple of 16",
        )  # fmt: skip
        need(self.statistics in ("bilevel", "direct"), "statistics", "expected bilevel or direct")
        need(self.outlier_share is None or 0 <= self.outlier_share <= 1, "outlier_share", "expected 0 to 1")
        need(self.outlier_threshold is None or self.outlier_threshold > 0, "outlier_threshold", "expected above 0")
        need(
            self.outlier_share is None or self.outlier_threshold is None,
            "outlier_threshold", "outlier_share is set too; choose one of the two",
        )  # fmt: skip
        need(0 <= self.damping <= 1, "damping", "expected 0 to 1")
        need(1 <= self.rounds <= 64, "rounds", "expected 1 to 64")
        need(0 <= self.sweeps <= 64, "sweeps", "expected 0 to 64")
        need(0 <= self.drift <= 1, "drift", "expected 0 to 1")

    @property
    def top(self) -> int:
        """The largest weight code."""
        return 2**self.weight_bits - 1

    @property
    def keeps_outliers(self) -> bool:
        return bool(self.outlier_share) or self.outlier_threshold is not None

    def layout(self, out_features: int, in_features: int) -> Layout:
        """The layout of a matrix of this shape."""
        return Layout(out_features, in_features, self.weight_bits, self.group_size, self.statistics)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
