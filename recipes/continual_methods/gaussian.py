"""Classes as Gaussians over frozen features: exact sums, so the order of tasks does not matter, nothing is forgotten.

`Gaussians` keeps, per class, the sum and number of its features, and one covariance for all. Read three ways: nearest
class mean; linear discriminant (LDA); and KLDA (Momeni et al. 2025): LDA on random Fourier features of an RBF kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Gaussians:
    """One pass over features (n, F) float64 and labels (n,); reading at any time."""

    def __init__(self, width: int, classes: int) -> None:
        self.sums = torch.zeros(classes, width, dtype=torch.float64)
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.moment = torch.zeros(width, width, dtype=torch.float64)

    def write(self, features: Tensor, labels: Tensor) -> None:
        x = features.double()
        self.sums.index_add_(0, labels, x)
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.moment += x.T @ x

    @property
    def means(self) -> Tensor:
        """(classes, F); zero where nothing was seen."""
        return self.sums / self.counts.clamp_min(1)[:, None]

    def covariance(self, ridge: float) -> Tensor:
        """Within the classes, (F, F), plus `ridge` times its mean variance on the diagonal."""
        inside = (self.moment - (self.sums.T @ self.means)) / self.counts.sum()
        return inside + ridge * inside.diagonal().mean() * torch.eye(len(inside), dtype=inside.dtype)

    def discriminants(self, features: Tensor, ridge: float) -> Tensor:
        """(n, classes): log density of each class up to what they share, equal priors; -inf for unseen classes."""
        weights = torch.linalg.solve(self.covariance(ridge), self.means.T)  # (F, classes)
        scores = features.double() @ weights - (self.means.T * weights).sum(0) / 2
        return scores.masked_fill(self.counts == 0, -torch.inf)

    def nearest_mean(self, features: Tensor) -> Tensor:
        """(n, classes): minus the distance to each class's mean; -inf for unseen classes."""
        return -torch.cdist(features.double(), self.means).masked_fill(self.counts == 0, torch.inf)


class FourierFeatures:
    """sqrt(2 / D) cos(omega x + b), whose products approach exp(-|x - y|^2 / (2 F width^2)) (Rahimi and Recht 2007).

    Args:
        inputs: F. outputs: D. width: of the kernel, in units of sqrt(F) so that standardised features want about 1.
    """

    def __init__(self, inputs: int, outputs: int, *, width: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale = 1 / (width * math.sqrt(inputs))
        self.omega = scale * torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
        self.phase = 2 * math.pi * torch.rand(outputs, generator=generator, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, F) -> (n, D)."""
        return math.sqrt(2 / len(self.phase)) * torch.cos(x.double() @ self.omega + self.phase)
