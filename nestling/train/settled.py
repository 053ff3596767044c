"""Tensors laid out in memory as a file gives them back, so that a resumed run multiplies in the same order."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.core.state import Tree, map_tensors


def settled(tree: Tree) -> Tree:
    """The same values; a tensor that is a view, or transposed, becomes one of its own.

    Matrix products of equal numbers may round differently for another layout or alignment, and a checkpoint keeps
    only the numbers.
    """
    return map_tensors(_settled, tree)


def _settled(x: Tensor) -> Tensor:
    plain = x.storage_offset() == 0 and x.stride() == torch.empty(x.shape, device="meta").stride()
    return x if plain else x.clone(memory_format=torch.contiguous_format)
