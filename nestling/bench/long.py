"""What length does: cost per token from 4K to 64K tokens, decoding at growing context, and a stream of a million."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestling.bench.measure import forget_peak, peak_bytes, resident, side_by_side, timed
from nestling.bench.workloads import layer, layer_work, model, text, training_work
from nestling.models import Decoder, LanguageModel, State

Row = dict[str, Any]
LENGTHS = (4096, 8192, 16_384, 32_768, 65_536)
LONG = 2048  # tokens from which the allocator's record of a run is too large to keep
CALL = 4096  # tokens of one call while a context is read


def slope(lengths: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log value against log length: 1 is linear."""
    x, y = ([math.log(v) for v in side] for side in (lengths, values))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def lengths(
    *,
    sizes: Sequence[int] = LENGTHS,
    dim: int = 128,
    heads: int = 2,
    preset: str = "tiny",
    names: Sequence[str] = ("transformer block", "self-modifying", "hope"),
    attention_up_to: int = 16_384,
    repeats: int = 2,
    device: str = "cpu",
) -> list[Row]:
    """Forward and backward of one sequence by its length, the fastest of `repeats` rounds in which the lengths take
    turns, so that drift of the machine does not look like growth; peak memory from one more run, of long sequences on
    a CPU in a process of its own."""
    sequences = {
        (name, size): OneSequence(name=name, size=size, dim=dim, heads=heads, preset=preset)
        for name in names
        for size in sizes
        if name != "transformer block" or size <= attention_up_to
    }
    works = {key: one.work(device) for key, one in sequences.items()}
    for name in names:
        works[name, min(sizes)]()
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            seconds[key].append(timed(work, device)[0])
    rows: list[Row] = []
    for (name, size), found in seconds.items():
        one, best = sequences[name, size], min(found)
        apart = device == "cpu" and size >= LONG
        peak = alone(one)["growth"] if apart else peak_bytes(works[name, size], device)
        rows.append(
            {"name": name, "length": size, "seconds": best, "tokens_per_second": size / best, "peak_bytes": peak}
        )
    return rows


def slopes(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The log-log slopes of seconds and of peak memory, by name."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    return {
        name: {what: slope([r["length"] for r in some], [r[what] for r in some]) for what in ("seconds", "peak_bytes")}
        for name, some in by_name.items()
        if len(some) > 1
    }


@dataclass(frozen=True, kw_only=True)
class OneSequence:
    """One sequence of some length through a layer or a model, forward and backward; a model takes its step too."""

    name: str
    size: int
    dim: int = 128
    heads: int = 2
    preset: str = "tiny"
    outer: str = "segment"

    def work(self, device: str = "cpu") -> Callable[[], object]:
        if self.name == "hope":
            module = model("hope", self.preset, outer=self.outer).to(device)
            return training_work(module, text(1, self.size, module.config.vocab_size, device))
        x = torch.randn(1, self.size, self.dim, generator=torch.Generator().manual_seed(0)).to(device)
        return layer_work(layer(self.name, self.dim, self.heads).to(device), x, training=True)


def alone(one: OneSequence) -> Row:
    """The work in a process of its own: the most memory that this process held, and by how much the work raised it.
    The allocator's record of a long sequence would itself take gigabytes."""
    call = json.dumps(asdict(one) | {"threads": torch.get_num_threads()})
    ran = subprocess.run([sys.executable, "-m", "nestling.bench.long", call], capture_output=True, text=True)
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-1:] or [f"exit code {ran.returncode}"]
        raise RuntimeError(f"{one.name} of {one.size} tokens failed in its own process: {last[0]}")
    return json.loads(ran.stdout)


def _alone(threads: int, **options: Any) -> Row:
    torch.set_num_threads(threads)
    one = OneSequence(**options)
    replace(one, size=min(one.size, 64)).work()()  # what torch sets up once
    work = one.work()
    forget_peak()
    before = resident()
    seconds, wall = timed(work)
    return {"seconds": seconds, "wall": wall, "resident": resident(), "growth": resident() - before}


# --- decoding ---------------------------------------------------------------------------------------------------


def decoding(
    *,
    contexts: Sequence[int] = (4096, 16_384, 65_536),
    preset: str = "tiny",
    names: Sequence[str] = ("transformer", "hope"),
    attention_up_to: int = 16_384,
    steps: int = 256,
    repeats: int = 3,
    device: str = "cpu",
) -> list[Row]:
    """Seconds per token at growing context, and what the state weighs."""
    rows: list[Row] = []
    for name in names:
        for learn in (False, True) if name != "transformer" else (False,):
            module = model(name, preset).to(device)
            limit = attention_up_to if name != "hope" else max(contexts)
            states = dict(reading(module, [c for c in contexts if c <= limit], learn=learn, device=device))
            rows += decode(module, name, states, learn=learn, steps=steps, repeats=repeats, device=device)
    return rows


def decode(
    module: LanguageModel,
    name: str,
    states: Mapping[int, State],
    *,
    learn: bool,
    steps: int = 256,
    repeats: int = 3,
    device: str = "cpu",
) -> list[Row]:
    """Rows of the decoding table for states by context, in turn. Writes off: `Decoder`; writes on: the general call,
    over one longest period, so that every level's write is paid for."""
    finite = [int(p) for p in module.config.periods if math.isfinite(p)]
    count = max(finite, default=steps) if learn else steps
    words = text(1, count, module.config.vocab_size, device)
    begin = _learning_steps if learn else _decoder_steps
    works = {str(context): begin(module, state, words) for context, state in states.items()}
    timings = side_by_side(works, repeats=repeats, device=device)
    return [
        {
            "name": name,
            "learn": learn,
            "context": context,
            "steps": count,
            "seconds_per_token": timings[str(context)].median / count,
            "state_bytes": state.nbytes,
            **timings[str(context)].to_dict(),
        }
        for context, state in states.items()
    ]


def _decoder_steps(module: LanguageModel, state: State, words: Tensor) -> Callable[[], object]:
    decoder = Decoder(module, state, room=2 * words.shape[1], graph=words.is_cuda)
    for token in words.T[:8]:
        decoder.step(token)

    def work() -> None:
        for token in words.T:
            decoder.step(token)

    return work


def _learning_steps(module: LanguageModel, state: State, words: Tensor) -> Callable[[], object]:
    def work() -> None:
        now = state
        with torch.no_grad():
            for token in words.T:
                now = module(token[:, None], now, learn=True).state

    return work


def reading(
    module: LanguageModel, contexts: Sequence[int], *, learn: bool, device: str = "cpu"
) -> Iterator[tuple[int, State]]:
    """(tokens read, state) at each of the contexts, read one after the other."""
    state: State | None = None
    words = text(1, CALL, module.config.vocab_size, device)
    done = 0
    with torch.no_grad():
        for context in sorted(contexts):
            while done < context:
                state = module(words[:, : context - done], state, learn=learn).state
                done += min(CALL, context - done)
            assert state is not None
            yield context, state


# --- a long stream and a long step ------------------------------------------------------------------------------


def stream(
    *,
    tokens: int = 2**20,
    preset: str = "tiny",
    every: int = 32_768,
    decode_at: Sequence[int] = (4096, 65_536, 2**20),
    device: str = "cpu",
) -> dict[str, list[Row]]:
    """Read a stream with writes on: seconds per token, bytes of the state and of the process as it goes on, and what
    decoding costs at some of its points."""
    module = model("hope", preset).to(device)
    words = text(1, CALL, module.config.vocab_size, device)
    state, done, spent, since = None, 0, 0.0, 0
    points: list[Row] = []
    kept: dict[int, State] = {}
    while done < tokens:
        size = min(CALL, tokens - done)

        def work(size: int = size) -> None:
            nonlocal state
            with torch.no_grad():
                state = module(words[:, :size], state).state

        spent += timed(work, device)[0]
        done, since = done + size, since + size
        assert state is not None
        if since >= every or done >= tokens:
            points.append(
                {
                    "tokens": done,
                    "seconds_per_token": spent / since,
                    "state_bytes": state.nbytes,
                    "resident": resident(),
                }
            )
            spent, since = 0.0, 0
        if done in decode_at:
            kept[done] = state
    decoded = [
        row for learn in (False, True) if kept for row in decode(module, "hope", kept, learn=learn, device=device)
    ]
    return {"stream": points, "decoding": decoded}


def long_step(*, preset: str = "small", tokens: int = 16_384, outer: str = "segment") -> Row:
    """One training step of Hope on one long sequence, in a process of its own."""
    return {"preset": preset, "tokens": tokens, "outer": outer} | alone(
        OneSequence(name="hope", size=tokens, preset=preset, outer=outer)
    )


if __name__ == "__main__":
    print(json.dumps(_alone(**json.loads(sys.argv[1]))))
