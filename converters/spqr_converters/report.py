"""What a conversion did, module by module, and what it left alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from spqr_format.matrix import PackedMatrix, SpqrMatrix

STARVED = "data-free: expert with too few tokens"  # a method


@dataclass(frozen=True)
class ModuleReport:
    """One quantised matrix. bits: stored bits for each weight; outliers: share of the weights; method: "calibrated",
    "data-free" (and why) or "lossless"; weight_error: relative norm; output_error: relative, squared, over the calibration
    inputs. lossless only: rounded, weights that equal those of the source's tool after its own rounding and not before;
    different, weights that do not equal them; rounding_error, relative norm before that rounding (see lossless.compare);
    compared, of how many weights the last four figures speak, where it is not all (then all codes were compared, as bits).
    tokens: with calibration, of how many tokens its inputs were seen."""

    name: str
    shape: tuple[int, int]
    weight_bits: int
    stored_bytes: int
    bits: float
    outliers: float
    method: str
    weight_error: float
    output_error: float | None = None
    damping: float | None = None
    rounded: int | None = None
    different: int | None = None
    rounding_error: float | None = None
    compared: int | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, name: str, matrix: SpqrMatrix | PackedMatrix, method: str, figures: dict[str, float]) -> ModuleReport:
        layout = matrix.layout
        weights = layout.out_features * layout.in_features
        count = layout.outliers
        stored = layout.stored_bytes(outliers=count)
        return cls(
            name, (layout.out_features, layout.in_features), layout.weight_bits, stored, 8 * stored / weights,
            count / weights, method, figures["weight_error"], figures.get("output_error"), figures.get("damping"),
            _count(figures.get("rounded")), _count(figures.get("different")), figures.get("rounding_error"),
            _count(figures.get("compared")), _count(figures.get("tokens")),
        )  # fmt: skip

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModuleReport:
        """The inverse of dataclasses.asdict, also through JSON."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})


def _count(figure: float | None) -> int | None:
    return None if figure is None else int(figure)


@dataclass
class Report:
    """source: its kind. mode: "lossless" (codes carried over), "requantized" (from an already quantized source, whose own
    error is unknown) or "quantized". notes: what a user must know of the source. modules: what was quantised.
    dense: tensor name -> {parameters, bytes, reason} of what was not. seconds: wall time."""

    modules: list[ModuleReport] = field(default_factory=list)
    dense: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    mode: str = "quantized"
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def quantised_parameters(self) -> int:
        return sum(m.shape[0] * m.shape[1] for m in self.modules)

    @property
    def quantised_bytes(self) -> int:
        return sum(m.stored_bytes for m in self.modules)

    @property
    def bits(self) -> float:
        """Stored bits per quantised weight."""
        return 8 * self.quantised_bytes / max(self.quantised_parameters, 1)

    @property
    def outliers(self) -> float:
        """Share of the quantised weights that are outliers."""
        return sum(m.outliers * m.shape[0] * m.shape[1] for m in self.modules) / max(self.quantised_parameters, 1)

    @property
    def starved(self) -> dict[str, int]:
        """Matrices of experts for which the calibration text had too few tokens -> how many it had."""
        return {m.name: m.tokens or 0 for m in self.modules if m.method == STARVED}

    @property
    def dense_parameters(self) -> int:
        return sum(d["parameters"] for d in self.dense.values())

    @property
    def dense_bytes(self) -> int:
        return sum(d["bytes"] for d in self.dense.values())

    def totals(self) -> dict[str, Any]:
        reasons: Counter[str] = Counter()
        for row in self.dense.values():
            reasons[row["reason"]] += row["parameters"]
        return {
            "modules": len(self.modules),
            "quantised_parameters": self.quantised_parameters,
            "quantised_bytes": self.quantised_bytes,
            "bits_per_quantised_weight": self.bits,
            "outlier_share": self.outliers,
            "dense_parameters": self.dense_parameters,
            "dense_bytes": self.dense_bytes,
            "dense_parameters_by_reason": dict(sorted(reasons.items())),
            "seconds": round(self.seconds, 1),
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "mode": self.mode,
            "source_error": "unknown" if self.mode != "quantized" else None,
            "notes": self.notes,
            "totals": self.totals(),
            "starved": self.starved,
            "provenance": self.provenance,
            "modules": [asdict(m) for m in self.modules],
            "dense": self.dense,
        }

    def as_json(self) -> bytes:
        """The report that lies in the checkpoint: without the time, for the same conversion gives the same bytes."""
        content = self.as_dict()
        del content["totals"]["seconds"]
        return (json.dumps(content, indent=1) + "\n").encode()
