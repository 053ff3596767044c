"""What a checkpoint must keep besides numbers: every source of randomness, and the layout of tensors in memory."""

import json
import os
import random
import signal

import numpy as np
import torch

from nestling.core.state import flatten, unflatten
from nestling.train import read_metrics, run
from nestling.train.random_state import random_state, seed_all, set_random_state
from nestling.train.settled import settled
from tests.train.small_runs import assert_same_run, small


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn(), *torch.rand(3).tolist()]


def test_every_source_goes_on_where_it_was():
    seed_all(3)
    draw()
    tensors, skeleton = flatten(random_state())
    expected = [draw(), draw()]
    set_random_state(unflatten(tensors, json.loads(json.dumps(skeleton))))
    assert [draw(), draw()] == expected
    seed_all(3)
    assert draw() != expected[0] and seed_all(3) is None and draw() != expected[0]


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(tmp_path):
    def score(model):
        return {"loss": sum(draw())}

    def stopped(model):
        os.kill(os.getpid(), signal.SIGTERM)
        return score(model)

    config = small("transformer", eval_every=3)
    run(config, tmp_path / "whole", evaluate=score)
    run(config, tmp_path / "cut", evaluate=stopped, say=lambda line: None)
    random.random(), np.random.rand(), torch.rand(1)
    run(config, tmp_path / "cut", evaluate=score, resume=True)
    assert (
        len({r["validation"]["loss"] for r in read_metrics(tmp_path / "cut/metrics.jsonl") if "validation" in r}) == 4
    )
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_settled_tensors_are_laid_out_as_a_file_gives_them_back():
    x = torch.arange(24.0).view(4, 6)
    views = {"transposed": x.T, "offset": x[1:], "strided": x[:, ::2], "row": x[:1].T.T, "expanded": x[0].expand(3, 6)}
    for name, view in settled(views).items():
        assert torch.equal(view, views[name]) and view.storage_offset() == 0, name
        assert view.stride() == torch.zeros(view.shape).stride(), name
    assert settled([x])[0] is x
