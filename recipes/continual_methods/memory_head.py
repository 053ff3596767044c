"""The last layer of a classifier as an associative memory: keys are features, values are classes.

    W <- W + P x (y - W^T x)^T,     P = (ridge I + sum of x x^T over all keys so far)^-1

The delta rule in the metric of all earlier keys, written block by block. It is exact: at any time W is the ridge
regression of all pairs so far, in whatever order they came, as long as the features do not move.
"""

from __future__ import annotations

import torch
from torch import Tensor


class MemoryHead:
    """Written by `write`, read by `read`.

    Args:
        width: of features, to which a constant 1 is added. classes: values are one-hot.
        ridge: added to the diagonal, in units of examples.
    """

    def __init__(self, width: int, classes: int, *, ridge: float) -> None:
        self.classes = classes
        self.weight = torch.zeros(width + 1, classes, dtype=torch.float64)
        self.inverse = torch.eye(width + 1, dtype=torch.float64) / ridge

    def write(self, features: Tensor, labels: Tensor) -> None:
        """Store features (n, F) under their labels (n,)."""
        x = _with_one(features.detach()).double()  # (n, F + 1)
        y = torch.nn.functional.one_hot(labels, self.classes).double()
        px = self.inverse @ x.T  # (F + 1, n)
        gain = torch.linalg.solve(torch.eye(len(x), dtype=x.dtype) + x @ px, px, left=False)  # (F + 1, n)
        self.weight += gain @ (y - x @ self.weight)
        self.inverse -= gain @ px.T

    def read(self, features: Tensor) -> Tensor:
        """Features (n, F) -> values (n, classes), near 1 for a class that such features were stored under."""
        return _with_one(features) @ self.weight.to(features.dtype)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)
