"""Checkpoints and vocabularies of llama2.c (legacy format): small Llamas in two files, plain or packed with xz.

model, tokenizer = read_model("stories260K.bin.xz"), read_tokenizer("tok512.bin.xz")
"""

from __future__ import annotations

import hashlib
import lzma
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
BEGIN, END = 1, 2
BYTES = 3  # id of the piece that is the byte 0
_KNOWN_WORDS = 100_000  # words whose ids a tokenizer remembers


def read_model(path: str | Path) -> LlamaForCausalLM:
    """The Llama of a checkpoint file, in float32. Raises ValueError if the file is not one."""
    data = _unpacked(path)
    shape = dict(zip(HEADER, struct.unpack("<7i", data[:28]) if len(data) > 28 else (0,) * 7, strict=True))
    if not all(0 < abs(value) < 2**24 for value in shape.values()) or shape["dim"] % shape["n_heads"]:
        raise ValueError(f"{path} is not a checkpoint of llama2.c: its first seven numbers are {tuple(shape.values())}")
    tied, vocabulary = shape["vocab_size"] > 0, abs(shape["vocab_size"])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape["dim"],
        intermediate_size=shape["hidden_dim"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        max_position_embeddings=shape["seq_len"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    numbers = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).astype(np.float32))
    weights = _named(numbers, config, str(path))
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"} and (not missing or tied)
    model.tie_weights()
    return model.eval()


def _named(numbers: Tensor, config: LlamaConfig, path: str) -> dict[str, Tensor]:
    """The numbers of a file as the weights of a Llama; each kind of weight lies there for all layers at once."""
    dim, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    width = dim // config.num_attention_heads
    keys = config.num_key_value_heads * width
    kinds: list[tuple[str, tuple[int, ...]]] = [
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (keys, dim)),
        ("self_attn.v_proj", (keys, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (config.vocab_size, dim))]
    shapes += [(name, (layers, *shape)) for name, shape in kinds]
    shapes += [("model.norm.weight", (dim,)), ("", (2, config.max_position_embeddings, width // 2))]  # "": rotary table
    shapes += [] if config.tie_word_embeddings else [("lm_head.weight", (config.vocab_size, dim))]
    sizes = [int(np.prod(shape)) for _, shape in shapes]
    if len(numbers) != sum(sizes):
        raise ValueError(
            f"{path} holds {len(numbers):,} numbers, a llama2.c checkpoint of its shape {sum(sizes):,}; it is damaged, "
            "or of another version (only version 0 is read)"
        )
    parts = {name: part.view(shape) for (name, shape), part in zip(shapes, numbers.split(sizes), strict=True)}
    made = {name: part for name, part in parts.items() if name.endswith("weight")}
    for name, _ in kinds:
        for i, matrix in enumerate(parts[name]):
            turned = name.endswith(("q_proj", "k_proj"))
            made[f"model.layers.{i}.{name}.weight"] = _halves(matrix, width) if turned else matrix
    return made


def _halves(matrix: Tensor, width: int) -> Tensor:
    """Rows reordered within each head: llama2.c turns neighbours (2i, 2i + 1), transformers halves (i, i + width/2)."""
    return matrix.view(-1, width // 2, 2, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)


class Llama2cTokenizer:
    """SentencePiece byte-pair encoding by scores. `encode` starts with the begin-of-text id, as in llama2.c."""

    def __init__(self, pieces: list[bytes], scores: list[float]) -> None:
        self.pieces, self.scores = pieces, scores
        self.ids = {piece: i for i, piece in enumerate(pieces) if i >= BYTES + 256}
        self.by_words = not any(b" " in piece[1:] for piece in self.ids)  # then no piece reaches over a word's start
        self.known: dict[str, list[int]] = {}
        self.fingerprint = "llama2c-" + hashlib.sha256(repr((pieces, scores)).encode()).hexdigest()[:16]

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        """Ids (n,) int64; special tokens are the begin-of-text id and the space that the vocabulary then expects."""
        start, text = ([BEGIN], f" {text}" if text else "") if add_special_tokens else ([], text)
        words = re.split(r"(?= )", text) if self.by_words else [text]
        return np.asarray(start + [i for word in words for i in self._merged(word)], dtype=np.int64)

    def _merged(self, word: str) -> list[int]:
        """Characters, then again and again the best pair, the leftmost on a tie."""
        if word in self.known:
            return self.known[word]
        ids: list[int] = []
        for character in word:
            raw = character.encode("utf-8")
            ids += [self.ids[raw]] if raw in self.ids else [BYTES + byte for byte in raw]
        while found := list(self._pairs(ids)):
            _, place, pair = max(found)
            ids[-place : 2 - place] = [pair]
        if len(self.known) < _KNOWN_WORDS:
            self.known[word] = ids
        return ids

    def _pairs(self, ids: list[int]) -> Iterator[tuple[float, int, int]]:
        """(score, -place, id) of every pair of neighbours that is a piece."""
        for place in range(len(ids) - 1):
            pair = self.ids.get(self._bytes(ids[place]) + self._bytes(ids[place + 1]))
            if pair is not None:
                yield self.scores[pair], -place, pair

    def _bytes(self, i: int) -> bytes:
        return bytes([i - BYTES]) if BYTES <= i < BYTES + 256 else self.pieces[i]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; one space at the start of a text that begins with the begin-of-text id belongs to it."""
        known = [int(i) for i in ids]
        for i in known:
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"token id {i} is outside the vocabulary of {self.vocab_size}; use the model's tokenizer"
                )
        text = b"".join(self._bytes(i) for i in known if i >= BYTES).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if known[:1] == [BEGIN] else text


def read_tokenizer(path: str | Path) -> Llama2cTokenizer:
    """The vocabulary of a tokenizer file. Raises ValueError if the file is not one."""
    data, at = _unpacked(path), 4
    pieces: list[bytes] = []
    scores: list[float] = []
    while at + 8 <= len(data):
        score, length = struct.unpack_from("<fi", data, at)
        if not 0 <= length <= len(data) - at - 8:
            break
        scores.append(score)
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    if at != len(data) or len(pieces) < BYTES + 256:
        raise ValueError(f"{path} is not a tokenizer of llama2.c: it ends inside piece {len(pieces)}")
    return Llama2cTokenizer(pieces, scores)


def _unpacked(path: str | Path) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; give a file of llama2.c, e.g. stories260K.bin or tok512.bin (or .xz)")
    data = Path(path).read_bytes()
    return lzma.decompress(data) if data[:6] == b"\xfd7zXZ\x00" else data
