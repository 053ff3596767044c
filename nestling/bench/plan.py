"""Plan: what a run will need per GPU, and how long it will take.

Without a measurement the plan is counted: bytes of what is kept, FLOPs of cost.py at an assumed share of a GPU's peak.
With one (`measure`) it is read off steps of the same model with two and with three blocks on the device at hand, with
as many rows as a rank reads at once: bytes and seconds of a step are straight lines in the number of blocks.

    weights      whole while a step lasts (of split ones this rank's part), and what of them this rank keeps
    gradients    whole until they are reduced, and this rank's part
    optimizer    this rank's part
    fast weights of this rank's rows: contexts, what levels have written, what they wait to write
    working      activations of the rows that are read at once, and what the backward pass holds for a moment

With parallel.reshard only two blocks are whole at a time, and what stands outside of blocks; blocks are gathered twice
and reduced for each segment. What a step then holds is counted, as one process cannot measure it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from nestling.bench import cost
from nestling.bench.measure import peak_bytes
from nestling.core.state import nbytes
from nestling.data import Tokens, TokenStream
from nestling.models import LanguageModel, ModelConfig, from_config
from nestling.train.config import RunConfig
from nestling.train.parallel.splits import splits_of
from nestling.train.trainer import Trainer

FLOAT = 4  # bytes of a weight, a gradient and a moment; a run in bf16 keeps these in float32
MOMENTS = {"adamw": 2, "muon": 1, "m3": 4, "dgd": 0}  # tensors kept for a hidden matrix from step to step
TIMED = 3  # steps
ASSUMED = 0.25  # of a GPU's peak, where nothing was measured


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: dense bf16 FLOP/s, bytes of memory, bytes/s to its neighbours, dollars per hour."""

    flops: float
    memory: float
    link: float
    dollars: float


GPUS = {
    "a100": Gpu(312e12, 80e9, 300e9, 1.8),
    "h100": Gpu(989e12, 80e9, 450e9, 2.8),
    "h200": Gpu(989e12, 141e9, 450e9, 3.5),
}


Line = tuple[float, float]  # a + b blocks


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds of a step of `rows` rows, by the number of blocks."""

    rows: int
    state: Line
    working: Line
    seconds: Line


@dataclass(frozen=True)
class Plan:
    """Bytes per GPU by what they are for, seconds of a step, and what follows."""

    parameters: int
    memory: dict[str, float]
    seconds: float
    tokens: float  # of a step, all GPUs together
    steps: int
    gpus: int
    measured: bool

    @property
    def bytes(self) -> float:
        """Per GPU, all together."""
        return sum(self.memory.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def days(self) -> float:
        return self.steps * self.seconds / 86400

    def dollars(self, per_hour: float) -> float:
        """At a price per GPU and hour."""
        return self.days * 24 * self.gpus * per_hour


def plan(config: RunConfig, model: ModelConfig, gpus: int, gpu: Gpu, measured: Measured | None = None) -> Plan:
    """The plan of a run on `gpus` ranks of a kind; `measured` on the same kind of device, with the rows of a part."""
    with torch.device("meta"):
        built = from_config(model)
    parameters = built.num_parameters()
    parallel, parts = config.parallel, config.parallel.tensor
    if measured and parts > 1:
        raise ValueError(f"parallel.tensor={parts} splits what is whole on one device; leave --measure out")
    if gpus % (parallel.sequence * parts):
        wanted = f"parallel.sequence={parallel.sequence} times parallel.tensor={parts}"
        raise ValueError(f"{wanted} does not divide {gpus} GPUs; use a divisor")
    groups = gpus // (parallel.sequence * parts)
    rows, together = config.train.rows / groups, config.rows_per_part(gpus)
    shard, share = parallel.shard or max(1, gpus // parts), shares(built, parts)
    part = FLOAT * sum(p.numel() * share[name] for name, p in built.named_parameters()) / shard * (gpus > 1)
    whole, reshards = FLOAT * at_once_whole(built, config, gpus, share), parallel.reshard and gpus > 1
    state = at(measured.state, model.depth) / measured.rows if measured else state_bytes(model, parts)
    memory = {
        "weights": whole + part,
        "gradients": part,  # whole ones are among what is working: twice, or once with `reshard`
        "optimizer": optimizer_bytes(built, config.optim.matrices, share) / shard,
        "fast weights": rows * state,
        "working": at(measured.working, model.depth)
        if measured and not reshards
        else (1 if reshards else 2) * whole + activation_bytes(model, config, together, share),
    }
    length = config.train.length / parallel.sequence
    if measured:
        compute = parallel.accumulate * at(measured.seconds, model.depth) / parallel.sequence
    else:
        once = cost.training(model, config.train.length / 2).flops * (4 / 3 if parallel.recompute else 1)
        compute = rows * length * once * work_share(built, share) / (ASSUMED * gpu.flops)
    exchange = FLOAT * exchanged(built, config, share) / gpu.link * (gpus > parts)
    exchange += rows * length * summed_bytes(built, config) / gpu.link
    tokens = config.train.rows * config.train.length
    return Plan(parameters, memory, compute + exchange, tokens, config.train.steps, gpus, measured is not None)


Shares = dict[str, float]  # of every parameter by its name: the part of it that one rank of a tensor group holds


def shares(model: LanguageModel, parts: int) -> Shares:
    """Everything, or of split matrices one of `parts`. Raises ValueError if the model cannot be split."""
    splits = splits_of(model, parts) if parts > 1 else {}
    return {name: 1 / parts if name in splits else 1.0 for name, _ in model.named_parameters()}


def work_share(model: LanguageModel, share: Shares) -> float:
    """The part of a token's multiplications that one rank of a group does."""
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and "embedding" not in n}
    return sum(size * share[name] for name, size in sizes.items()) / sum(sizes.values())


def summed_bytes(model: LanguageModel, config: RunConfig) -> float:
    """Bytes per token that a rank sends to sum what its group's parts of matrices give, forward and backward: once for
    each pair of them (heads and output, gate/up and down), the embedding and the head."""
    parts, width = config.parallel.tensor, (2 if config.train.bf16 else FLOAT) * model.config.dim
    if parts == 1:
        return 0.0
    pairs = len(splits_of(model, parts)) / 2
    return (3 if config.parallel.recompute else 2) * pairs * width * 2 * (parts - 1) / parts


def optimizer_bytes(model: LanguageModel, matrices: str, share: Shares | None = None) -> float:
    """What the optimizer keeps: two moments, for hidden matrices what theirs keeps."""
    kept = 0.0
    for name, p in model.named_parameters():
        hidden = p.dim() == 2 and name not in ("embedding.weight", "head.weight")
        kept += (MOMENTS[matrices] if hidden else 2) * p.numel() * (1 if share is None else share[name])
    return FLOAT * kept


def state_bytes(model: ModelConfig, parts: int = 1) -> float:
    """The bound of a row's state that `levels()` prints, block by block; what has no bound is left out. Of `parts`
    ranks that split the model one has its share, of mixers that are not split all."""
    block = from_config(replace(model, depth=1, vocab_size=2)).blocks[0]
    sizes = [level.state_bytes or 0 for level in block.levels()]  # type: ignore[operator]
    mixer = len(block.mixer.levels())  # type: ignore[union-attr, operator]
    split = hasattr(block.mixer, "splits")
    return model.depth * (sum(sizes[:mixer]) / (parts if split else 1) + sum(sizes[mixer:]) / parts)


def at_once_whole(model: LanguageModel, config: RunConfig, gpus: int, share: Shares) -> float:
    """Parameters that are whole at a time: all, or with `reshard` those of two blocks and outside of blocks."""
    freed = sum(p.numel() for block in model.blocks[2:] for p in block.parameters())
    held = sum(p.numel() * share[name] for name, p in model.named_parameters())
    return held - freed * (config.parallel.reshard and gpus > 1)


def exchanged(model: LanguageModel, config: RunConfig, share: Shares) -> float:
    """Numbers that a rank exchanges per step: parameters gathered and gradients reduced; with `reshard` those of blocks
    gathered twice and reduced for every segment. Segments that end with a document come on top. What stands outside of
    blocks is gathered for the first forward pass and every backward pass, and reduced once."""
    parts, shortest = config.parallel.accumulate, min([config.train.length, *model.config.periods])
    sizes = {name: p.numel() * share[name] for name, p in model.named_parameters() if p.dim()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    times = 3 * parts * math.ceil(config.train.length / shortest) if config.parallel.reshard else 2
    return times * blocks + (parts + 2) * (sum(sizes.values()) - blocks)


def activation_bytes(c: ModelConfig, config: RunConfig, rows: float, share: Shares) -> float:
    """A rough count of activations: of a segment, or of all tokens where nothing writes."""
    parts = config.parallel.tensor
    finite = [period for period in c.periods if math.isfinite(period)]
    tokens = rows * min([config.train.length / config.parallel.sequence, *finite])
    number = 2 if config.train.bf16 else FLOAT
    inside = 16 * c.dim + 4 * c.width / parts
    blocks = (c.depth * c.dim + inside) if config.parallel.recompute else c.depth * (c.dim + inside)
    logits = min(tokens * c.vocab_size, 2**24) * 3 * FLOAT * share["head.weight"]
    fast = rows * (c.depth * 3 * c.dim * c.width * len(finite) / len(c.periods)) * 2 * FLOAT / parts
    return tokens * number * blocks + logits + fast


def measure(config: RunConfig, model: ModelConfig, *, rows: int, device: str = "cpu") -> Measured:
    """Trainings of a few steps with two and with three blocks."""
    two, three = (_measured(config, replace(model, depth=depth), rows, device) for depth in (2, 3))
    state, working, seconds = ((a - 2 * (b - a), b - a) for a, b in zip(two, three, strict=True))
    return Measured(rows, state, working, seconds)


def _measured(config: RunConfig, model: ModelConfig, rows: int, device: str) -> tuple[float, float, float]:
    """Bytes of the state, working bytes and seconds of a step, once every level has written."""
    trainer = trainer_of(config, model, rows, device)
    finite = [period for period in model.periods if math.isfinite(period)]
    for _ in range(1 + math.ceil(2 * max(finite, default=0) / config.train.length)):
        trainer.next_step()
    working = peak_bytes(trainer.next_step, device)
    clock = time.process_time if device == "cpu" else time.perf_counter  # a step on a GPU ends with reading its loss
    began = clock()
    for _ in range(TIMED):
        trainer.next_step()
    assert trainer.state is not None
    return nbytes(trainer.state.tree), working, (clock() - began) / TIMED


def trainer_of(config: RunConfig, model: ModelConfig, rows: int, device: str) -> Trainer:
    """A trainer of random tokens, whose streams do not end."""
    length = config.train.length
    forever = replace(
        config.train, rows=rows, stream_length=length << 20, calibrate_every=0, steps=1 << 30,
        eval_every=0, checkpoint_every=0, device=device,
    )  # fmt: skip
    alone = replace(config.parallel, ranks=0, shard=0, accumulate=1, sequence=1, tensor=1)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, size=8 * length + 1)
    tokens = Tokens(pieces=[ids], starts=np.zeros(1, dtype=np.int64), tokenizer="random", fingerprint="random")
    stream = TokenStream(tokens, rows=rows, length=length)
    return Trainer(from_config(model), stream, replace(config, train=forever, parallel=alone))


def at(line: Line, blocks: float) -> float:
    """The value of such a line."""
    return line[0] + line[1] * blocks
