"""What each kernel costs a multiprocessor, compiled for a GPU that need not be there: registers, spills, shared memory.

    python benchmarks/kernels.py [--architecture 90] [--dtype bfloat16] [--widths 64 128]

Runs every op that has a kernel, forward and backward, on the CPU with launches that only compile; the numbers that
come out of the op are garbage and nobody looks. Finds what the interpreter cannot: code that does not compile.
Compiling for one shape takes a minute or two. Needs triton >= 3.6, and no GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CHUNK, HEADS, TOKENS = 64, 2, 256


class NoDevice:
    """A driver that knows which GPU to compile for and has none."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def gated_delta_rule(dtype: torch.dtype, width: int) -> list[torch.Tensor]:
    q, k, v = (torch.randn(1, TOKENS, HEADS, width, dtype=dtype, requires_grad=True) for _ in range(3))
    beta, g = torch.rand(1, TOKENS, HEADS), -torch.rand(1, TOKENS, HEADS)
    return list(import_module("nestling.ops.gated_delta_rule.triton").gated_delta_rule(q, k, v, beta, g))


def titans(dtype: torch.dtype, width: int, hidden: tuple[int, ...] = ()) -> list[torch.Tensor]:
    q, k, v = (torch.randn(1, TOKENS, HEADS, width, dtype=dtype, requires_grad=True) for _ in range(3))
    gates = [-torch.rand(1, TOKENS, HEADS) for _ in range(3)]
    sizes = (width, *hidden, width)
    weights = tuple(torch.randn(HEADS, a, b, requires_grad=True) for a, b in zip(sizes, sizes[1:], strict=False))
    op = import_module("nestling.ops.titans.triton").titans
    y, state = op(q, k, v, *gates, weights=weights, chunk_size=CHUNK, decay_to="initial", normalized=True)
    return [y, *state]


def titans_mlp(dtype: torch.dtype, width: int) -> list[torch.Tensor]:
    return titans(dtype, width, (width,))


def self_modifying(dtype: torch.dtype, width: int) -> list[torch.Tensor]:
    """Memories of width x (at most) 64: wider ones see features of their input."""
    from nestling.ops.self_modifying import Rule

    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")  # its kernels take float32
    values = min(width, 64)
    z, q = (torch.randn(1, TOKENS, HEADS, values, requires_grad=True) for _ in range(2))
    weights = (torch.randn(HEADS, 5, width, values, requires_grad=True),)
    gates, rates = (torch.randn(2, HEADS, values), torch.zeros(2, HEADS)), torch.ones(HEADS, 5)
    features = torch.randn(HEADS, values, width) if width > values else None
    op = import_module("nestling.ops.self_modifying.triton").self_modifying
    y, state = op(z, q, weights, *gates, rates, rule=Rule(), chunk_size=CHUNK, features=features)
    return [y, *state]


OPS = (gated_delta_rule, titans, titans_mlp, self_modifying)


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    kernel = RUN(self, *args, grid=grid, warmup=True, **options)
    COMPILED[self.__name__, options.get("num_warps", 4)] = kernel
    return kernel


RUN = JITFunction.run
COMPILED: dict[tuple[str, int], Any] = {}


def usage(kernel: Any) -> tuple[int, int]:
    """Registers and bytes of stack per thread, from the compiled code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    fields = dict(part.split(":", 1) for part in said.stdout.split() if ":" in part and part[0].isupper())
    return int(fields["REG"]), int(fields["STACK"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, default=90, help="compute capability, 90 for an H100 or H200")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--ops", nargs="+", default=[op.__name__ for op in OPS])
    args = parser.parse_args()
    driver.set_active(NoDevice(args.architecture))
    JITFunction.run = compile_only
    print(f"triton {triton.__version__}, sm_{args.architecture}, {args.dtype}, chunks of {CHUNK} tokens\n")
    print("| op | width | kernel | warps | registers per thread | stack bytes per thread | shared memory, bytes |")
    print("|---|---|---|---|---|---|---|")
    for op in (op for op in OPS if op.__name__ in args.ops):
        for width in args.widths:
            COMPILED.clear()
            outputs = op(getattr(torch, args.dtype), width)
            torch.stack([y.float().sum() for y in outputs]).sum().backward()
            for (name, warps), kernel in COMPILED.items():
                registers, stack = usage(kernel)
                cells = (op.__name__, width, name, warps, registers, stack, kernel.metadata.shared)
                print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
