"""What the arithmetic costs: FLOPs and moved numbers per token of every op, layer and model, as formulas of the shape.

Counted is what the mathematics of the chunk form asks for: matrix products and triangular solves, two FLOPs a
multiply-add, dense C x C products inside a chunk; element-wise work is left out. Moved is what must cross memory
if everything inside a chunk stays in cache: inputs, outputs, and the state once in and once out per chunk. The
backward pass of a product is two products of its size, and it reads and writes twice what the forward pass does:
training is three times both. docs/performance.md derives each line. Letters: K key and value width of a head, F
hidden width of a memory, C chunk length, M memories.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nestling.models import ModelConfig


@dataclass(frozen=True)
class Cost:
    """FLOPs, and numbers moved to or from memory, per token of one forward pass."""

    flops: float
    moved: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.moved + other.moved)

    def __rmul__(self, count: float) -> Cost:
        return Cost(count * self.flops, count * self.moved)

    @property
    def training(self) -> Cost:
        """Forward and backward."""
        return 3 * self

    def intensity(self, bytes_per_number: int = 4) -> float:
        """FLOPs per byte."""
        return self.flops / (bytes_per_number * self.moved)

    def floor(self, flops: float, bandwidth: float, bytes_per_number: int = 4) -> float:
        """Seconds per token that a machine of `flops` FLOP/s and `bandwidth` bytes/s cannot undercut."""
        return max(self.flops / flops, bytes_per_number * self.moved / bandwidth)


# --- ops, per token and head ------------------------------------------------------------------------------------


def linear_attention(K: int, C: int) -> Cost:
    """Scores and their use 4CK, the chunk's write and read of the state 4K²."""
    return Cost(4 * C * K + 4 * K * K, 4 * K + 1 + 2 * K * K / C)


def delta_rule(K: int, C: int) -> Cost:
    """k·k and q·k 4CK, the inverse 2C²/3, times 2K columns 4CK, scores times writes 2CK; 6K² with the state."""
    return Cost(10 * C * K + 2 * C * C / 3 + 6 * K * K, 4 * K + 1 + 2 * K * K / C)


def gated_delta_rule(K: int, C: int) -> Cost:
    """The delta rule; decays are element-wise."""
    return delta_rule(K, C) + Cost(0, 1)


def titans(K: int, C: int, F: int = 0, *, momentum: bool = True) -> Cost:
    """F = 0: one matrix; else two, through a hidden width F. With momentum every read and write also meets S.

    Where the memory decays to its initial weights, k and q meet those of the first matrix and what was written apart.
    """
    m = int(momentum)
    decays = Cost(2 * m * C * C, 2 + m)
    if F == 0:
        state = (1 + m) * K * K
        return decays + Cost(4 * C * K + 2 * K * K * (2 + (2 + m) + (1 + m)), 4 * K + 2 * state / C)
    state = 2 * (1 + m) * K * F
    products = 4 + 2 * (2 + m) + 2 * (1 + m)  # at the anchor: three forward, one back; reads; writes
    return decays + Cost(4 * C * (K + F) + 2 * K * F * products, 4 * K + 2 * state / C)


def self_modifying(K: int, C: int, F: int = 0, M: int = 5, *, memory: str = "features") -> Cost:
    """M memories that share their key; `memory` as in the layer ("linear" has F = K and no static features)."""
    if memory == "mlp":
        return _self_modifying_mlp(K, C, F or K, M)
    F = F if memory == "features" else K
    features = 4 if memory == "features" else 0  # φ of z, k, v, q
    # Generators at z and at v; all memories at k, at the anchor and as they decay; all are written; q reads two parts.
    products = features + 2 * (M - 1) + 2 * M + M + 2
    inside = 4 * C * F + 2 * C * K + M * C * K  # k·k, q·k; scores times writes; the solve
    return Cost(2 * K * F * products + inside, 3 * K + 2 * M * F * K / C)


def _self_modifying_mlp(K: int, C: int, F: int, M: int) -> Cost:
    # Forward of two matrices: generators at z and v, all at k; errors go back through the second. Then the first is
    # read as it decays, the second so and at the start; both are written, and read by q in two parts.
    forward = 2 * (2 * (M - 1) + M)
    products = forward + M + M + 2 * M + 2 * M + 4
    inside = 2 * C * K + 2 * M * C * F + M * C * (F + K)  # k·k; h·h of each memory; both solves
    inside += 2 * C * (K + F) + 2 * C * (F + K)  # what q finds in each matrix
    return Cost(2 * K * F * products + inside, 3 * K + 4 * M * F * K / C)


def cms_update(inputs: int, outputs: int, period: int) -> Cost:
    """The gradient of one linear map, an outer product per token, and the write once a period."""
    return Cost(2 * inputs * outputs, inputs + outputs + 3 * inputs * outputs / period)


def cms_write(inputs: int, outputs: int, period: int) -> Cost:
    """The factored gradient of a period as one product, added to what was written before."""
    return Cost(2 * inputs * outputs, inputs + outputs + 2 * inputs * outputs / period)


def newton_schulz(rows: int, columns: int, steps: int = 5) -> Cost:
    """Per row of a matrix: three products a step, of the matrix with itself, of the square, and of both."""
    small = min(rows, columns)
    square = 2 * small**3 / rows
    return Cost(steps * (4 * columns * small + square), 2 * columns)


# --- layers and models, per token -------------------------------------------------------------------------------


def linear(inputs: int, outputs: int) -> Cost:
    """A matrix of parameters; at training sizes its own bytes are shared by thousands of tokens."""
    return Cost(2 * inputs * outputs, inputs + outputs)


def attention(dim: int, context: float) -> Cost:
    """Projections, and `context` keys on average: half the length where attention is causal and full."""
    return 4 * linear(dim, dim) + Cost(4 * context * dim, 4 * dim)


def transformer_block(dim: int, context: float) -> Cost:
    """Attention and an MLP of four times the width."""
    return attention(dim, context) + linear(dim, 4 * dim) + linear(4 * dim, dim)


def self_modifying_titans(dim: int, heads: int, C: int = 64, expansion: float = 1, memory: str = "features") -> Cost:
    """Projections of z, q, gate and output, convolution of four taps, and the memories of every head."""
    K = dim // heads
    op = self_modifying(K, C, round(expansion * K), memory=memory)
    return 4 * linear(dim, dim) + Cost(8 * dim, 2 * dim) + heads * op


def continuum(config: ModelConfig) -> Cost:
    """All levels of one block: together one gated MLP."""
    return linear(config.dim, 2 * config.width) + linear(config.width, config.dim)


def mixer(config: ModelConfig, context: float) -> Cost:
    """The sequence layer of one block."""
    if config.name == "hope":
        return self_modifying_titans(config.dim, config.heads, config.chunk_size, config.expansion)
    return attention(config.dim, context if config.window is None else min(context, config.window))


def reading(config: ModelConfig, context: float) -> Cost:
    """One forward pass of a model with frozen levels; the embedding is a look-up."""
    blocks = config.depth * (mixer(config, context) + continuum(config))
    return blocks + linear(config.dim, config.vocab_size)


def writing(config: ModelConfig) -> Cost:
    """The writes of all levels, beyond the backward pass that carries the surprise to them: the old-key metric, and
    W + D formed once per segment. The gradient itself is counted by `learning` and `training`."""
    finite = [p for p in config.periods if math.isfinite(p)]
    if not finite or config.inner_lr == 0:
        return Cost(0, 0)
    width, dim, each = config.width // len(config.periods), config.dim, Cost(0, 0)
    metric = 2.0 * (2 * width * dim * dim + width * width * dim) if config.inner_kappa else 0.0
    for period in finite:
        each += Cost(metric / period, 3 * 3 * width * dim / period)
    merged = Cost(0, 3 * 3 * width * dim * len(finite) / min(finite))
    return config.depth * (each + merged)


def learning(config: ModelConfig, context: float) -> Cost:
    """Reading with writes on: forward; back to the activations as far as the first level, which lies behind the first
    mixer; the gradients of the written maps; the writes."""
    share = sum(math.isfinite(p) for p in config.periods) / len(config.periods)
    if share == 0 or config.inner_lr == 0:
        return reading(config, context)
    gradients = config.depth * share * continuum(config)
    return 2 * reading(config, context) + -1 * mixer(config, context) + gradients + writing(config)


def training(config: ModelConfig, context: float) -> Cost:
    """A training step per token: forward and backward; the levels' gradients are the outer ones, row by row."""
    return reading(config, context).training + writing(config)
