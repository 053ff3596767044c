"""Common sense, zero-shot, through lm-eval with task files of our own over local data: no network is needed.

    common_sense(as_lm(model, tokenizer), data="DIR")                        # DIR/evals/*.jsonl.xz
    lm-eval run --model hf --model_args pretrained=gpt2 --include_path nestling/evals/tasks --tasks nestling_piqa

The task files (`tasks/*.yaml`) have the prompts and metrics of lm-eval's own tasks where the data allow it.
CommonsenseQA and SIQA are llm-foundry's variants: the choices stand in the prompt, the answer is a letter, and some
items lost a choice. All are the first 300 to 1,000 items, so they are called nestling_*: no score here is an official
one. Official tasks go by their own names (`hellaswag`), where a network is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestling.data import locate, read_records
from nestling.evals.lm_harness import Accuracy, accuracies

FOLDER = Path(__file__).parent / "tasks"
PREFIX = "nestling_"
REPORTED = {  # the metric of each task that papers print
    "lambada": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "siqa": "acc",
    "boolq": "acc",
    "openbook_qa": "acc_norm",
    "commonsense_qa": "acc",
}
TASKS = tuple(PREFIX + name for name in REPORTED)


def dataset(file: str, folder: str | None = None, **_: Any) -> dict[str, Any]:
    """What a task file reads: the split `test` of a file below `folder` or $NESTLING_DATA."""
    from datasets import Dataset

    return {"test": Dataset.from_list(read_records(locate(file, folder)))}


def common_sense(
    lm: Any, tasks: Sequence[str] = TASKS, *, data: str | None = None, limit: int | None = None
) -> list[Accuracy]:
    """Scores on tasks of TASKS, or on official ones by their name in lm-eval."""
    official = any(name not in TASKS for name in tasks)
    return accuracies(lm, tasks, limit=limit, folder=FOLDER, data=data, official=official)


def reported(found: Sequence[Accuracy]) -> list[Accuracy]:
    """Of each task the metric that papers print."""
    return [one for one in found if REPORTED.get(one.task.removeprefix(PREFIX), one.metric) == one.metric]
