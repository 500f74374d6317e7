"""The portable dequantize kernel, run by Triton's interpreter on a CPU, against the numpy decode."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np, torch
from conftest import make_matrix
from spqr_kernels import dequant
for shape in ((1, 1), (17, 33), (40, 130), (17, 256), (33, 688), (5, 1100), (17, 4300)):
    for kind in (
        {{"weight_bits": 3}}, {{"weight_bits": 3, "permuted": True}}, {{"weight_bits": 2, "group_size": 32, "outliers": 0.0}},
        {{"weight_bits": 4, "statistics": "direct", "group_size": 128}},
    ):
        matrix = make_matrix(*shape, **kind)
        tensors = {{leaf: torch.from_numpy(t.copy()) for leaf, t in matrix.pack().items()}}
        exact = matrix.dequantize()
        for dtype in (torch.float32, torch.float16):  # the interpreter cuts bf16 off instead of rounding it
            found = dequant.dequantize(tensors, matrix.layout, dtype)
            assert torch.equal(found, torch.from_numpy(exact).to(dtype)), (shape, kind, dtype)
print("equal")
"""


def test_the_portable_kernel_decodes_as_numpy_does():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(tests=tests)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
