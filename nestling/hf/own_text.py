"""What a model knows, shown by itself: text it samples, in the place of its training text, which is seldom at hand."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROWS, LENGTH = 32, 128  # sequences, and tokens of each


@torch.no_grad()
def own_text(model: PreTrainedModel, rows: int = ROWS, length: int = LENGTH, *, seed: int = 0) -> Tensor:
    """Text (rows, length) sampled from a model at temperature 1, each row from the token that begins a text.

    Families without such a token start from their end-of-text token, or from any. The caller's random state stays.
    """
    config = model.config.get_text_config()
    begin = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    begin = begin[0] if isinstance(begin, list) else begin
    device, size = model.device, model.get_input_embeddings().num_embeddings
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = torch.randint(size, (rows, 1), device=device)
        if begin is not None and 0 <= begin < size:
            start = torch.full_like(start, begin)
        training = model.training
        try:
            return model.eval().generate(
                start,
                attention_mask=torch.ones_like(start),
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )
        finally:
            model.train(training)
