"""ModelConfig: everything that decides what a model is, in numbers and names that survive a JSON file."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..memories.continuum import DIRECTIONS, InnerRule, check_periods

Periods = tuple[float, ...]
ADAPTIVE = ("q", "k", "v", "eta", "alpha")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a model. Widths in channels, periods, windows and chunks in tokens.

    Attributes:
        name: which model, see `nestling.models.NAMES`.
        vocab_size, dim, depth, heads: vocabulary, width of the stream, blocks, heads per mixer.
        hidden: hidden width of one block's MLPs together; 0 = 8/3 of dim.
        window: sliding window of attention; None = full.
        chunk_size, expansion: chunk and hidden width (times head width) of the sequence memories.
        adaptive: which of q, k, v, eta, alpha a Hope makes with memories that are written; the others are fixed maps.
        dgd, decay: whether a Hope's memories erase what is stored at a key before they write it, and forget.
        periods: token periods of the CMS levels, fast to slow; inf = frozen.
        inner_lr: rate of the CMS writes, one or one per period; 0 = static.
        inner_rule, inner_relative, inner_bound, inner_erase, inner_decay, inner_kappa, inner_online, inner_learned:
            see `nestling.memories.continuum.InnerRule`.
        reset: when fast weights go back to their start: "never" or at a "document" border.
        continuum: how levels are joined: "sequential", "nested", "independent".
        outer: where the outer gradient stops: at each "segment" border, or never inside a call ("sequence").
        bptt: writes through which the outer gradient is exact (0 = first-order).
    """

    name: str
    vocab_size: int = 256
    dim: int = 128
    depth: int = 4
    heads: int = 2
    hidden: int = 0
    window: int | None = None
    chunk_size: int = 64
    expansion: int = 1
    adaptive: tuple[str, ...] = ("k", "v", "eta", "alpha")
    dgd: bool = True
    decay: bool = True
    periods: Periods = (math.inf,)
    inner_lr: float | tuple[float, ...] = 0.02
    inner_rule: str = "sgd"
    inner_relative: bool = True
    inner_bound: float = 0.1
    inner_erase: float = 0.0
    inner_decay: float = 0.0
    inner_kappa: float = 100.0
    inner_online: bool = False
    inner_learned: bool = False
    reset: Literal["never", "document"] = "never"
    continuum: Literal["sequential", "nested", "independent"] = "sequential"
    outer: Literal["segment", "sequence"] = "segment"
    bptt: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.periods, list):
            object.__setattr__(self, "periods", tuple(self.periods))
        if isinstance(self.inner_lr, list):
            object.__setattr__(self, "inner_lr", tuple(self.inner_lr))
        if isinstance(self.adaptive, list):
            object.__setattr__(self, "adaptive", tuple(self.adaptive))
        if any(name not in ADAPTIVE for name in self.adaptive):
            raise ValueError(f"adaptive={self.adaptive} must name some of {', '.join(ADAPTIVE)}")
        for name in ("vocab_size", "dim", "depth", "heads", "chunk_size", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            fits = [h for h in range(1, self.dim // 2 + 1) if self.dim % h == 0 and (self.dim // h) % 2 == 0]
            near = min(fits, key=lambda h: abs(h - self.heads)) if fits else 1
            raise ValueError(
                f"dim={self.dim} does not split into heads={self.heads} of even width; use e.g. heads={near}"
                if fits
                else f"dim={self.dim} must be even; use e.g. dim={self.dim + 1}"
            )
        check_periods(self.periods)
        if isinstance(self.inner_lr, tuple) and len(self.inner_lr) != len(self.periods):
            raise ValueError(
                f"inner_lr has {len(self.inner_lr)} rates for {len(self.periods)} periods; give one rate each"
            )
        if self.inner_rule not in DIRECTIONS:
            raise ValueError(f"inner_rule={self.inner_rule!r} is unknown; choose one of {', '.join(DIRECTIONS)}")
        for name, allowed in (
            ("reset", ("never", "document")),
            ("continuum", ("sequential", "nested", "independent")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.hidden < 0:
            raise ValueError(f"hidden={self.hidden} must be at least 0")
        check_outer(self.outer, self.bptt)

    @property
    def width(self) -> int:
        """Hidden width of a block's MLPs together."""
        return self.hidden or 8 * self.dim // 3

    def rules(self) -> list[InnerRule]:
        """The inner rule of every level of a block, fast to slow."""
        rates = self.inner_lr if isinstance(self.inner_lr, tuple) else (self.inner_lr,) * len(self.periods)
        return [
            InnerRule(
                rate=rate,
                direction=DIRECTIONS[self.inner_rule],
                relative=self.inner_relative,
                bound=self.inner_bound,
                erase=self.inner_erase,
                decay=self.inner_decay,
                kappa=self.inner_kappa,
                online=self.inner_online,
                learned=self.inner_learned and rate > 0,
                reset=self.reset,
            )
            for rate in rates
        ]


def check_outer(outer: str, bptt: int) -> None:
    """Raises ValueError for a reach of the outer gradient that does not exist."""
    if outer not in ("segment", "sequence"):
        raise ValueError(f"outer={outer!r} is unknown; choose one of segment, sequence")
    if bptt < 0:
        raise ValueError(f"bptt={bptt} must be at least 0; 0 is first-order")


def check_frozen(config: ModelConfig) -> None:
    """Raises ValueError for a level that would write: a baseline has none."""
    if config.periods != (math.inf,):
        raise ValueError(
            f"{config.name}: periods={config.periods} must be (inf,); use hope or hope-attention for finite periods"
        )


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The config that `dataclasses.asdict` wrote; an unknown key raises ValueError."""
    known = {f.name for f in fields(ModelConfig)}
    for key in values:
        if key not in known:
            raise ValueError(f"model config: unknown key {key!r}; known: {', '.join(sorted(known))}")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return ModelConfig(**plain)
