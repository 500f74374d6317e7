"""The solvers against float64 oracles and against each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spqr_converters import SolverOptions, calibrated, datafree
from spqr_converters.hessian import Accumulator, factorise
from spqr_converters.statistics import assign, feedback, fit_bilevel, loss_of, metric
from spqr_format.errors import SpqrError


def problem(out: int, inn: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and a Hessian of correlated inputs with unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    W = 0.02 * torch.randn(out, inn, generator=generator)
    X = torch.randn(4 * inn + 8, inn, generator=generator) @ torch.randn(inn, inn, generator=generator) / inn**0.5
    X *= 0.1 + torch.rand(inn, generator=generator)
    return W, X.T @ X / len(X)


def output_error(W: torch.Tensor, H: torch.Tensor, matrix) -> float:
    E = W.double() - torch.from_numpy(matrix.dequantize()).double()
    return float((E @ H.double() * E).sum())


def oracle_decode(matrix) -> np.ndarray:
    """The decode formula of the spec, one weight at a time in numpy float32."""
    f = np.float32
    layout = matrix.layout
    W = np.zeros((layout.out_features, layout.in_features), f)
    for r, c in np.ndindex(W.shape):
        g = c // layout.group_size
        if layout.statistics == "bilevel":
            ss, sz, zs, zz = matrix.tile_stats[r // 16, g].astype(f)
            s = ss * (f(matrix.scale_codes[r, g]) - sz)
            z = zs * (f(matrix.zero_codes[r, g]) - zz)
        else:
            s, z = f(matrix.group_scales[r, g]), f(matrix.group_zeros[r, g])
        W[r, c] = s * (f(matrix.codes[r, c]) - z)
    if matrix.values is not None:
        for r in range(layout.out_features):
            for i in range(matrix.crow_indices[r], matrix.crow_indices[r + 1]):
                W[r, matrix.col_indices[i]] += f(matrix.values[i])
    return W


@pytest.mark.parametrize("statistics", ["bilevel", "direct"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (16, 16), (5, 48), (33, 7)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_shape_decodes_as_the_spec_says(statistics: str, shape: tuple[int, int], bits: int) -> None:
    W, H = problem(*shape)
    options = SolverOptions(weight_bits=bits, statistics=statistics, outlier_share=0.05, rounds=1, sweeps=1)
    fed, _, own = calibrated.solve_and_decode(W, H, options)
    np.testing.assert_array_equal(own, oracle_decode(fed))
    for matrix in (datafree.quantize(W, options), fed):
        assert matrix.codes.max() < 2**bits
        decoded = matrix.dequantize()
        np.testing.assert_array_equal(decoded, oracle_decode(matrix))
        assert np.linalg.norm(decoded - W.numpy()) < {2: 0.7, 3: 0.4, 4: 0.25}[bits] * np.linalg.norm(W)


@pytest.mark.parametrize("statistics", ["bilevel", "direct"])
def test_feedback_beats_data_free_and_sweeps_beat_feedback(statistics: str) -> None:
    W, H = problem(64, 96)
    errors = [output_error(W, H, datafree.quantize(W, SolverOptions(statistics=statistics)))]
    for sweeps in (0, 2):
        matrix, figures = calibrated.solve(W, H, SolverOptions(statistics=statistics, sweeps=sweeps))
        errors.append(output_error(W, H, matrix))
        assert figures["output_error"] == pytest.approx(errors[-1] / float((W @ H * W).sum()), rel=1e-3)
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < errors[1]


def test_bilevel_search_beats_min_max_rounding() -> None:
    """Data-free, against the plain recipe: min-max scale and zero in full precision, nearest codes."""
    W, _ = problem(64, 64)
    groups = W.view(64, 4, 16)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    s = (high - low) / 7
    plain = (((groups - low) / s).round() * s + low).view(64, 64)
    ours = torch.from_numpy(datafree.quantize(W).dequantize())
    assert (W - ours).norm() < 0.95 * (W - plain).norm()


@given(st.integers(0, 10_000), st.integers(1, 4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_feedback_loss_is_the_quadratic_form(seed: int, n: int, masked: bool) -> None:
    """The sum of squared fed-back errors equals e A e^T with A = (U^T U)^-1; codes by brute force are never beaten."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, 2 * n + 1, generator=generator, dtype=torch.float64)
    H = root @ root.T + 0.05 * torch.eye(n, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True).float()
    w = torch.randn(n, 3, generator=generator)
    scale, zero = torch.full((3, 1), 0.4), torch.full((3, 1), 3.3)
    loss = feedback(w, U, scale, zero, 7, None)[:, 0]
    codes, again = assign(w, U, scale[:, 0], zero[:, 0], 7, None)
    torch.testing.assert_close(loss, again)
    e = (w - scale[:, 0] * (codes - zero[:, 0])).double()
    torch.testing.assert_close(loss.double(), (e * (H @ e)).sum(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(metric(U).double(), H, rtol=1e-3, atol=1e-3)
    choices = torch.tensor(list(itertools.product(range(8), repeat=n)), dtype=torch.float64).T
    for row in range(3):
        e = w[:, row : row + 1].double() - 0.4 * (choices - 3.3)
        best = (e * (H @ e)).sum(0).min()
        assert loss[row] >= best * (1 - 1e-3) - 1e-6
    if masked:
        # An outlier takes the value that leaves the other columns' errors alone at the least cost.
        free = torch.zeros_like(w, dtype=torch.bool)
        free[n // 2] = True
        loss = feedback(w, U, scale, zero, 7, free)[:, 0]
        codes, _ = assign(w, U, scale[:, 0], zero[:, 0], 7, free)
        decoded = scale[:, 0] * (codes - zero[:, 0])
        torch.testing.assert_close(loss, loss_of(w, U, decoded, free))
        assert (loss >= _free_optimum(w, H, decoded, n // 2) * (1 - 1e-3) - 1e-6).all()


def _free_optimum(w: torch.Tensor, H: torch.Tensor, decoded: torch.Tensor, j: int) -> torch.Tensor:
    """Loss when column j takes its best value and all others are as decoded."""
    e = (w - decoded).double()
    e[j] = 0
    e[j] = -(H[j] @ e) / H[j, j]
    return (e * (H @ e)).sum(0)


@given(st.integers(0, 10_000), st.sampled_from([1e-6, 1e-2, 1.0, 1e3]))
@settings(max_examples=20, deadline=None)
def test_fit_never_loses_to_its_start(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = size * torch.randn(16, 32, generator=generator)
    first = fit_bilevel(w, None, 7, rounds=1)
    again = fit_bilevel(w, None, 7, rounds=3, start=first)
    losses = first.loss.view(2, 16).sum(1), again.loss.view(2, 16).sum(1)
    assert (losses[1] <= losses[0] * (1 + 1e-5)).all()
    torch.testing.assert_close(first.loss, (w - first.decode()).square().sum(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("statistics", ["bilevel", "direct"])
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_constant_weights(statistics: str, value: float) -> None:
    W = torch.full((17, 33), value)
    matrix = datafree.quantize(W, SolverOptions(statistics=statistics))
    np.testing.assert_allclose(matrix.dequantize(), W.numpy(), rtol=5e-3, atol=0)


def test_one_row_of_zeros_among_others() -> None:
    W, H = problem(16, 32)
    W[3] = 0
    for matrix in (datafree.quantize(W), calibrated.solve(W, H, SolverOptions())[0]):
        decoded = matrix.dequantize()
        assert np.isfinite(decoded).all()
        assert np.abs(decoded[3]).max() < 0.03


@pytest.mark.parametrize("share", [0.0, 0.003, 0.02, 1.0])
def test_outlier_budget_is_met(share: float) -> None:
    W, H = problem(37, 50)
    options = SolverOptions(outlier_share=share, rounds=1, sweeps=1)
    for matrix in (datafree.quantize(W, options), calibrated.solve(W, H, options)[0]):
        count = 0 if matrix.values is None else len(matrix.values)
        budget = round(share * W.numel())
        # A residual that rounds to zero needs no entry.
        assert budget - max(1, budget // 50) <= count <= budget


def test_outliers_find_the_planted_ones_and_help() -> None:
    W, H = problem(48, 64)
    rows, columns = torch.arange(0, 48, 5), torch.arange(0, 48, 5) % 61
    W[rows, columns] = 0.5
    plain = calibrated.solve(W, H, SolverOptions())[0]
    kept = calibrated.solve(W, H, SolverOptions(outlier_share=len(rows) / W.numel()))[0]
    assert output_error(W, H, kept) < 0.5 * output_error(W, H, plain)
    found = set(zip(np.repeat(np.arange(48), np.diff(kept.crow_indices)).tolist(), kept.col_indices.tolist(), strict=True))
    assert len(found & set(zip(rows.tolist(), columns.tolist(), strict=True))) >= 8
    few = calibrated.solve(W, H, SolverOptions(outlier_threshold=1.0))[0]
    many = calibrated.solve(W, H, SolverOptions(outlier_threshold=0.1))[0]
    assert 0 < len(few.values) < len(many.values)


def test_same_input_same_bits() -> None:
    W, H = problem(40, 70)
    options = SolverOptions(outlier_share=0.01)
    for solve in (lambda: datafree.quantize(W, options), lambda: calibrated.solve(W, H, options)[0]):
        one, two = solve().pack(), solve().pack()
        assert one.keys() == two.keys()
        assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_dead_columns_keep_their_weights() -> None:
    W, H = problem(32, 48)
    H[:, 5] = H[5, :] = 0
    H[:, 40] = H[40, :] = 0
    matrix, figures = calibrated.solve(W, H, SolverOptions())
    error = torch.from_numpy(matrix.dequantize()) - W
    assert figures["damping"] == 0.01
    assert float(error[:, [5, 40]].norm()) < 0.5 * float(W[:, [5, 40]].norm())


def test_no_input_at_all() -> None:
    W, _ = problem(16, 16)
    _, figures = calibrated.solve(W, torch.zeros(16, 16), SolverOptions())
    assert figures["weight_error"] < 0.3


def test_damping_rises_until_cholesky_succeeds() -> None:
    H = torch.eye(4) + 0.0
    H[0, 1] = H[1, 0] = 1.5  # eigenvalue -0.5
    factor = factorise(H, torch.arange(4), 0.01)
    assert factor.damping == pytest.approx(1.0)
    U = factor.inverse_root.double()
    torch.testing.assert_close(torch.linalg.inv(U.T @ U), factor.damped.double(), rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_is_named() -> None:
    W, H = problem(8, 16)
    W[3, 7] = float("nan")
    for solve in (lambda: datafree.quantize(W, name="m.weight"), lambda: calibrated.solve(W, H, SolverOptions(), "m.weight")):
        with pytest.raises(SpqrError, match=r"SPQR-E502 m\.weight\[3, 7\]"):
            solve()
    W[3, 7] = 0
    H[2, 2] = float("inf")
    with pytest.raises(SpqrError, match=r"SPQR-E503 m\.weight"):
        calibrated.solve(W, H, SolverOptions(), "m.weight")
    with pytest.raises(SpqrError, match=r"SPQR-E503 layers\.0"):
        Accumulator(4, "layers.0").add(torch.tensor([[0.0, 1.0, float("nan"), 2.0]]))


def test_drift_correction_against_float64() -> None:
    """With quantisation out of the way the corrected weight is the least-squares map from seen inputs to wanted outputs."""
    generator = torch.Generator().manual_seed(1)
    wanted = torch.randn(400, 12, generator=generator)
    seen = wanted + 0.1 * torch.randn(400, 12, generator=generator)
    W = torch.randn(5, 12, generator=generator)
    accumulator = Accumulator(12, "m", reference=True)
    accumulator.add(seen[:150], wanted[:150])
    accumulator.add(seen[150:], wanted[150:])
    corrected = calibrated.corrected_target(W, accumulator.mean(), accumulator.drift(), 1.0)
    expected = torch.linalg.lstsq(seen.double(), (wanted @ W.T).double()).solution.T
    torch.testing.assert_close(corrected.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "bad",
    [
        {"weight_bits": 5}, {"group_size": 24}, {"group_size": 0}, {"statistics": "x"}, {"outlier_share": 1.5},
        {"outlier_threshold": 0.0}, {"outlier_share": 0.1, "outlier_threshold": 0.1}, {"damping": -1.0}, {"rounds": 0},
    ],
)  # fmt: skip
def test_options_out_of_range(bad: dict) -> None:
    with pytest.raises(SpqrError, match="SPQR-E505"):
        SolverOptions(**bad)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("statistics", ["bilevel", "direct"])
def test_wide_groups_with_a_short_last_one(group_size: int, statistics: str) -> None:
    W, H = problem(20, 150)
    options = SolverOptions(group_size=group_size, statistics=statistics, rounds=1, sweeps=1)
    plain, fed = datafree.quantize(W, options), calibrated.solve(W, H, options)[0]
    assert output_error(W, H, fed) < output_error(W, H, plain)
