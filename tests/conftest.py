"""What several rooms' tests share: random quantized matrices, the bundled model, the data that only some machines have."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spqr_format import Layout, SpqrMatrix

ROOT = Path(__file__).parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no GPU")


def make_matrix(
    out_features: int, in_features: int, *, weight_bits: int = 3, group_size: int = 16, statistics: str = "bilevel",
    outliers: float = 0.01, permuted: bool = False, seed: int = 0,
) -> SpqrMatrix:  # fmt: skip
    """A matrix of random codes, plausible statistics (weights near N(0, 0.02)) and a share of random outliers."""
    rng = np.random.default_rng(seed)
    layout = Layout(out_features, in_features, weight_bits, group_size, statistics)  # type: ignore[arg-type]
    per_group = (out_features, layout.groups)
    middle = 2 ** (weight_bits - 1) - 0.5
    arrays: dict[str, np.ndarray] = {"codes": rng.integers(0, 2**weight_bits, (out_features, in_features), dtype=np.uint8)}
    if statistics == "bilevel":
        stats = rng.uniform(0.5, 1.5, (layout.tile_rows, layout.groups, 4))
        # s = ss (sq - sz) about 0.01, z = zs (zq - zz) about the middle
        stats *= [0.002, 1.0, 0.2, 1.0]
        stats[..., 1] = -stats[..., 1] - 1.5
        stats[..., 3] = 3.5 - middle / stats[..., 2]
        arrays["tile_stats"] = stats.astype(np.float16)
        arrays["scale_codes"] = rng.integers(0, 8, per_group, dtype=np.uint8)
        arrays["zero_codes"] = rng.integers(0, 8, per_group, dtype=np.uint8)
    else:
        arrays["group_scales"] = rng.uniform(0.005, 0.02, per_group).astype(np.float16)
        arrays["group_zeros"] = rng.integers(0, 2**weight_bits + 1, per_group, dtype=np.uint8)
    mask = rng.random((out_features, in_features)) < outliers
    if mask.any():
        arrays["crow_indices"] = np.concatenate([[0], mask.sum(1).cumsum()])
        arrays["col_indices"] = np.nonzero(mask)[1]
        arrays["values"] = rng.normal(0, 0.1, int(mask.sum())).astype(np.float16)
    if permuted:
        arrays["perm"] = rng.permutation(in_features).astype(np.int32)
    return SpqrMatrix(layout, **arrays)


@pytest.fixture(scope="session")
def random_matrix() -> Callable[..., SpqrMatrix]:
    return make_matrix


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The trained model bundled with the tests."""
    return ROOT / "tests" / "models" / "tiny-llama"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Larger models and texts, which stand beside the checkout on some machines."""
    folder = Path(os.environ.get("SPQR_TEST_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no larger models and texts at {folder}")
    return folder
