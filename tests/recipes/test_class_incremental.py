"""Classes that come a few at a time: how a seed deals them out, and the classifier that all methods share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recipes.class_tasks import Size, Texts, stream
from recipes.continual_methods.cms import CmsWrites

CLASSES = [f"class {i}" for i in range(6)]
SIZE = Size(tasks=3, train=4, validation=2, test=3)


def texts(groups: list[list[str]]) -> Texts:
    train = [(f"{name} text {i}", name) for name in CLASSES for i in range(10)]
    test = [(f"{name} test {i}", name) for name in CLASSES for i in range(5)]
    return Texts(train, test, groups)


def encode(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def test_a_seed_decides_everything_and_validation_is_apart() -> None:
    one, same, other = (stream(texts([]), SIZE, encode, seed) for seed in (1, 1, 2))
    assert one.names == same.names and one.shown == same.shown
    assert one.names != other.names
    assert one.asked != other.asked and sorted(n for t in one.asked for n, _ in t) == sorted(
        n for t in other.asked for n, _ in t
    )
    assert [len(part) for part in one.train] == [8, 8, 8] and [len(part) for part in one.validation] == [4, 4, 4]
    learned = {tuple(x.tolist()) for part in one.train for x, _ in part}
    assert not learned & {tuple(x.tolist()) for part in one.validation for x, _ in part}


def test_labels_count_classes_in_the_order_in_which_they_come() -> None:
    made = stream(texts([CLASSES[:2], CLASSES[2:4], CLASSES[4:]]), SIZE, encode, 0)
    assert [sorted({label for _, label in part}) for part in made.train] == [[0, 1], [2, 3], [4, 5]]
    assert all(text.startswith(made.names[label]) for part in made.shown for text, label in part)
    groups = [{made.names[label] for _, label in part} for part in made.asked]
    assert {frozenset(group) for group in groups} == {frozenset(CLASSES[i : i + 2]) for i in (0, 2, 4)}


def examples(count: int, classes: int) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(40, (3 + i % 5,), generator=generator), i % classes) for i in range(count)]


def test_features_do_not_see_padding_or_neighbours(small) -> None:  # type: ignore[no-untyped-def]
    from recipes.continual_methods.classifier import Classifier

    classifier = Classifier(small, torch.randint(40, (4, 33)), 3, None)
    data = [text for text, _ in examples(5, 3)]
    with torch.no_grad():
        together, alone = classifier.features(data), torch.cat([classifier.features([text]) for text in data])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_class_exists_when_it_was_met(small) -> None:  # type: ignore[no-untyped-def]
    from recipes.continual_methods.classifier import Classifier
    from recipes.continual_methods.memory_head import MemoryHead

    data = examples(6, 3)
    classifier = Classifier(small, torch.randint(40, (4, 33)), 3, MemoryHead(32, 3, ridge=0.1))
    assert classifier.loss(data) == 0  # nothing is known yet
    classifier.store([data[0], data[1]])
    assert classifier.seen.tolist() == [True, True, False]
    loss = classifier.loss([data[0], data[2]])  # the second one's class does not exist: it counts as zero
    torch.testing.assert_close(loss, classifier.loss([data[0]]) / 2)
    assert classifier.correct(data[:3]) == [True, True, False]


def test_converted_levels_learn_a_stream_and_leave_the_weights(small) -> None:  # type: ignore[no-untyped-def]
    from nestling.hf import convert_to_cms
    from nestling.memories.continuum import InnerRule
    from recipes.continual_methods.classifier import Classifier
    from recipes.continual_methods.cms import CmsWrites, as_one_stream
    from recipes.continual_methods.memory_head import MemoryHead

    own = torch.randint(40, (4, 33))
    convert_to_cms(small, (4, 8), rates=0.05, rule=InnerRule(online=True), old_text=own)
    before = [p.clone() for p in small.parameters()]
    classifier = Classifier(small, own, 3, MemoryHead(32, 3, ridge=0.1))
    as_one_stream(classifier)
    method = CmsWrites(classifier, classifier.loss, batch=4, stored=classifier.store)
    method.learn(examples(16, 3))
    assert all(torch.equal(p, old) for p, old in zip(small.parameters(), before, strict=True))
    writes = sorted(int(state.writes) for state in method.state.values())
    assert writes == [2, 4] and min(method.moved().values()) > 0


def test_names_are_scored_by_the_mean_log_probability_of_their_tokens(small) -> None:  # type: ignore[no-untyped-def]
    from recipes.continual_methods.in_context import name_scores

    prompt, names = torch.tensor([1, 5, 7]), [torch.tensor([3, 4, 9]), torch.tensor([8])]
    scores = name_scores(small, prompt, names)
    for name, score in zip(names, scores, strict=True):
        with torch.no_grad():
            logits = small(input_ids=torch.cat([prompt, name])[None]).logits[0].log_softmax(-1)
        by_hand = logits[2 : 2 + len(name)].gather(1, name[:, None]).mean()
        torch.testing.assert_close(score, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["one period", "frozen"])
def test_controls_of_the_trained_head_write_what_they_say(method: str) -> None:
    from recipes.class_methods import BATCH, SHARE, TRAINED, Row, make

    own = torch.randint(3, 512, (4, 33), generator=torch.Generator().manual_seed(0))
    classifier, taught = make(Row(method, TRAINED, ()), 0.3, 0.0, 3, own, seed=0)
    data = examples(BATCH, 3)
    classifier.expect(data)
    taught.learn(data)
    assert isinstance(taught, CmsWrites)
    levels = {path: level for path, level in taught.levels.items() if path != "head"}
    assert taught.state["head"].writes == 1 and taught.moved().keys() == taught.levels.keys()
    if method == "frozen":
        assert not levels
    else:
        assert {level.period for level in levels.values()} == {BATCH}  # below: the slow levels are the early layers
        slow = [float(level.rule.rate) / (0.3 * SHARE) for level in levels.values()]
        assert slow == pytest.approx([1 / 16, 1 / 16, 1 / 4, 1 / 4, 1])
