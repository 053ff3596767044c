"""The demo from beginning to end: train two models, let Hope read, restart it, write the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nestling.data import held_out_windows, load_documents
from nestling.demo import figures, stages
from nestling.demo.report import page
from nestling.demo.results import Results
from nestling.demo.sentences import sentences
from nestling.demo.settings import Settings, full_settings, quick_settings
from nestling.demo.tables import tables
from nestling.evals import forgetting, provenance
from nestling.introspect import levels
from nestling.train import RunConfig, config_to_json
from nestling.train.optimizer import make_optimizer

Say = Callable[[str], None]


def to_stdout(line: str) -> None:
    """Where the account goes by default."""
    print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Where the demo left its files, and its numbers."""

    folder: Path
    results: Results

    @property
    def report(self) -> Path:
        """The page to open."""
        return self.folder / "report.html"


def run(
    out: str | Path = "runs",
    *,
    quick: bool = False,
    seed: int = 0,
    text: str = "emma",
    data: str | Path | None = None,
    say: Say = to_stdout,
) -> Demo:
    """Run the demo in a new folder `demo-<n>` below `out`, never in an old one.

    Args:
        quick: seconds instead of minutes; shows the parts, not the result.
        seed: of weights, data order and samples.
        text: what is read: a bundled text, or a file, also below the folder `data`.
        say: takes the lines of the account; the progress of training goes to stderr.
    Raises ImportError without matplotlib, ValueError for a text that is too short, KeyboardInterrupt if a signal
    stops the training.
    """
    figures.require_matplotlib()
    settings = quick_settings(seed) if quick else full_settings(seed)
    unseen = opened(text, data, settings)
    folder = new_folder(Path(out))
    say(f"demo in {folder}")
    with one_thread():
        results, drawn = measured(settings, folder, unseen, text, seed, quick, say)
    (folder / "results.json").write_text(json.dumps(results.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
    (folder / "report.html").write_text(page(results, drawn), encoding="utf-8")
    say("\n" + "\n\n".join([*(table.text() for table in tables(results)), "\n".join(sentences(results))]))
    say(f"\nreport after {results.seconds:.0f} seconds: {folder / 'report.html'}")
    return Demo(folder=folder, results=results)


def opened(text: str, data: str | Path | None, settings: Settings) -> str:
    """The text to read. Raises ValueError if it is too short."""
    whole = "\n".join(load_documents(text, data))
    needed, size = settings.read + settings.next, len(whole.encode())
    if size < needed:
        raise ValueError(f"text {text} has {size:,} bytes, the demo reads {needed:,}; give a longer text")
    return whole


def new_folder(out: Path) -> Path:
    """A folder demo-<n> with the first free n, made now."""
    number = 1
    while True:
        folder = out / f"demo-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch inside: models this small gain little from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plain(config: RunConfig) -> dict[str, Any]:
    """A config as JSON holds it."""
    return json.loads(config_to_json(config))


def measured(
    settings: Settings, folder: Path, unseen: str, name: str, seed: int, quick: bool, say: Say
) -> tuple[Results, list[tuple[str, str]]]:
    """All stages in order; the numbers and the figures."""
    began, trained_on = time.monotonic(), settings.hope.data.text
    say(f"training Hope on {trained_on}")
    hope = stages.trained(settings.hope, folder / "hope")
    say("training Transformer++ of equal parameters on the same tokens")
    transformer = stages.trained(settings.transformer, folder / "transformer")
    say("scoring both on held-out text")
    scores = stages.scored(hope, transformer, settings)

    tokens = torch.as_tensor(hope.tokenizer.encode(unseen), dtype=torch.long)[: settings.read + settings.next]
    text, rest = tokens[None, : settings.read], tokens[settings.read :].tolist()
    say(f"reading {settings.read:,} tokens of {name}: Transformer++")
    by_transformer, _ = stages.read_once(transformer.model, text, settings, learn=False)
    say(f"reading {settings.read:,} tokens of {name}: Hope with its CMS frozen")
    frozen, _ = stages.read_once(hope.model, text, settings, learn=False)
    say(f"reading {settings.read:,} tokens of {name}: Hope, learning")
    learning, after = stages.read_once(hope.model, text, settings, learn=True)
    windows = held_out_windows(hope.held_out, length=settings.length, count=settings.windows)
    lost = forgetting(hope.model, after.state, windows)
    say("saving the memory, restarting, and writing samples")
    memory = stages.restarted(hope.model, after.state, folder, rest)
    samples = stages.sampled(hope, after.state, rest, settings.sample, seed)

    results = Results(
        quick=quick, seed=seed, length=settings.length, trained_on=trained_on, read=name, read_tokens=settings.read,
        training={"hope": hope.training, "transformer": transformer.training}, held_out=scores,
        reading={"hope-learning": learning, "hope-frozen": frozen, "transformer": by_transformer},
        forgetting=lost, memory=memory, samples=samples, machine=provenance(),
        configs={"hope": plain(settings.hope), "transformer": plain(settings.transformer)},
        seconds=time.monotonic() - began,
    )  # fmt: skip
    boxes = levels(hope.model, make_optimizer(hope.model, settings.hope.optim))
    names = stages.level_names(hope.model, list(learning.writes[-1].norms))
    return results, list(figures.all_figures(results, names, boxes))
