"""Dotted overrides: types, nearest names, what belongs to an option and what does not."""

import math
from dataclasses import dataclass, field

import pytest

from nestling.cli.overrides import Override, leaves, merged, split
from nestling.cli.parser import UsageError


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 1
    rate: float = 0.5
    name: str = ""
    fast: bool = False
    window: int | None = None
    periods: tuple[float, ...] | None = None
    eval_every: int = 0


@dataclass(frozen=True, kw_only=True)
class Outer:
    train: Inner = field(default_factory=Inner)
    options: dict[str, bool | int | float | str | None | tuple[float, ...]] = field(default_factory=dict)


def values(line: str) -> dict[str, object]:
    rest, found = split(line.split(), Outer)
    assert rest == []
    return {".".join(override.path): override.value for override in found}


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("--train.steps 100", "train.steps", 100),
        ("--train.steps=100", "train.steps", 100),
        ("--train.steps 1_000", "train.steps", 1000),
        ("--train.steps -3", "train.steps", -3),
        ("--train.rate 1e-3", "train.rate", 1e-3),
        ("--train.rate 2", "train.rate", 2.0),
        ("--train.rate inf", "train.rate", math.inf),
        ("--train.name 17", "train.name", "17"),
        ("--train.name=", "train.name", ""),
        ("--train.fast", "train.fast", True),
        ("--train.fast false", "train.fast", False),
        ("--train.window 64", "train.window", 64),
        ("--train.window none", "train.window", None),
        ("--train.periods 16 64 inf", "train.periods", (16.0, 64.0, math.inf)),
        ("--train.periods 16,64", "train.periods", (16.0, 64.0)),
        ("--train.periods=16", "train.periods", (16.0,)),
        ("--train.eval-every 5", "train.eval_every", 5),
        ("--options.kappa 30", "options.kappa", 30),
        ("--options.kappa 0.5,inf", "options.kappa", (0.5, math.inf)),
        ("--options.rule muon", "options.rule", "muon"),
        ("--options.online true", "options.online", True),
    ],
)
def test_values_are_typed_by_their_field(line: str, path: str, value: object) -> None:
    found = values(line)
    assert found == {path: value}
    assert type(found[path]) is type(value)


def test_the_rest_of_the_line_stays_in_order() -> None:
    line = "first --train.fast --json --train.periods 1 2 --out x --train.steps 3 second"
    rest, found = split(line.split(), Outer)
    assert rest == ["first", "--json", "--out", "x", "second"]
    assert [override.path[-1] for override in found] == ["fast", "periods", "steps"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--train.stepz 1", "unknown option --train.stepz; did you mean --train.steps?"),
        ("--trian.steps 1", "unknown option --trian.steps; did you mean --train.steps?"),
        ("--optim.steps 1", "unknown option --optim.steps; did you mean --train.steps?"),
        ("--train.steps.more 1", "unknown option --train.steps.more; did you mean --train.steps?"),
        ("--train.steps x", "--train.steps=x is not of type int; give a value of that type"),
        ("--train.steps 1.5", "--train.steps=1.5 is not of type int; give a value of that type"),
        ("--train.window x", "--train.window=x is not of type int or none; give a value of that type"),
        ("--train.periods 1 x", "--train.periods=1 x is not of type float ... or none; give a value of that type"),
        ("--train.steps", "--train.steps needs a value of type int"),
        ("--train.steps --json", "--train.steps needs a value of type int"),
        ("--train.periods", "--train.periods needs a value of type float ... or none"),
    ],
)
def test_errors_name_option_value_and_remedy(line: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        split(line.split(), Outer)
    assert str(error.value) == message


@dataclass(frozen=True, kw_only=True)
class Nested:
    run: Outer = field(default_factory=Outer)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--run.train", "--run.train is a group; name one of --run.train.steps, --run.train.rate"),
        ("--run.options", "--run.options is a group; name one of --run.options.NAME"),
    ],
)
def test_a_group_is_no_option(option: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        split([option, "1"], Nested)
    assert str(error.value).startswith(message)


def test_leaves_list_every_option() -> None:
    assert leaves(Outer)[:2] == ["--train.steps", "--train.rate"]
    assert leaves(Outer)[-1] == "--options.NAME"


def test_merging_changes_only_what_is_named() -> None:
    before = {"train": {"steps": 1, "rate": 2.0}, "options": {}}
    after = merged(before, [Override(("train", "steps"), 5), Override(("options", "kappa"), 1)])
    assert after == {"train": {"steps": 5, "rate": 2.0}, "options": {"kappa": 1}}
    assert before == {"train": {"steps": 1, "rate": 2.0}, "options": {}}
