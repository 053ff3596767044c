"""The choices the paper leaves open in the self-modifying write, as one value that cannot be built inconsistent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GENERATORS = ("k", "v", "eta", "alpha")  # memories that produce the write; order of the memory axis
READ = "memory"  # the memory that is read; always last on the memory axis
KERNEL_CHUNKS = (16, 32, 64)  # tokens; the chunk is part of the definition, so a kernel cannot choose another
KERNEL_SIZE = 64 * 128  # entries of a matrix: with more, registers spill and compiling takes minutes


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How every memory is written and read. README.md gives the equation of each choice."""

    objective: Literal["dot", "l2"] = "dot"  # -<M(k), v> or 1/2 |M(k) - v|^2, gradient at the chunk's anchor
    erase: Literal["decayed", "undecayed", "none"] = "decayed"  # DGD erase: of the decayed memory, as printed, off
    erase_hidden: bool = False  # 2-layer memories: erase the second matrix too, with eta / (1 + eta |h|^2)
    decay_to: Literal["initial", "zero"] = "initial"  # where a memory that is never written ends up
    read: Literal["causal", "anchor"] = "causal"  # M_{t-1} inside the chunk, or the chunk's first state
    self_values: bool = False  # the read memory too learns its own output M(v), not v
    eta_max: float = 2.0  # eta = eta_max * sigmoid(.)

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        bound = self.largest_stable_eta
        if not 0 < self.eta_max <= bound:
            raise ValueError(
                f"eta_max is {self.eta_max}, outside (0, {bound}] where objective={self.objective!r} with "
                f"erase={self.erase!r} is stable; lower eta_max or use objective='dot', erase='decayed'"
            )

    @property
    def largest_stable_eta(self) -> float:
        """The eta up to which one write of a unit key never grows the memory, nor flips the L2 form's sign."""
        if self.objective == "l2":
            return 1.0 if self.erase == "none" else 0.5
        return 1.0 if self.erase == "undecayed" else 2.0

    @property
    def is_default(self) -> bool:
        """Whether whole chunks take a backward pass that is written out, in torch or in a kernel."""
        return self == Rule(eta_max=self.eta_max)


_ALLOWED: dict[str, tuple[str, ...]] = {
    "objective": ("dot", "l2"),
    "erase": ("decayed", "undecayed", "none"),
    "decay_to": ("initial", "zero"),
    "read": ("causal", "anchor"),
}


def memory_names(memories: int) -> tuple[str, ...]:
    """Names along the memory axis: k, v, eta, alpha, (q,) memory."""
    return (*GENERATORS, READ) if memories == 5 else (*GENERATORS, "q", READ)


def kernel_obstacle(rule: Rule, weights: tuple[Tensor, ...], given_q: bool, chunk_size: int) -> str | None:
    """What stands in the way of triton.py in a call with these initial states; None = at most their widths."""
    if len(weights) != 1 or not given_q or not rule.is_default:
        return "the kernel takes one matrix per memory, given queries and Rule(eta_max=...)"
    if chunk_size not in KERNEL_CHUNKS:
        return f"chunk_size is {chunk_size} and the kernel takes {KERNEL_CHUNKS}"
    rows, columns = weights[0].shape[2:]
    if rows * columns > KERNEL_SIZE:
        return f"a memory has {rows} x {columns} entries and the kernel takes {KERNEL_SIZE}"
    if weights[0].dtype != torch.float32:
        return f"the memories are {weights[0].dtype} and the kernel takes torch.float32"
    return None
