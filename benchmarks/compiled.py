"""Training steps with compiled blocks beside the same steps without: two sizes, three models, one thread."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor

from nestling.bench.measure import side_by_side
from nestling.bench.workloads import model, text, training_work
from nestling.models import LanguageModel
from nestling.models.compiled import CompiledRead

SIZES = {"small": ("tiny", 4, 512), "middle": ("small", 2, 512)}  # preset, rows, tokens
MODELS = ("transformer", "hope-attention", "hope")
REPEATS = 9


def compare() -> dict[str, Any]:
    """A row for every size and model."""
    with inductor.patch(compile_threads=1, force_disable_caches=True):
        return {"rows": [beside(size, name) for size in SIZES for name in MODELS]}


def beside(size: str, name: str) -> dict[str, Any]:
    """CPU seconds of a step: medians over rounds in which both take their turn, and the median of the rounds' ratios.

    `ready` is what the first compiled step took, compiler included; `apart` how far the gradients are apart.
    """
    preset, rows, length = SIZES[size]
    torch._dynamo.reset()
    plain, compiled = model(name, preset), model(name, preset)
    tokens = text(rows, length, plain.config.vocab_size)
    CompiledRead(rows, int(min(length, *plain.config.periods))).give(compiled)
    began = cpu()
    theirs = gradients(compiled, tokens)
    ready = cpu() - began
    works = {"plain": training_work(plain, tokens), "compiled": training_work(compiled, tokens)}
    apart = max(distance(a, b) for a, b in zip(gradients(plain, tokens), theirs, strict=True))
    found = side_by_side(works, repeats=REPEATS)
    ratios = [b / a for a, b in zip(found["plain"].seconds, found["compiled"].seconds, strict=True)]
    return {
        "size": size,
        "name": name,
        "parameters": plain.num_parameters(),
        **{way: timing.to_dict() for way, timing in found.items()},
        "ratio": median(ratios),
        "ratios": ratios,
        "ready": ready,
        "apart": apart,
    }


def gradients(module: LanguageModel, tokens: Tensor) -> Sequence[Tensor]:
    """Of all parameters that have one, after one backward pass."""
    module.loss(tokens)[0].backward()
    found = [p.grad for p in module.parameters() if p.grad is not None]
    module.zero_grad(set_to_none=True)
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Of two gradients, relative to the length of the first."""
    return float((a - b).norm() / a.norm().clamp_min(1e-20))


def cpu() -> float:
    """CPU seconds of this process and of the compilers it called."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
