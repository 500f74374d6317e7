"""The calibrated quantizer of one matrix: error feedback with bilevel statistics, then coordinate descent by groups.

Groups are always `group_size` consecutive original columns. They are processed in descending order of their Hessian
diagonal, and so are the columns within one; inference needs no permutation. [SpQR section 4; GPTQ section 3]
"""

from __future__ import annotations

import torch

from spqr_format.matrix import SpqrMatrix
from spqr_kernels.dispatch import has_fit_kernels

from .hessian import Accumulator, Factor, factorise
from .options import SolverOptions
from .outliers import choose, leave_one_out
from .solution import Solution, check_finite, padded_rows
from .statistics import FITS, GroupFit, to_half

_DRIFT_PRIOR = 8  # tokens for each input column that count for no drift
BATCH_COLUMNS = 128  # columns whose feedback to later columns is applied in one product
# Tokens for each column that a Hessian of few tokens is mixed with, of columns alike in size and unrelated. A mean of n tokens
# is off by about sqrt(columns / n) of itself, and error feedback goes where it is too small by chance: without this, 4 tokens a
# column are worse than none. Measured on tiny-moe, where 1 and 8 do as well as 3 (converters/benchmarks/experts.py).
_FEW = 3


def order_columns(H: torch.Tensor, group_size: int) -> torch.Tensor:
    """Column order, int64 [in]: groups by their largest Hessian diagonal, columns within a group by their own, both
    descending."""
    diagonal = H.diagonal()
    n = len(diagonal)
    groups = -(-n // group_size)
    padded = torch.full((groups * group_size,), -1.0, dtype=diagonal.dtype, device=H.device)
    padded[:n] = diagonal
    by_group = padded.view(groups, group_size)
    first = by_group.amax(1).sort(descending=True, stable=True).indices
    within = by_group.sort(dim=1, descending=True, stable=True).indices
    order = (first.unsqueeze(1) * group_size + within[first]).view(-1)
    return order[order < n]


def _spans(order: torch.Tensor, group_size: int) -> list[tuple[int, slice]]:
    """(group number, its span of positions) along a column order that keeps groups together."""
    numbers = (order // group_size).tolist()
    spans, start = [], 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[start]:
            spans.append((numbers[start], slice(start, i)))
            start = i
    return spans


def corrected_target(weight: torch.Tensor, damped: torch.Tensor, drift: torch.Tensor, share: float) -> torch.Tensor:
    """W + share * W E[(x_reference - x) x^T] H^-1: the weight that maps the inputs which the quantised model sees to the
    outputs of the original one, as far as a linear map can. float32 [out, in]."""
    correction = torch.linalg.solve(damped.double(), (weight.double() @ drift.double()).T).T
    return (weight.double() + share * correction).float()


def prepare(H: torch.Tensor, options: SolverOptions, name: str = "hessian", tokens: int | None = None) -> Factor:
    """The factor of a Hessian that `solve` needs; layers with the same inputs share one. tokens: that H is the mean of, where
    they may be few for its columns."""
    damping = options.damping + (0.0 if tokens is None else _FEW * len(H) / tokens)
    return factorise(H, order_columns(H, options.group_size), damping, name)


def solve(
    weight: torch.Tensor,
    H: torch.Tensor,
    options: SolverOptions,
    name: str = "weight",
    drift: torch.Tensor | None = None,
    factor: Factor | None = None,
) -> tuple[SpqrMatrix, dict[str, float]]:
    """Quantise weight [out, in] (any float dtype) against H float32 [in, in]; returns the matrix and its figures:
    weight_error (relative Frobenius norm), output_error (relative, Hessian-weighted, squared) and damping.

    Errors: E502 a weight is not finite; E503 H is not finite or cannot be made positive definite.
    """
    return solve_and_decode(weight, H, options, name, drift, factor)[:2]


def solve_and_decode(
    weight: torch.Tensor,
    H: torch.Tensor,
    options: SolverOptions,
    name: str = "weight",
    drift: torch.Tensor | None = None,
    factor: Factor | None = None,
) -> tuple[SpqrMatrix, dict[str, float], torch.Tensor]:
    """`solve`, and the matrix decoded, float32 [out, in] on the weight's device."""
    check_finite(weight, name)
    weight = weight.detach().float()
    layout = options.layout(*weight.shape)
    factor = factor or prepare(H, options, name)
    target = weight
    if drift is not None and options.drift > 0:
        target = corrected_target(weight, factor.damped, drift, options.drift)
    solution = _Solver(target, factor, options, layout).run()
    decoded = solution.decoded()
    error = weight - decoded
    figures = {
        "weight_error": float(error.norm() / weight.norm().clamp_min(1e-30)),
        "output_error": float((error @ H * error).sum() / (weight @ H * weight).sum().clamp_min(1e-30)),
        "damping": factor.damping,
    }
    return solution.matrix(), figures, decoded


class SharedInput:
    """The calibration inputs of layers that share one: their Hessian, the drift, and a factor for each group size that is asked
    for, on which the order of the columns depends. Errors: E503."""

    def __init__(self, sums: Accumulator, few: bool = False) -> None:
        """few: the tokens may be few for the columns, as those of an expert."""
        self._name, self._few = sums.name, sums.tokens if few else None
        self._H, self._drift = sums.mean(), sums.drift()
        if self._drift is not None:
            # With few tokens for each input column the correction is mostly noise.
            self._drift *= sums.tokens / (sums.tokens + _DRIFT_PRIOR * len(self._H))
        self._factors: dict[int, Factor] = {}

    def solve(
        self, weight: torch.Tensor, options: SolverOptions, name: str
    ) -> tuple[SpqrMatrix, dict[str, float], torch.Tensor]:
        """`solve_and_decode` of one of the layers."""
        if options.group_size not in self._factors:
            self._factors[options.group_size] = prepare(self._H, options, self._name, self._few)
        return solve_and_decode(weight, self._H, options, name, self._drift, self._factors[options.group_size])


class _Solver:
    """One matrix on its way. All matrices are columns first and in processing order."""

    def __init__(self, weight: torch.Tensor, factor: Factor, options: SolverOptions, layout) -> None:
        self.options = options
        self.order = factor.order
        self.U = factor.inverse_root
        self.H = factor.damped[self.order][:, self.order]
        self.w = padded_rows(weight)[self.order]
        self.spans = _spans(self.order, options.group_size)
        self.out_features = weight.shape[0]
        self.solution = Solution.empty(layout, weight.device)
        self.decoded = torch.empty_like(self.w)  # D + S
        self.error = torch.empty_like(self.w)  # w - decoded
        self.free: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.fits: dict[int, GroupFit] = {}

    def run(self) -> Solution:
        if self.options.keeps_outliers:
            self._choose_outliers()
        self._feed_back()
        if self.options.sweeps:
            factors = self._factor_groups()
        for _ in range(self.options.sweeps):
            self._sweep(factors)
        for number, span in self.spans:
            self.solution.put(number, self.order[span], self.fits[number])
        if self.free is not None and self.values is not None:
            self.solution.free = torch.empty_like(self.free)
            self.solution.values = torch.empty_like(self.values)
            self.solution.free[self.order] = self.free
            self.solution.values[self.order] = self.values
        return self.solution

    def _choose_outliers(self) -> None:
        gains = torch.empty_like(self.w)
        for _, span in self.spans:
            gains[span] = leave_one_out(self.w[span], self.U[span, span], self.options.top)
        unit = float((self.w[:, : self.out_features].var(1, unbiased=False) / self.U.diagonal().square()).mean())
        self.free = choose(gains, self.options, self.out_features, unit)
        self.values = torch.zeros_like(self.w)

    def _mask(self, span: slice) -> torch.Tensor | None:
        return None if self.free is None else self.free[span]

    def _feed_back(self) -> None:
        """One pass of error feedback over the groups."""
        w = self.w.clone()
        fit_group = FITS[self.options.statistics]
        batch: list[tuple[slice, torch.Tensor]] = []
        for i, (number, span) in enumerate(self.spans):
            U = self.U[span, span]
            fit = fit_group(w[span], U, self.options.top, self._mask(span), rounds=self.options.rounds)
            self.fits[number] = fit
            errors = self._store(span, w[span], fit, U)
            batch.append((span, errors))
            first = batch[0][0].start
            following = self.spans[i + 1][1] if i + 1 < len(self.spans) else None
            if following is None:
                break
            if following.stop - first > BATCH_COLUMNS:
                joined = torch.cat([e for _, e in batch])
                w[span.stop :] -= self.U[first : span.stop, span.stop :].T @ joined
                batch = []
            else:
                # Within a batch only the next group is brought up to date.
                joined = torch.cat([e for _, e in batch])
                w[following] -= self.U[first : span.stop, following].T @ joined

    def _store(self, span: slice, w: torch.Tensor, fit: GroupFit, U: torch.Tensor) -> torch.Tensor:
        """Set decoded values and outliers of a group; returns its errors in units of the root, [n, R]."""
        decoded = fit.decode()
        free = self._mask(span)
        if free is None or self.values is None:
            self._keep(span, decoded)
            return torch.linalg.solve_triangular(U.T, w - decoded, upper=False)
        if has_fit_kernels(w):
            from spqr_kernels import fit as kernels

            self.values[span], errors = kernels.residuals(w, U, decoded, free)
            self._keep(span, decoded + self.values[span])
            return errors
        errors = torch.empty_like(w)
        for j in range(len(w)):
            now = w[j] - U[:j, j] @ errors[:j] if j else w[j]
            value = torch.where(free[j], to_half(now - decoded[j]), 0)
            self.values[span.start + j] = value
            errors[j] = (now - decoded[j] - value) / U[j, j]
        self._keep(span, decoded + self.values[span])
        return errors

    def _keep(self, span: slice, decoded: torch.Tensor) -> None:
        self.decoded[span] = decoded
        self.error[span] = self.w[span] - decoded

    def _factor_groups(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each group the root of its block's inverse, float32 [n, n], and LU factors and pivots of the block's transpose in
        float64: those of one width in one run, for on a GPU each small factorisation waits for the one before."""
        factors: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        widths = [span.stop - span.start for _, span in self.spans]
        for width in set(widths):
            alike = [i for i, found in enumerate(widths) if found == width]
            blocks = torch.stack([self.H[self.spans[i][1], self.spans[i][1]] for i in alike]).double()
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(blocks))
            roots = torch.linalg.cholesky(inverse, upper=True).float()
            factors |= zip(alike, zip(roots, *torch.linalg.lu_factor(blocks.mT), strict=True), strict=True)
        return [factors[i] for i in range(len(widths))]

    def _sweep(self, factors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """One pass of coordinate descent: each group refitted to what the errors of all others leave for it to do."""
        fit_group = FITS[self.options.statistics]
        for (number, span), (root, lu, pivots) in zip(self.spans, factors, strict=True):
            old = self.fits[number]
            pull = (self.H[span] @ self.error).double()
            target = self.decoded[span] + torch.linalg.lu_solve(lu, pivots, pull, adjoint=True).float()
            fit = fit_group(target, root, self.options.top, self._mask(span), rounds=self.options.rounds, start=old)
            self.fits[number] = fit
            self._store(span, target, fit, root)
