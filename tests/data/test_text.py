"""Files become documents; a bad file is one clear line."""

import lzma
from pathlib import Path

import pytest

import nestling.data
from nestling.data import TEXTS, bundled_text, load_documents, locate, read_documents, split_documents


def test_file_folder_and_xz_are_documents(tmp_path):
    (tmp_path / "b.txt").write_bytes("zwei\r\nö".encode())
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"one"))
    (tmp_path / "c.md").write_text("not read")
    assert read_documents(tmp_path) == ["one", "zwei\r\nö"]
    assert read_documents(tmp_path / "c.md") == ["not read"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty; give a file with text"),
        ("latin.txt", "gr\xfc\xdfe".encode("latin1"), "not UTF-8: byte 0xfc at offset 2.*iconv"),
        ("cut.txt.xz", lzma.compress(b"a long text" * 99)[:-9], "not a whole xz file"),
        ("junk.txt.xz", b"junk", "not a whole xz file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_documents(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*gone.txt"):
        read_documents(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="has no .txt or .txt.xz file"):
        read_documents(tmp_path)


def test_larger_data_is_found_by_option_and_by_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("NESTLING_DATA", raising=False)
    (tmp_path / "book.txt").write_text("text")
    assert load_documents("book.txt", tmp_path) == ["text"]
    with pytest.raises(FileNotFoundError, match="--data DIR or the environment variable NESTLING_DATA"):
        locate("book.txt")
    monkeypatch.setenv("NESTLING_DATA", str(tmp_path))
    assert locate("book.txt") == tmp_path / "book.txt"


def test_bundled_texts_load_and_stay_small():
    folder = Path(nestling.data.__file__).parent / "texts"
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 1 << 20
    assert {p.name for p in folder.iterdir()} == set(TEXTS.values())
    assert len(bundled_text("shakespeare")) == 1_003_854
    for name in ("emma", "sherlock_holmes", "moby_dick"):
        assert len(bundled_text(name).encode()) >= 128 * 1024
    with pytest.raises(ValueError, match="no bundled text 'hamlet'; there are shakespeare, "):
        bundled_text("hamlet")


def test_split_holds_out_the_last_part_of_each_document():
    training, held_out = split_documents(["abcdefghij", "0123456789" * 2], 0.1)
    assert training == ["abcdefghi", "01234567890123456789"[:18]] and held_out == ["j", "89"]
    for fraction in (0, 1, -0.1):
        with pytest.raises(ValueError, match="not between 0 and 1"):
            split_documents(["abc"], fraction)
    with pytest.raises(ValueError, match="too short"):
        split_documents([""], 0.1)
