"""The exact Fisher of a sample: gradients of N examples in factors, and what follows from their Gram matrix [N, N].

    F = 1/N Σ_n vec(g_n) vec(g_n)ᵀ,   g_n = left_nᵀ @ right_n,   K_nm = <g_n, g_m> / N

For small models, and to check the other kinds of `fisher.py` against.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .fisher import Part, inverse_or_zero, leading_count, like, random_basis
from .lowrank import LowRank, Update
from .named import wide

CUT = 1e-10  # of the largest eigenvalue of a Gram matrix: eigenvectors below it are round-off


@dataclass(frozen=True, eq=False)
class SampleGram:
    """F = 1/N Σ_n vec(g_n) vec(g_n)ᵀ of one layer, exact, with the gradients of N examples in factors.

    Its nonzero spectrum is that of the Gram matrix K = V diag(S) Vᵀ, K_nm = <g_n, g_m> / N, and its eigenvectors are
    u_i = Σ_n V_ni g_n / sqrt(N S_i). For small models, and to check the others against.

    Attributes:
        left: [N, R, out].
        right: [N, R, in]; g_n = left_nᵀ @ right_n.
    """

    left: Tensor
    right: Tensor

    @cached_property
    def trace(self) -> Tensor:
        """Sum of all eigenvalues, mean |g_n|²: a scalar in float64."""
        left, right = self.left.double(), self.right.double()
        return ((left @ left.mT) * (right @ right.mT)).sum() / max(len(left), 1)

    def gram(self) -> Tensor:
        """Return K [N, N] in float64."""
        left, right = self.left.double(), self.right.double()
        rows = [((left @ a.T) * (right @ b.T)).sum((1, 2)) for a, b in zip(left, right, strict=True)]
        return torch.stack(rows) / len(rows)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """S [n], descending and above round-off, and V [N, n]; in float64."""
        values, vectors = torch.linalg.eigh(self.gram())
        values, vectors = values.flip(0), vectors.flip(1)
        n = int((values > CUT * values[:1].clamp(min=0)).sum())
        return values[:n], vectors[:, :n]

    def products(self, update: Update) -> Tensor:
        """Return <g_n, dW>, [N]."""
        kind = like(update)
        left, right = self.left.to(kind), self.right.to(kind)
        if isinstance(update, LowRank):
            return ((left @ update.left) * (right @ update.right.T)).sum((1, 2))
        return ((left @ wide(update.delta)) * right).sum((1, 2))

    def quadratic(self, update: Update) -> Tensor:
        """Return vec(dW)ᵀ F vec(dW) = mean <g_n, dW>², a scalar."""
        return self.products(update).square().mean()

    def normalised(self) -> SampleGram:
        """Return the Fisher with a mean eigenvalue of 1 over all out · in directions (zeros stay)."""
        share = inverse_or_zero(self.trace / (self.left.shape[2] * self.right.shape[2]))
        return SampleGram(self.left * share.sqrt().to(self.left), self.right)

    def rotated(self, generator: torch.Generator) -> SampleGram:
        """Return the same Gram matrix, and so the same spectrum, with each side in random orthogonal directions."""
        return SampleGram(_turned(self.left, generator), _turned(self.right, generator))

    def part(self, update: Update, energy: float, most: int) -> Part:
        """Return what of an update lies in the span of the leading eigenvectors: dW_A = Σ_n w_n g_n.

        Args:
            update: dW.
            energy: m is the least number of eigenvectors that hold this share of the trace of F.
            most: m is at most this.
        """
        values, vectors = self._spectrum
        m = leading_count(values[:most], self.trace, energy)
        kind = like(update)
        mix = (vectors[:, :m] / (len(self.left) * values[:m]).sqrt()).to(kind)  # u_i = Σ_n mix_ni g_n
        coefficients = mix.T @ self.products(update)
        left = (mix @ coefficients)[:, None, None] * self.left.to(kind)
        return Part(coefficients, values[:m].to(kind), LowRank(left.flatten(0, 1).T, self.right.to(kind).flatten(0, 1)))


def compress(delta: Tensor, x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return an example's gradient δᵀ x [d, k] as leftᵀ @ right, of rank R = `most`: exact if its own is not above.

    Truncated SVD from thin QR of the two factors; d x k is never formed.

    Args:
        delta: gradients at what leaves the layer, one row a token, [T, d].
        x: what enters the layer, [T, k].
        most: R; rows of zeros fill up what has less.

    Returns:
        left [R, d] and right [R, k], in float32 at least.
    """
    left, right = wide(delta), wide(x)
    if len(left) > most:
        with torch.autocast(left.device.type, enabled=False):  # hooks run within the host's
            p, r = torch.linalg.qr(left.T)
            q, s = torch.linalg.qr(right.T)
            u, values, v = torch.linalg.svd(r @ s.T, full_matrices=False)
            roots = values[:most].sqrt()
            left, right = (p @ (u[:, :most] * roots)).T, (q @ (v[:most].T * roots)).T
    missing = (0, 0, 0, most - len(left))
    return torch.nn.functional.pad(left, missing), torch.nn.functional.pad(right, missing)


def _turned(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows [..., d] with the same products among themselves, in a random subspace."""
    basis, coordinates = torch.linalg.qr(rows.double().flatten(0, -2).T)
    other = random_basis(len(basis), basis.shape[1], generator).to(basis)
    turned: Tensor = (other @ coordinates).T
    return turned.reshape(rows.shape).to(rows)
