"""The counts of docs/performance.md are those that torch's own counter finds in what runs."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nestling.bench import cost
from nestling.bench.cases import OPS, Shape, made
from nestling.bench.workloads import TransformerBlock, layer
from nestling.models import from_config
from nestling.models.presets import config_of

SHAPE = Shape(rows=1, tokens=64, heads=2, width=16, chunk_size=16)
TWICE = {"cms_update": 2.0}  # its chunk form makes two products, of the closed windows and of the open one


def triangular(a, b, **options):
    """A unit-triangular solve: a multiply-add for every entry below the diagonal, counted dense as a product is."""
    return math.prod(b) * a[-1]


def attention(q, k, v, *rest, **options):
    """Scores and their use, every key for every query."""
    return 4 * math.prod(q) * k[-2]


def attention_backward(slope, q, k, v, *rest, **options):
    """Scores again, and four products of their size."""
    return 10 * math.prod(q) * k[-2]


MORE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    torch.ops.aten.linalg_solve_triangular: triangular,
    torch.ops.aten.baddbmm_: lambda out, a, b, **options: 2 * math.prod(a) * b[-1],
}


def counted(work):
    """FLOPs of products, solves and attention in a call."""
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", OPS)
def test_ops(name: str) -> None:
    """Forward within 5 %; with the backward pass at most 8 % less than three times it, and at most one forward pass
    more, which is what recomputing in the backward pass may cost."""
    case = OPS[name]
    leaves = made(case, SHAPE, torch.float32, "cpu")
    formula = SHAPE.count * case.total(SHAPE).flops * TWICE.get(name, 1.0)

    def forward():
        return [y for y in case.run(case.forms()[1], leaves, SHAPE.chunk_size) if y.requires_grad]

    assert counted(forward) == pytest.approx(formula, rel=0.05)
    assert 0.92 * 3 <= counted(lambda: sum(y.sum() for y in forward()).backward()) / formula <= 4.1


@pytest.mark.parametrize("name", ["self-modifying", "self-modifying x2", "self-modifying mlp"])
def test_layers(name: str) -> None:
    x = torch.randn(1, 64, 32)
    module = layer(name, 32, 2, 16)
    memory = "mlp" if name.endswith("mlp") else "features"
    formula = 64 * cost.self_modifying_titans(32, 2, 16, 2 if name.endswith("x2") else 1, memory).flops
    assert counted(lambda: module(x)) == pytest.approx(formula, rel=0.03)


def test_transformer_block() -> None:
    """The counter counts every key for every query."""
    x = torch.randn(1, 64, 32)
    block = TransformerBlock(32, 2)
    assert counted(lambda: block(x)) == pytest.approx(64 * cost.transformer_block(32, 64).flops, rel=1e-6)


@pytest.mark.parametrize("name", ["transformer", "hope", "hope-attention"])
def test_models(name: str) -> None:
    """Reading within 1 %; a training step within 12 % (attention's backward computes its scores again); learning from
    what is read within 25 % (the written-out backward of a memory yields gradients nobody asked for)."""
    T, size = 257, 64
    periods = {} if name == "transformer" else {"periods": (size, 2 * size, math.inf)}
    config = config_of(name, vocab_size=64, dim=64, depth=2, heads=2, chunk_size=16, **periods)
    model, tokens = from_config(config), torch.randint(64, (1, T))
    context = T if name == "transformer" else (T + size) / 2  # keys per query, as torch counts them
    for work, formula, rel in (
        (lambda: model(tokens, learn=False), cost.reading(config, T), 0.01),
        (lambda: model(tokens), cost.learning(config, context), 0.25),
        (lambda: model.loss(tokens)[0].backward(), cost.training(config, context), 0.12),
    ):
        assert counted(work) == pytest.approx(T * formula.flops, rel=rel)


def test_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    one = cost.Cost(flops=8, moved=2)
    assert one.floor(flops=4, bandwidth=1e9) == 2
    assert one.floor(flops=1e9, bandwidth=4) == 2
    assert one.intensity() == 1
    assert (one.training + 2 * one) == cost.Cost(40, 10)
