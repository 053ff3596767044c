"""In-context recall: every asked answer stands in its document behind its cue, and articles are kept apart."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.data import ByteTokenizer, Passage, Question
from nestling.evals.in_context_recall import (
    PARTS,
    Entry,
    apart,
    cloze,
    hashed,
    part,
    read_entries,
    records,
    spans,
)
from nestling.evals.needles import needle_score
from nestling.evals.suite import NOTHING
from nestling.models import Output, State

BYTES = ByteTokenizer()
ENTRIES = [Entry(f"Lake {i}", "Natural Place", f"lake number {i} of Finland") for i in range(40)]
TEXT = (
    "In the year 1889 the town of Ulm built a tall tower of grey stone for its old church. The work was led by Anna "
    "Maria Berg who had come from Graz to the south. It took eleven years and cost more than the whole town had."
)
ASKED = ("1889", "grey stone", "Anna Maria Berg", "Graz", "the", "In", "not there", "more than the whole town had")
PASSAGE = Passage("Ulm", TEXT, tuple(Question("?", answer) for answer in ASKED))


def shown(task, lengths: tuple[int, int], count: int = 30, seed: int = 0):
    """Document and list of (cue, answer) of every example."""
    made = task.examples(count, lengths, seed)
    for tokens, targets in zip(made.tokens, made.targets, strict=True):
        text = BYTES.decode(tokens.tolist()).rstrip("\0")
        marks = [False, *(targets != NOTHING).tolist()[:-1]]
        asked = targets != NOTHING
        assert torch.equal(targets[asked], tokens[1:][asked[:-1]])
        document, _, rest = text.rpartition("\n\n") if "\n\n" in text else text.partition("\n")
        pairs, place = [], len(text) - len(rest)
        for line in rest.splitlines():
            cut = next(i for i in range(len(line)) if marks[place + i])
            pairs.append((line[:cut], line[cut:]))
            assert all(marks[place + cut : place + len(line)]) and not any(marks[place : place + cut])
            place += len(line) + 1
        yield document, pairs, len(text)


def test_records_ask_for_every_line_of_the_document_again() -> None:
    in_order = 0
    for document, pairs, length in shown(records(ENTRIES, BYTES), (150, 256)):
        assert 150 <= length <= 256 and len(pairs) >= 2
        assert sorted(cue + answer for cue, answer in pairs) == sorted(document.splitlines())
        in_order += [cue + answer for cue, answer in pairs] == document.splitlines()
        assert all(cue.endswith((" / kind:", " / about:")) and answer.startswith(" ") for cue, answer in pairs)
    orders = [
        ([c + a for c, a in pairs] == document.splitlines())
        for document, pairs, _ in shown(records(ENTRIES, BYTES), (150, 256))
    ]
    assert not all(orders)


def test_a_cloze_asks_for_answers_after_the_four_words_before_them() -> None:
    seen = set()
    for document, pairs, length in shown(cloze([PASSAGE], BYTES), (40, 200)):
        assert 40 <= length <= 200 and document in TEXT and pairs
        for cue, answer in pairs:
            assert len(cue.split()) == 4 and document.count(cue + answer) == 1
            seen.add(answer.strip())
    assert seen == {"grey stone", "Anna Maria Berg", "Graz"}  # the others: no cue, more than once, or not there
    assert [TEXT[a:b] for _, a, b in spans(PASSAGE)] == ["grey stone", "Anna Maria Berg", "Graz"]
    assert apart([(0, 5, 9), (7, 10, 12), (9, 11, 14), (20, 25, 26)]) == [(0, 5, 9), (9, 11, 14), (20, 25, 26)]


def test_the_same_seed_asks_the_same_with_and_without_the_document() -> None:
    task = records(ENTRIES, BYTES)
    whole, again, other = (task.examples(8, (150, 256), seed) for seed in (3, 3, 4))
    assert torch.equal(whole.tokens, again.tokens) and not torch.equal(whole.targets, other.targets)
    alone = task.without_document().examples(8, (150, 256), 3)
    assert alone.tokens.shape[1] < whole.tokens.shape[1] / 1.8
    asked = [[row[row != NOTHING].tolist() for row in made.targets] for made in (whole, alone)]
    assert asked[0] == asked[1]


def copying(tokens: Tensor, state: State | None = None, learn: bool = True) -> Output:
    """Says what followed the longest end of the text so far that had stood before, of at least four bytes."""
    logits = torch.zeros(*tokens.shape, 256)
    for row, ids in enumerate(tokens.tolist()):
        for t in range(4, len(ids)):
            ends = ((bytes(ids[t + 1 - n : t + 1]), n) for n in range(min(t, 40), 3, -1))
            places = ((bytes(ids[:t]).rfind(end), n) for end, n in ends)
            place, n = next(((place, n) for place, n in places if place >= 0), (-1, 0))
            logits[row, t] = 20 * F.one_hot(torch.tensor(ids[place + n] if place >= 0 else 0), 256)
    return Output(logits, state)  # type: ignore[arg-type]


def test_a_model_that_copies_is_right_and_needs_the_document() -> None:
    task = records([Entry(f"The lake called {i:02}", "Lake", f"one of {i * i} lakes") for i in range(30)], BYTES)
    with_it = needle_score(copying, task, 10, (200, 256), seed=0)
    assert with_it.value_share == 1 and with_it.bits < 0.01 and with_it.values > 20
    without = needle_score(copying, task.without_document(), 10, (200, 256), seed=0)
    assert without.values == with_it.values and without.value_share < 0.5  # a kind that an earlier question had


def test_articles_lie_in_one_part_each_and_the_parts_are_as_large_as_they_say() -> None:
    many = [Entry(f"title {i}", "x", "y z") for i in range(2000)]
    sizes = {name: len(part(many, name)) for name in PARTS}
    assert sum(sizes.values()) == 2000 and abs(sizes["test"] - 300) < 60 and abs(sizes["training"] - 1400) < 80
    assert hashed("Super Bowl 50") == hashed("Super Bowl 50") and {hashed(e.title) for e in many} <= set(range(100))
    with pytest.raises(ValueError, match="'tests' is none of test, validation, training"):
        part(many, "tests")
    with pytest.raises(ValueError, match="none of 1 documents falls into"):
        part(many[:1], next(name for name in PARTS if hashed("title 0") not in PARTS[name]))


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="1 entries make no document"):
        records(ENTRIES[:1], BYTES)
    with pytest.raises(ValueError, match="no answer of 1 passages can be asked"):
        cloze([Passage("Ulm", "A town.", (Question("?", "town"),))], BYTES)
    with pytest.raises(ValueError, match=r"200 draws gave no document of records of so many tokens; widen them"):
        records(ENTRIES, BYTES).examples(1, (10, 40), seed=0)


def test_entries_say_what_they_are(tmp_path) -> None:
    file = tmp_path / "entries.jsonl"
    lines = [
        ("Isabella River (Minnesota)", "The Isabella River is a river of Minnesota."),
        ("Hope", "Hope was the one and only ship of its class in the navy, and sank."),
        ("No", "It has no such words."),
        ("A title of far too many words", "It is a river of Minnesota."),
        ("Short", "It is a river."),
    ]
    file.write_text("\n".join(json.dumps({"title": t, "label": "Thing", "text": x}) for t, x in lines))
    assert read_entries(file) == [
        Entry("Isabella River", "Thing", "river of Minnesota"),
        Entry("Hope", "Thing", "one and only ship of its"),
    ]
