"""Rows of the table of identities that tie models together: frozen, static, nested, independent, one step."""

import math

import pytest
import torch
from torch.nn import functional

from nestling.core.state import tensors
from nestling.testing import assert_close
from tests.models.tiny import PLAIN, by_hand, level_weights, read, text, tiny, written


def test_hope_attention_with_one_frozen_level_is_the_transformer():
    hope, plain = tiny("hope-attention", periods=(math.inf,)), tiny("transformer", seed=1)
    plain.load_state_dict(hope.state_dict())
    tokens = text(2, 20)
    assert torch.equal(read(hope, tokens)[0], read(plain, tokens)[0])


def test_a_frozen_level_is_a_plain_gated_mlp():
    block = tiny(periods=(math.inf,)).blocks[0].channel
    x, mlp = torch.randn(2, 5, 8, dtype=torch.float64), block.stack[0].body
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * mlp.norm.weight
    gate, up = (normed @ mlp.up.weight.T).chunk(2, -1)
    assert_close(block(x)[0], x + (functional.silu(gate) * up) @ mlp.down.weight.T, "frozen level", 1e-12)


@pytest.mark.parametrize("kind", ["hope-attention", "hope"])
def test_rate_zero_is_the_static_model_bit_for_bit_on_the_same_segments(kind):
    model, tokens = tiny(kind, periods=(4, 8), inner_lr=0.0), text(2, 23)
    logits, state = read(model, tokens)
    static, _ = read(model, tokens, tuple(range(4, 23, 4)), learn=False)
    assert torch.equal(logits, static)
    assert state.writes.tolist() == [[5, 2], [5, 2]] and not any(s.delta for s in state.tree.fast.values())
    assert_close(logits, read(model, tokens, learn=False)[0], "one whole pass", 1e-10)
    single, whole = (read(model.float(), tokens, learn=learn)[0] for learn in (True, False))
    assert float((single - whole).abs().max()) < 2e-6 * max(1.0, float(whole.abs().max()))


def test_one_level_with_a_period_of_all_tokens_is_one_sgd_step():
    model = tiny(periods=(12,), inner_lr=0.3, **PLAIN)
    tokens = text(1, 16)
    logits, _ = read(model, tokens)
    names = [n for n, _ in model.named_parameters() if n.endswith(("up.weight", "down.weight"))]
    chosen = [model.get_parameter(n) for n in names]
    out = model(tokens[:, :12], learn=False)
    loss = functional.cross_entropy(out.logits[0], tokens[0, 1:13])
    loss.backward()
    rate = next(iter(level_weights(model).values())).inner_log_rate.exp().item()
    torch.optim.SGD(chosen, lr=rate).step()
    after, _ = read(model, tokens[:, 12:], state=out.state, learn=False)
    assert_close(logits[:, 12:], after, "after the step", 1e-9)


def test_nested_levels_return_to_their_start_exactly():
    model, tokens = tiny(periods=(2, 6), inner_lr=0.1, continuum="nested"), text(1, 26)
    state, seen = None, []
    for t in range(26):
        _, state = read(model, tokens[:, t : t + 1], state=state)
        fast = state.tree.fast["blocks.1.channel.stack.0"]
        size = sum(float(d.to_dense().abs().sum()) for d in fast.delta.values())
        seen.append((int(fast.writes), size))
    for t, (writes, size) in enumerate(seen):
        assert writes == t // 2
        assert (size == 0.0) == (t // 2 % 3 == 0), t  # exactly the start after every third write
    slow = state.tree.fast["blocks.1.channel.stack.1"]
    assert any(x.abs().max() > 0 for d in slow.delta.values() for x in tensors(d))


def test_independent_levels_with_one_hot_weights_are_that_single_mlp():
    stack = tiny(periods=(4, 8), continuum="independent").blocks[0].channel
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for chosen in range(2):
        with torch.no_grad():
            stack.weights.copy_(torch.eye(2)[chosen])
        assert_close(stack(x)[0], x + stack.stack[chosen].body(x), f"level {chosen}", 1e-12)


def test_a_chain_is_fast_to_slow_as_in_the_figure():
    stack = tiny(periods=(4, 8)).blocks[0].channel
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    fast = x + stack.stack[0](x)
    assert_close(stack(x)[0], fast + stack.stack[1](fast), "chain", 1e-12)


def test_the_shortcut_of_one_shared_error_is_not_what_is_written():
    """By hand (torch.func) every weight of every block has its own gradient; the model writes these."""
    model, tokens = tiny(periods=(4, 8), inner_lr=0.3, **PLAIN), text(1, 14)
    _, _, fast = by_hand(model, tokens, "segment")
    _, state = read(model, tokens)
    found = {}
    for name, delta in fast.items():
        path, _, weight = name.removeprefix("model.").removesuffix(".weight").rpartition(".body.")
        found[name] = state.tree.fast[path].delta[weight].to_dense()[0]
        assert_close(found[name], delta.detach(), name, 1e-9)
    assert written(state) > 1e-3
    first, last = (found[f"model.blocks.{i}.channel.stack.0.body.down.weight"] for i in (0, 1))
    assert float((first - last).norm()) > 0.1 * float(last.norm())
