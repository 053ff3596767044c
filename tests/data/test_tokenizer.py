"""Tokenizers give back what they took, and say who they are."""

import sys

import numpy as np
import pytest

from nestling.data import BPETokenizer, ByteTokenizer, bundled_text, load_tokenizer

ODD = "ça va? \u4f60\u597d\r\n\ttwo  spaces \U0001f642"


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([bundled_text("shakespeare")[:50_000]], vocab_size=400)


def test_bytes_round_trip():
    ids = ByteTokenizer().encode(ODD)
    assert ids.dtype == np.int64 and len(ids) == len(ODD.encode()) and ByteTokenizer().decode(ids) == ODD


def test_bytes_of_a_cut_character_decode_to_the_replacement_mark():
    assert ByteTokenizer().decode(ByteTokenizer().encode("aç")[:-1]) == "a\ufffd"


def test_bpe_round_trip_and_compression(bpe):
    text = bundled_text("shakespeare")[60_000:61_000]
    assert bpe.decode(bpe.encode(ODD)) == ODD
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.vocab_size == 400 and bpe.encode(text).max() < 400
    assert len(bpe.encode(text)) < 0.7 * len(text)


def test_bpe_file_gives_the_same_ids_and_fingerprint(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.fingerprint == bpe.fingerprint != ByteTokenizer().fingerprint
    assert np.array_equal(loaded.encode(ODD), bpe.encode(ODD))


def test_fingerprint_tells_tokenizers_apart(bpe):
    other = BPETokenizer.train(["a completely different text"], vocab_size=260)
    assert other.fingerprint != bpe.fingerprint


def test_errors_name_the_remedy(bpe, tmp_path):
    with pytest.raises(ValueError, match="token id 256 is outside the vocabulary of 256"):
        ByteTokenizer().decode([1, 256])
    with pytest.raises(ValueError, match="token id 400"):
        bpe.decode([400])
    with pytest.raises(FileNotFoundError, match="use 'bytes'"):
        load_tokenizer("nowhere.json")
    with pytest.raises(ValueError, match="256 or more"):
        BPETokenizer.train(["a"], vocab_size=10)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        load_tokenizer(str(tmp_path / "bad.json"))


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'nestling\[bpe\]'"):
        BPETokenizer.train(["a"], vocab_size=256)
