"""The recipes of the needles: equal parameters, the vocabulary, the batches, the loss, the rates and the pages."""

import copy
import math
import re

import pytest
import torch
from torch.nn import functional as F

from nestling.evals.suite import NOTHING
from nestling.memories.self_modifying import SelfModifyingTitans
from recipes import needle_gates, needle_levels, needle_tasks, needles
from recipes import needle_training as training

TINY = {"dim": 8, "depth": 1, "heads": 1}


@pytest.mark.parametrize("name", needles.MODELS)
def test_models_have_equal_parameters_and_learn(name: str) -> None:
    model, goal = training.make(name), training.make("hope").num_parameters()
    assert abs(model.num_parameters() / goal - 1) < 0.02
    row = training.task("s-niah-1", "train").examples(1, (96, 96), seed=0)
    training.loss_on(model, row, torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "inner" not in n)


def test_every_digit_is_a_token_and_words_come_back() -> None:
    spell = training.tokenizer()
    said = "The special magic number for quiet otter is: 1234567. "
    pieces = [spell.decode([i]) for i in spell.encode(said).tolist()]
    assert [p for p in pieces if p.strip().isdigit()] == list("1234567")
    assert spell.decode(spell.encode(said)) == said and spell.vocab_size == training.VOCABULARY


def test_books_do_not_overlap() -> None:
    made = training.texts()
    assert len(made["train"]) > 8 * len(made["validation"]) and "Ishmael" in made["test"]
    assert made["validation"][:200] not in made["train"] and "Ishmael" not in made["train"]


def test_rows_grow_from_the_ends_of_needle_and_question() -> None:
    first, last = training.batch(0, seed=0), training.batch(training.STEPS - 1, seed=0)
    said = training.tokenizer().decode(first.tokens[0].tolist())
    assert re.fullmatch(r" is: (\d{7})\.  provided text is \1", said) and first.tokens.numel() >= training.TOKENS
    for rows in (first, last):
        asked = rows.targets != NOTHING
        assert (asked.sum(1) == 8).all() and torch.equal(rows.targets[asked], rows.tokens[asked.roll(1, 1)])
    assert last.tokens.shape == (2, training.LENGTH)
    assert torch.equal(first.tokens, training.batch(0, seed=0).tokens)
    assert not torch.equal(first.tokens, training.batch(0, seed=1).tokens)
    lengths = [training.length_at(step) for step in range(training.STEPS)]
    assert lengths == sorted(lengths) and set(lengths) == {length for _, length in training.STAGES}


def test_the_loss_is_that_of_the_answers_and_half_of_a_part_of_the_text() -> None:
    model, rows = training.make("delta-net", TINY), training.task("s-niah-2", "train").examples(3, (96, 100), seed=1)
    logits = model(rows.tokens, learn=False).logits[:, :-1].flatten(0, 1)
    answers = F.cross_entropy(logits, rows.targets[:, :-1].flatten(), ignore_index=NOTHING)
    places = torch.randperm(len(logits), generator=torch.Generator().manual_seed(5))[: len(logits) // training.PART]
    text = F.cross_entropy(logits[places], rows.tokens[:, 1:].flatten()[places])
    found = training.loss_on(model, rows, torch.Generator().manual_seed(5))
    assert found.item() == pytest.approx((answers + training.LANGUAGE * text).item(), rel=1e-5)


def test_the_gates_of_hope_start_where_they_are_told_to() -> None:
    for layer in training.make("hope").modules():
        if isinstance(layer, SelfModifyingTitans):
            assert layer.memory == "linear" and not layer.conv.activation
            assert layer.half_lives()["memory"] == pytest.approx(training.HALF_LIFE, rel=0.05)
            assert layer.rates[:, :-1].mean().item() == pytest.approx(training.GENERATORS, rel=1e-3)
            assert layer.eta_bias.sigmoid().mean().item() == pytest.approx(1 / (1 + math.exp(-training.ETA)))


def test_rates_rise_hold_and_fall() -> None:
    shares = [training.pace(step, 100) for step in range(100)]
    assert shares[0] < shares[10] < 1 and shares[30:70] == [1] * 40 and shares[80] > shares[99] > 0


def test_muon_takes_the_matrices_and_nothing_is_left_out() -> None:
    model = training.make("hope", TINY)
    made = training.optimizer_of(model, 1e-2)
    taken = {id(p) for group in made.param_groups for p in group["params"]}
    assert taken == {id(p) for p in model.parameters()}
    rates = {group["level"]: group["lr"] for group in made.param_groups}
    assert rates == {"matrices": pytest.approx(4e-2), "rest": pytest.approx(1e-2)}


def answers(*exact: float) -> list[dict]:
    """Cells of one model, a share for each seed, equal at all lengths and tasks."""
    return [
        {t: {str(n): {"exact": e, "bits": 1 - e} for n in needles.LENGTHS} for t in training.TRAINED} for e in exact
    ]


def test_the_fewest_bits_choose_and_better_needs_an_interval() -> None:
    swept = {f"{lr:g}": {"bits": bits} for lr, bits in zip(needles.RATES, (2.0, 1.0, 1.5), strict=True)}
    assert needles.chosen_rate(swept) == needles.RATES[1]
    cells = {"hope": answers(1.0, 0.9, 1.0), "delta-net": answers(0.1, 0.0, 0.05), "retnet": answers(0.9, 1.0, 0.9)}
    found = needles.compared(cells, "s-niah-2", needles.FAR)
    assert [found[n]["exact"]["verdict"] for n in ("delta-net", "retnet")] == ["better", "no difference shown"]
    assert found["delta-net"]["bits"]["verdict"] == "better" and found["delta-net"]["exact"]["mean"] > 0.8
    metrics = {"cells": cells, f"hope minus baseline at {needles.FAR}": {"s-niah-2": found}}
    shown = needles.page({"metrics": metrics})
    assert "| hope | 3 | 96.7 [82.3, 111]" in shown and "no difference shown" in shown


def test_an_answer_is_asked_at_its_length() -> None:
    found = needles.ask(training.make("delta-net", TINY), "s-niah-2", "validation", 128, 3, seed=0)
    assert found["n"] == 3 and found["exact"] == 0 and found["bits"] > 4


def test_levels_that_write_change_what_is_read_behind_their_first_period() -> None:
    whole = training.make("hope")
    model = needle_levels.split(whole)
    model.calibrate(needle_levels.book("train", 96, 2))
    rows = needle_levels.book("test", 160, 1)
    assert torch.allclose(model(rows, learn=False).logits, whole(rows, learn=False).logits, atol=1e-5)
    with torch.no_grad():
        still, writes = (needle_levels.writing(model, n, 64, rate=0.1)(rows, learn=True).logits for n in (0, 2))
    assert torch.allclose(still, model(rows, learn=False).logits, atol=1e-5)
    assert torch.allclose(still[:, :64], writes[:, :64], atol=1e-5)
    assert not torch.allclose(still[:, 65:], writes[:, 65:], atol=1e-5)
    config = needle_levels.writing(model, 2, 256, rate=0.1).config
    assert config.periods == (256, 1024, 4096, 16384) and config.inner_lr == (0.1, 0.1, 0.0, 0.0)


def test_the_page_of_the_levels_compares_with_no_writes() -> None:
    def cells(bits: float) -> list[dict]:
        return [{"exact": 0.5, "bits": bits + s / 10, "book": [4.0, 4.0, bits, bits + s]} for s in range(3)]

    made = {needle_levels.label(*s): cells(2.0 - 0.5 * (s[0] > 0)) for s in needle_levels.settings()}
    lines = needle_levels.page({"metrics": {"cells": made}}).splitlines()
    assert len(made) == 13 and lines[2] == "| no writes | 50 | 2.100 |  | 2.500 |  |  |"
    assert lines[3] == "| 1 x 64 | 50 | 1.600 | -0.500 [-0.500, -0.500] | 2.000 | -0.500 [-0.500, -0.500] | better |"


def test_every_task_takes_its_turn_in_the_second_training() -> None:
    spell = training.tokenizer()
    seen = set()
    for step in range(len(needle_tasks.TASKS) // 2):
        rows = needle_tasks.batch(step, seed=0)
        assert rows.tokens.shape == (training.TOKENS // 384, 384)
        for tokens, targets in zip(rows.tokens, rows.targets, strict=True):
            asked, text = targets != NOTHING, spell.decode(tokens.tolist())
            assert torch.equal(targets[asked], tokens[asked.roll(1)])
            values = re.findall(r" is: ([0-9a-f-]+)\. ", text)
            keys = set(re.findall(r"for ([a-z]+ [a-z]+) is: ", text))
            answers = spell.decode(targets[asked].tolist()).split()
            kind = "s-niah-1" if "There and back again" in text else "s-niah-3" if "uuids" in text else "s-niah-2"
            if len(values) > 1:
                kind = "multi-value" if len(keys) == 1 else "multi-query" if len(answers) > 1 else "multi-key"
            assert set(answers) <= set(values)
            seen.add(kind)
    assert seen == set(needle_tasks.TASKS)
    last = needle_tasks.batch(needle_tasks.STEPS - 1, seed=0)
    assert last.tokens.shape == (2, training.LENGTH)
    assert not torch.equal(last.tokens, needle_tasks.batch(needle_tasks.STEPS - 1, seed=1).tokens)


@pytest.mark.parametrize("name", needle_gates.CHANGES)
def test_a_change_of_the_gates_does_what_its_name_says(name: str) -> None:
    torch.manual_seed(0)
    plain = training.make("hope", TINY)
    made = needle_gates.changed(copy.deepcopy(plain), name)
    rows = torch.randint(training.VOCABULARY, (1, 200))
    same = torch.allclose(made(rows, learn=False).logits, plain(rows, learn=False).logits, atol=1e-6)
    assert same == (name == "as trained")
    one, other = (next(m for m in model.modules() if isinstance(m, SelfModifyingTitans)) for model in (plain, made))
    if name == "generators still":
        assert other.rates[:, :-1].max() == 0 and other.rates[:, -1].min() == 1
    if name == "no decay":
        assert torch.equal(other.alpha_bias.sigmoid(), torch.ones(other.heads))
    if name.startswith("gates x"):
        factor = float(name.split()[-1])
        assert torch.allclose(other.gate_weight[0], factor * one.gate_weight[0])
        assert torch.equal(other.gate_weight[1], one.gate_weight[1])
        assert torch.allclose(other.eta_bias, factor * one.eta_bias)
