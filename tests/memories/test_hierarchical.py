"""Global and local Titans memories: all shards at once are the shards one after the other."""

import pytest
import torch

from nestling.memories import HierarchicalTitans
from nestling.testing import assert_close

DIM, HEADS, SHARD = 8, 2, 10


def layer(**options):
    return HierarchicalTitans(DIM, HEADS, chunk_size=4, global_chunk=16, shard=SHARD, **options).double()


def one_after_the_other(made, x):
    """The same layer as its equation: a global read of the whole text, and a loop over shards that begin anew."""
    q, k, v, _ = made.frame.enter(x, None, None)
    o, _ = made.whole(x, q, k, v)
    shards = zip(*(z.split(SHARD, 1) for z in (x, q, k, v)), strict=True)
    return made.frame.leave(o + torch.cat([made.local(*shard)[0] for shard in shards], 1), x)


@pytest.mark.parametrize("memory", ["mlp", "linear"])
@pytest.mark.parametrize("tokens", [7, 10, 40, 57])
def test_all_shards_at_once_are_the_loop_over_shards_with_every_gradient(tokens, memory):
    made, x = layer(memory=memory), torch.randn(2, tokens, DIM, dtype=torch.float64, requires_grad=True)
    results = []
    for y in (made(x)[0], one_after_the_other(made, x)):
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append((y, torch.autograd.grad((y * weights).sum(), [x, *made.parameters()])))
    (ours, gradients), (theirs, expected) = results
    assert_close(ours, theirs, "output")
    for (name, _), a, b in zip([("x", x), *made.named_parameters()], gradients, expected, strict=True):
        assert_close(a, b, f"gradient of {name}")


def test_a_shard_border_clears_the_local_memory_and_leaves_the_global_one():
    made = layer()
    _, state = made(torch.randn(2, 3 * SHARD, DIM, dtype=torch.float64))
    assert state.phase.tolist() == [0, 0] and state.local.count.tolist() == [0, 0]
    assert not any(x.any() for x in (*state.local.anchor, *state.local.running, *state.local.surprise))
    assert all(x.any() for x in state.whole.running)


def test_what_the_local_memory_read_in_another_shard_is_gone():
    made = layer()
    x = torch.randn(1, 25, DIM, dtype=torch.float64)
    other = x.clone()
    other[:, :3] += 1  # long before the convolution of the third shard begins
    (q, k, v, _), (_, k2, v2, _) = (made.frame.enter(z, None, None) for z in (x, other))
    reads = [made._shards([z, q, key, value], None, 0, None)[0] for z, key, value in ((x, k, v), (other, k2, v2))]
    assert_close(reads[0][:, SHARD:], reads[1][:, SHARD:], "later shards")
    assert not torch.equal(reads[0][:, :SHARD], reads[1][:, :SHARD])


def test_levels_name_both_memories_and_the_reset():
    whole, local, _ = layer().levels()
    assert (whole.name, local.name) == ("global memory", "local memory")
    assert "every 10 tokens" in local.transfer and "every" not in whole.transfer


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="shard is 0"):
        HierarchicalTitans(DIM, HEADS, shard=0)
    with pytest.raises(ValueError, match="global_chunk is -1"):
        HierarchicalTitans(DIM, HEADS, global_chunk=-1)
    with pytest.raises(ValueError, match="dim=8 is not divisible by heads=3"):
        HierarchicalTitans(DIM, 3)
