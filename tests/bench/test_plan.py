"""What a plan predicts from two and three blocks is what more of them need; more GPUs need less each."""

from dataclasses import replace

import pytest

from nestling.bench.measure import peak_bytes
from nestling.bench.plan import GPUS, at, measure, optimizer_bytes, plan, trainer_of
from nestling.core.state import nbytes
from nestling.models import build, config_of
from nestling.train import ModelChoice, RunConfig, TrainConfig
from nestling.train.optimizer import make_optimizer, optimizer_tree
from tests.train.small_runs import small

MODEL = config_of("hope", dim=32, depth=5, heads=2, chunk_size=16, periods=(32.0, 64.0))
CONFIG = RunConfig(
    model=ModelChoice(name="hope"), train=TrainConfig(rows=5, length=64, stream_length=64 * 16, steps=1000)
)


def test_measured_memory_is_that_of_more_blocks() -> None:
    measured = measure(CONFIG, MODEL, rows=5)
    trainer = trainer_of(CONFIG, MODEL, 5, "cpu")
    for _ in range(3):
        trainer.next_step()
    working = peak_bytes(trainer.next_step)
    assert trainer.state is not None
    state = nbytes(trainer.state.tree)
    assert at(measured.state, 5) == pytest.approx(state, rel=0.02)
    assert at(measured.working, 5) == pytest.approx(working, rel=0.1)
    made = plan(CONFIG, MODEL, 1, GPUS["h100"], measured)
    kept = 4 * trainer.model.num_parameters() + nbytes(optimizer_tree(trainer.optimizer))
    assert made.bytes == pytest.approx(kept + state + working, rel=0.1) and made.measured


@pytest.mark.parametrize("matrices", ["adamw", "muon", "m3", "dgd"])
def test_the_optimizers_bytes_are_those_it_keeps(matrices: str) -> None:
    config = small("hope")
    model = build("hope", dim=16, depth=2, heads=2, chunk_size=8, periods=(16.0, 32.0))
    optimizer = make_optimizer(model, replace(config.optim, matrices=matrices))
    model.loss(*(2 * [next(iter([model.embedding.weight.new_zeros(2, 40).long()]))]))[0].backward()
    optimizer.step()
    counts = sum(1 for p in model.parameters()) * 8  # AdamW counts its steps in a number of each tensor
    kept = nbytes(optimizer_tree(optimizer))
    assert optimizer_bytes(model, matrices) == pytest.approx(kept, rel=0.02, abs=counts)


def test_more_gpus_need_less_each_and_less_time() -> None:
    train = replace(CONFIG.train, rows=32, length=4096, stream_length=1 << 16)
    config, model = replace(CONFIG, train=train), config_of("hope", "760m")
    one, eight = (plan(config, model, gpus, GPUS["h100"]) for gpus in (1, 8))
    assert one.parameters == pytest.approx(760e6, rel=0.1)
    assert one.bytes > eight.bytes and one.memory["optimizer"] == 8 * eight.memory["optimizer"]
    assert one.days > 4 * eight.days > 0 and eight.dollars(2.0) == pytest.approx(eight.days * 24 * 8 * 2)
    split = replace(config, parallel=replace(config.parallel, accumulate=4))
    assert plan(split, model, 1, GPUS["h100"]).memory["working"] < one.memory["working"]


def test_tensor_parallelism_divides_what_is_split() -> None:
    """Of Hope-Attention all matrices and fast weights; of Hope the token memories stay whole on every rank."""
    train = replace(CONFIG.train, rows=32, length=4096, stream_length=1 << 16)
    for name, halves in (("hope-attention", True), ("hope", False)):
        model = config_of(name, "760m", hidden=4092)
        plans = {}
        for tensor in (1, 2):
            config = replace(CONFIG, train=train, parallel=replace(CONFIG.parallel, tensor=tensor))
            plans[tensor] = plan(config, model, 8, GPUS["h100"])
        one, two = plans[1], plans[2]
        in_step = one.memory["weights"] - one.memory["gradients"], two.memory["weights"] - two.memory["gradients"]
        assert in_step[0] == 4 * one.parameters
        assert (in_step[1] == pytest.approx(in_step[0] / 2, rel=1e-3)) == halves and in_step[1] < in_step[0]
        assert two.memory["fast weights"] == pytest.approx(one.memory["fast weights"], rel=0.01) or not halves
        assert two.memory["optimizer"] == pytest.approx(one.memory["optimizer"], rel=0.01) or not halves
        assert two.tokens == one.tokens and two.seconds > one.seconds  # half the work on twice the rows, and sums
    with pytest.raises(ValueError, match="hidden=4096 does not divide into 3 levels times 2 ranks; .* example 4098"):
        plan(config, config_of("hope", "760m"), 8, GPUS["h100"])
