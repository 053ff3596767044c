"""RunConfig: everything that decides a training run. Frozen, checked on construction, compared on resume."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

MATRICES = ("adamw", "muon", "m3", "dgd")
DGD_RATE = 0.3  # the middle of the grids in docs/optimizers.md
Value = bool | int | float | str | None | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model to build; None leaves a size as the preset has it."""

    name: str = "hope"
    """One of nestling.models.NAMES."""
    preset: str = "tiny"
    """Sizes to start from, one of nestling.models.PRESETS."""
    dim: int | None = None
    """Width of the residual stream, in channels."""
    depth: int | None = None
    """Blocks."""
    heads: int | None = None
    """Heads per sequence memory."""
    window: int | None = None
    """Sliding window of attention, in tokens."""
    chunk_size: int | None = None
    """Chunk of the token memories, in tokens."""
    expansion: int | None = None
    """Hidden width of token memories, in head widths."""
    periods: tuple[float, ...] | None = None
    """Token periods of the CMS levels, fast to slow; inf = frozen."""
    inner_lr: tuple[float, ...] | None = None
    """Rate of CMS writes: one for all levels or one per level; 0 = static."""
    match: str = ""
    """Trim hidden widths to the parameter count of this model name or number; empty = do not."""
    options: dict[str, Value] = field(default_factory=dict)
    """Further keyword arguments of nestling.models.build."""

    def __post_init__(self) -> None:
        names = {f.name for f in fields(self)} - {"options"}
        for name in self.options:
            require(name not in names, f"model.options[{name!r}] has a field of its own", f"set model.{name}")
        for name in ("dim", "depth", "heads", "window", "chunk_size", "expansion"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}={value} is below 1", "use at least 1")

    def overrides(self) -> dict[str, Any]:
        """Keyword arguments of `nestling.models.build(name, preset, ...)`, the vocabulary apart."""
        own = ("name", "preset", "match", "options")
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if self.inner_lr is not None and len(self.inner_lr) == 1:
            chosen["inner_lr"] = self.inner_lr[0]
        if self.match:
            chosen["match"] = int(self.match) if self.match.isdigit() else self.match
        return chosen | self.options


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read."""

    text: str = "shakespeare"
    """A bundled text, a text file, a folder of .txt(.xz), or a folder of token shards."""
    tokenizer: str = "bytes"
    """'bytes' or the path of a tokenizer.json."""
    validation: str = ""
    """Held-out text, file or folder; empty = the last part of each document of `text`."""
    validation_fraction: float = 0.1
    """Part of each document that is held out where `validation` is empty, in (0, 1)."""
    shuffle: int = 0
    """Read blocks of whole documents, at least so many tokens each, in an order drawn from train.seed; 0 = do not."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Further texts or folders by name, with their weights beside the 1 of `text`; all are read in blocks."""

    def __post_init__(self) -> None:
        require(self.text != "", "data.text is empty", "name a bundled text, a file or a folder")
        share = self.validation_fraction
        require(0 < share < 1, f"data.validation_fraction={share} is not between 0 and 1", "use for example 0.1")
        require(self.shuffle >= 0, f"data.shuffle={self.shuffle} is negative", "use 0 or more tokens")
        for name, weight in self.mixture.items():
            require(0 < weight < math.inf, f"data.mixture: {name} has weight {weight}", "use a number above 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """An optimizer with a warm-up and a cosine to a last rate."""

    matrices: str = "adamw"
    """What writes hidden matrices: adamw, muon, m3 or dgd; AdamW writes everything else."""
    matrices_lr: float = 0.0
    """Highest rate of hidden matrices; 0 = `lr`, and 0.3 for dgd, which multiplies gradients as they are."""
    erase: float = 0.01
    """What a step of dgd first forgets of the matrices along their inputs: 1 = the paper's part, 0 = nothing."""
    ns_dtype: str = ""
    """In what Muon and M3 orthogonalise: float32 or bfloat16; empty = the fastest of the device."""
    lr: float = 2e-3
    """Highest rate, per step."""
    final_lr: float = 0.1
    """Rate of the last step, in parts of `lr`."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Steps at which the cosine has reached `final_lr`, where it stays; 0 = the last step."""
    weight_decay: float = 0.1
    """Decay of matrices, in parts of the rate; vectors do not decay."""
    beta1: float = 0.9
    """Kept part of the first moment per step."""
    beta2: float = 0.95
    """Kept part of the second moment per step."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest gradient norm; inf = no clipping."""

    def __post_init__(self) -> None:
        known = self.matrices in MATRICES
        require(known, f"optim.matrices={self.matrices!r} is unknown", f"use one of {', '.join(MATRICES)}")
        known = self.ns_dtype in ("", "float32", "bfloat16")
        require(known, f"optim.ns_dtype={self.ns_dtype!r} is unknown", "use float32, bfloat16, or nothing")
        require(0 < self.lr < math.inf, f"optim.lr={self.lr} is not positive", "use for example 2e-3")
        known = 0 <= self.matrices_lr < math.inf
        require(known, f"optim.matrices_lr={self.matrices_lr} is negative", "use 0 for the usual one")
        unused = self.matrices_lr > 0 and self.matrices == "adamw"
        require(not unused, f"optim.matrices_lr={self.matrices_lr} with optim.matrices=adamw", "set optim.lr")
        require(0 <= self.erase < math.inf, f"optim.erase={self.erase} is negative", "use 0 to forget nothing")
        require(0 <= self.final_lr <= 1, f"optim.final_lr={self.final_lr} is not in [0, 1]", "it is a part of lr")
        require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps} is negative", "use 0 or more")
        decays = self.decay_steps == 0 or self.decay_steps > self.warmup_steps
        require(decays, f"optim.decay_steps={self.decay_steps} is not after the warm-up", "use 0 for the last step")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} is negative", "use 0 or more")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}={getattr(self, name)} is not in [0, 1)", "use 0.9")
        require(self.eps > 0, f"optim.eps={self.eps} is not positive", "use 1e-8")
        require(self.clip_norm > 0, f"optim.clip_norm={self.clip_norm} is not positive", "use inf for no clipping")

    @property
    def matrices_rate(self) -> float:
        """Highest rate of hidden matrices."""
        return self.matrices_lr or (DGD_RATE if self.matrices == "dgd" else self.lr)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and on how much, how state is carried, and what is written down."""

    steps: int = 300
    """Optimizer steps."""
    rows: int = 8
    """Contiguous streams read side by side, in rows per batch."""
    length: int = 256
    """Tokens per row and step."""
    stream_length: int = 8192
    """Tokens after which the state of all rows is cleared, a multiple of `length`."""
    carry_context: bool = False
    """Keep the context of the mixers from step to step too; False keeps fast weights, clocks and buffers only."""
    eval_every: int = 100
    """Steps between validations, 0 = only after the last step."""
    eval_windows: int = 16
    """Held-out windows of `length` tokens per validation."""
    calibrate_every: int = 100
    """Steps between updates of the old-key statistics; they are made after the last step in any case. 0 = only then."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step has one in any case. 0 = only then."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are never removed; 0 = no such ones."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    device: str = "cpu"
    """Device of torch, such as cpu or cuda."""
    bf16: bool = False
    """Autocast matrix products to bfloat16; weights and fast weights stay float32."""
    compile: bool = False
    """Read the usual pieces of text through blocks compiled with torch.compile; the first steps take long."""
    tensorboard: bool = False
    """Also write TensorBoard files."""

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "length", "stream_length", "eval_windows", "keep"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} is below 1", "use at least 1")
        for name in ("eval_every", "calibrate_every", "checkpoint_every", "keep_every", "seed"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} is negative", "use 0 or more")
        nearest = max(1, round(self.stream_length / self.length)) * self.length
        require(
            self.stream_length % self.length == 0,
            f"train.stream_length={self.stream_length} is not a multiple of train.length={self.length}",
            f"use {nearest}",
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a step is spread over processes and time. Nothing here changes what is computed, rounding apart."""

    ranks: int = 0
    """Processes that torchrun must have started; 0 = any number."""
    shard: int = 0
    """Ranks (or groups of `tensor`) that share one copy of the weights; fewer than all = hybrid sharding, 0 = all."""
    accumulate: int = 1
    """Parts of its rows that a rank reads one after the other in each step."""
    sequence: int = 1
    """Ranks that share the same rows: each reads a stretch of the tokens of a step, the state goes from one to next."""
    tensor: int = 1
    """Ranks that share the same rows and split the matrices of the model among them (tensor parallelism)."""
    recompute: bool = False
    """Keep no activations inside blocks; the backward pass computes them again."""
    reshard: bool = False
    """Gather the weights of a block for each of its passes and free them after it (ZeRO-3); False = once per step."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        for name, least in (("ranks", 0), ("shard", 0), ("accumulate", 1), ("sequence", 1), ("tensor", 1)):
            require(
                getattr(self, name) >= least,
                f"parallel.{name}={getattr(self, name)} is below {least}",
                f"use at least {least}",
            )
        require(
            not self.reshard or self.sequence == self.tensor == 1,
            f"parallel.reshard with parallel.sequence={self.sequence}, parallel.tensor={self.tensor}",
            "leave out reshard, or these",
        )
        require(self.timeout > 0, f"parallel.timeout={self.timeout} is not positive", "use for example 600")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens when a step goes wrong: its loss or gradient is not finite, or the gradient is far too long."""

    skips: int = 0
    """Bad steps in a row whose update is left out; one more goes back to the last checkpoint. 0 = stop at the first."""
    rollbacks: int = 0
    """Times that a run goes back to its last checkpoint, reading on behind the bad text; one more stops it."""
    spike: float = math.inf
    """A gradient norm of this many medians of the last good steps is bad; inf = only what is not finite is."""

    def __post_init__(self) -> None:
        for name in ("skips", "rollbacks"):
            require(getattr(self, name) >= 0, f"guard.{name}={getattr(self, name)} is negative", "use 0 or more")
        require(self.spike > 1, f"guard.spike={self.spike} is not above 1", "use for example 10")
        needed = self.rollbacks == 0 or self.skips > 0
        require(needed, f"guard.rollbacks={self.rollbacks} without guard.skips", "use for example guard.skips=3")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: model, data, optimizer, training, and how it is spread and guarded."""

    model: ModelChoice = field(default_factory=ModelChoice)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        warmup, steps = self.optim.warmup_steps, self.train.steps
        require(
            warmup <= steps, f"optim.warmup_steps={warmup} is more than train.steps={steps}", f"use at most {steps}"
        )
        traced = not (self.train.compile and self.optim.matrices == "dgd")
        require(
            traced, "train.compile with optim.matrices=dgd, which looks inside of blocks", "leave out one of the two"
        )
        if self.parallel.tensor > 1:
            fault = f"parallel.tensor={self.parallel.tensor} with optim.matrices=dgd, which needs inputs of whole maps"
            require(self.optim.matrices != "dgd", fault, "use adamw, muon or m3")
        freed = not (self.parallel.reshard and (self.train.compile or self.optim.matrices == "dgd"))
        require(
            freed, "parallel.reshard with train.compile or optim.matrices=dgd, never tried together", "leave one out"
        )
        self.rows_per_part(max(1, self.parallel.ranks))

    def rows_per_part(self, ranks: int) -> int:
        """Rows that a rank reads at once. Raises ValueError if the rows do not divide."""
        groups = max(1, ranks // (self.parallel.sequence * self.parallel.tensor))
        parts = groups * self.parallel.accumulate
        require(
            self.train.rows % parts == 0,
            f"train.rows={self.train.rows} do not divide into {groups} ranks times "
            f"parallel.accumulate={self.parallel.accumulate}",
            f"use a multiple of {parts}",
        )
        return self.train.rows // parts

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config_file.write_config` writes them."""
        return asdict(self)


def require(holds: bool, fault: str, remedy: str) -> None:
    """Raise ValueError with the fault and the remedy unless the rule holds."""
    if not holds:
        raise ValueError(f"{fault}; {remedy}")
