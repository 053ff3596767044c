"""The boxes of any module: what is declared equals the parameters, writes and tensors observed."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nestling
from nestling.core.level import Level
from nestling.introspect.table import alike


class OwnAttention(nn.Module):
    """Foreign attention under a name that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.project(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


class FastLayer(nn.Module):
    """A layer that declares its own level, and owns more than the level does."""

    def __init__(self, period: float = 16) -> None:
        super().__init__()
        self.memory, self.gate, self.period = nn.Linear(8, 8, bias=False), nn.Linear(8, 1), period

    def levels(self) -> list[Level]:
        return [
            Level(
                name="memory",
                memory="linear",
                objective="L2",
                rule="DGD",
                clock="token",
                period=self.period,
                parameters=64,
                half_life=1024.0,
                state_bytes=256,
            )  # fmt: skip
        ]


def named(boxes) -> dict:
    return {box.name: box for box in boxes}


@pytest.mark.parametrize(
    "module",
    [
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 3, enable_nested_tensor=False),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2)),
        nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=3),
        nn.Sequential(nn.Embedding(9, 8), OwnAttention(), FastLayer()),
    ],
    ids=["encoder", "convolutions", "lstm", "mixed"],
)
def test_each_parameter_belongs_to_one_box(module: nn.Module) -> None:
    if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.LazyLinear):
        module(torch.zeros(2, 3, 5, 5))
    assert nestling.levels(module).parameters == sum(p.numel() for p in module.parameters())


def test_shared_parameters_count_once() -> None:
    module = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11, bias=False))
    module[1].weight = module[0].weight
    assert nestling.levels(module).parameters == 44


def test_attention_is_re_solved_at_every_read() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 3, enable_nested_tensor=False)
    attention = [box for box in nestling.levels(encoder) if box.memory == "softmax attention"]
    assert [box.name for box in attention] == [f"layers.{i}.self_attn.attention" for i in range(3)]
    assert all((b.clock, b.period, b.frequency, b.state_bytes) == ("token", 0, math.inf, None) for b in attention)
    assert nestling.levels(encoder)[0].memory == "softmax attention"


def test_foreign_attention_is_recognised() -> None:
    boxes = named(nestling.levels(nn.Sequential(OwnAttention(), nn.Linear(8, 8))))
    assert boxes["0.attention"].period == 0
    assert "1.attention" not in boxes


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_state_is_what_the_layer_returns(kind: type, bidirectional: bool) -> None:
    module = kind(4, 6, num_layers=2, bidirectional=bidirectional)
    box = named(nestling.levels(module))[f"{kind.__name__}.state"]
    _, state = module(torch.randn(5, 3, 4))
    parts = state if isinstance(state, tuple) else (state,)
    assert box.state_bytes == sum(x.numel() * x.element_size() for x in parts) / 3
    assert (box.clock, box.period) == ("token", 1)
    _, after = module(torch.randn(1, 3, 4), state)
    assert all(
        not torch.equal(x, y) for x, y in zip(parts, after if isinstance(after, tuple) else (after,), strict=True)
    )


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells(kind: type) -> None:
    module = kind(4, 6)
    state = module(torch.randn(3, 4))
    parts = state if isinstance(state, tuple) else (state,)
    assert named(nestling.levels(module))[f"{kind.__name__}.state"].state_bytes == 4 * 6 * len(parts)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_running_statistics_are_written_once_per_training_step(momentum: float | None) -> None:
    module = nn.BatchNorm1d(4, momentum=momentum).double()
    box = named(nestling.levels(module))["BatchNorm1d.running statistics"]
    assert (box.clock, box.period, box.tensors, box.elements, box.state_bytes) == ("step", 1, 2, 8, 64)
    module(torch.randn(9, 4).double())
    before = module.running_mean.clone()
    module(torch.zeros(9, 4).double())
    if momentum is None:
        assert box.half_life is None
    else:
        torch.testing.assert_close(module.running_mean, before * 0.5 ** (1 / box.half_life), rtol=1e-12, atol=0)
    assert not torch.equal(module.running_mean, before)
    module.eval()(torch.randn(9, 4).double())
    assert "running statistics" not in str(nestling.levels(nn.BatchNorm1d(4, track_running_stats=False)))


def test_only_what_the_optimizer_holds_is_written() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([*module[0].parameters(), module[1].weight], lr=0.1)
    boxes = named(nestling.levels(module, optimizer))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "0.bias", "1.weight"}
    assert {name: box.period for name, box in boxes.items() if not name.startswith("SGD")} == {
        "0": 1, "1": 1, "1.frozen": math.inf, "2": math.inf,
    }  # fmt: skip
    assert (boxes["1"].elements, boxes["1.frozen"].elements, boxes["SGD.weights"].elements) == (16, 4, 36)


def test_an_optimizer_of_another_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer SGD holds 2 parameters that are not the module's"):
        nestling.levels(nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters()))


def test_declared_levels_are_taken_at_their_word() -> None:
    boxes = named(nestling.levels(nn.Sequential(nn.Linear(8, 8), FastLayer())))
    fast = boxes["1.memory"]
    assert (fast.period, fast.half_life, fast.parameters, fast.state_bytes) == (16, 1024.0, 64, 256)
    assert boxes["1: the rest"].parameters == 9
    assert "1.gate" not in boxes
    alone = named(nestling.levels(FastLayer()))
    assert set(alone) == {"memory", "FastLayer: the rest"}


def test_boxes_are_ordered_fast_to_slow() -> None:
    stack = nn.Sequential(FastLayer(512), FastLayer(16), OwnAttention(), FastLayer(math.inf))
    boxes = nestling.levels(stack, torch.optim.SGD(stack.parameters()))
    assert [(b.clock, b.period) for b in boxes.on("token")] == [("token", p) for p in (0, 16, 512, math.inf)]
    assert {b.clock for b in boxes[4:]} == {"step"}
    assert [len(level) for level in boxes.by_frequency()] == [1, 1, 1, 1, len(boxes) - 4]


def test_json_holds_every_field() -> None:
    boxes = nestling.levels(nn.Sequential(FastLayer(math.inf), OwnAttention()))
    rows = json.loads(boxes.to_json())
    assert [row["name"] for row in rows] == [box.name for box in boxes]
    assert rows[1]["period"] == "inf" and rows[0]["period"] == 0
    assert all("Infinity" not in line for line in boxes.to_json().split("\n"))
    wanted = {"name", "memory", "objective", "rule", "clock", "period", "parameters", "half_life", "transfer"}
    assert all(wanted <= row.keys() for row in rows)


def test_like_blocks_share_a_row() -> None:
    boxes = nestling.levels(nn.ModuleList([FastLayer(16) for _ in range(12)]))
    (memory, twelve), (rest, also_twelve) = alike(boxes)
    assert (memory.name, twelve, memory.parameters) == ("*.memory", 12, 12 * 64)
    assert (rest.name, also_twelve, rest.parameters) == ("*: the rest", 12, 12 * 9)


def read_columns(text: str) -> list[str]:
    """All text of each column of a table, without blanks."""
    lines = text.split("\n")
    dashes = next(line for line in lines if line.startswith("---"))
    spans = [(match.start(), match.end()) for match in re.finditer("-+", dashes)]
    return ["".join("".join(line[a:b].split()) for line in lines[:-1]) for a, b in spans]


@pytest.mark.parametrize("width", [110, 140, 200])
def test_table_fits_the_terminal_and_drops_no_word(width: int) -> None:
    module = nn.Sequential(FastLayer(16), OwnAttention(), nn.LSTM(8, 8))
    boxes = nestling.levels(module, torch.optim.Adam(module.parameters()))
    text = boxes.table(width)
    assert max(map(len, text.split("\n"))) <= width
    columns = read_columns(text)
    for box in boxes:
        assert box.name.replace(" ", "") in columns[0]
        assert box.rule.replace(" ", "") in columns[3]
    assert "16tokens" in columns[4] and "1,024tokens" in columns[6] and "256Barow" in columns[7]
    assert text.endswith(f"{len(boxes)} boxes, {boxes.parameters:,} parameters")


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_figure_draws_every_clock(tmp_path, ending: str) -> None:
    module = nn.Sequential(FastLayer(16), FastLayer(512), FastLayer(math.inf), OwnAttention())
    path = nestling.levels(module, torch.optim.Adam(module.parameters())).figure(tmp_path / "new" / f"f.{ending}")
    assert path.stat().st_size > 5_000
    if ending == "svg":
        text = path.read_text(encoding="utf-8")
        assert "<svg" in text and text.count("<!--") > 10


def test_boxes_in_a_drawing_never_overlap() -> None:
    from nestling.introspect.figure import WIDTH, drawn, place

    module = nn.Sequential(*(FastLayer(p) for p in (1, 2, 4, 16, 17, 512, 4096, math.inf)), OwnAttention())
    panel = drawn(list(nestling.levels(module)), "token")
    at = place(panel, 4096)
    assert len(at) == 9
    assert all(r != s or abs(x - y) >= WIDTH for i, (x, r) in enumerate(at) for y, s in at[:i])
