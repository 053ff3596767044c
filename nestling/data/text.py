"""Text files as documents: one file is one document; a folder gives its .txt and .txt.xz files in order of name."""

from __future__ import annotations

import lzma
import os
from collections.abc import Sequence
from pathlib import Path

from nestling.data.bundled import TEXTS, bundled_text


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, packed with xz if its name ends so; line ends stay as they are.

    Raises FileNotFoundError or ValueError, one line that names the remedy.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; check the path")
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is not a whole xz file ({error}); copy it again") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}; "
            f"convert it, for example: iconv -f latin1 -t utf-8"
        ) from error
    if not text:
        raise ValueError(f"{path} is empty; give a file with text")
    return text


def read_documents(path: str | Path) -> list[str]:
    """The documents of a file or folder. Raises as `read_text`, and ValueError for a folder without text files."""
    path = Path(path)
    if not path.is_dir():
        return [read_text(path)]
    files = sorted(p for p in path.iterdir() if p.name.endswith((".txt", ".txt.xz")))
    if not files:
        raise ValueError(f"folder {path} has no .txt or .txt.xz file; give a text file or a folder of them")
    return [read_text(p) for p in files]


def locate(name: str | Path, folder: str | Path | None = None) -> Path:
    """The path of a data file: as it stands, below `folder` (the option --data), or below $NESTLING_DATA.

    Raises FileNotFoundError that names both ways to say where larger data lie.
    """
    roots = [r for r in (folder, os.environ.get("NESTLING_DATA")) if r]
    for path in [Path(name), *(Path(root) / name for root in roots)]:
        if path.exists():
            return path
    tried = ", ".join(str(r) for r in [Path.cwd(), *roots])
    raise FileNotFoundError(
        f"no data file {name} in {tried}; say where it lies with --data DIR or the environment variable NESTLING_DATA"
    )


def load_documents(name: str, folder: str | Path | None = None) -> list[str]:
    """The documents called `name`: a bundled text (bundled.TEXTS), or a file or folder found by `locate`."""
    return [bundled_text(name)] if name in TEXTS else read_documents(locate(name, folder))


def split_documents(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Training and held-out documents: the last `fraction` of the characters of each document is held out."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation fraction {fraction} is not between 0 and 1; use for example 0.1")
    cuts = [int(len(d) * (1 - fraction)) for d in documents]
    if any(cut in (0, len(d)) for cut, d in zip(cuts, documents, strict=True)):
        raise ValueError(f"a document is too short to hold out {fraction:g} of it; give longer documents")
    return [d[:cut] for d, cut in zip(documents, cuts, strict=True)], [
        d[cut:] for d, cut in zip(documents, cuts, strict=True)
    ]
