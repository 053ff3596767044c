"""A tiny random Llama for the recipes that teach a pretrained model one task after the other."""

import importlib.util
import os

import pytest
import torch


@pytest.fixture
def small():  # type: ignore[no-untyped-def]
    """40 ids, two layers of width 16."""
    if importlib.util.find_spec("transformers") is None:
        assert not os.environ.get("CI"), "CI runs these tests: transformers is in the extra test"
        pytest.skip("transformers is not installed; runs with: pip install 'nestling[test]'")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()
