"""The adapter for lm-eval against hand computations; and every local task file: what it asks, and of what.

lm-eval takes 620 MB and 40 seconds to install, so it is in no extra that CI has: those tests skip there.
"""

import json
import lzma
import math

import pytest
import torch

from nestling.data import ByteTokenizer
from nestling.evals.common_sense import PREFIX, REPORTED, TASKS, common_sense, reported
from nestling.evals.lm_harness import accuracies, accuracy, as_lm, continued, kept, scored
from nestling.models import build

BYTES, CPU = ByteTokenizer(), torch.device("cpu")


def model(name: str = "hope-attention", **options):
    torch.manual_seed(0)
    options = {"vocab_size": 256, "dim": 16, "depth": 1, "heads": 1} | options
    return build(name, **options).double().eval()


def by_hand(m, context: bytes, continuation: bytes, learn: bool = False) -> tuple[float, bool]:
    logits = m(torch.tensor([list(context + continuation)]), learn=learn).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    nats = sum(logits[i, byte].item() for i, byte in zip(places, continuation, strict=True))
    return nats, [int(logits[i].argmax()) for i in places] == list(continuation)


ASKED = [(b"The cat", b" sat on the mat"), (b"A", b" dog"), (b"The cat", b" ran"), (b"x" * 30, b"y")]


@pytest.mark.parametrize("learn", [False, True])
def test_loglikelihoods_are_those_of_the_continuation_in_any_order_and_batch(learn: bool) -> None:
    m = model(periods=(4,), inner_lr=0.1)
    expected = [by_hand(m, a, b, learn) for a, b in ASKED]
    pairs = [(list(a), list(b)) for a, b in ASKED]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for rows in (1, 3, 8):
            found = scored(m, [pairs[i] for i in order], max_length=None, learn=learn, rows=rows, device=CPU)
            assert [nats for nats, _ in found] == pytest.approx([expected[i][0] for i in order], rel=1e-6)
            assert [greedy for _, greedy in found] == [expected[i][1] for i in order]
    if learn:
        assert expected[0][0] != pytest.approx(by_hand(m, *ASKED[0])[0], rel=1e-3)


def test_what_greedy_decoding_says_is_greedy() -> None:
    m, ids = model(), list(b"The cat")
    for _ in range(6):
        ids.append(int(m(torch.tensor([ids]), learn=False).logits[0, -1].argmax()))
    said = continued(m, BYTES, list(b"The cat"), until=[], most=6, learn=False)
    assert said == BYTES.decode(ids[7:])
    assert scored(m, [(ids[:7], ids[7:])], max_length=None, learn=False, rows=1, device=CPU)[0][1]
    assert not scored(m, [(ids[:7], [*ids[7:12], ids[12] ^ 1])], max_length=None, learn=False, rows=1, device=CPU)[0][1]


def test_long_requests_lose_their_beginning() -> None:
    m, (context, continuation) = model(), ASKED[0]
    assert kept([1, 2, 3, 4], 2) == [2, 3, 4] and kept([1, 2], None) == [1, 2]
    found = scored(m, [(list(context), list(continuation))], max_length=16, learn=False, rows=1, device=CPU)
    assert found[0][0] == pytest.approx(by_hand(m, context[-2:], continuation)[0], rel=1e-6)
    with pytest.raises(ValueError, match="continuation of 15 tokens after 7 has no place in max_length=14"):
        scored(m, [(list(context), list(continuation))], max_length=14, learn=False, rows=1, device=CPU)


class Echo:
    """A model that says "abcabc..." whatever it is asked."""

    def parameters(self):
        yield torch.zeros(())

    def generate(self, tokens, count, *, temperature, learn_prompt):
        assert temperature == 0
        yield from (torch.tensor([b"abc"[i % 3]]) for i in range(count))


def test_generation_stops_at_the_first_of_the_stops_or_at_its_length() -> None:
    def said(until, most):
        return continued(Echo(), BYTES, [65], until=until, most=most, learn=False)  # type: ignore[arg-type]

    assert (said(["ca", "bca"], 9), said(["x"], 4), said([], 3)) == ("a", "abca", "abc")


def test_results_have_the_standard_error_of_their_items_and_the_chance_of_their_choices() -> None:
    samples = [{"acc": x, "perplexity": -x, "resps": [0] * k} for x, k in ((1.0, 2), (0.0, 4), (1.0, 4), (1.0, 2))]
    found = accuracy("t", "acc", 1.0, samples)
    assert (found.value, found.chance, found.n) == (0.75, 0.375, 4) and found.stderr == pytest.approx(0.25)
    assert found.columns()["value"] == "75.0 ± 79.6" and found.columns()["chance"] == "37.5"
    free = accuracy("t", "perplexity", 1.0, samples)
    assert free.value == pytest.approx(math.exp(0.75)) and free.chance is None
    assert free.stderr == pytest.approx(0.25 * math.exp(0.75)) and accuracy("t", "acc", 1.0, samples[:1]).stderr is None


# --- with lm-eval -----------------------------------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):
    """lm-eval, whose imports and log must not fail a test."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("lm_eval", reason="lm-eval is not installed; runs with: pip install 'nestling[eval]'")


class Request:
    def __init__(self, *args):
        self.args = args


def test_the_adapter_splits_strings_and_begins_empty_contexts_with_a_newline(harness) -> None:
    m = model()
    lm = as_lm(m, BYTES)
    found = lm.loglikelihood([Request("The cat", " sat"), Request("The cat ", "sat"), Request("", "sat")])
    expected = [by_hand(m, *pair)[0] for pair in ((b"The cat", b" sat"), (b"The cat", b" sat"), (b"\n", b"sat"))]
    assert [nats for nats, _ in found] == pytest.approx(expected, rel=1e-6)
    from lm_eval.api.registry import get_model

    assert get_model("nestling") is type(lm)
    with pytest.raises(ValueError, match="decodes greedily"):
        lm.generate_until([Request("a", {"do_sample": True})])
    said = lm.generate_until([Request("The cat", {"until": "zz", "max_gen_toks": 5})])
    assert said == [continued(m, BYTES, list(b"The cat"), until=["zz"], most=5, learn=False)]


def test_rolling_scores_every_token_once(harness) -> None:
    m, text = model(), b"Seven words, and a stop."
    whole = as_lm(m, BYTES).loglikelihood_rolling([Request(text.decode()), Request("")])
    assert whole == pytest.approx([by_hand(m, b"\n", text)[0], 0], rel=1e-6)
    parts = as_lm(m, BYTES, max_length=10).loglikelihood_rolling([Request(text.decode())])
    expected = [by_hand(m, b"\n", text[:10]), by_hand(m, text[9:10], text[10:20]), by_hand(m, text[13:20], text[20:])]
    assert parts == pytest.approx([sum(nats for nats, _ in expected)], rel=1e-6)


CHOICES = {"query": "Q: why", "choices": ["so", "no idea"], "gold": 0}
ITEMS = {
    "winogrande": {"context_options": ["Ann left so Ann", "Ann left so Eve"], "continuation": "cried.", "gold": 1},
    "lambada": {"context": "She gripped her", "continuation": "arm"},
    "piqa": CHOICES | {"query": "Question: why\n"},
}
PROMPTS = {
    "winogrande": [("Ann left so Ann", " cried."), ("Ann left so Eve", " cried.")],
    "lambada": [("She gripped her", " arm")],
    "piqa": [("Question: why\nAnswer:", " so"), ("Question: why\nAnswer:", " no idea")],
    "arc_easy": [("Q: why\nAnswer:", " so"), ("Q: why\nAnswer:", " no idea")],
    "arc_challenge": [("Q: why\nAnswer:", " so"), ("Q: why\nAnswer:", " no idea")],
    "boolq": [("Q: why\nAnswer:", " so"), ("Q: why\nAnswer:", " no idea")],
}


def test_task_files_ask_what_they_say(harness, tmp_path) -> None:
    """Each local task over two items, by a model that prefers short continuations, in all and then per byte."""
    (tmp_path / "evals").mkdir()
    for name in REPORTED:
        file = tmp_path / "evals" / f"{'lambada_openai' if name == 'lambada' else name}.jsonl.xz"
        file.write_bytes(lzma.compress((json.dumps(ITEMS.get(name, CHOICES)) + "\n").encode() * 3))
    lm, asked = as_lm(model(), BYTES), {name: [] for name in TASKS}

    def short(requests, **_):
        for request in requests:
            asked[request.task_name].append(request.args)
        return [(-float(len(request.args[1])), False) for request in requests]

    lm.loglikelihood = short
    made = {(one.task, one.metric): one for one in common_sense(lm, data=str(tmp_path), limit=2)}
    assert [one.metric for one in reported(list(made.values()))] == list(REPORTED.values())
    for name in REPORTED:
        assert asked[PREFIX + name] == 2 * PROMPTS.get(name, [("Q: why", " so"), ("Q: why", " no idea")]), name
        found = made[PREFIX + name, "acc"]
        right = {"winogrande": 0.0, "lambada": 0.0}.get(name, 1.0)  # equal likelihoods: the first is chosen
        assert (found.value, found.n, found.chance) == (right, 2, 0 if name == "lambada" else 0.5)
    assert made[PREFIX + "lambada", "perplexity"].value == pytest.approx(math.exp(4))
    assert tuple(PREFIX + name for name in REPORTED) == TASKS
    with pytest.raises(ValueError, match="knows no task 'hellaswagg'"):
        accuracies(lm, ["hellaswagg"], official=False)
