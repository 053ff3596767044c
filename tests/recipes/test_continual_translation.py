"""Languages in sequence, and the language models that learn them: what is asked for, and what is never seen."""

from __future__ import annotations

import importlib.util
import lzma
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestling.memories.continuum import continuum_levels
from recipes import translation_tasks as tasks


def encode(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Tatoeba's file: 50 pairs of a language, every English sentence twice, and one pair that is too long."""
    rows = [f"xx\tword {i}\tEnglish {i // 2}" for i in range(50)]
    rows += ["yy\tother\tEnglish of another", f"xx\t{'long ' * 30}\tEnglish too long"]
    (tmp_path / "mt").mkdir()
    path = tmp_path / "mt" / "tatoeba20_eng.tsv.xz"
    path.write_bytes(lzma.compress("\n".join(["lang\tsource\teng", *rows]).encode()))
    return str(tmp_path)


def made(folder: str, seed: int, *, tuning: bool) -> tasks.Pairs:
    return tasks.language("xx", folder, encode, begin=1, seed=seed, count=20, asked=8, tuning=tuning)


def test_a_text_is_asked_for_from_the_first_token_of_the_english() -> None:
    ids, start = tasks.text_of("ab", "cd", encode, 1)
    assert ids.tolist() == [1, *b"ab =", *b" cd\n"] and start == 5


def test_test_pairs_are_the_same_for_every_seed_and_never_learned(folder: str) -> None:
    one, other, tuning = made(folder, 0, tuning=False), made(folder, 1, tuning=False), made(folder, 0, tuning=True)
    assert one.asked == other.asked and one.shown != other.shown
    assert not {p[0] for p in tuning.asked} & {p[0] for p in one.asked}
    for pairs in (one, other, tuning):
        assert len(pairs.shown) == 20 and len(pairs.asked) == 8
        assert not {english for _, english in pairs.shown} & {english for _, english in pairs.asked}
        assert not any("too long" in english or "another" in english for _, english in pairs.shown)


def texts() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(30, (n,), generator=generator), start) for n, start in ((7, 3), (4, 1), (9, 8))]


def by_hand(model, ids: Tensor, start: int) -> float:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
    return -float(logits.gather(1, ids[start:, None]).sum())


def test_only_what_is_asked_for_is_lost(small) -> None:  # type: ignore[no-untyped-def]
    from recipes.continual_methods.language import LanguageTask

    task, total = LanguageTask(small), sum(by_hand(small, *text) for text in texts())
    nats, count = task.nats(texts(), batch=2)
    assert count == (7 - 3) + (4 - 1) + (9 - 8)
    assert nats == pytest.approx(total, rel=1e-4)
    assert task.loss(texts()).item() == pytest.approx(total / count, rel=1e-4)


def test_a_prompted_model_answers_as_one_that_reads_all_at_once(small) -> None:  # type: ignore[no-untyped-def]
    from recipes.continual_methods.prompted import Prompted

    prompt, (ids, start) = torch.tensor([1, 4, 6, 2]), texts()[0]
    nats, said = Prompted(small, prompt, end=-1, new=3).ask((ids, start))
    whole = torch.cat([prompt, ids[1:]])
    assert nats == pytest.approx(by_hand(small, whole, len(prompt) + start - 1), rel=1e-4)
    so_far = torch.cat([prompt, ids[1:start]])
    for token in said:
        with torch.no_grad():
            assert token == int(small(input_ids=so_far[None]).logits[0, -1].argmax())
        so_far = torch.cat([so_far, torch.tensor([token])])
    assert len(said) == 3


def test_a_prompt_takes_from_every_set_equally(small) -> None:  # type: ignore[no-untyped-def]
    from recipes.continual_methods.prompted import filled

    sets = [[torch.tensor([1, 10 + i, 20]) for i in range(4)], [torch.tensor([1, 50 + i]) for i in range(4)]]
    assert filled(sets, 1, 8).tolist() == [1, 10, 20, 50, 11, 20, 51]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_every_method_learns_and_is_read(small, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import recipes.continual_methods.language as language

    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}

    def fresh():  # type: ignore[no-untyped-def]
        made = type(small)(small.config).eval()
        made.load_state_dict(state)
        return made

    monkeypatch.setattr(language, "pretrained", fresh)
    monkeypatch.setattr(language, "own_texts", lambda: torch.randint(30, (3, 12)))
    data = [(torch.arange(8) % 3 + 5, 1)] * 8
    values = {"Hope-2": 0.5, "one period (2)": 0.5, "attention too": 0.5, "CMS-1": 0.02, "EWC": 1.0}
    values |= dict.fromkeys(("sequential", "MLPs", "every map", "LoRA", "replay"), 0.01)
    for name, value in values.items():
        if name == "LoRA" and importlib.util.find_spec("peft") is None:
            continue
        task, method = language.make(name, value, 0.01, batch=2, buffer=4, fisher=2, seed=0)
        before = task.nats(data)[0]
        method.learn(data)
        with method.reading():
            assert task.nats(data)[0] < before, name
        assert math.isfinite(before)


def test_what_is_written_and_what_is_fine_tuned_are_the_same_maps(small, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import recipes.continual_methods.language as language

    monkeypatch.setattr(language, "own_texts", lambda: torch.randint(30, (3, 12)))
    for tuned, written in (("MLPs", "Hope-1"), ("every map", "CMS-1")):
        both = []
        for change in (
            lambda model, name=tuned: language.train_only(model, language.TRAINED[name]),
            lambda model, name=written: language.with_levels(model, language.WRITES[name], 0.1, 2),
        ):
            model = type(small)(small.config)
            change(model)
            both.append(model)
        trained = {n for n, p in both[0].named_parameters() if p.requires_grad}
        maps = {f"{path}.{n}" for path, level in continuum_levels(both[1]).items() for n in level.maps}
        names = {path.replace("body.", "").rstrip(".") + ".weight" for path in maps}
        assert trained == names and len(trained) == {"MLPs": 6, "every map": 15}[tuned]


def test_one_period_has_the_rates_per_example_of_its_levels() -> None:
    pytest.importorskip("transformers", reason="runs with: pip install 'nestling[test]'")
    import recipes.continual_methods.language as language

    for name, levels in (("one period (2)", "Hope-2"), ("one period (3)", "Hope-3")):
        control, periods = language.WRITES[name], language.WRITES[levels].periods
        assert control.shares == tuple(1 / period for period in periods) and set(control.periods) == {1}


def test_chrf_is_that_of_sacrebleu(folder: str) -> None:
    pytest.importorskip("sacrebleu", reason="runs with: pip install 'nestling[translation]'")
    from recipes.continual_translation import chrf

    part = made(folder, 0, tuning=False)
    perfect, signature = chrf([english for _, english in part.asked], part)
    assert perfect == pytest.approx(100) and "nc:6" in signature
    assert chrf(["zzz"] * len(part.asked), part)[0] < 20
