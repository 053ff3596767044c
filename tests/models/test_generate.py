"""generate: greedy equals reading everything again, sampling filters, stops, and what is learned."""

import math

import pytest
import torch

from nestling.testing import assert_close
from tests.models.tiny import read, same_memory, text, tiny

FAST = {"periods": (4, 8, math.inf), "inner_lr": 0.05}


@pytest.fixture(params=["transformer", "hope-attention", "hope"])
def model(request):
    return tiny(request.param, **({} if request.param == "transformer" else FAST))


def test_greedy_with_a_cache_is_greedy_without(model):
    prompt = text(2, 9)
    made = model.generate(prompt, 6, temperature=0.0, learn_output=True).all()
    tokens = prompt
    for _ in range(6):
        tokens = torch.cat([tokens, read(model, tokens)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, tokens[:, 9:])


def test_the_state_has_read_everything_and_learned_what_was_asked():
    model, prompt = tiny(**FAST), text(1, 9)
    generation = model.generate(prompt, 8, temperature=0.0)
    words = torch.stack(list(generation), 1)
    _, after = read(model, prompt)
    _, expected = read(model, words, state=after, learn=False)
    same_memory(generation.state, expected)
    assert generation.state.tokens.tolist() == [17]
    learned = model.generate(prompt, 8, temperature=0.0, learn_output=True)
    both = torch.cat([prompt, learned.all()], 1)
    same_memory(learned.state, read(model, both)[1])
    nothing = model.generate(prompt, 8, temperature=0.0, learn_prompt=False)
    nothing.all()
    assert nothing.state.writes.tolist() == [[0, 0]]


@pytest.mark.parametrize("learn_output", [False, True])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, {"eos": 3}], ids=str)
def test_it_samples_what_calls_of_the_model_would(model, options, learn_output):
    prompt, eos = text(3, 9), options.get("eos")
    options = {**options, "learn_output": learn_output}
    generation = model.generate(prompt, 14, generator=torch.Generator().manual_seed(7), **options)
    made = generation.all()
    logits, state = read(model, prompt)
    generator, reads, words = torch.Generator().manual_seed(7), torch.ones(3, 1, dtype=torch.bool), []
    sampler = model.generate(prompt, 0, generator=generator, **options)
    while len(words) < 14 and bool(reads.any()):
        token = sampler.sample(logits[:, -1])[:, None]
        words.append(torch.where(reads, token, torch.tensor(-1 if eos is None else eos)))
        logits, state = read(model, words[-1], state=state, learn=learn_output, mask=reads)
        reads = reads & (words[-1] != eos)
    assert torch.equal(made, torch.cat(words, 1))
    same_memory(generation.state, state)
    more = text(3, 9, seed=5)
    assert_close(read(model, more, state=generation.state)[0], read(model, more, state=state)[0], "what follows", 1e-9)


def test_the_state_can_be_asked_for_on_the_way(model):
    prompt = text(2, 9)
    generation = model.generate(prompt, 6, temperature=0.0)
    for n, _ in enumerate(generation, start=1):
        assert generation.state.tokens.tolist() == [9 + n] * 2


def test_sampling_is_repeatable_and_filtered(model):
    prompt = text(1, 5).expand(64, 5)
    options = {"temperature": 2.0}
    seeded = [torch.Generator().manual_seed(7) for _ in range(2)]
    one, two = (model.generate(prompt, 3, generator=generator, **options).all() for generator in seeded)
    assert torch.equal(one, two)
    ranks = read(model, prompt[:1])[0][0, -1].argsort(descending=True)
    top = model.generate(prompt, 1, top_k=3, **options).all()
    assert set(top.flatten().tolist()) == set(ranks[:3].tolist())
    p = (read(model, prompt[:1])[0][0, -1] / 2).softmax(-1)[ranks]
    few = model.generate(prompt, 1, top_p=float(p[:2].sum()) - 1e-6, **options).all()
    assert set(few.flatten().tolist()) == set(ranks[:2].tolist())
    assert torch.equal(model.generate(prompt, 1, top_k=1).all(), ranks[:1].expand(64, 1))


def test_a_row_stops_at_eos():
    model, prompt = tiny(**FAST), text(3, 5)
    plain = model.generate(prompt, 12, temperature=0.0).all()
    eos = int(plain[0, 2])
    generation = model.generate(prompt, 12, temperature=0.0, eos=eos)
    made = generation.all()
    for row in range(3):
        stop = (plain[row] == eos).nonzero()
        end = int(stop[0]) + 1 if len(stop) else 12
        assert torch.equal(made[row, :end], plain[row, :end][: made.shape[1]])
        assert (made[row, end:] == eos).all()
        assert generation.state.tokens[row] == 5 + min(end, made.shape[1])


def test_bad_options_are_one_line():
    model, prompt = tiny(), text(1, 3)
    for options, says in (({"temperature": -1}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 1.5}, "top_p")):
        with pytest.raises(ValueError, match=says):
            model.generate(prompt, 2, **options)
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(prompt[:, :0], 2)
