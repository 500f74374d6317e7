"""The Hessian of a linear layer's output error, and what error feedback needs of it.

For a layer y = W x the error of a quantised weight V over the calibration inputs is
trace((W - V) H (W - V)^T) with H = E[x x^T]. [GPTQ, Frantar et al. 2022, section 3; SpQR, Dettmers et al. 2023, section 4]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spqr_format.errors import SpqrError


class Accumulator:
    """Sums x x^T over calibration inputs in float32; `mean()` is H, float32 [in, in], in squared units of the input.

    With a reference stream (the inputs that the unquantised model would have seen) it also sums
    (x_reference - x)^T x, from which `calibrated.solve` corrects the target weight. [GPTAQ, Li et al. 2025]
    """

    def __init__(self, in_features: int, name: str, device: torch.device | str = "cpu", reference: bool = False) -> None:
        self.name = name
        self.tokens = 0
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.cross = torch.zeros_like(self.sum) if reference else None

    def add(self, x: torch.Tensor, x_reference: torch.Tensor | None = None) -> None:
        """Add inputs [..., in]. A NaN or an infinity among them is E503 and names the module."""
        x = x.reshape(-1, x.shape[-1]).float()
        if not bool(torch.isfinite(x).all()):
            raise SpqrError("E503", self.name, "its calibration inputs hold a NaN or an infinity")
        self.tokens += x.shape[0]
        self.sum.addmm_(x.T, x)
        if self.cross is not None:
            if x_reference is None:
                raise ValueError("this accumulator needs the reference inputs too")
            self.cross.addmm_((x_reference.reshape(x.shape).float() - x).T, x)

    def mean(self) -> torch.Tensor:
        """H = E[x x^T], float32 [in, in]. E503 when it is not finite (squares overflow float32)."""
        H = self.sum / max(self.tokens, 1)
        if not bool(torch.isfinite(H).all()):
            raise SpqrError("E503", self.name, "the Hessian of its calibration inputs is not finite")
        return H

    def drift(self) -> torch.Tensor | None:
        """E[(x_reference - x) x^T], float32 [in, in], or None without a reference stream."""
        return None if self.cross is None else self.cross / max(self.tokens, 1)

    def take(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`mean()` and `drift()`; the sums, which are as large, are given up."""
        H, drift = self.mean(), self.drift()
        del self.sum, self.cross
        return H, drift


@dataclass
class Factor:
    """A damped Hessian, ready for use: `damped` float32 [in, in], `inverse_root` = U with H^-1 = U^T U in the column
    order `order` (int64 [in]; float32, upper triangular), `dead` bool [in], and the damping that it took."""

    damped: torch.Tensor
    inverse_root: torch.Tensor
    order: torch.Tensor
    dead: torch.Tensor
    damping: float


def damp(H: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """H + damping * mean(diag) * I in float64, and the dead columns (diagonal 0: the input is always 0, so any weight
    does; their diagonal becomes 1)."""
    H = H.double()
    diagonal = H.diagonal()
    dead = diagonal <= 0
    alive = diagonal[~dead]
    mean = float(alive.mean()) if alive.numel() else 1.0
    H = H + torch.diag(torch.where(dead, torch.full_like(diagonal, mean), torch.full_like(diagonal, damping * mean)))
    return H, dead


def factorise(H: torch.Tensor, order: torch.Tensor, damping: float, name: str = "hessian") -> Factor:
    """Damp H and factorise its inverse in the given column order; damping rises tenfold each time Cholesky fails.

    E503 when H is not finite, or when even damping 1e4 does not make it positive definite.
    """
    if not bool(torch.isfinite(H).all()):
        raise SpqrError("E503", name, "the Hessian is not finite")
    level = damping
    while level <= 1e4:
        damped, dead = damp(H, level)
        root, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if not int(failed):
            inverse = torch.cholesky_inverse(root)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return Factor(damped.float(), upper.float(), order, dead, level)
        level = level * 10 if level > 0 else 1e-6
    raise SpqrError("E503", name, "the Hessian cannot be made positive definite")
