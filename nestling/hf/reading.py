"""Reading with a state, in the words of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..models import ReadingModel, State


@dataclass
class ReadingOutput(CausalLMOutputWithPast):
    """The output of a causal language model, and `state`: what to read on with."""

    state: State | None = None


def read_with_state(
    reader: ReadingModel,
    tokens: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    learn: bool,
    state: State | None,
    options: dict[str, Any],
) -> ReadingOutput:
    """One call of a `ReadingModel` in the words of transformers.

    With `learn` and labels, while gradients are on, it is a training step: `ReadingModel.loss`, which needs one
    backward pass for both clocks and gives no logits.
    """
    known = {"return_dict", "use_cache", "num_items_in_batch", "position_ids"}
    wrong = [k for k, v in options.items() if k not in known and v is not None and v is not False]
    if tokens is None or wrong:
        raise ValueError(f"forward with learn or state: input_ids are needed, {wrong} cannot be used; leave them out")
    mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    if labels is None:
        out = reader(tokens, state, learn=learn, mask=mask)
        return ReadingOutput(logits=out.logits, state=out.state)
    targets = torch.full_like(labels, -1)
    targets[:, :-1] = labels[:, 1:]
    targets = targets if mask is None else targets.masked_fill(~mask, -1)
    count, share = (targets >= 0).sum(), options.get("num_items_in_batch")
    if learn and torch.is_grad_enabled():
        mean, state = reader.loss(tokens, targets, mask, state)
        return ReadingOutput(loss=mean if share is None else mean * (count / share), state=state)
    out = reader(tokens, state, learn=learn, mask=mask)
    loss = reader.loss_of_logits(out.logits, targets) / (count if share is None else share)
    return ReadingOutput(loss=loss, logits=out.logits, state=out.state)
