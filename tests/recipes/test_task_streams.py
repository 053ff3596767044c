"""Tasks in turn: what each task holds, how it is scored, and that the loop trains on one after the other."""

from __future__ import annotations

import lzma
import math

import pytest
import torch
from torch import nn

from nestling.models import build
from recipes.optimizer_zoo import Entry
from recipes.sweeps import climb
from recipes.task_streams import ImageTask, learn_in_turn, permuted, split_classes, step_on, texts
from recipes.vision_tasks import MLP, Images


def images(count: int = 60, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    pixels = 0.1 * torch.randn(count, 28, 28, generator=generator)
    pixels[torch.arange(count), labels] += 1.0  # row k of the picture shines for class k
    return Images(pixels, labels)


def test_permuted_tasks_hold_the_same_pixels_in_other_orders() -> None:
    tasks = permuted(images(), images(seed=1), 3, 10, 5, seed=4)
    orders = [task.pixels for task in tasks if isinstance(task, ImageTask)]
    assert torch.equal(orders[0], torch.arange(784))
    assert all(torch.equal(order.sort()[0], torch.arange(784)) for order in orders)
    assert not torch.equal(orders[1], orders[2])


def test_split_deals_out_every_class_once() -> None:
    tasks = [t for t in split_classes(images(), images(seed=1), 5, 4, 5, seed=4) if isinstance(t, ImageTask)]
    assert sorted(torch.cat([task.classes for task in tasks]).tolist()) == list(range(10))
    for task in tasks:
        assert set(task.train.labels.tolist()) == set(task.held_out.labels.tolist()) == set(task.classes.tolist())
        assert len(task.train) == 12


def test_scores_over_all_classes_and_over_the_tasks_own() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # class 0 first, then 1, 2, ...
            return -torch.arange(10.0).expand(len(x), 10)

    held_out = images().take(torch.tensor([1, 2, 11, 12]))
    task = ImageTask(images(), held_out, iter([]), torch.tensor([1, 2]), torch.arange(784))
    assert task.scores(Constant()) == {"all classes": 0.0, "the task's classes": 0.5}
    whole = ImageTask(images(), images(), iter([]), torch.arange(10), torch.arange(784))
    assert whole.scores(Constant()) == {"all classes": 0.1}


def test_each_task_is_learned_in_its_turn() -> None:
    torch.manual_seed(0)
    model = MLP(16)
    tasks = split_classes(images(400), images(100, seed=1), 2, 20, 60, seed=0)
    scores = learn_in_turn(model, torch.optim.Adam(model.parameters(), 3e-3), tasks, 60, 5)["all classes"]
    assert [len(row) for row in scores] == [2, 2]
    assert scores[0][0] > 0.9 and scores[0][1] == 0.0  # classes never met are never said
    assert scores[1][1] > 0.9 and scores[1][0] < scores[0][0]


def test_texts_train_on_the_start_and_hold_out_two_halves_of_the_rest(tmp_path) -> None:
    folder = tmp_path / "lm"
    folder.mkdir()
    (folder / "wikitext2_valid.txt.xz").write_bytes(lzma.compress(bytes(range(97, 117)) * 100))
    first, second = (texts(str(tmp_path), 2, 16, 3, seed=0, part=part) for part in (0, 1))
    assert len(first[1].stream.tokens) == 1800
    assert first[1].windows.shape == (3, 17)
    assert not torch.equal(first[0].windows, second[0].windows)
    model = build("transformer", "tiny", dim=16, depth=1, heads=2)
    (score,) = first[1].scores(model).values()
    assert 4 < score < 9  # near log 256 before any training


def test_no_step_where_the_loss_is_no_number() -> None:
    layer = nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    assert not step_on(lambda m: m(torch.tensor([[math.nan, 1.0]])).sum(), layer, optimizer, 1.0)
    assert torch.equal(layer.weight, before)
    assert step_on(lambda m: m(torch.ones(1, 2)).sum(), layer, optimizer, 0.5)
    assert torch.allclose(layer.weight, before - 0.05)


@pytest.mark.parametrize("peak", [1e-3, 0.1, 2.0])
def test_the_grid_grows_until_the_best_is_inside(peak: float) -> None:
    best, found = climb(Entry(lambda m, lr: None, 0.1), lambda rate: -abs(math.log(rate / peak)))
    assert abs(math.log(best / peak)) <= math.log(3) / 2 + 1e-9
    rates = [float(rate) for rate in found]
    assert min(rates) < best < max(rates)


def test_divergence_ends_the_grid() -> None:
    best, found = climb(Entry(lambda m, lr: None, 0.1), lambda rate: rate if rate < 0.5 else -math.inf)
    assert best == pytest.approx(0.3)
    assert len(found) == 5
