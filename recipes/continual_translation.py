"""Languages learned one after the other: translation into English, each alone and all in sequence, by method.

    python -m recipes.continual_translation --data DIR    # DIR/mt; needs transformers, peft, and sacrebleu for chrF
    python -m recipes.continual_translation --table       # the committed result as tables
    python -m recipes.continual_translation --figure      # and as docs/figures/continual_translation.png

The bundled pretrained model (260,032 parameters, English stories, 512 pieces, other letters as bytes) learns pairs
"source = English" of two languages (Manx, Potawatomi: short verses) and of three (Tagalog, Basque, Kabyle: short
sentences of Tatoeba), one language at a time, some passes over each. Asked for after each language: bits per byte of
the English of test pairs, with the source before it. At the end, and alone: chrF of greedy translations (sacrebleu).
A model of this size does not translate; what it can learn is what such English looks like, and a few names and words.
So bits are the finer measure, and "no source", the same bits with the sources of other pairs, says what is due to the
source.

One number of each method is the best of those that were tried by the mean bits over all languages at the end and both
sequences, on pairs for choosing, one seed; CMS-3 has the rate of CMS-1, replay and "joint" that of "sequential".

* Hope-1: the MLPs are levels with a period of 8 pairs, plain gradients, an old-key metric of the model's own text and
  online of what was read. "old text": the same without the online part. "attention too": and the attention's maps are
  levels as well. "CMS-1": and the output map, written along Adam's direction, kappa 3. That was found on the pairs for
  choosing, among about 35 settings; the others had three or four values each. "CMS-3": three levels of it, periods of
  8, 32 and 128 pairs, the rate of the slower ones twice and four times as large.
* "sequential" trains all weights with Adam, "MLPs" what Hope-1 writes, "every map" what CMS-1 writes. "joint": all
  languages at once. Everyone passes as often over the same batches, and steps or writes once a batch.
* ICL shows pairs in the context of the frozen model, as many as fit, in equal parts of every language learned.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.evals.continual import continual, mean
from nestling.evals.statistics import interval, paired
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import add_data, parser_of, run, shown
from recipes.translation_tasks import SEQUENCES, Pairs, language

if TYPE_CHECKING:
    from recipes.continual_methods.fine_tuning import Method
    from recipes.continual_methods.language import LanguageTask

PAIRS, ASKED, PASSES, BATCH, BUFFER, FISHER, NEW = 96, 30, 2, 8, 48, 16, 20
ROOM = 448  # tokens of context of ICL
BEGIN, CHOOSING_SEED = 1, 100
RUNS = Path("runs/continual_translation")
WRITE, ADAM = (0.1, 0.2, 0.4), (1e-4, 3e-4, 1e-3)
METHODS: dict[str, tuple[float, ...]] = {
    "Hope-1": WRITE,
    "old text": WRITE,
    "attention too": WRITE,
    "CMS-1": (5e-4, 1.5e-3, 4.5e-3),
    "CMS-3": (5e-4, 1.5e-3, 4.5e-3),
    "sequential": ADAM,
    "MLPs": ADAM,
    "every map": ADAM,
    "LoRA": (3e-4, 1e-3, 3e-3),
    "EWC": (1e1, 1e2, 1e3, 1e4),
    "replay": (3e-4,),
    "joint": (3e-4,),
    "ICL": (0.0,),
}
LEVELS = ("Hope-1", "old text", "attention too", "CMS-1", "CMS-3")
ALONE = ("CMS-1", "sequential")  # what is also asked of each language by itself


def encode(text: str) -> Tensor:
    from recipes.continual_methods.language import tokenizer

    return torch.from_numpy(tokenizer().encode(text, add_special_tokens=False))


def load(sequence: str, folder: str | None, seed: int, *, tuning: bool) -> list[Pairs]:
    """The languages of a sequence, as one seed has them."""
    return [
        language(name, folder, encode, begin=BEGIN, seed=seed, count=PAIRS, asked=ASKED, tuning=tuning)
        for name in SEQUENCES[sequence]
    ]


def passes(parts: Sequence[Pairs], seed: int) -> list[Any]:
    """Every pair of these languages PASSES times, shuffled anew for each pass."""
    generator, made = random.Random(seed), []
    for _ in range(PASSES):
        once = [text for part in parts for text in part.learned]
        generator.shuffle(once)
        made += once
    return made


def bits(task: LanguageTask, part: Pairs, *, other_sources: bool = False) -> float:
    """Bits per byte of the English, with its own source before it or with that of another pair."""
    texts = part.asked_texts
    if other_sources:
        turned = [*texts[1:], texts[0]]
        texts = [
            (torch.cat([theirs[:at], ids[start:]]), at)
            for (ids, start), (theirs, at) in zip(texts, turned, strict=True)
        ]
    return bits_per_byte(task.nats(texts)[0], part)


def bits_per_byte(nats: float, part: Pairs) -> float:
    """Nats over all answers as bits per byte of the English."""
    return nats / math.log(2) / sum(len(f"{english}\n".encode()) for _, english in part.asked)


def line(ids: Sequence[int]) -> str:
    """The first line of what was generated."""
    from recipes.continual_methods.language import tokenizer

    return tokenizer().decode(ids).split("\n")[0].strip()


@torch.no_grad()
def translations(task: LanguageTask, part: Pairs) -> list[str]:
    """Greedy, to the end of the line."""
    prompts = [ids[:start] for ids, start in part.asked_texts]
    width = max(len(p) for p in prompts)
    rows = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    places = torch.arange(width) >= width - torch.tensor([len(p) for p in prompts])[:, None]
    end = int(encode("\n")[-1])
    made = task.model.generate(
        rows, attention_mask=places.long(), max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    return [line(ids.tolist()) for ids in made[:, width:]]


def chrf(found: Sequence[str], part: Pairs) -> tuple[float, str]:
    """chrF of sacrebleu, and its signature."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ImportError("chrF needs the package sacrebleu: pip install 'nestling[translation]'") from error
    metric = CHRF()
    score = metric.corpus_score(list(found), [[english for _, english in part.asked]])
    return float(score.score), str(metric.get_signature())


def ends(task: LanguageTask, method: Method, parts: Sequence[Pairs]) -> Cell:
    """What is said of a model that has learned all it will: bits, bits without the source, chrF."""
    with method.reading():
        made = [translations(task, part) for part in parts]
        scores = [chrf(lines, part) for lines, part in zip(made, parts, strict=True)]
        return {
            "bits": [bits(task, part) for part in parts],
            "no source": [bits(task, part, other_sources=True) for part in parts],
            "chrF": [score for score, _ in scores],
            "signature": scores[0][1],
            "samples": [made[0][:2]],
        }


def run_cell(
    name: str, value: float, rate: float, sequence: str, seed: int, folder: str | None, *, tuning: bool
) -> Cell:
    """One method on one sequence: all languages in turn and, but for choosing, each of them alone."""

    def work() -> Cell:
        from recipes.continual_methods.language import make

        torch.manual_seed(seed)
        parts = load(sequence, folder, seed, tuning=tuning)

        def fresh() -> tuple[LanguageTask, Method]:
            return make(name, value, rate, batch=BATCH, buffer=BUFFER, fisher=FISHER, seed=seed)

        task, method = fresh()
        first = [bits(task, part) for part in parts]
        rows = []
        for t, todo in enumerate([[*parts]] if name == "joint" else [[part] for part in parts]):
            method.learn(passes(todo, seed * 10 + t))
            if not tuning or t == len(parts) - 1 or name == "joint":
                with method.reading():
                    rows.append([bits(task, part) for part in parts])
        if tuning:
            return {"bits": rows}
        made: Cell = {"first": first, "bits": rows, "sequence": ends(task, method, parts)}
        if name not in ALONE:
            return made
        made["alone"] = []
        for t, part in enumerate(parts):
            task, method = fresh()
            method.learn(passes([part], seed * 10 + t))
            made["alone"].append(ends(task, method, [part]))
        return made

    label = f"{'choose' if tuning else 'test'}-{len(SEQUENCES[sequence])}-{name}-{value:g}-{seed}"
    return cell(RUNS, label, work)


def in_context(sequence: str, seed: int, folder: str | None) -> Cell:
    """The frozen model with pairs in its context: of one language, and of all of the sequence."""

    def work() -> Cell:
        from recipes.continual_methods.language import LanguageTask, pretrained
        from recipes.continual_methods.prompted import Prompted, filled

        parts = load(sequence, folder, seed, tuning=False)
        task = LanguageTask(pretrained())
        end = int(encode("\n")[-1])

        def prompted(shown: Sequence[Pairs], part: Pairs) -> Cell:
            prompt = filled([[ids for ids, _ in other.learned] for other in shown], BEGIN, ROOM)
            reader = Prompted(task.model, prompt, end=end, new=NEW)
            answers = [reader.ask(text) for text in part.asked_texts]
            score, signature = chrf([line(said) for _, said in answers], part)
            return {
                "bits": bits_per_byte(sum(nats for nats, _ in answers), part),
                "chrF": score,
                "signature": signature,
            }

        return {
            "first": [bits(task, part) for part in parts],
            "alone": [prompted([part], part) for part in parts],
            "sequence": [prompted(parts, part) for part in parts],
        }

    return cell(RUNS, f"test-{len(SEQUENCES[sequence])}-ICL-{seed}", work)


def choose(name: str, rate: float, folder: str | None) -> dict[str, float]:
    """Mean bits at the end by value, over both sequences, on pairs for choosing."""
    one = f"{name[:-1]}1" if name.endswith("-3") else name
    found = {}
    for value in METHODS[name] if len(METHODS[name]) > 1 else ():
        made = [run_cell(one, value, rate, s, CHOOSING_SEED, folder, tuning=True) for s in SEQUENCES]
        found[f"{value:g}"] = mean([mean(m["bits"][-1]) for m in made])
    return found


def report(seeds: int, folder: str | None) -> Path:
    """Run what is missing, and write the result."""
    metrics: Cell = {"tried": {}, "chosen": {}, "sequences": {}}
    rate = 0.0
    for name in ("sequential", *(name for name in METHODS if name != "sequential")):
        found = choose(name, rate, folder)
        value = min(METHODS[name], key=lambda v: found.get(f"{v:g}", 0.0))
        rate = value if name == "sequential" else rate
        metrics["tried"][name], metrics["chosen"][name] = found, value
    metrics["reference"] = min(LEVELS, key=lambda name: min(metrics["tried"][name].values()))
    for sequence in SEQUENCES:
        methods: Cell = {}
        for name in METHODS:
            value = metrics["chosen"][name]
            methods[name] = summary(
                [
                    in_context(sequence, seed, folder)
                    if name == "ICL"
                    else run_cell(name, value, rate, sequence, seed, folder, tuning=False)
                    for seed in range(seeds)
                ]
            )
        metrics["sequences"][sequence] = {"methods": methods, "differences": differences(methods)}
    config: Cell = {"pairs": PAIRS, "asked": ASKED, "passes": PASSES, "batch": BATCH, "buffer": BUFFER}
    config |= {"fisher": FISHER, "new": NEW, "room": ROOM, "chosen on": [*SEQUENCES, CHOOSING_SEED]}
    return write_result("continual_translation", config, list(range(seeds)), rounded(metrics))


def summary(cells: Sequence[Cell]) -> Cell:
    """The cells, and by seed the means over the languages of what the table prints."""
    made: Cell = {"cells": list(cells)}
    if "bits" in cells[0]:
        made["bits"] = [mean(c["sequence"]["bits"]) for c in cells]
        made["no source"] = [mean(c["sequence"]["no source"]) for c in cells]
        made["chrF"] = [mean(c["sequence"]["chrF"]) for c in cells]
    else:
        made |= {key: [mean([one[key] for one in c["sequence"]]) for c in cells] for key in ("bits", "chrF")}
    if "alone" in cells[0]:
        for key in ("bits", "chrF"):
            values = [[one[key] for one in c["alone"]] for c in cells]
            made[f"{key} alone"] = [mean([flat(v) for v in seed]) for seed in values]
    if len(cells[0].get("bits", ())) > 1:
        numbers = [continual(c["bits"], smaller_is_better=True, initial=c["first"]).to_dict() for c in cells]
        made |= {key: [n[key] for n in numbers] for key in numbers[0] if key != "average"}
    return made


def flat(value: float | list[float]) -> float:
    """The one number of a list of one, or the number."""
    return value[0] if isinstance(value, list) else value


def differences(methods: Cell) -> Cell:
    """Every kind of levels less each other method, paired by seed: mean bits at the end."""
    return {
        one: {o: vars(paired(methods[one]["bits"], m["bits"])) for o, m in methods.items() if o != one}
        for one in LEVELS
    }


def page(result: Cell) -> str:
    """The result as markdown."""
    lines = []
    for sequence, found in result["metrics"]["sequences"].items():
        methods, gaps = found["methods"], found["differences"]
        best = result["metrics"]["reference"]
        first = mean(methods["ICL"]["cells"][0]["first"])
        lines += ["", f"**{sequence}** (before: {first:.3f} bits per byte)", ""]
        titles = ["bits, in sequence", "bits, alone", "sources exchanged", "forgetting, bits", "chrF, in sequence"]
        lines += [
            f"| method | {' | '.join(titles)} | chrF, alone | {best} less this, bits |",
            "|---" + "|---:" * 7 + "|",
        ]
        for name, made in methods.items():
            keys = [("bits", ".3f"), ("bits alone", ".3f"), ("no source", ".3f"), ("forgetting", ".3f")]
            keys += [("chrF", ".1f"), ("chrF alone", ".1f")]
            cells = [shown(vars(interval(made[key])), form) if key in made else "" for key, form in keys]
            gap = "" if name == best else shown(gaps[best][name], "+.3f")
            lines.append(f"| {name} | {' | '.join(cells)} | {gap} |")
    return "\n".join([*lines[1:], "", f"CPU time: {cpu_minutes(result['metrics']):.0f} minutes (rates not counted)."])


def draw(result: Cell, path: Path) -> None:
    """As Figure 8 of the paper: alone against in sequence, bits and chrF, with the intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sequences = result["metrics"]["sequences"]
    figure, axes = plt.subplots(2, len(sequences), figsize=(6.5 * len(sequences), 6.4), squeeze=False)
    for column, (sequence, found) in enumerate(sequences.items()):
        methods = found["methods"]
        for panel, key, unit in zip(axes[:, column], ("bits", "chrF"), ("bits per byte", "chrF"), strict=True):
            for i, (kind, colour) in enumerate(((f"{key} alone", "#c05621"), (key, "#2b6cb0"))):
                for j, made in enumerate(methods.values()):
                    if kind in made:
                        one = interval(made[kind])
                        low, high = one.low or one.mean, one.high or one.mean
                        error = [[one.mean - low], [high - one.mean]]
                        panel.errorbar(j + 0.24 * (i - 0.5), one.mean, error, color=colour, marker="o", capsize=2)
            panel.set_xticks(range(len(methods)), list(methods), rotation=35, fontsize=8)
            panel.set_ylabel(unit)
            panel.set_title(sequence, fontsize=10)
    for name, colour in (("alone", "#c05621"), ("in sequence", "#2b6cb0")):
        axes[0, 0].plot([], [], color=colour, marker="o", label=name)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("continual_translation", __doc__)
    add_data(parser)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("continual_translation", options, lambda: report(options.seeds, options.data), page, draw)


if __name__ == "__main__":
    main()
