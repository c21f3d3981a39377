"""Fisher information of a layer in the space of its weight update dW [out, in], without a matrix of that size.

With x_t what enters the layer at token t, and δ_t the gradient of an example's summed loss at what leaves it, the
example's gradient is g_n = Σ_t δ_t x_tᵀ, which depends neither on LoRA's factors nor on their initialisation.

    Kronecker   F ≈ S_out ⊗ S_in,  S_out = mean δ δᵀ,  S_in = mean x xᵀ        dWᵀF dW = tr(S_out dW S_in dWᵀ)
    diagonal    the same with the diagonals of S_out and S_in
    samples     F = 1/N Σ_n g_n g_nᵀ exactly, each g_n in factors

Every Fisher is brought to a mean eigenvalue of 1, so that strengths carry over between models: without that, refusals,
of which an aligned model is nearly certain, weigh 1e-5 of text (measured, research notes). An isotropic Fisher
then is |dW|². Read next: `core/fisher.py`, which collects them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .lowrank import Dense, LowRank, Update, squared_norm

Kind = Literal["kronecker", "diagonal", "samples"]
Labels = Literal["data", "model"]


@dataclass(frozen=True)
class Factor:
    """A symmetric matrix S = Q diag(values) Qᵀ + rest · (I - Q Qᵀ), [d, d], never formed.

    Attributes:
        vectors: Q [d, q], orthonormal columns; None: the coordinate axes, all d of them.
        values: eigenvalues, descending (in the coordinates' order if Q is None), [q].
        rest: mean of the eigenvalues that are not kept, a scalar.
    """

    vectors: Tensor | None
    values: Tensor
    rest: Tensor

    @property
    def size(self) -> int:
        """d."""
        return len(self.values) if self.vectors is None else self.vectors.shape[0]

    @property
    def trace(self) -> Tensor:
        """Sum of all eigenvalues."""
        return self.values.sum() + self.rest * (self.size - len(self.values))

    def normalised(self) -> Factor:
        """Return the factor with a mean eigenvalue of 1 (a factor of zeros, of a layer that nothing reaches, stays)."""
        mean = self.trace / self.size
        share = torch.where(mean > 0, 1 / mean, 0.0)
        return Factor(self.vectors, self.values * share, self.rest * share)

    def product(self, x: Tensor) -> Tensor:
        """Return xᵀ S x [r, r] for x [d, r]."""
        if self.vectors is None:
            return x.T @ (self.values.to(x.dtype)[:, None] * x)
        inside = self.vectors.to(x.dtype).T @ x
        return self.rest * (x.T @ x) + inside.T @ ((self.values - self.rest).to(x.dtype)[:, None] * inside)

    def times(self, x: Tensor) -> Tensor:
        """Return S x [d, n]."""
        if self.vectors is None:
            return self.values.to(x.dtype)[:, None] * x
        vectors = self.vectors.to(x.dtype)
        return self.rest * x + vectors @ ((self.values - self.rest).to(x.dtype)[:, None] * (vectors.T @ x))

    def rotated(self, generator: torch.Generator) -> Factor:
        """Return the same spectrum with random eigenvectors: the control of the same magnitude."""
        draw = torch.randn(self.size, len(self.values), generator=generator, dtype=torch.float64)
        return Factor(torch.linalg.qr(draw)[0].to(self.values), self.values, self.rest)


@dataclass(frozen=True)
class Part:
    """What of an update lies in the m leading directions of a Fisher.

    Attributes:
        coefficients: <u_i, dW>, [m].
        eigenvalues: L_i, [m].
        update: dW_A = Σ_i <u_i, dW> u_i.
    """

    coefficients: Tensor
    eigenvalues: Tensor
    update: LowRank

    @property
    def energy(self) -> Tensor:
        """Σ_i L_i <u_i, dW>², a scalar."""
        return (self.eigenvalues * self.coefficients.square()).sum()


@dataclass(frozen=True)
class Kronecker:
    """F ≈ S_out ⊗ S_in of one layer; diagonal, if its factors are."""

    out: Factor
    into: Factor

    def quadratic(self, update: Update) -> Tensor:
        """Return tr(S_out dW S_in dWᵀ) = vec(dW)ᵀ F vec(dW), a scalar."""
        if isinstance(update, LowRank):
            return (self.out.product(update.left) * self.into.product(update.right.T)).sum()
        return (self.out.times(update.delta) * self.into.times(update.delta.T).T).sum()

    def leading(self, energy: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the m leading eigenpairs l_i l_j of F, as (i, j, l_i l_j), each [m], descending.

        With q eigenvectors kept on each side these are the true leading ones for every m <= q: pair (i, j) has i · j
        pairs at or above it.

        Args:
            energy: m is the least whose eigenvalues hold this share of the trace of F.
            most: m is at most this.
        """
        products = torch.outer(self.out.values, self.into.values)
        values, places = products.flatten().sort(descending=True)
        values, places = values[:most], places[:most]
        held = values.double().cumsum(0) / (self.out.trace * self.into.trace).double().clamp(min=1e-300)
        m = min(int((held < energy).sum()) + 1, len(values))
        columns = products.shape[1]
        return places[:m] // columns, places[:m] % columns, values[:m]

    def part(self, update: Update, energy: float, most: int) -> Part:
        """Return what of an update lies in the span of the leading eigenvectors q_i p_jᵀ."""
        assert self.out.vectors is not None and self.into.vectors is not None  # methods refuse a diagonal here
        i, j, eigenvalues = self.leading(energy, most)
        p, q = self.out.vectors[:, : int(i.max()) + 1], self.into.vectors[:, : int(j.max()) + 1]
        coefficients = update.between(p, q)[i, j]
        grid = coefficients.new_zeros(p.shape[1], q.shape[1]).index_put((i, j), coefficients)
        return Part(coefficients, eigenvalues, LowRank(p @ grid, q.T))


def remainder(update: Update, part: Part) -> tuple[Update, Tensor]:
    """Return dW_T = dW - dW_A, and |dW_T|² = |dW|² - |dW_A|² (the two are orthogonal)."""
    squared = squared_norm(update) - part.coefficients.square().sum()
    rest: Update = Dense(update.delta - part.update.left @ part.update.right) if isinstance(update, Dense) else (
        update.minus(part.update)
    )
    return rest, squared.clamp(min=0)
