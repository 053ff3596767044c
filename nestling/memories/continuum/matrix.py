"""FastMatrix: one matrix per sequence, kept as a sum of outer products while that is smaller than the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.state import replace, state_class


@state_class
class FastMatrix:
    """A matrix (B, O, I) per sequence: `dense` plus the sum over r of left_r right_r^T; either part may be None.

    Attributes:
        dense: (B, O, I) or None.
        left, right: (B, R, O) and (B, R, I), or both None.
    """

    dense: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def empty(self) -> bool:
        return self.dense is None and self.left is None

    def plus_outer(self, left: Tensor, right: Tensor) -> FastMatrix:
        """Add sum_r left_r right_r^T; the factors are merged once they would need more room than the matrix."""
        if self.left is not None and self.right is not None:
            left, right = torch.cat([self.left, left], 1), torch.cat([self.right, right], 1)
        rank, out, inp = left.shape[1], left.shape[2], right.shape[2]
        if self.dense is None and rank * (out + inp) < out * inp:
            return FastMatrix(left=left, right=right)
        product = left.transpose(1, 2) @ right
        return FastMatrix(dense=product if self.dense is None else self.dense + product)

    def plus(self, other: FastMatrix, scale: Tensor | None = None) -> FastMatrix:
        """The sum of two fast matrices, the other's rows multiplied by `scale` (B,)."""
        if other.dense is not None and not self.empty and scale is not None:
            made = FastMatrix(dense=torch.addcmul(self.to_dense(), other.dense, scale.view(-1, 1, 1).to(other.dense)))
            other = replace(other, dense=None)
        else:
            made = self
        other = other if scale is None else other.times(scale)
        if other.dense is not None:
            made = FastMatrix(dense=other.dense if made.empty else made.to_dense() + other.dense)
        return made if other.left is None or other.right is None else made.plus_outer(other.left, other.right)

    def to_dense(self) -> Tensor:
        """The matrix itself, (B, O, I)."""
        if self.left is None or self.right is None:
            assert self.dense is not None, "an empty FastMatrix has no shape"
            return self.dense
        product = self.left.transpose(1, 2) @ self.right
        return product if self.dense is None else self.dense + product

    def times(self, scale: Tensor) -> FastMatrix:
        """Every row b of the batch multiplied by scale[b]."""
        s = scale.view(-1, 1, 1)
        return replace(
            self,
            dense=None if self.dense is None else self.dense * s,
            left=None if self.left is None else self.left * s,
        )

    def times_matrix(self, matrix: Tensor) -> FastMatrix:
        """Multiplied from the right by `matrix`, (I, I) or (B, I, I)."""
        return replace(
            self,
            dense=None if self.dense is None else self.dense @ matrix,
            right=None if self.right is None else self.right @ matrix,
        )

    def erase(self, keys: FastMatrix, strength: Tensor) -> FastMatrix:
        """M - strength[b] M K for the key moment K = sum_r k_r k_r^T (B, I, I), given as a fast matrix."""

        def erased(x: Tensor) -> Tensor:
            out = 0.0 if keys.dense is None else x @ keys.dense
            if keys.left is not None and keys.right is not None:
                out = out + (x @ keys.left.transpose(1, 2)) @ keys.right
            return x - strength.view(-1, 1, 1) * out

        return replace(
            self,
            dense=None if self.dense is None else erased(self.dense),
            right=None if self.right is None else erased(self.right),
        )

    def trace(self) -> Tensor:
        """The trace of each row's (square) matrix, (B,)."""
        if self.dense is None and self.left is not None and self.right is not None:
            return (self.left * self.right).sum((1, 2))
        return self.to_dense().diagonal(dim1=1, dim2=2).sum(1)

    def combined(self) -> FastMatrix:
        """Called when rows of several states became one: rows of both forms become one matrix."""
        return self if self.dense is None or self.left is None else FastMatrix(dense=self.to_dense())

    def norm(self) -> Tensor:
        """The Frobenius norm of each row's matrix, (B,)."""
        if self.dense is None and self.left is not None and self.right is not None:
            gram = (self.left @ self.left.transpose(1, 2)) * (self.right @ self.right.transpose(1, 2))
            square = gram.sum((1, 2))
            return torch.where(square > 0, square, 1).sqrt() * (square > 0)  # smooth at 0, for exact outer gradients
        dense = self.to_dense()
        return torch.linalg.vector_norm(dense, dim=(1, 2))

    def apply(self, x: Tensor) -> Tensor:
        """M x for every token: x (B, T, I) -> (B, T, O)."""
        y = None if self.dense is None else x @ self.dense.transpose(1, 2).to(x.dtype)
        if self.left is not None and self.right is not None:
            low = (x @ self.right.transpose(1, 2).to(x.dtype)) @ self.left.to(x.dtype)
            y = low if y is None else y + low
        assert y is not None, "an empty FastMatrix maps nothing"
        return y
