"""The quantizer's kernels, run by Triton's interpreter on a CPU, against the torch version of the same searches."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROLOGUE = """
import torch
from spqr_converters import SolverOptions, calibrated, datafree, outliers, statistics
from spqr_kernels import fit
generator = torch.Generator().manual_seed(0)

def problem(n, rows):
    X = torch.randn(3 * n + 2, n, generator=generator)
    H = X.T @ X / len(X) + 0.05 * torch.eye(n)
    return 0.02 * torch.randn(rows, n, generator=generator), H

def on_gpu(answer):
    for module in (statistics, outliers, calibrated):
        module.has_fit_kernels = lambda w: answer and len(w) <= 16
"""

GROUPS = """
for n, with_root, with_outliers in ((16, False, False), (7, False, True), (5, True, False), (16, True, True)):
    weight, H = problem(n, 32)
    weight[3], weight[20] = 0, 0.5
    w = weight.T.contiguous()
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True) if with_root else None
    free = torch.rand(n, 32, generator=generator) < 0.1 if with_outliers else None
    if free is not None:
        free[:, 5] = True
    exact = statistics.fit_bilevel(w, U, 7, free)
    gains = outliers.leave_one_out(w, U, 7)
    start = statistics.fit_bilevel(w, U, 7, free, rounds=1)
    better = statistics.fit_bilevel(w, U, 7, free, rounds=2, start=start)
    on_gpu(True)
    found = statistics.fit_bilevel(w, U, 7, free)
    again = statistics.fit_bilevel(w, U, 7, free, rounds=2, start=start)
    torch.testing.assert_close(outliers.leave_one_out(w, U, 7), gains, rtol=1e-2, atol=1e-3 * float(gains.abs().max()))
    torch.testing.assert_close(fit.loss_of(w, U, exact.decode(), free), exact.loss, rtol=1e-4, atol=1e-9)
    on_gpu(False)
    for ours, oracle in ((found, exact), (again, better)):
        # The loss of what is stored, by the oracle's own sum.
        loss = statistics.loss_of(w, U, ours.decode(), free)
        torch.testing.assert_close(loss, ours.loss, rtol=1e-4, atol=1e-9)
        assert abs(float(loss.sum() / oracle.loss.sum()) - 1) < 2e-3, (n, with_root, with_outliers)
        assert (ours.codes != oracle.codes).float().mean() < 0.02
    assert (again.loss.view(2, 16).sum(1) <= start.loss.view(2, 16).sum(1) * (1 + 1e-5)).all()
print("equal")
"""

MATRIX = """
weight, H = problem(20, 16)
for solve in (lambda: datafree.solve(weight, options), lambda: calibrated.solve(weight, H, options)):
    options = SolverOptions(outlier_share=0.02, sweeps=1, rounds=2)
    on_gpu(False)
    _, exact = solve()
    on_gpu(True)
    matrix, found = solve()
    for name in exact:
        assert abs(found[name] / exact[name] - 1) < 5e-3, (name, exact, found)
    error = torch.from_numpy(matrix.dequantize()) - weight
    assert abs(float(error.norm() / weight.norm()) / found["weight_error"] - 1) < 1e-5
    assert abs(len(matrix.values) - 6) <= 1
print("equal")
"""


@pytest.mark.parametrize("program", [GROUPS, MATRIX], ids=["groups", "matrix"])
def test_the_kernels_find_what_torch_finds(program: str) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROLOGUE + program],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
