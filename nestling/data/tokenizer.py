"""Tokenizers behind one small interface: bytes, and byte-pair encoding from a JSON file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Ids = np.ndarray  # (tokens,) int64


class Tokenizer(Protocol):
    """What the library asks of a tokenizer. Ids lie in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly if they give the same ids."""
        ...

    def encode(self, text: str) -> Ids: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """One token per byte of UTF-8; 256 ids, nothing to train."""

    vocab_size = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; a byte sequence that is not UTF-8 (a cut character) becomes the replacement mark."""
        return bytes(checked(ids, self.vocab_size)).decode("utf-8", errors="replace")


class BPETokenizer:
    """Byte-level byte-pair encoding of the `tokenizers` library: any text comes back as it went in."""

    def __init__(self, json: str):
        """`json` is the content of a tokenizer file. Raises ValueError if it is none."""
        try:
            self.inner = tokenizers_library().Tokenizer.from_str(json)
        except Exception as error:  # the library raises the bare Exception
            raise ValueError(
                f"not a tokenizer file ({error}); make one with BPETokenizer.train(...).save(path)"
            ) from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn `vocab_size` pieces (at least the 256 bytes) from texts."""
        if vocab_size < 256:
            raise ValueError(f"vocab_size={vocab_size} has no room for the 256 bytes; use 256 or more")
        library = tokenizers_library()
        inner = library.Tokenizer(library.models.BPE())
        inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        inner.train_from_iterator(
            texts,
            library.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
        )
        return cls(inner.to_str())

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        """The tokenizer of a JSON file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer file {path}; give the path of a tokenizer.json, or use 'bytes'")
        return cls(Path(path).read_text(encoding="utf-8"))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.inner.to_str(), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        return int(self.inner.get_vocab_size())

    @property
    def fingerprint(self) -> str:
        return "bpe-" + hashlib.sha256(self.inner.to_str().encode()).hexdigest()[:16]

    def encode(self, text: str) -> Ids:
        return np.asarray(self.inner.encode(text).ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.inner.decode(checked(ids, self.vocab_size), skip_special_tokens=False))


def load_tokenizer(name: str) -> Tokenizer:
    """'bytes', or the path of a tokenizer.json."""
    return ByteTokenizer() if name == "bytes" else BPETokenizer.load(name)


def checked(ids: Iterable[int], vocab_size: int) -> Sequence[int]:
    """The ids as a list of int. Raises ValueError at the first one outside the vocabulary."""
    known = [int(i) for i in ids]
    for i in known:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary of {vocab_size}; use the tokenizer of the model")
    return known


def tokenizers_library() -> Any:
    """The optional package, imported where it is used."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ImportError("byte-pair encoding needs the package tokenizers: pip install 'nestling[bpe]'") from error
    return tokenizers
