"""A form that is wrong gets no speed."""

import dataclasses

import pytest
import torch

from nestling.bench import suites
from nestling.bench.cases import OPS, Shape, made
from nestling.bench.measure import threads
from nestling.bench.verify import distance, model_gate, op_gate
from nestling.bench.workloads import model, text
from nestling.testing import random_loss
from tests.needs import triton_runs

SHAPE = Shape(rows=1, tokens=8, heads=1, width=4, chunk_size=4)


@pytest.mark.parametrize("name", OPS)
def test_the_chunk_forms_pass(name: str) -> None:
    assert op_gate(OPS[name], OPS[name].forms()[1], SHAPE) is None


@pytest.mark.parametrize("name", OPS)
def test_two_threads_give_the_numbers_of_one(name: str) -> None:
    """At a size that torch divides among threads: outputs, final state and every gradient."""
    case, shape, found = OPS[name], Shape(rows=2, tokens=256, heads=4, width=32, chunk_size=32), []
    for count in (1, 2):
        with threads(count):
            leaves = made(case, shape, torch.float32, "cpu")
            outputs = case.run(case.forms()[1], leaves, shape.chunk_size)
            loss = random_loss([y for y in outputs if y.requires_grad])
            found.append([*outputs, *torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)])
    assert max(distance(a, b) for a, b in zip(*found, strict=True)) < 1e-5


def test_kernels_are_forms_of_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestling.bench.cases.find_spec", lambda name: name == "triton")
    assert OPS["gated_delta_rule"].forms() == ("reference", "chunk")
    assert OPS["gated_delta_rule"].forms("cuda") == ("reference", "chunk", "triton")
    assert OPS["newton_schulz"].forms("cuda") == ("reference", "batched", "triton")
    assert OPS["newton_schulz"].forms("cuda", training=True) == ("reference", "batched")


@pytest.mark.parametrize("name", ["cms_write", "newton_schulz"])
def test_a_kernel_without_a_backward_pass_is_held_to_its_outputs(name: str) -> None:
    triton_runs()
    assert op_gate(OPS[name], "triton", SHAPE) is None


def broken(part: str):
    """The delta rule whose chunk form is off by a little, in its output or only in a gradient."""
    right = OPS["delta_rule"]

    def call(form, x, chunk_size):
        o, state = right.call(form, x, chunk_size)
        if form == "reference":
            return o, state
        if part == "output":
            return o * 1.001, state
        if part == "gradient":
            return o + 0.01 * (x["beta"] - x["beta"].detach()).unsqueeze(-1), state
        if part == "state":
            return o, state + 0.001
        raise RuntimeError("out of\nresources")

    return dataclasses.replace(right, call=call)


@pytest.mark.parametrize(
    ("part", "said"),
    [("output", "output 0"), ("gradient", "gradient 3"), ("state", "output 1"), ("raises", "RuntimeError: out of res")],
)
def test_the_gate_catches_a_broken_form(part: str, said: str) -> None:
    assert (op_gate(broken(part), "chunk", SHAPE) or "green").startswith(said)


def test_a_red_gate_prints_no_speed() -> None:
    rows = suites.ops({}, SHAPE, loop_tokens=4, repeats=1, cases={"wrong": broken("output")})
    red = [r for r in rows if r["form"] == "chunk"]
    assert len(red) == 1
    assert red[0]["gate"].startswith("output 0 is off by 1.0e-03")
    assert {"seconds", "tokens_per_second", "ratio"}.isdisjoint(red[0])


def test_models_pass_and_a_missing_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    hope = model("hope", dim=16, depth=1, heads=1, chunk_size=8, periods=(16, float("inf")), match=None)
    words = text(1, 40, hope.config.vocab_size)
    assert model_gate(hope, words) is None
    loss = type(hope).loss
    monkeypatch.setattr(type(hope), "loss", lambda self, t: (loss(self, t)[0] + 1e-3 * self.norm.weight.sum(), None))
    assert (model_gate(hope, words) or "green").startswith("output 0")


def test_distance_is_relative_and_sees_nothing_as_zero() -> None:
    one = torch.ones(3)
    assert distance(1.01 * one, one) == pytest.approx(0.01, rel=1e-4)
    assert distance(None, 0 * one) == distance(None, None) == 0
    assert distance(None, one) == float("inf")
    assert not distance(one * float("nan"), one) <= 1
