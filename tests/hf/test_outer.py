"""The outer gradient of converted models, through their writes: exact and first-order, to rates and initial states."""

import math

import pytest
import torch
from torch.func import functional_call

from tests.hf.needs import need

need("transformers")

from nestling.core.state import tensors  # noqa: E402
from nestling.hf import convert_to_cms  # noqa: E402
from nestling.memories.continuum import InnerRule  # noqa: E402
from tests.hf.small import cache_of, plain, stories_model, text  # noqa: E402

PLAIN = InnerRule(relative=False, bound=math.inf, kappa=0, learned=True)  # D <- D - rate * mean gradient
PERIOD, LENGTH = 4, 18


def double(model):
    """In float64 throughout: the norms of Llama go through float32 whatever they are given."""
    for path, m in list(model.named_modules()):
        if type(m).__name__ == "LlamaRMSNorm":
            above, _, name = path.rpartition(".")
            norm = torch.nn.RMSNorm(len(m.weight), eps=m.variance_epsilon)
            norm.weight = m.weight
            setattr(model.get_submodule(above), name, norm)
    return model.double()


def tiny(family="Llama", rule=PLAIN, periods=(PERIOD, PERIOD), **options):
    made = convert_to_cms(double(plain(family)), periods, rates=0.5, rule=rule, calibrate=False, **options)
    return made.double().eval()  # the rates too, which are float32 in every model


def gradients(model, tokens):
    model.zero_grad()
    loss, state = model.reader.loss(tokens)
    loss.backward()
    assert not any(x.requires_grad for x in tensors(state.tree))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def slope(model, name, index, tokens, eps=1e-5):
    """dL/dp of one entry, by two readings that differ in it."""
    p, values = model.get_parameter(name), []
    with torch.no_grad():
        for step in (eps, -2 * eps):
            p.view(-1)[index] += step
            values.append(float(model.reader.loss(tokens)[0]))
        p.view(-1)[index] += eps
    return (values[0] - values[1]) / (2 * eps)


RULES = {
    "plain": (PLAIN, (4, 8)),
    "decay, old keys, relative": (InnerRule(decay=0.1, kappa=3.0, bound=0.3, learned=True), (4, 8)),
    "erase": (InnerRule(relative=False, kappa=0, erase=0.5, learned=True), (8, 4)),
}


@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX"])
@pytest.mark.parametrize("rule", RULES)
def test_the_exact_gradient_agrees_with_finite_differences(rule, family):
    chosen, periods = RULES[rule]
    model = tiny(family, chosen, sorted(periods), outer="sequence", bptt=99)
    if chosen.kappa:
        model.calibrate(text(2, 20, seed=5))
    tokens = text(2, LENGTH)
    ours = gradients(model, tokens)
    rates = [name for name in ours if name.endswith("inner_log_rate")]
    first = next(name for name in ours if ".body." in name and ours[name].dim() == 2)  # a weight that is written
    other = next(name for name in ours if ".body." not in name and ours[name].dim() == 2)
    assert len(rates) == 2
    for name in [*rates, first, other]:
        index = int(ours[name].abs().argmax())
        assert ours[name].view(-1)[index].item() == pytest.approx(
            slope(model, name, index, tokens), rel=1e-5, abs=1e-9
        ), name


def test_the_exact_gradient_of_the_pretrained_model_agrees_with_finite_differences():
    model = convert_to_cms(
        double(stories_model()), (8, 16), rates=0.3, rule=InnerRule(decay=0.03, learned=True),
        old_text=torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(3)), outer="sequence", bptt=9,
    ).double().eval()  # fmt: skip
    tokens = torch.randint(3, 512, (1, 34), generator=torch.Generator().manual_seed(4))
    ours = gradients(model, tokens)
    layers = "pretrained.model.layers"
    for name in (
        f"{layers}.4.mlp.inner_log_rate",
        f"{layers}.0.mlp.inner_log_rate",
        f"{layers}.2.mlp.body.up_proj.weight",
    ):
        index = int(ours[name].abs().argmax())
        assert ours[name].view(-1)[index].item() == pytest.approx(
            slope(model, name, index, tokens), rel=1e-5, abs=1e-9
        ), name


def by_hand(model, tokens, outer, *, exact):
    """One period, one row, plain rule: the reading loop with torch and transformers alone.

    Returns the mean loss, whose graph is that of the outer gradient; `growth` carries the slope of a learned rate.
    """
    bare, moving = double(plain()), {}
    slow = {n.removeprefix("pretrained.").replace(".body.", "."): p for n, p in model.named_parameters()}
    rates = {n.rpartition(".")[0]: slow.pop(n) for n in list(slow) if n.endswith("inner_log_rate")}
    for name in slow:
        owner = next((path for path in rates if name.startswith(path)), None)
        if owner is not None:
            moving[name] = owner
    fast = {n: torch.zeros_like(slow[n]) for n in moving}
    past, total = None, 0.0
    for start in range(0, LENGTH, PERIOD):
        growth = {n: (rates[r] - rates[r].detach()).exp() for n, r in moving.items()}
        here = {n: slow[n] + (fast[n] if exact else growth[n] * fast[n].detach()) for n in moving}
        piece = tokens[:, start : start + PERIOD]
        out = functional_call(bare, {**slow, **here}, (piece,), {"use_cache": True} | ({} if past is None else past))
        goal = tokens[0, start + 1 : start + 1 + PERIOD]
        loss = torch.nn.functional.cross_entropy(out.logits[0, : len(goal)], goal, reduction="sum")
        total = total + loss
        if len(piece[0]) == PERIOD:
            grads = torch.autograd.grad(loss, list(here.values()), create_graph=exact, retain_graph=True)
            for n, g in zip(here, grads, strict=True):
                fast[n] = fast[n] - rates[moving[n]].exp() * (g if exact else g.detach()) / PERIOD
        past = cache_of(bare, out)
        if outer == "segment":
            for layer in next(iter(past.values())).layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return total / (LENGTH - 1)


@pytest.mark.parametrize("outer", ["segment", "sequence"])
@pytest.mark.parametrize("exact", [False, True])
def test_both_are_the_loops_written_by_hand(outer, exact):
    model, tokens = tiny(outer=outer, bptt=99 if exact else 0), text(1, LENGTH)
    ours = gradients(model, tokens)
    wanted = {name: p for name, p in model.named_parameters() if name in ours}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = torch.autograd.grad(by_hand(model, tokens, outer, exact=exact), list(wanted.values()))
    for name, grad in zip(wanted, theirs, strict=True):
        torch.testing.assert_close(ours[name], grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    other = gradients(tiny(outer=outer, bptt=0 if exact else 99), tokens)
    assert max(float((other[n] - g).abs().max()) for n, g in ours.items()) > 1e-4


def test_reading_does_not_depend_on_how_it_is_trained():
    tokens = text(2, 21)
    with torch.no_grad():
        first, exact = (tiny(bptt=n).eval()(tokens, learn=True) for n in (0, 3))
    assert torch.equal(first.logits, exact.logits)
    for a, b in zip(tensors(first.state.tree), tensors(exact.state.tree), strict=True):
        assert torch.equal(a, b)


def test_truncation_cuts_the_gradient_after_so_many_writes():
    tokens = text(1, LENGTH)
    found = [gradients(tiny(bptt=n), tokens)["pretrained.model.layers.0.mlp.inner_log_rate"] for n in (1, 2, 4, 99)]
    assert abs(found[0] - found[1]) > 1e-6 and abs(found[1] - found[2]) > 1e-6
    assert found[2] == found[3]  # four writes are all there are


@pytest.mark.parametrize(("options", "message"), [({"bptt": -1}, "bptt=-1"), ({"outer": "whole"}, "outer='whole'")])
def test_a_reach_that_does_not_exist_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
