"""Tiny random models of every family that convert_to_cms names, and the pretrained checkpoint of the tests."""

import inspect
from pathlib import Path

import torch
import transformers

from nestling.hf import convert_to_cms
from nestling.hf.llama2c import read_model, read_tokenizer

VOCABULARY, CONTEXT, WINDOW = 96, 48, 6
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
GROUPED = dict(num_key_value_heads=1)
OLD = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT, bos_token_id=1, eos_token_id=2)

FAMILIES = {
    "Llama": SHAPE | GROUPED,
    "Qwen2": SHAPE | GROUPED,
    "Qwen3": SHAPE | GROUPED | dict(head_dim=8),
    "Mistral": SHAPE | GROUPED | dict(sliding_window=WINDOW),
    "Gemma2": SHAPE | GROUPED | dict(head_dim=8, sliding_window=WINDOW),
    "Phi3": SHAPE | GROUPED,
    "Olmo2": SHAPE | GROUPED,
    "GPT2": OLD,
    "GPTNeoX": SHAPE,  # attention and MLP side by side
    "GPTJ": OLD | dict(rotary_dim=4),  # side by side as well
}
DATA = Path(__file__).parent / "data"


def plain(family="Llama", seed=0):
    """A random model of a family, ready to read."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def converted(family="Llama", periods=(4, 8), seed=0, rates=0.05, **options):
    """The same, converted; writes are long enough to be seen, and spare nothing."""
    return convert_to_cms(plain(family, seed), periods, rates=rates, **{"calibrate": False} | options)


def text(rows, length, seed=1):
    """Random ids above the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def cache_of(model, out):
    """The cache of an output, under the name by which the model's forward takes it: it changed in transformers 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: out[name]}


def stories_model():
    """The bundled pretrained model."""
    return read_model(DATA / "stories260K.bin.xz")


def stories_tokenizer():
    """Its vocabulary."""
    return read_tokenizer(DATA / "tok512.bin.xz")
