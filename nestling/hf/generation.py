"""What the `generate` of transformers cannot do with a memory, said clearly."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_cache(input_ids: Tensor | None, options: dict[str, Any]) -> None:
    """Raises ValueError if a cache comes without the ids it was made from.

    `generate` cuts what the cache has seen off the ids: of new ids alone, nothing or the wrong part would be left.
    """
    cache = options.get("cache", options.get("past_key_values"))
    if cache is None or input_ids is None:
        return
    seen, mask = int(cache.get_seq_length()), options.get("attention_mask")
    said = mask is not None and mask.shape[1] > input_ids.shape[1]  # how transformers knows that only new ids came
    if input_ids.shape[1] <= seen and not said:
        raise ValueError(
            f"generate: the cache has seen {seen} tokens, but only {input_ids.shape[1]} ids were given; give the whole "
            "history, or keep a conversation in nestling.Session, which takes only what is new"
        )
