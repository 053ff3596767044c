"""Attention against softmax written out; its cache."""

import pytest
import torch

from nestling.core.state import select_rows, stack_rows
from nestling.memories.attention import Attention
from nestling.testing import assert_close, assert_trees_close, state_roundtrip


def layer(window=None):
    return Attention(8, 2, window=window).double()


def by_hand(attention, x, window):
    """One query at a time: rotate, score, softmax over the last `window` keys."""
    rows, tokens, dim = x.shape
    width = dim // attention.heads
    q, k, v = (part.view(rows, tokens, attention.heads, width) for part in (x @ attention.qkv.weight.T).chunk(3, -1))
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones(tokens, width // 2, dtype=torch.float64), torch.arange(tokens)[:, None] * rates)

    def rotate(y):
        z = torch.complex(y[..., : width // 2], y[..., width // 2 :]) * turn[None, :, None]
        return torch.cat([z.real, z.imag], -1)

    q, k, out = rotate(q), rotate(k), []
    for t in range(tokens):
        seen = slice(0 if window is None else max(0, t - window + 1), t + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, seen]) / width**0.5
        out.append(torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, seen]).flatten(1))
    return torch.stack(out, 1) @ attention.out.weight.T


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_it_is_softmax_attention(window):
    attention, x = layer(window), torch.randn(2, 17, 8, dtype=torch.float64)
    y, _ = attention(x)
    assert_close(y, by_hand(attention, x, window), "y", 1e-10)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("cuts", [(1,), (5, 6), (3, 4, 5, 12)])
def test_any_split_gives_outputs_and_cache_of_one_call(window, cuts):
    state_roundtrip(layer(window), torch.randn(2, 17, 8, dtype=torch.float64), cuts)


def test_a_window_bounds_the_cache():
    attention = layer(4)
    _, state = attention(torch.randn(1, 30, 8, dtype=torch.float64))
    assert state.k.shape[1] == 3 and state.slot.tolist() == [[28, 29, 30]]


@pytest.mark.parametrize("window", [None, 3])
def test_padding_is_nowhere_and_rows_of_different_age_stack(window):
    attention, x = layer(window), torch.randn(3, 12, 8, dtype=torch.float64)
    lengths = torch.tensor([2, 0, 7])
    y, state = attention(x[:, :7], None, lengths)
    assert bool(y.isfinite().all()) and state.position.tolist() == [2, 0, 7]
    alone = [attention(x[i : i + 1, :n])[1] if n else None for i, n in enumerate(lengths.tolist())]
    stacked = stack_rows(alone, [1, 1, 1])
    for i, n in enumerate(lengths.tolist()):
        whole, _ = attention(torch.cat([x[i : i + 1, :n], x[i : i + 1, 7:]], 1))
        for start in (state, stacked):
            more, _ = attention(x[:, 7:], start)
            assert_close(more[i], whole[0, n:], f"row {i}", 1e-10)
        one, _ = attention(x[i : i + 1, 7:], select_rows(state, [i]))
        assert_close(one[0], whole[0, n:], f"row {i} selected", 1e-10)


@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_an_open_cache_reads_one_token_like_a_call(window):
    """Rows of different age; one of them pauses; the ring turns and the room grows."""
    attention, x = layer(window), torch.randn(3, 20, 8, dtype=torch.float64)
    with torch.no_grad():
        _, state = attention(x[:, :6], None, torch.tensor([6, 2, 0]))
        cache = state.opened(3)
        for t in range(6, 20):
            reads = torch.tensor([1, t % 2, 1])
            cache = cache.opened(2) if t in (9, 11, 13, 15, 17, 19) else cache
            before, (y, cache) = cache.k.data_ptr(), attention(x[:, t : t + 1], cache, reads)
            expected, state = attention(x[:, t : t + 1], state, reads)
            assert cache.k.data_ptr() == before
            assert_close(y[reads > 0], expected[reads > 0], f"token {t}", 1e-10)
            assert_trees_close(cache.closed(), state, f"cache after token {t}")
    with pytest.raises(ValueError, match="one per call"):
        attention(x, cache)


def test_positions_survive_half_precision():
    """model.bfloat16() must not round the rotary frequencies: attention has no floating buffer to round."""
    assert not list(layer().buffers())


def test_bad_sizes_are_one_line():
    with pytest.raises(ValueError, match="even width"):
        Attention(9, 3)
    with pytest.raises(ValueError, match="window=0"):
        Attention(8, 2, window=0)
