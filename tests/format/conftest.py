"""Shared by the tests of the format: the spec's own scripts as modules, and a verdict on raw bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spqr_format import SpqrError
from spqr_format.reader import Checkpoint

SPEC = Path(__file__).parents[2] / "spec"
sys.path.insert(0, str(SPEC))  # reference_decoder and make_vectors are scripts, not part of a package


@pytest.fixture(scope="session")
def spec() -> Path:
    return SPEC


@pytest.fixture
def verdict(tmp_path: Path) -> Callable[[bytes], str | None]:
    """Bytes of a shard -> the code that refuses them, or None if every module decodes without an index error (R7)."""
    path = tmp_path / "x.safetensors"

    def judge(content: bytes) -> str | None:
        path.write_bytes(content)
        try:
            with Checkpoint.from_files([path]) as checkpoint:
                for module, layout in checkpoint.modules.items():
                    weight = checkpoint.matrix(module).dequantize()
                    assert weight.shape == (layout.out_features, layout.in_features)
                    assert np.isfinite(weight).all()
        except SpqrError as error:
            return error.code if len(str(error)) < 3000 else "an error message of absurd length"
        return None

    return judge
