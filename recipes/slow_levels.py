"""What a slow level buys: texts of four kinds in turn, read by one level, and by two inside each other.

    python -m recipes.slow_levels --data DIR          # DIR/lm, DIR/mt; needs transformers
    python -m recipes.slow_levels --table             # the committed result as tables
    python -m recipes.slow_levels --figure            # and as docs/figures/slow_levels.png

A stream is eight documents of 2,048 tokens: a novel, Wikipedia, Shakespeare, another language, and again each of the
four, further on. The bundled model (260,032 parameters, TinyStories) reads it with 512 tokens of context, none across
documents, and predicts every token before it learns from it. Gain: nats per token over the second four documents, the
return, against the model frozen. Forgetting: rise of the loss on bundled stories, asked as a new document after all.

Every arm writes each MLP every 256 tokens, by one backward pass, and knows where documents start:

* one level, never reset;
* one level of which a part is kept when a document starts (0 = fast weights per document, as in dynamic evaluation);
* two levels at one period: both are written every 256 tokens, the fast one starts again at a document. The control;
* slow level: the same two, but the slow one is written every 4,096 tokens, with the same six rates and half-lives per
  token (`convert_to_cms(..., assign="nested")`).

Each arm has six settings. The one that gains most at under 1 % forgetting on a validation stream is read on five test
streams whose texts no choice has seen; intervals are over these five. Two arms forgot less there than the slow level.
So, after that was seen, they were read at higher rates too, and are compared at the forgetting of the slow level, by
lines between the points of each stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.data.text import locate, read_text
from nestling.evals.protocol import token_losses
from nestling.evals.reading import domain_loss
from nestling.evals.statistics import interval, paired
from nestling.memories.continuum import InnerRule
from nestling.models import State
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import add_data, parser_of, run, shown
from recipes.pretrained_reading import DATA, known_stories
from recipes.translation_tasks import read_pairs

RUNS = Path("runs/slow_levels")
LENGTH, VISITS, PERIOD, SLOW, CONTEXT = 2048, 2, 256, 4096, 512
LIMIT, STORIES, STORY = 1.0, 24, 192  # percent of forgetting; stories asked, and the tokens of each that are predicted
PIECE = 40_000  # characters that are more than enough for VISITS documents
KINDS = ("novel", "Wikipedia", "Shakespeare", "language")
# A stream by the names of its novel and language, and where in Wikipedia and Shakespeare its pieces start (shares).
VALIDATION = (("emma", "bible_glv_eng", "wikitext2_valid", 0.0, 0.9),)
TEST = tuple(
    (novel, language, "wikitext2_test_a", 0.18 * i, 0.17 * i)
    for i, (novel, language) in enumerate(
        (
            ("great_expectations", "bible_pot_eng"),
            ("don_quixote", "tgl"),
            ("huckleberry_finn", "eus"),
            ("little_women", "kab"),
            ("ulysses", "bre"),
        )
    )
)
TESTED = ("gain", "gain on beginnings", "forgetting")
Stream = tuple[str, str, str, float, float]


@dataclass(frozen=True)
class Setting:
    """Rates and decays per write, fast to slow; `kept`: part of what was written that outlives a document's end."""

    rates: tuple[float, ...]
    decays: tuple[float, ...]
    kept: float = 1.0


def two(slow: int) -> tuple[Setting, ...]:
    """Two levels at equal rates and half-lives per token, whatever the slow one's period."""
    share = slow / SLOW
    decay = round(1 - (1 - 0.2) ** share, 6)
    return tuple(Setting((fast, rate * share), (0.0, decay)) for fast in (0.32, 0.64) for rate in (1.28, 2.56, 5.12))


ARMS: dict[str, tuple[tuple[int, ...], tuple[Setting, ...]]] = {
    "one level": (
        (PERIOD,),
        tuple(
            Setting((rate,), (decay,))
            for rate, decay in ((0.03, 0.03), (0.04, 0.03), (0.057, 0.03), (0.08, 0.03), (0.04, 0.01), (0.16, 0.1))
        ),
    ),
    "one level, partly kept": (
        (PERIOD,),
        tuple(
            Setting((rate,), (decay,), kept)
            for rate, decay, kept in (
                (0.64, 0.0, 0.0),
                (0.64, 0.0, 0.3),
                (0.64, 0.03, 0.4),
                (0.64, 0.03, 0.5),
                (0.32, 0.03, 0.5),
                (1.28, 0.03, 0.4),
            )
        ),
    ),
    "two levels, one period": ((PERIOD, PERIOD), two(PERIOD)),
    "slow level": ((PERIOD, SLOW), two(SLOW)),
}
NESTED = "slow level"
STRONGER = {
    "one level": (Setting((0.113,), (0.03,)),),
    "two levels, one period": tuple(
        Setting((0.64, rate), ARMS["two levels, one period"][1][0].decays) for rate in (0.226, 0.32)
    ),
}


# --- texts ------------------------------------------------------------------------------------------------------


def documents(stream: Stream, folder: str | None) -> Tensor:
    """(VISITS * 4, LENGTH) ids of a stream, the four kinds in turn."""
    from nestling.hf.llama2c import read_tokenizer

    encode = read_tokenizer(DATA / "tok512.bin.xz").encode
    ids = [torch.from_numpy(encode(text))[: VISITS * LENGTH] for text in texts(stream, folder)]
    return torch.stack(ids).view(len(KINDS), VISITS, LENGTH).transpose(0, 1).flatten(0, 1)


def texts(stream: Stream, folder: str | None) -> tuple[str, str, str, str]:
    """A piece of each kind."""
    novel, language, wikipedia, there, here = stream
    return (
        piece(file(f"lm/gutenberg/{novel}", folder), 0.25),
        piece(file(f"lm/{wikipedia}", folder), there),
        piece(file("lm/tinyshakespeare_train", folder), here),
        "\n".join(source for source, _ in read_pairs(language, folder))[:PIECE],
    )


def file(name: str, folder: str | None) -> str:
    return read_text(locate(f"{name}.txt.xz", folder))


def piece(text: str, share: float) -> str:
    """PIECE characters from a share of the text on."""
    start = int(share * len(text))
    return text[start : start + PIECE]


# --- reading ----------------------------------------------------------------------------------------------------


def converted(periods: Sequence[int], setting: Setting) -> Any:
    """The bundled model with these levels inside each other; all but the slowest start again at a document."""
    from nestling.hf import convert_to_cms
    from nestling.hf.llama2c import read_model

    rules = [InnerRule(decay=decay, reset="document") for decay in setting.decays]
    rules[-1] = replace(rules[-1], reset="never")
    plain = read_model(DATA / "stories260K.bin.xz")
    return convert_to_cms(
        plain, periods, assign="nested", rates=setting.rates, rule=rules, old_text=own_text_of(plain), context=CONTEXT
    ).reader


def own_text_of(plain: Any) -> Tensor:
    """What the model samples itself: the old text."""
    from nestling.hf.own_text import own_text

    return own_text(plain, seed=0)


@torch.no_grad()
def read(reader: Any, stream: Tensor, *, learn: bool = True, kept: float = 1.0) -> tuple[Tensor, State]:
    """Losses (B, documents, LENGTH - 1) of streams (B, documents, LENGTH), and the state where another would start."""
    state: State | None = None
    losses = []
    for document in stream.unbind(1):
        out = reader(document, state, learn=learn)
        losses.append(token_losses(out.logits[:, :-1], document[:, 1:]))
        state = after_document(reader, out.state, kept)
    assert state is not None
    return torch.stack(losses, 1), state


def after_document(reader: Any, state: State, kept: float) -> State:
    """A document ends: the last segment is learned, contexts are empty, levels are reset, or kept in part."""
    nothing = torch.zeros(state.rows, 1, dtype=torch.long)
    state = reader(nothing, state, mask=nothing.bool(), new_document=~nothing.bool()).state
    if kept == 1:
        return state
    share = torch.full((state.rows,), kept)
    fast = {
        path: replace(level, delta={name: delta.times(share) for name, delta in level.delta.items()})
        for path, level in state.tree.fast.items()
    }
    return State(replace(state.tree, fast=fast), reader)


def asked_stories() -> Tensor:
    """(STORIES, STORY + 1) the beginnings of bundled stories that are long enough."""
    return torch.stack([ids[0, : STORY + 1] for ids in known_stories() if ids.shape[1] > STORY][:STORIES])


def measured(arm: str, setting: Setting, streams: Sequence[Stream], folder: str | None) -> Cell:
    """Nats of each stream over the return and over the first quarter of its documents; the stories; the writes."""
    reader = converted(ARMS[arm][0], setting)
    texts = torch.stack([documents(stream, folder) for stream in streams])
    losses, state = read(reader, texts, kept=setting.kept)
    return nats_of(losses) | {
        "stories": [domain_loss(reader, asked_stories(), state.select([row])) for row in range(len(texts))],
        "writes": [int(level.writes[0]) for level in state.tree.fast.values()][: len(ARMS[arm][0])],
        "state_bytes": state.nbytes // len(texts),
    }


def nats_of(losses: Tensor) -> Cell:
    """Of each stream, over the documents of the return."""
    again = losses[:, len(KINDS) * (VISITS - 1) :].double()
    parts = {"nats": again, "beginnings": again[:, :, : LENGTH // 4]}
    return {name: part.mean((1, 2)).tolist() for name, part in parts.items()} | {
        "kinds": {kind: again[:, i].mean(1).tolist() for i, kind in enumerate(KINDS)}
    }


def frozen(split: str, streams: Sequence[Stream], folder: str | None) -> Cell:
    """The model as it is."""

    def work() -> Cell:
        reader = converted((PERIOD,), ARMS["one level"][1][0])
        losses, _ = read(reader, torch.stack([documents(s, folder) for s in streams]), learn=False)
        return nats_of(losses) | {"stories": domain_loss(reader, asked_stories())}

    return cell(RUNS, f"{split}-frozen", work)


def scored(split: str, arm: str, setting: Setting, streams: Sequence[Stream], folder: str | None) -> Cell:
    """Gains and forgetting in percent, by stream."""
    numbers = "-".join(f"{x:g}" for x in (*setting.rates, *setting.decays, setting.kept))
    name = f"{split}-{arm.replace(' ', '_').replace(',', '')}-{numbers}"
    made, still = cell(RUNS, name, lambda: measured(arm, setting, streams, folder)), frozen(split, streams, folder)
    gains = {
        what: [100 * (1 - a / b) for a, b in zip(made[key], still[key], strict=True)]
        for what, key in (("gain", "nats"), ("gain on beginnings", "beginnings"))
    }
    kinds = {
        kind: [100 * (1 - a / b) for a, b in zip(values, still["kinds"][kind], strict=True)]
        for kind, values in made["kinds"].items()
    }
    lost = [100 * (value / still["stories"] - 1) for value in made["stories"]]
    return {"setting": asdict(setting), **gains, "gain by kind": kinds, "forgetting": lost, "cell": made}


# --- report -----------------------------------------------------------------------------------------------------


def best(points: Sequence[Cell]) -> Cell:
    """The point that gains most at under LIMIT forgetting. Raises ValueError if all forget more."""
    safe = [p for p in points if p["forgetting"][0] < LIMIT]
    if not safe:
        raise ValueError(f"no setting of {len(points)} forgets less than {LIMIT} %; add smaller rates")
    return max(safe, key=lambda p: p["gain"][0])


def report(folder: str | None) -> Path:
    """Choose, test, and write the result."""
    points = {arm: [scored("validation", arm, s, VALIDATION, folder) for s in ARMS[arm][1]] for arm in ARMS}
    chosen = {arm: Setting(**lists_to_tuples(best(made)["setting"])) for arm, made in points.items()}
    tested = {arm: scored("test", arm, setting, TEST, folder) for arm, setting in chosen.items()}
    rows: Cell = {}
    for arm, found in tested.items():
        rows[arm] = found | {"intervals": {}, "slow level less this": {}}
        for what in TESTED:
            rows[arm]["intervals"][what] = vars(interval(found[what]))
            if arm != NESTED:
                rows[arm]["slow level less this"][what] = vars(paired(tested[NESTED][what], found[what]))
    for arm, settings in STRONGER.items():
        rows[arm]["stronger"] = [scored("test", arm, setting, TEST, folder) for setting in settings]
        level = gains_at([rows[arm], *rows[arm]["stronger"]], tested[NESTED]["forgetting"])
        rows[arm]["slow level less this"]["gain at equal forgetting"] = vars(paired(tested[NESTED]["gain"], level))
    config = {"validation": VALIDATION, "test": TEST, "length": LENGTH, "visits": VISITS, "limit": LIMIT}
    arms = {arm: {"periods": periods, "settings": [asdict(s) for s in made]} for arm, (periods, made) in ARMS.items()}
    return write_result("slow_levels", config | {"arms": arms}, [0], rounded({"validation": points, "test": rows}))


def gains_at(points: Sequence[Cell], forgetting: Sequence[float]) -> list[float]:
    """The gain of each stream where the lines between its points, by rising rate, first have this forgetting.

    Raises ValueError where no point forgets so much.
    """
    found = []
    for stream, wanted in enumerate(forgetting):
        path = [(p["forgetting"][stream], p["gain"][stream]) for p in points]
        for (f0, g0), (f1, g1) in zip(path, path[1:], strict=False):
            if f0 <= wanted <= f1:
                found.append(g0 + (g1 - g0) * (wanted - f0) / (f1 - f0))
                break
        else:
            raise ValueError(f"stream {stream}: forgetting {wanted} is not between the points {path}; add a rate")
    return found


def lists_to_tuples(fields: Cell) -> Cell:
    return {name: tuple(value) if isinstance(value, list | tuple) else value for name, value in fields.items()}


def page(result: Cell) -> str:
    """The result as markdown."""
    lines = [
        "| arm | setting | validation: gain, forgotten | gain | on beginnings | forgotten | slow level gains more |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, row in result["metrics"]["test"].items():
        point = next(p for p in result["metrics"]["validation"][arm] if p["setting"] == row["setting"])
        tested = " | ".join(shown(row["intervals"][what], ".1f") for what in TESTED)
        more = row["slow level less this"]
        last = shown(more["gain"], ".1f") if more else ""
        equal = more.get("gain at equal forgetting")
        last += f"; at equal forgetting {shown(equal, '.1f')}" if equal else ""
        chosen = f"{point['gain'][0]:.1f}, {point['forgetting'][0]:.1f}"
        lines.append(f"| {arm} | {words(row['setting'])} | {chosen} | {tested} | {last} |")
    return "\n".join([*lines, "", f"{cpu_minutes(result['metrics']):.0f} CPU minutes."])


def words(setting: Cell) -> str:
    """A setting in a cell of a table."""
    pairs = zip(setting["rates"], setting["decays"], strict=True)
    levels = "; ".join(f"{rate:g}, decay {decay:g}" for rate, decay in pairs)
    return levels if setting["kept"] == 1 else f"{levels}, kept {setting['kept']:g}"


def draw(result: Cell, path: Path) -> None:
    """Gain against forgetting: every setting on the validation stream, and the chosen ones on the test streams."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for i, (arm, points) in enumerate(result["metrics"]["validation"].items()):
        colour, row = f"C{i}", result["metrics"]["test"][arm]
        left.scatter([p["forgetting"][0] for p in points], [p["gain"][0] for p in points], color=colour, label=arm)
        right.scatter(row["forgetting"], row["gain"], color=colour, alpha=0.4, s=16)
        right.scatter(row["intervals"]["forgetting"]["mean"], row["intervals"]["gain"]["mean"], color=colour, s=70)
    for axes, title in (
        (left, "validation stream, every setting"),
        (right, "test streams, chosen settings; large: mean"),
    ):
        axes.axvline(LIMIT, color="black", linewidth=0.6)
        axes.set(xlabel="forgetting of the stories, %", title=title)
    left.set_xlim(right=7)  # a strong slow level may lie far outside
    left.set_ylabel("gain on the return, %")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("slow_levels", __doc__)
    add_data(parser)
    options = parser.parse_args(argv)
    run("slow_levels", options, lambda: report(options.data), page, draw)


if __name__ == "__main__":
    main()
