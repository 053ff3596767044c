"""The line that shows a long reading going on."""

from __future__ import annotations

import shutil
import sys
import time

WIDTH, EVERY = 20, 0.2  # characters of the bar, seconds between two lines


class ReadingLine:
    """A bar on stderr, rewritten in place.

    Args:
        shown: None = where stderr is a terminal. length: characters of the whole text; None = nobody knows.
    """

    def __init__(self, shown: bool | None, length: int | None) -> None:
        self.shown = sys.stderr.isatty() if shown is None else shown
        self.length, self.characters, self.tokens = length, 0, 0
        self.start = self.last = time.monotonic()

    def encoded(self, characters: int, tokens: int) -> None:
        """A piece of the text has become tokens, which will be read."""
        self.characters, self.tokens = self.characters + characters, self.tokens + tokens

    def update(self, tokens: int, nats: float | None, size: int) -> None:
        """Tokens read so far, mean surprise, bytes of the memory."""
        now = time.monotonic()
        if not self.shown or (now - self.last < EVERY and tokens < self.tokens):
            return
        self.last = now
        share = None if self.length is None else tokens / self.tokens * self.characters / self.length
        bar = "" if share is None else f"[{'#' * round(WIDTH * share):{WIDTH}}] "
        loss = "" if nats is None else f"  {nats:.3f} nats"
        speed = tokens / max(now - self.start, 1e-9)
        line = f"{bar}{tokens:,} tokens  {speed:,.0f}/s{loss}  memory {size / 2**20:.1f} MiB"
        print(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.shown:
            print(file=sys.stderr, flush=True)
