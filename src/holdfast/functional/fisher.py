"""Fisher information of a layer in the space of its weight update dW [out, in], without a matrix of that size.

With x_t what enters the layer at token t, and δ_t the gradient of an example's summed loss at what leaves it, the
example's gradient is g_n = Σ_t δ_t x_tᵀ, which depends neither on LoRA's factors nor on their initialisation.

    Kronecker   F ≈ S_out ⊗ S_in,  S_out = mean δ δᵀ,  S_in = mean x xᵀ        dWᵀF dW = tr(S_out dW S_in dWᵀ)
    diagonal    the same with the diagonals of S_out and S_in
    samples     F = 1/N Σ_n g_n g_nᵀ exactly, each g_n in factors

Every Fisher is brought to a mean eigenvalue of 1, so that strengths carry over between models: without that, refusals,
of which an aligned model is nearly certain, would weigh next to nothing beside text. An isotropic Fisher then
is |dW|². Read next: `moments.py`, which makes factors, and `core/fisher.py`, which collects them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .lowrank import LowRank, Update, squared_norm
from .named import wide

Kind = Literal["kronecker", "diagonal", "samples"]
Labels = Literal["data", "model"]


@dataclass(frozen=True, eq=False)
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
        """The d of S [d, d]."""
        return len(self.values) if self.vectors is None else self.vectors.shape[0]

    @property
    def trace(self) -> Tensor:
        """Sum of all eigenvalues."""
        return self.values.sum() + self.rest * (self.size - len(self.values))

    def normalised(self) -> Factor:
        """Return the factor with a mean eigenvalue of 1 (a factor of zeros, of a layer that nothing reaches, stays).

        The same object at every call, so layers that share a factor go on sharing it.
        """
        return self._normalised

    @cached_property
    def _normalised(self) -> Factor:
        share = inverse_or_zero(self.trace / self.size)
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
        return Factor(random_basis(self.size, len(self.values), generator).to(self.values), self.values, self.rest)


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
class Kronecker:
    """F ≈ S_out ⊗ S_in of one layer; diagonal, if its factors are."""

    out: Factor
    into: Factor

    @cached_property
    def _leads(self) -> dict[tuple[float, int], tuple[Tensor, Tensor, Tensor, int, int]]:
        return {}

    def quadratic(self, update: Update) -> Tensor:
        """Return tr(S_out dW S_in dWᵀ) = vec(dW)ᵀ F vec(dW), a scalar."""
        if isinstance(update, LowRank):
            return (self.out.product(update.left) * self.into.product(update.right.T)).sum()
        delta = wide(update.delta)
        return (self.out.times(delta) * self.into.times(delta.T).T).sum()

    def normalised(self) -> Kronecker:
        """Return the Fisher with both factors brought to a mean eigenvalue of 1: its own is 1 then."""
        return Kronecker(self.out.normalised(), self.into.normalised())

    def rotated(self, generator: torch.Generator) -> Kronecker:
        """Return the same spectrum with random eigenvectors on both sides."""
        return Kronecker(self.out.rotated(generator), self.into.rotated(generator))

    def leading(self, energy: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the m leading eigenpairs l_i l_j of F, as (i, j, l_i l_j), each [m], descending.

        With q eigenvectors kept on each side these are the true leading ones for every m <= q: pair (i, j) has i · j
        pairs at or above it. Eigenvalues of 0 lead nowhere and are left out.

        Args:
            energy: m is the least whose eigenvalues hold this share of the trace of F.
            most: m is at most this.
        """
        products = torch.outer(self.out.values, self.into.values)
        values, places = products.flatten().sort(descending=True)
        m = leading_count(values[:most], self.out.trace * self.into.trace, energy)
        columns = products.shape[1]
        return places[:m] // columns, places[:m] % columns, values[:m]

    def part(self, update: Update, energy: float, most: int) -> Part:
        """Return what of an update lies in the span of the leading eigenvectors q_i p_jᵀ."""
        assert self.out.vectors is not None  # methods refuse a diagonal here
        assert self.into.vectors is not None
        if (energy, most) not in self._leads:  # a fixed choice, made once: it reads numbers back from the device
            i, j, eigenvalues = self.leading(energy, most)
            rows, columns = (int(index.max()) + 1 if len(index) else 0 for index in (i, j))
            self._leads[energy, most] = i, j, eigenvalues, rows, columns
        i, j, eigenvalues, rows, columns = self._leads[energy, most]
        kind = like(update)
        p, q = self.out.vectors[:, :rows].to(kind), self.into.vectors[:, :columns].to(kind)
        coefficients = update.between(p, q)[i, j]
        grid = coefficients.new_zeros(rows, columns).index_put((i, j), coefficients)
        return Part(coefficients, eigenvalues.to(kind), LowRank(p @ grid, q.T))


def remainder(update: Update, part: Part) -> tuple[Update, Tensor]:
    """Return dW_T = dW - dW_A, and |dW_T|² = |dW|² - |dW_A|² (the two are orthogonal)."""
    squared = squared_norm(update) - part.coefficients.square().sum()
    return update.minus(part.update), squared.clamp(min=0)


def principal_cosines(a: Kronecker, b: Kronecker, energy: float, most: int) -> Tensor:
    """Return the cosines of the principal angles between the leading subspaces of two Fishers, [min(m, m')] descending.

    Inner products of eigenvectors q_i p_jᵀ are products of those of q_i and of p_j, so two small matrices suffice.
    1 is a shared direction; of two random subspaces of D = out · in dimensions the mean square is max(m, m') / D.

    Args:
        a: a Fisher with eigenvectors on both sides.
        b: another one of the same layer.
        energy: as in `Kronecker.leading`.
        most: as in `Kronecker.leading`.

    Raises:
        ValueError: if a Fisher is diagonal.
    """
    (p, q), (u, v) = _leading_vectors(a, energy, most), _leading_vectors(b, energy, most)
    cosines: Tensor = torch.linalg.svdvals((p.T @ u) * (q.T @ v))
    return cosines.clamp(max=1.0)


def _leading_vectors(fisher: Kronecker, energy: float, most: int) -> tuple[Tensor, Tensor]:
    """Return the two sides of the leading eigenvectors, [out, m] and [in, m] in float64."""
    out, into = fisher.out.vectors, fisher.into.vectors
    if out is None or into is None:
        raise ValueError("Principal angles need eigenvectors, and a diagonal Fisher has none: use kind='kronecker'.")
    i, j, _ = fisher.leading(energy, most)
    return out[:, i].double(), into[:, j].double()


def leading_count(values: Tensor, trace: Tensor, energy: float) -> int:
    """Return how many of these eigenvalues, descending, it takes to hold a share of the trace: all if they do not."""
    held = values.double().cumsum(0) / trace.double().clamp(min=1e-300)
    return min(int((held < energy).sum()) + 1, int((values > 0).sum()))


def inverse_or_zero(mean: Tensor) -> Tensor:
    """Return 1 / mean, and 0 for a layer that nothing reaches."""
    return torch.where(mean > 0, 1 / mean, 0.0)


def like(update: Update) -> Tensor:
    """Return a tensor with the dtype and device that products with an update run in."""
    return update.left if isinstance(update, LowRank) else wide(update.delta)


def random_basis(size: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return random orthonormal columns [size, columns] in float64."""
    draw = torch.randn(size, columns, generator=generator, dtype=torch.float64, device=generator.device)
    basis: Tensor = torch.linalg.qr(draw)[0]
    return basis
