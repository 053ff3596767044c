"""A run whose blocks are compiled is the same run: losses, gradients, checkpoints. Graphs, their number and what is
refused. Traced and differentiated by torch.compile as always; only one test also generates code (inductor)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from nestling.train import RunConfig, prepare, run
from nestling.train import compile as compiling
from nestling.train.trainer import Trainer
from tests.train.small_runs import losses, small, with_train

pytestmark = pytest.mark.filterwarnings("default")  # those of the compiler are not ours to mend
STEPS = 5
# Of the models so far. Transformer: attention, frozen channel. Hope-Attention: attention with a cache, channel with
# levels. Hope: that channel again; its first half walks through chunks on the host.
GRAPHS = {"transformer": 2, "hope-attention": 4, "hope": 4}


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch):
    """Fresh graphs in float64, without code generation."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()


def config_of(name: str, **parallel) -> RunConfig:
    """Steps of two whole segments, the second with what the first left in the mixers; levels write at once."""
    made = small(name, length=32, stream_length=96, steps=STEPS, calibrate_every=0, eval_every=0)
    return replace(made, parallel=replace(made.parallel, **parallel))


def trained(config: RunConfig, steady: int = STEPS) -> tuple[list[dict], list[torch.Tensor], dict[str, torch.Tensor]]:
    """The records of all steps, every gradient of every step, and the weights after them. After `steady` steps
    another graph is an error."""
    ready = prepare(config)
    trainer = Trainer(ready.model, ready.stream, config)
    records, gradients, write = [], list[torch.Tensor](), trainer.optimizer.step

    def step() -> None:
        gradients.extend(p.grad.clone() for p in ready.model.parameters() if p.grad is not None)
        write()

    trainer.optimizer.step = step
    for i in range(STEPS):
        with torch._dynamo.config.patch(error_on_recompile=i >= steady):
            records.append(trainer.next_step())
    return records, gradients, ready.model.state_dict()


def assert_same(config: RunConfig, steady: int = STEPS, allowed: float = 1e-10) -> None:
    """Compiled or not, a run has the same losses, counts of writes, gradients, weights and names of weights."""
    (records, gradients, weights), (others, theirs, same) = (
        trained(with_train(config, compile=on), steady) for on in (False, True)
    )
    for one, other in zip(records, others, strict=True):
        assert one["writes"] == other["writes"]
        assert one["loss"] == pytest.approx(other["loss"], rel=allowed)
    for one, other in zip(gradients, theirs, strict=True):
        assert float((one - other).abs().max()) <= allowed * float(one.abs().max().clamp_min(1e-6))
    assert weights.keys() == same.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(same[key], weight, rtol=10 * allowed, atol=10 * allowed)


def test_compiled_runs_are_the_same_with_few_graphs_without_breaks() -> None:
    """Both blocks share their graphs, all of which are there after the first step: a graph serves levels that have
    written and levels that have not, and models with the same halves. Rows are read in parts and computed again."""
    for name, graphs in GRAPHS.items():
        made = config_of(name, accumulate=2, recompute=True)
        if name == "transformer":
            made = with_train(made, length=16)  # the pieces that the others have
        assert_same(made, steady=1)
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_levels_that_learn_from_factors_and_gradients_through_segments() -> None:
    """Wide maps and short segments, so that the gradient of an output is wanted and not that of a matrix; and one
    graph is passed back through twice."""
    made = config_of("hope")
    options = {"outer": "sequence", "inner_learned": True, "continuum": "independent"}
    model = replace(made.model, dim=32, periods=(4.0, 8.0), options=options)
    assert_same(replace(made, model=model, train=replace(made.train, length=16)))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_checkpoint_goes_on_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 9 to 12 from a compiled run's checkpoint, not compiled and compiled again."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    made = small("transformer", compile=True)
    run(made, tmp_path)
    whole = losses(tmp_path)
    for on in (False, True):
        run(with_train(made, compile=on), tmp_path, resume=True, checkpoint=tmp_path / "checkpoints" / "step-00000008")
        again = losses(tmp_path)
        assert again[: 3 * 8] == whole[: 3 * 8]
        assert again == pytest.approx(whole, rel=1e-10)
    assert counters["stats"]["unique_graphs"] > 0


def test_code_is_generated_and_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: the eps keeps AdamW from making large steps of gradients that are nothing but rounding."""
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no processes of its own
    torch.set_default_dtype(torch.float32)
    made = config_of("hope")
    made = replace(made, model=replace(made.model, depth=1, periods=(16.0,)))
    assert_same(replace(made, optim=replace(made.optim, eps=1e-2)), allowed=1e-5)
    assert counters["inductor"]


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config_of("hope-attention")
    exact = with_train(replace(made, model=replace(made.model, options={"bptt": 1})), compile=True)
    with pytest.raises(ValueError, match=r"train.compile with bptt=1: .*leave out one of the two"):
        trained(exact)
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs the C\+\+ compiler no-such-compiler, and there is none; install it"):
        trained(with_train(made, compile=True))
