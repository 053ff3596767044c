"""Shards give the same stream as the text they were made of, and damage is noticed."""

import json

import numpy as np
import pytest
import torch

from nestling.data import BPETokenizer, ByteTokenizer, TokenStream, open_shards, tokenize, write_shards

DOCUMENTS = ["first document, ", "b", "the third one is longer than a shard of twenty tokens, surely", "end"]


@pytest.mark.parametrize("shard_tokens", [1, 7, 20, 1000])
def test_round_trip_equals_the_text_in_memory(tmp_path, shard_tokens):
    headers = write_shards(DOCUMENTS, ByteTokenizer(), tmp_path, shard_tokens=shard_tokens)
    shards, text = open_shards(tmp_path, ByteTokenizer(), verify=True), tokenize(DOCUMENTS, ByteTokenizer())
    assert len(headers) == -(-len(text) // shard_tokens) and len(shards) == len(text)
    assert shards.starts.tolist() == text.starts.tolist()
    a, b = (TokenStream(t, rows=2, length=9, seed=4) for t in (shards, text))
    for _ in range(25):
        x, y = next(a), next(b)
        assert torch.equal(x.tokens, y.tokens) and torch.equal(x.new_document, y.new_document)


def test_dtype_follows_the_vocabulary(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        fingerprint = "wide"

        def encode(self, text):
            return super().encode(text) + 66_000

    write_shards(["abc"], Wide(), tmp_path / "wide")
    write_shards(["abc"], ByteTokenizer(), tmp_path / "bytes")
    assert json.loads((tmp_path / "wide/shard-00000.json").read_text())["dtype"] == "uint32"
    assert (tmp_path / "bytes/shard-00000.bin").stat().st_size == 6
    assert open_shards(tmp_path / "wide", Wide()).take(0, 3).tolist() == [66_097, 66_098, 66_099]


def test_fingerprint_follows_the_ids(tmp_path):
    write_shards(DOCUMENTS, ByteTokenizer(), tmp_path / "a")
    write_shards(DOCUMENTS[:3] + ["enD"], ByteTokenizer(), tmp_path / "b")
    a, b = (open_shards(tmp_path / name, ByteTokenizer()).fingerprint for name in "ab")
    assert a != b == open_shards(tmp_path / "b", ByteTokenizer()).fingerprint


def test_shards_are_memory_mapped(tmp_path):
    write_shards(DOCUMENTS, ByteTokenizer(), tmp_path)
    assert all(isinstance(piece, np.memmap) for piece in open_shards(tmp_path, ByteTokenizer()).pieces)


def test_damage_and_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="make shards with: nestling prepare"):
        open_shards(tmp_path, ByteTokenizer())
    write_shards(DOCUMENTS, ByteTokenizer(), tmp_path, shard_tokens=20)
    with pytest.raises(FileExistsError, match="has shards already"):
        write_shards(DOCUMENTS, ByteTokenizer(), tmp_path)
    with pytest.raises(ValueError, match="holds ids of tokenizer bytes, not of bpe-"):
        open_shards(tmp_path, BPETokenizer.train(["a"], vocab_size=256))

    data = tmp_path / "shard-00001.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="has 38 bytes, its header says 40"):
        open_shards(tmp_path, ByteTokenizer())
    data.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match="its checksum differs"):
        open_shards(tmp_path, ByteTokenizer(), verify=True)

    header = tmp_path / "shard-00000.json"
    for content in ("{", "[]", json.dumps({"format": "other", "dtype": "uint16"}), '{"format": "x"}'):
        header.write_text(content)
        with pytest.raises(ValueError, match="header"):
            open_shards(tmp_path, ByteTokenizer())


def test_nothing_to_write(tmp_path):
    with pytest.raises(ValueError, match="no tokens to write"):
        write_shards([], ByteTokenizer(), tmp_path)
    with pytest.raises(ValueError, match="shard_tokens=0"):
        write_shards(DOCUMENTS, ByteTokenizer(), tmp_path, shard_tokens=0)
