"""NestlingCache: the state of a model of this library where transformers expects a cache."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from ..models import State

# the name of the cache in calls and outputs: it changed in transformers 5.24
CACHE = "cache"
if CACHE not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    CACHE = "past_key_values"


class NestlingCache(Cache):
    """Holds a `State` for `generate`. It is not a list of keys and values: it cannot be cropped, only kept or left.

    Attributes:
        state: what the sequences have read; None = nothing. columns: ids that `generate` need not give again, padding
            included.
    """

    def __init__(self, state: State | None = None, columns: int = 0) -> None:
        super().__init__(layers=[])
        self.state, self.columns = state, columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = None if self.state is None else self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.select([row for row in range(self.state.rows) for _ in range(repeats)])

    def reset(self) -> None:
        """Back to the initial state of the model, which is learned, not zero."""
        self.state, self.columns = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("NestlingCache: what was written cannot be cropped; keep a copy of an earlier state instead")

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_linear(self) -> list[bool]:
        """What has no length cannot be told how many ids it has seen; this has one."""
        return [False]

    @property
    def is_croppable(self) -> bool:
        return False

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("NestlingCache holds no keys and values; it belongs to NestlingForCausalLM")
