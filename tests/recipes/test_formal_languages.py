"""The recipe of the formal languages: equal parameters, one gradient step of every model, and how its table reads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nestling.evals.formal_languages import LANGUAGES
from nestling.evals.suite import NOTHING, Examples
from nestling.memories.self_modifying import SelfModifyingTitans
from recipes.fitting import DECAY, groups
from recipes.formal_languages import (
    BATCH,
    BINS,
    LENGTH,
    MODELS,
    RATES,
    batch,
    chosen_rate,
    ends,
    found_ahead,
    loss_on,
    make,
    parameters,
    read_adding,
    solved,
)
from recipes.formal_languages_page import page


@pytest.mark.parametrize("name", MODELS)
def test_models_have_equal_parameters_and_every_one_of_them_learns(name: str) -> None:
    language = LANGUAGES["shuffle-2"]
    model = make(name, language.vocab_size, chunk_size=4)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / parameters(language.vocab_size) - 1) < 0.02
    strings = language.examples(2, (12, 12), seed=0)
    loss_on(model, strings, smoothing=0.1).backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    gates = {"blocks.1.mixer.eta_bias", "blocks.1.mixer.gate_weight"}
    held = gates if name.startswith("hope") and name != "hope-default" else set()
    assert still == held  # eta = 2 and alpha = 1 in the adding block, for good


def test_hope_reads_at_another_chunk_size_with_the_same_weights() -> None:
    model = make("hope", 4, chunk_size=2)
    other = make("hope", 4, chunk_size=8)
    other.load_state_dict(model.state_dict())
    blocks = [block for m in (model, other) for block in m.modules() if hasattr(block, "chunk_size")]
    assert [block.chunk_size for block in blocks] == [2, 2, 8, 8]
    assert [block.rule.erase for block in blocks] == ["decayed", "none"] * 2
    assert all(
        isinstance(m, nn.Module) and torch.isfinite(m(torch.zeros(1, 20).long()).logits).all() for m in (model, other)
    )


def test_all_symbols_begin_with_nearly_one_value_and_different_keys_in_the_adding_memory() -> None:
    torch.manual_seed(0)
    model = make("hope", 4)
    layer, seen = model.blocks[1].mixer, F.normalize(model.embedding.weight.detach(), dim=-1)
    z = F.normalize(layer.project_z(seen), dim=-1)
    keys, values = (F.normalize(z @ M, dim=-1) for M in layer.initial[0][0, :2].detach())
    apart = ~torch.eye(4, dtype=torch.bool)
    assert (values @ values.T)[apart].min() > 0.9 and (keys @ keys.T)[apart].max() < 0.8


def test_a_language_is_solved_where_every_seed_is_always_right() -> None:
    right, beyond, wrong = [[1.0, 1.0]] * 4, [[1.0, 1.0]] * 2 + [[0.5, 0.9]] * 2, [[1.0, 1.0], [0.99, 1.0]] * 2
    cells = [{"read": {"1": right, "16": right, "32": right}}, {"read": {"1": right, "16": beyond, "32": wrong}}]
    assert solved(cells, 4 * LENGTH) == ["1", "16"] and solved(cells, BINS[-1][1]) == ["1"]
    assert solved(cells[:1], LENGTH) == ["1", "16", "32"]


def test_the_rate_with_the_most_right_strings_is_chosen() -> None:
    def rate(*shares: list[float]) -> float:
        return chosen_rate({f"{lr:g}": share for lr, share in zip(RATES, shares, strict=True)})

    assert rate([0.5, 0.99], [0.9, 0.91], [0.9, 0.95]) == RATES[2]
    assert rate([0.9, 0.95], [0.9, 0.95], [0.5, 1.0]) == RATES[0]


def test_the_energy_is_what_the_adding_memory_holds_at_the_end_of_each_string() -> None:
    language, model = LANGUAGES["a^n b^n"], make("hope", 3)
    strings = language.examples(3, (2, 12), seed=0)
    parts = []
    for tokens, end in zip(strings.tokens, ends(strings).tolist(), strict=True):
        state = model.body(tokens[None, :end], [None] * 2)[1][1]
        parts.append(state.running[0][:, :, -1].square().sum())
    term = loss_on(model, strings, energy=0.5) - loss_on(model, strings)
    assert term.item() == pytest.approx(0.5 * torch.sqrt(1 + sum(parts) / 3).item(), rel=1e-4)


def test_what_queries_find_of_symbols_still_to_come_is_counted_by_hand() -> None:
    model = make("hope", 3)
    layer = model.blocks[1].mixer
    assert isinstance(layer, SelfModifyingTitans) and layer.project_q is not None
    mixed = torch.randn(2, 4, model.config.dim, generator=torch.Generator().manual_seed(0))
    strings = Examples(torch.tensor([[0, 0, 1, 0], [2, 1, 2, 2]]), torch.tensor([[0, 0, 0, NOTHING], [0, 0, 0, 0]]))
    z, q = (F.normalize(project(mixed), dim=-1) for project in (layer.project_z, layer.project_q))
    found = (q @ F.normalize(z @ layer.initial[0][0, 0], dim=-1).mT).square()  # (2, T, S)
    by_hand = (found[0, 0, 2] + found[0, 1, 2] + found[1, 0, 1]) / (3 * 3 + 4 * 4)
    assert found_ahead(layer, mixed, strings).item() == pytest.approx(by_hand.item(), rel=1e-4)
    whole = loss_on(model, strings, ahead=2.0) - loss_on(model, strings)
    assert whole.item() == pytest.approx(2 * read_adding(model, strings)[2].item(), rel=1e-4)


def test_a_batch_has_strings_of_every_length_and_long_ones() -> None:
    made = batch(LANGUAGES["a^n b^n"], seed=0)
    lengths = (made.targets != NOTHING).sum(1)
    assert made.tokens.shape == (BATCH, LENGTH) and int(lengths[: BATCH // 2].min()) < LENGTH // 2
    assert int(lengths[BATCH // 2 :].min()) >= LENGTH - 8


def test_matrices_decay_and_vectors_do_not() -> None:
    with_decay, without = groups(make("hope", 4))
    assert (with_decay["weight_decay"], without["weight_decay"]) == (DECAY, 0.0)
    assert {p.dim() > 1 for p in with_decay["params"]} == {True} and {p.dim() for p in without["params"]} == {1}


def test_the_page_shows_every_seed_and_one_number_where_they_agree() -> None:
    def read(*found: float) -> dict[str, list[list[float]]]:
        return {"16": [[share, 1.0] for share in found]}

    cells = {
        "parity": [{"read": read(1, 1, 1, 1), "cpu_seconds": 90}, {"read": read(1, 0.25, 0, 1), "cpu_seconds": 30}]
    }
    other = {"parity": [{"read": {"any": [[share, 1.0]] * 4}} for share in (0.5, 0.0)]}
    confirmation = {"parity": [{"read": read(1, 0.5, 1, 1), "cpu_seconds": 60}]}
    metrics = {"bins": [list(b) for b in BINS], "chosen rate": {"hope": 0.01, "lstm": 0.01}}
    metrics |= {"cells": {"hope": cells, "lstm": other}, "confirmation": confirmation}
    lines = page({"metrics": metrics, "config": {"length": LENGTH}}).splitlines()
    assert lines[0].endswith("3 CPU minutes.")
    assert "| hope | 100 / 25 |" in lines and "| parity | 16 | 100 | 100 / 25 | 100 / 0 | 100 |" in lines
    (gap,) = [line for line in lines if line.startswith("| lstm | parity | ") and "shown" in line]
    assert "37.5" in gap  # of (50, 25) points
    assert lines[-1] == "| parity | 16 | 100 | 50 | 100 | 100 |"
