"""FastMatrix: one matrix per sequence, kept as a sum of outer products while that is smaller than the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.state import replace, state_class
from ...ops.dispatch import cms_write


@state_class
class FastMatrix:
    """A matrix (B, O, I) per sequence: `dense`, or the sum over r of left_r right_r^T; neither = nothing yet.

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

    @property
    def rows(self) -> int:
        """Number of sequences; an empty matrix does not know."""
        part = self.dense if self.left is None else self.left
        assert part is not None, "an empty FastMatrix has no rows"
        return len(part)

    def plus_outer(self, left: Tensor, right: Tensor) -> FastMatrix:
        """Add sum_r left_r right_r^T; the factors are merged once they would need more room than the matrix."""
        return self.plus(FastMatrix(left=left, right=right))

    def plus(self, other: FastMatrix, scale: Tensor | None = None, *, keep: float = 1.0) -> FastMatrix:
        """keep * self + other, the other's rows multiplied by `scale` (B,)."""
        if self.empty:
            return (other if scale is None else other.times(scale))._fitting()
        if other.left is None or other.right is None:
            assert other.dense is not None, "an empty FastMatrix cannot be added"
            mine = self.to_dense() if keep == 1 else keep * self.to_dense()
            if scale is None:
                return FastMatrix(dense=mine + other.dense)
            return FastMatrix(dense=torch.addcmul(mine, other.dense, scale.view(-1, 1, 1).to(mine)))
        if self.left is None or self.right is None:
            one = other.left.new_ones(len(other.left)) if scale is None else scale
            return FastMatrix(dense=cms_write(self.to_dense(), other.left, other.right, one, keep=keep))
        left = other.left if scale is None else other.left * scale.view(-1, 1, 1).to(other.left)
        mine = self.left if keep == 1 else keep * self.left
        return FastMatrix(left=torch.cat([mine, left], 1), right=torch.cat([self.right, other.right], 1))._fitting()

    def _fitting(self) -> FastMatrix:
        """In the smaller of the two forms."""
        if self.left is None or self.right is None:
            return self
        rank, out, inp = self.left.shape[1], self.left.shape[2], self.right.shape[2]
        return self if rank * (out + inp) < out * inp else FastMatrix(dense=self.to_dense())

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
