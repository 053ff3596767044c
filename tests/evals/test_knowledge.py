"""Knowledge incorporation: against a model that remembers by rote, against hand-counted bits, and on a real one."""

import math

import pytest
import torch
from torch import Tensor

from nestling.data import ByteTokenizer, Passage, Question, one_per_article, read_passages
from nestling.evals.knowledge import CONDITIONS, ask, condition, facts, knowledge, less_bits, recited, swapped
from nestling.models import Output, State, build
from nestling.models.state import Carried

BYTES, CPU = ByteTokenizer(), torch.device("cpu")
PASSAGES = [
    Passage("Rome", "The river of Rome is the Tiber.", (Question("Which river?", "Tiber"), Question("Where?", "Rome"))),
    Passage("Oslo", "Oslo lies at a fjord.", (Question("Where does Oslo lie?", "fjord"), Question("Who?", "Oslo"))),
    Passage("Bonn", "Beethoven was born in Bonn.", (Question("Whose?", "Beethoven"), Question("Born in?", "Bonn"))),
]


class Rote:
    """Gives each byte of an answer that it has read about a probability of one half; all else is even."""

    def __init__(self) -> None:
        self.heard: dict[int, str] = {}  # what a state has read with learning; a state is a number

    def __call__(self, tokens: Tensor, state: State | None = None, learn: bool = True) -> Output:
        rows, length = tokens.shape
        known = "" if state is None else self.heard[int(state.tokens[0])]
        logits = torch.zeros(rows, length, 256, dtype=torch.float64)
        for row in range(rows):
            text = BYTES.decode(tokens[row].tolist()).rstrip("\0")
            prompt = max(text.find("Answer:"), 0)
            passage = next((p for p in PASSAGES if p.text in known + text[:prompt]), None)
            for q in passage.questions if passage else ():
                if q.question in text:
                    said = f" {q.answer}".encode()[: length - prompt - 6]
                    logits[row, range(prompt + 6, prompt + 6 + len(said)), list(said)] = math.log(255)
        number = len(self.heard) + 1
        if learn:
            self.heard[number] = known + BYTES.decode(tokens[0].tolist())
        return Output(logits, State(Carried([], {}, None, torch.full((rows,), number))))


def test_a_model_that_remembers_by_rote_knows_what_it_read_and_nothing_else() -> None:
    made = knowledge(Rote(), BYTES, PASSAGES, times=(1, 3))
    assert [(c.name, c.times) for c in made] == [
        ("nothing", 0), ("own", 1), ("another", 1), ("own", 3), ("another", 3), ("context", 0)
    ]  # fmt: skip
    assert {c.name for c in made} == set(CONDITIONS) and {c.questions for c in made} == {6}
    for c in made:
        knows = c.name in ("own", "context")
        assert c.bits == pytest.approx([1.0 if knows else 8.0] * 3) and c.exact == (float(knows),) * 3
    assert less_bits(made, "another", "own", 3).mean == pytest.approx(7)
    assert less_bits(made, "nothing", "another", 1).mean == pytest.approx(0)
    own = condition(made, "own", 3)
    assert own.swapped[1] == pytest.approx((2 * (1 + 4 * math.log2(510)) + 8) / 11)  # " Oslo" for " fjord" and back
    assert facts(made, 3).mean == pytest.approx(sum(own.swapped) / 3 - 1)
    assert condition(made, "context").passage is None and len(own.passage) == 3


def test_swapped_answers_are_those_of_other_questions() -> None:
    asked = [Question(q, a) for q, a in (("1", "x"), ("2", "x"), ("3", "y"), ("4", "z"))]
    assert [(q.question, q.answer) for q in swapped(asked)] == [("1", "y"), ("2", "y"), ("3", "z"), ("4", "x")]


def test_bits_are_those_of_the_answers_bytes_alone() -> None:
    model = build("hope-attention", vocab_size=256, dim=16, depth=1, heads=1, periods=(16,)).double()
    questions = PASSAGES[0].questions
    bits, _ = ask(model, BYTES, questions, before="A text.", device=CPU)
    nats = 0.0
    for q in questions:
        start, answer = f"A text.\nQuestion: {q.question}\nAnswer:".encode(), f" {q.answer}".encode()
        logits = model(torch.tensor([list(start + answer)]), learn=False).logits[0].log_softmax(-1)
        nats -= sum(logits[len(start) - 1 + i, byte].item() for i, byte in enumerate(answer))
    assert bits == pytest.approx(nats / math.log(2) / len(b" Tiber Rome"), rel=1e-9)


def test_reading_lowers_the_bits_of_the_passage_and_the_context_is_gone() -> None:
    model = build("hope-attention", vocab_size=256, dim=16, depth=1, heads=1, periods=(16,), inner_lr=0.05).double()
    made = knowledge(model, BYTES, PASSAGES, times=(8,))
    nothing, own, another = (condition(made, name, 8) for name in ("nothing", "own", "another"))
    assert all(a > b for a, b in zip(nothing.passage, own.passage, strict=True))
    assert sum(another.passage) > sum(own.passage)
    state = model(torch.tensor([list(PASSAGES[0].text.encode())]), learn=False).state.reset_context()
    assert recited(model, BYTES, PASSAGES[0].text, state, CPU) == pytest.approx(nothing.passage[0], rel=1e-9)


def test_lists_that_cannot_be_compared_are_refused() -> None:
    for wrong in ([], PASSAGES[:1], [PASSAGES[0], PASSAGES[1], PASSAGES[0]]):
        with pytest.raises(ValueError, match=r"one article; give one of each article"):
            knowledge(Rote(), BYTES, wrong)
    with pytest.raises(ValueError, match="one has no two different answers"):
        knowledge(Rote(), BYTES, [PASSAGES[0], Passage("Ulm", "A town.", PASSAGES[0].questions[:1])])


def test_passages_come_from_json_lines_and_one_is_taken_of_each_article(tmp_path) -> None:
    file = tmp_path / "passages.jsonl"
    line = '{"title": "%s", "context": "%s", "questions": [%s]}'
    questions = ", ".join(f'{{"question": "Q{i}?", "answer": "A\u2028{i}"}}' for i in range(2))
    made = [line % ("a", "x" * n, questions) for n in (5, 20, 22)] + [line % ("b", "ü" * 10, questions)]
    made.append(line % ("c", "x" * 20, questions.replace("\u20280", "\u20281")))
    file.write_text("\n".join([*made, ""]))
    passages = read_passages(file)
    assert [p.title for p in passages] == ["a", "a", "a", "b", "c"]
    assert passages[0].questions == (Question("Q0?", "A\u20280"), Question("Q1?", "A\u20281"))
    assert [p.text for p in one_per_article(passages, 10, 20)] == ["x" * 20, "ü" * 10]
    file.write_text('{"title": "a", "context": "b"}\n')
    with pytest.raises(ValueError, match=r"passages.jsonl has no passages: 'questions' is missing; give title"):
        read_passages(file)
    for text, what in (('{"a"', "is not JSON"), ("[1]", "is no JSON object")):
        file.write_text('{"a": 1}\n' + text)
        with pytest.raises(ValueError, match=f"line 2 {what}"):
            read_passages(file)
