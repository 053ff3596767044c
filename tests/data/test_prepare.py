"""Any source becomes the same shards, whatever the number of workers and interruptions."""

import json
from pathlib import Path

import pytest

import nestling.data.prepare as module
import nestling.data.sources as sources
from nestling.data import ByteTokenizer, open_shards, prepare_shards, units_of
from nestling.data.sources import JsonLines

TEXTS = [f"Document {i}: " + "äbc " * (i % 7) for i in range(60)]


def decoded(folder: Path) -> list[str]:
    """The documents of a folder of shards, in order."""
    tokens = open_shards(folder, ByteTokenizer(), verify=True)
    ends = [*tokens.starts[1:], len(tokens)]
    pairs = zip(tokens.starts, ends, strict=True)
    return [ByteTokenizer().decode(tokens.take(int(start), int(end - start))) for start, end in pairs]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two texts and three files of records, in folders."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXTS[0])
    for name, part in (("b", TEXTS[1:20]), ("deep/c", TEXTS[20:30]), ("deep/d", TEXTS[30:])):
        lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(part)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


@pytest.mark.parametrize("size", [1, 37, 200, 10**6])
def test_lines_belong_to_the_unit_they_begin_in(corpus: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "JSONL_BYTES", size)
    units = units_of(corpus / "deep" / "d.jsonl")
    assert [text for unit in units for text in unit.documents("text")] == TEXTS[30:]
    assert all(isinstance(unit, JsonLines) for unit in units) and (len(units) > 1) == (size < 10**6)


def test_all_files_of_a_folder_in_order(corpus: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    count = prepare_shards(corpus, tmp_path / "out", shard_tokens=100, report=lambda *told: seen.append(told))
    assert decoded(tmp_path / "out") == TEXTS
    assert count == sum(len(text.encode()) for text in TEXTS) == seen[-1][2]
    assert [done for done, _, _ in seen] == [0, 1, 2, 3, 4] and len(list((tmp_path / "out").glob("shard-*.bin"))) > 4


def test_two_workers_make_the_same_files_as_one(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare_shards(corpus, tmp_path / str(workers), workers=workers, shard_tokens=150)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("1", "2"))
    assert one == two


def test_an_interruption_costs_the_unit_at_hand(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, encode, calls = tmp_path / "out", module.encode_unit, []

    def stopped(unit, number, *rest):
        calls.append(number)
        if number == 2 and calls.count(2) == 1:
            (out / "shard-00002-00000.bin").write_bytes(b"half")
            raise KeyboardInterrupt
        return encode(unit, number, *rest)

    monkeypatch.setattr(module, "encode_unit", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(corpus, out)
    with pytest.raises(ValueError, match="lacks 2 of its 4 parts; call the same `nestling prepare` again"):
        open_shards(out, ByteTokenizer())
    prepare_shards(corpus, out)
    assert calls == [0, 1, 2, 2, 3] and decoded(out) == TEXTS


def test_what_cannot_be_prepared_is_said(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_shards(corpus, out)
    (corpus / "e.txt").write_text("more")
    with pytest.raises(ValueError, match="begun with other settings: units 4 -> 5.*choose an empty folder"):
        prepare_shards(corpus, out)
    with pytest.raises(ValueError, match="no text in the field 'body'; it has text, id: name one with --field"):
        prepare_shards(corpus / "b.jsonl", tmp_path / "x", field="body")
    (corpus / "bad.jsonl").write_text('{"text": "good"}\n{"text": bad}\n')
    with pytest.raises(ValueError, match="bad.jsonl at byte 17 is not JSON"):
        prepare_shards(corpus / "bad.jsonl", tmp_path / "y")
    (corpus / "empty").mkdir()
    with pytest.raises(ValueError, match="has no file that ends in .txt"):
        units_of(corpus / "empty")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        units_of(tmp_path / "nothing")


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is missing: pip install 'nestling[data]'")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(60)}), tmp_path / "t.parquet", row_group_size=25)
    assert len(units_of(tmp_path / "t.parquet")) == 3
    prepare_shards(tmp_path / "t.parquet", tmp_path / "out", workers=1)
    assert decoded(tmp_path / "out") == TEXTS
    with pytest.raises(ValueError, match="no column 'body'; name one of text, n with --field"):
        prepare_shards(tmp_path / "t.parquet", tmp_path / "x", field="body")


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that are made of the package, on a stand-in: the package reads from the network."""

    class Stream:
        num_shards = 3

        def shard(self, num_shards: int, index: int) -> list[dict[str, str]]:
            return [{"text": text} for text in TEXTS[index::num_shards]]

    class Library:
        @staticmethod
        def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Stream:
            assert (name, config, split, streaming) == ("some/data", "part", "train", True)
            return Stream()

    monkeypatch.setattr(sources, "datasets_library", lambda: Library)
    prepare_shards("hub:some/data:part", tmp_path / "out")
    assert decoded(tmp_path / "out") == TEXTS[0::3] + TEXTS[1::3] + TEXTS[2::3]
