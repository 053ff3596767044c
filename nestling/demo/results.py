"""Everything that the demo measured, as values that JSON can hold; the tables and the sentences come from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nestling.evals import Forgetting, Writes

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One model's training."""

    parameters: int
    steps: int
    tokens: int
    seconds: float
    validation: Points  # (tokens, nats) as training went on


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Frozen loss on held-out windows of the training text, in nats per token."""

    short: float  # windows of the training length
    long: float  # windows of 4 times the training length
    by_position: Points  # (position, nats) in the long windows


@dataclass(frozen=True, kw_only=True)
class Read:
    """One reading of the unseen text, in bits per byte."""

    whole: float
    first_half: float
    second_half: float
    by_position: Points  # (token, bits per byte)
    writes: tuple[Writes, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The saved memory and what a new process found in it."""

    file: str
    bytes: int
    tensors: int
    equal_state: bool  # the loaded tensors
    equal_reading: bool  # the losses on the next tokens
    next: int  # how many tokens these were

    @property
    def equal(self) -> bool:
        """Whether everything came back bit for bit."""
        return self.equal_state and self.equal_reading


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The same prompt continued before and after reading."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """The demo's numbers. Models go by "hope" and "transformer"; a suffix says how they read."""

    quick: bool
    seed: int
    length: int  # training length
    trained_on: str
    read: str
    read_tokens: int
    training: dict[str, Training]  # hope, transformer
    held_out: dict[str, HeldOut]  # hope, transformer (full attention), transformer-window
    reading: dict[str, Read]  # hope-learning, hope-frozen, transformer
    forgetting: Forgetting
    memory: Memory
    samples: Samples
    machine: dict[str, Any]
    configs: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """With the keys of the result files."""
        metrics = asdict(self)
        machine, configs = metrics.pop("machine"), metrics.pop("configs")
        name = "demo --quick" if self.quick else "demo"
        return {"recipe": name, "config": configs, **machine, "seeds": [self.seed], "metrics": metrics}
