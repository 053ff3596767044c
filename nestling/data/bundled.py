"""The texts that come with the package (sources, licences and checksums: DATA_LICENSES.md)."""

from __future__ import annotations

import lzma
from importlib.resources import files

TEXTS = {
    "shakespeare": "tinyshakespeare_train.txt.xz",  # 1.0 MB of plays; its last tenth is validation text
    "emma": "emma_start.txt.xz",  # 264 KB; unseen text of another style, never trained on
    "sherlock_holmes": "sherlock_holmes_start.txt.xz",  # 164 KB; unseen as well
    "moby_dick": "moby_dick_start.txt.xz",  # 132 KB; for choosing inner rates
}


def bundled_text(name: str) -> str:
    """The whole text. Raises ValueError for a name that is not bundled."""
    if name not in TEXTS:
        raise ValueError(f"no bundled text {name!r}; there are {', '.join(TEXTS)}")
    return lzma.decompress(files("nestling.data").joinpath("texts", TEXTS[name]).read_bytes()).decode("utf-8")
