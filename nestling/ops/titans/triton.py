"""The walk of a Titans memory over its chunks on a GPU: what must run one chunk after the other, and nothing else.

A chunk writes with the matrices as they are at its start, so along the sequence only those states are needed. `_states`
computes them, one program per row and head; the rest (the writes of all chunks once more, all reads) is parallel over
chunks and stays in torch, as in chunk.py. `_states_backward` walks back and makes the writes of each chunk again from
the kept states. Both hold one matrix at a time: the states lie in memory, a chunk reads those at its start and stores
those of the next, so that the 2-layer memory with momentum (four matrices) fits as well as a linear one.

Letters as in writes.py: rows R = B H, N chunks, C tokens, S states of a matrix (M, with momentum also the surprise), a
matrix (F, V). The 2-layer memory is y = k + silu(k W2) W1, W2 (K, F) the first matrix, W1 (F, K) the second. Products
take the dtype of the values (bfloat16 on tensor cores) and sum in float32; states are float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nestling.ops.titans import chunk
from nestling.ops.titans.writes import Part, commit_memory, decays, prepare, read_memory, written

TINY: tl.constexpr = tl.constexpr(1.2e-38)  # smallest |error|^2 that is divided by
WARPS = {"num_warps": 4, "num_stages": 1}


def titans(*arguments: Any, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The numbers of reference.titans up to rounding; arguments and results as there.

    Widths are 16, 32, 64 or 128, chunk_size at most 64. What is left of an open chunk goes through chunk.py, and
    a gradient that is differentiated again through the same walk in torch.
    """
    return chunk.titans(*arguments, whole=whole_chunks, **options)


def whole_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    *,
    rest: tuple[Tensor, ...] | None,
    running: list[Tensor],
    full: Tensor | None,
    chunk_size: int,
    normalized: bool,
) -> tuple[Tensor, list[Tensor]]:
    """`chunk.WholeChunks`: states by the kernel, then all reads; the backward pass makes the reads again."""
    low = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    tokens: list[Any] = [  # (R, N, C, ...)
        None if x is None else x.unflatten(1, (-1, chunk_size)).movedim(3, 1).flatten(0, 1)
        for x in (q, k, v, eta, log_decay, log_momentum)
    ]
    rows, shape = tokens[0].shape[:2], running[0].shape[:2]
    flat = None if rest is None else [w.expand(len(q), *w.shape).flatten(0, 1) for w in rest]
    layers = len(running) // (1 if log_momentum is None else 2)
    borders = _borders(
        [x if x is None else x.to(low) if i < 3 else x.float() for i, x in enumerate(tokens)],
        flat,
        [torch.stack(running[i::layers], 2).flatten(0, 1) for i in range(layers)],
        full,
        normalized,
    )
    read = partial(_reads, normalized)
    reads = partial(checkpoint, read, use_reentrant=False) if torch.is_grad_enabled() else read
    y = reads([None if x is None else x.flatten(0, 1).float() for x in tokens], flat, [x[:, :-1] for x in borders])
    y = y.unflatten(0, (*shape, rows[1])).flatten(2, 3).transpose(1, 2)
    return y, [x[:, -1, s].unflatten(0, shape) for s in range(borders[0].shape[2]) for x in borders]


def _borders(
    tokens: list[Any], rest: list[Tensor] | None, states: list[Tensor], full: Tensor | None, normalized: bool
) -> list[Tensor]:
    """(R, N + 1, S, F, V) for each matrix. A row's chunk that is not full keeps all and writes nothing."""
    _, k, v, eta, log_decay, log_momentum = tokens
    _, _, last, transfer = decays(log_decay, log_momentum, None)
    last, transfer = last[..., 0].mT, transfer[..., 0, 0]  # (R, N, C, S), (R, N, S, S)
    if full is not None:
        mask = full.T.repeat_interleave(len(k) // full.shape[1], 0)[..., None, None]
        transfer = torch.where(mask, transfer, torch.eye(transfer.shape[-1], device=v.device))
        last = torch.where(mask, last, 0.0)
    length = k.shape[2]
    more = max(16, triton.next_power_of_2(length)) - length  # tokens without rate that write nothing
    k, v, last = (functional.pad(x, (0, 0, 0, more)) for x in (k, v, last))
    inputs = (k, v, functional.pad(eta, (0, more)), transfer, last, *states, *(rest or ()))
    return States.apply(len(states), normalized, *(x.contiguous() for x in inputs))


def _reads(normalized: bool, tokens: list[Any], rest: list[Tensor] | None, starts: list[Tensor]) -> Tensor:
    """All tokens of all chunks (R N, C, ...), from the states at the chunks' starts: (R N, C, K)."""
    chunks = starts[0].shape[1]
    rest = None if rest is None else [w.repeat_interleave(chunks, 0) for w in rest]
    running = [x[:, :, s].flatten(0, 1) for s in range(starts[0].shape[2]) for x in starts]
    part = prepare(tokens, rest, len(starts) == 2, normalized)
    return read_memory(part, rest, running, written(part, rest, running[: len(starts)]))


class States(torch.autograd.Function):
    """The states of each matrix at every chunk border, (R, N + 1, S, F, V) float32, from those at the first one.

    layers 1 or 2; k, v (R, N, C, K), eta (R, N, C); transfer (R, N, S, S), last (R, N, C, S), made by writes.decays;
    then per matrix its first states (R, S, F, V); then per matrix the weight (R, F, V) that it decays to, or nothing.
    """

    @staticmethod
    def forward(ctx: Any, layers: int, normalized: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        tokens, firsts, rest = inputs[:5], inputs[5 : 5 + layers], inputs[5 + layers :]
        chunks = tokens[0].shape[1]
        ends = [x.new_empty(len(x), chunks + 1, *x.shape[1:]) for x in firsts]
        for end, x in zip(ends, firsts, strict=True):
            end[:, 0] = x
        with torch.cuda.device_of(tokens[0]):
            _states[(len(ends[0]),)](
                *tokens, *_pair(ends), *_pair(rest or ends), chunks, **_fixed(tokens, ends, rest, normalized)
            )
        ctx.save_for_backward(*inputs, *ends)
        ctx.layers, ctx.normalized = layers, normalized
        return tuple(ends)

    @staticmethod
    def backward(ctx: Any, *d_ends: Tensor) -> tuple[Tensor | None, ...]:
        layers = ctx.layers
        saved = ctx.saved_tensors
        inputs, ends = saved[:-layers], saved[-layers:]
        if torch.is_grad_enabled():
            return (None, None, *_differentiable(layers, ctx.normalized, inputs, d_ends))
        tokens, rest = inputs[:5], inputs[5 + layers :]
        d_ends = tuple(x.clone(memory_format=torch.contiguous_format) for x in d_ends)  # becomes the whole gradient
        dk, dv, d_eta, _, d_last = (torch.empty_like(x) for x in tokens)
        d_rest = [torch.zeros_like(x) for x in rest]
        _states_backward[(len(ends[0]),)](
            *tokens, *_pair(ends), *_pair(rest or ends), *_pair(d_ends), *_pair(d_rest or ends), dk, dv, d_eta, d_last,
            tokens[0].shape[1], **_fixed(tokens, ends, rest, ctx.normalized),
        )  # fmt: skip
        products = (d[:, 1:].flatten(3) @ x[:, :-1].flatten(3).mT for d, x in zip(d_ends, ends, strict=True))
        d_transfer = torch.stack(list(products)).sum(0)
        return (None, None, dk, dv, d_eta, d_transfer, d_last, *(x[:, 0] for x in d_ends), *d_rest)


def _differentiable(
    layers: int, normalized: bool, inputs: tuple[Tensor, ...], outer: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of the same walk as autograd records it in torch: they can be differentiated again."""
    alias = [x.view_as(x) for x in inputs]  # cuts the inputs' own history off
    borders, rest = [alias[5 : 5 + layers]], alias[5 + layers :] or None
    for k, v, eta, transfer, last in zip(*(x.float().unbind(1) for x in alias[:5]), strict=True):
        last, transfer, k_rest = last.mT[..., None], transfer[..., None, None], None if rest is None else k @ rest[0]
        error = v - k if layers == 2 else v
        square = k.square().sum(-1, keepdim=True) if normalized else None
        part = Part(
            k, k, error, eta[..., None], last, last, last, transfer, last, square, None, k_rest
        )  # as far as it is used
        running = [x[:, s] for s in range(borders[-1][0].shape[1]) for x in borders[-1]]
        after = commit_memory(part, running, written(part, rest, running[:layers]))
        borders.append([torch.stack(after[i::layers], 1) for i in range(layers)])
    outputs = [torch.stack(list(x), 1) for x in zip(*borders, strict=True)]
    wanted = [x for x in alias if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, outer, create_graph=True, allow_unused=True))
    return tuple(next(found) if x.requires_grad else None for x in alias)


def _pair(matrices: Any) -> tuple[Tensor, Tensor]:
    """Both matrices; a kernel for a linear memory gets its one twice and leaves the second alone."""
    return matrices[0], matrices[-1]


def _fixed(tokens: tuple[Tensor, ...], ends: Any, rest: Any, normalized: bool) -> dict[str, Any]:
    """What the kernels are compiled for."""
    C, K = tokens[0].shape[2:]
    exact = "tf32x3" if tokens[0].dtype == torch.float32 else "tf32"
    sizes = {"C": C, "K": K, "F": ends[0].shape[-1], "S": ends[0].shape[2]}
    return {**sizes, "LAYERS": len(ends), "REST": bool(rest), "NORMALIZED": normalized, "EXACT": exact, **WARPS}


@triton.jit
def _square(x):
    """|x|^2 of each token, (C, 1)."""
    return tl.sum(x.to(tl.float32) * x, 1)[:, None]


@triton.jit
def _share(curvature):
    """What is left of a normalized rate."""
    return 1 / tl.maximum(curvature / 2, 1.0)


@triton.jit
def _d_curvature(d_share, share):
    """Gradient of the curvature from that of its `_share`."""
    return tl.where(share < 1, -d_share * share * share / 2, 0.0)


@triton.jit
def _weight(state, rest, tile, REST: tl.constexpr):
    """The whole matrix, float32."""
    M = tl.load(state + tile)
    if REST:
        M += tl.load(rest + tile)
    return M


@triton.jit
def _gates(transfer, last, chunk, C: tl.constexpr, S: tl.constexpr):
    """M in M, S in M, S in S; and of each token's write in M and in S, (C, 1) each."""
    transfer += chunk * S * S
    last += chunk * C * S + tl.arange(0, C)[:, None] * S
    return (
        tl.load(transfer),
        tl.load(transfer + S - 1),
        tl.load(transfer + S * S - 1),
        tl.load(last),
        tl.load(last + S - 1),
    )


@triton.jit
def _grow(
    state, tile, SIZE: tl.constexpr, keys, values, keep, feed, echo, in_M, in_S, S: tl.constexpr, EXACT: tl.constexpr
):
    """Store the states after a chunk behind those at its start."""
    M = keep * tl.load(state + tile)
    M += tl.dot(tl.trans((in_M * keys).to(keys.dtype)), values, input_precision=EXACT)
    if S == 2:
        surprise = tl.load(state + SIZE + tile)
        M += feed * surprise
        surprise = echo * surprise + tl.dot(tl.trans((in_S * keys).to(keys.dtype)), values, input_precision=EXACT)
        tl.store(state + 3 * SIZE + tile, surprise)
    tl.store(state + S * SIZE + tile, M)


@triton.jit
def _shrink(d_state, tile, SIZE: tl.constexpr, keys, values, in_M, in_S, S: tl.constexpr, EXACT: tl.constexpr):
    """Gradients of the values, the keys, in_M and in_S that `_grow` took, from that of the states it stored."""
    low = tl.load(d_state + S * SIZE + tile).to(keys.dtype)
    through = tl.dot(values, tl.trans(low), input_precision=EXACT)
    d_values, d_keys = in_M * tl.dot(keys, low, input_precision=EXACT), in_M * through
    d_in_M = tl.sum(keys * through, 1)
    d_in_S = d_in_M
    if S == 2:
        low = tl.load(d_state + 3 * SIZE + tile).to(keys.dtype)
        through = tl.dot(values, tl.trans(low), input_precision=EXACT)
        d_values += in_S * tl.dot(keys, low, input_precision=EXACT)
        d_keys += in_S * through
        d_in_S = tl.sum(keys * through, 1)
    return d_values, d_keys, d_in_M, d_in_S


@triton.jit
def _pull(d_state, d_rest, tile, SIZE: tl.constexpr, dW, keep, feed, echo, S: tl.constexpr, REST: tl.constexpr):
    """Add to the gradient of the states at a chunk's start what comes through its writes and the states after it."""
    dM = tl.load(d_state + S * SIZE + tile)
    if S == 2:
        dS = feed * dM + echo * tl.load(d_state + 3 * SIZE + tile)
        tl.store(d_state + SIZE + tile, tl.load(d_state + SIZE + tile) + dS)
    tl.store(d_state + tile, tl.load(d_state + tile) + keep * dM + dW)
    if REST:
        tl.store(d_rest + tile, tl.load(d_rest + tile) + dW)


@triton.jit
def _states(
    k, v, eta, transfer, last, first, second, first_rest, second_rest, N,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, S: tl.constexpr, LAYERS: tl.constexpr, REST: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Each chunk: the gradient of its error at the matrices of its start, written into them with decay and momentum."""
    row, SIZE = tl.program_id(0).to(tl.int64), K * F
    tokens = tl.arange(0, C)[:, None] * K + tl.arange(0, K)[None, :]
    up = tl.arange(0, K)[:, None] * F + tl.arange(0, F)[None, :]
    down = tl.arange(0, F)[:, None] * K + tl.arange(0, K)[None, :]
    for n in range(N):
        chunk, here = row * N + n, (row * (N + 1) + n) * S * SIZE
        xk, xv = tl.load(k + chunk * C * K + tokens), tl.load(v + chunk * C * K + tokens)
        rate = tl.load(eta + chunk * C + tl.arange(0, C))[:, None]
        keep, feed, echo, in_M, in_S = _gates(transfer, last, chunk, C, S)
        W = _weight(first + here, first_rest + row * SIZE, up, REST).to(xk.dtype)
        a = tl.dot(xk, W, input_precision=EXACT)
        if LAYERS == 1:
            if NORMALIZED:
                rate *= _share(_square(xk))
            values = (rate * (xv - a)).to(xk.dtype)
        else:
            s = tl.sigmoid(a)
            h = a * s
            low, W = h.to(xk.dtype), _weight(second + here, second_rest + row * SIZE, down, REST).to(xk.dtype)
            error = xv - (xk + tl.dot(low, W, input_precision=EXACT))
            back = tl.dot(error.to(xk.dtype), tl.trans(W), input_precision=EXACT) * (s + h * (1 - s))
            if NORMALIZED:
                rate *= _share(_square(h) + _square(xk) * _square(back) / tl.maximum(_square(error), TINY))
            out, values = (rate * error).to(xk.dtype), (rate * back).to(xk.dtype)
            _grow(second + here, down, SIZE, low, out, keep, feed, echo, in_M, in_S, S, EXACT)
        _grow(first + here, up, SIZE, xk, values, keep, feed, echo, in_M, in_S, S, EXACT)
        tl.debug_barrier()  # the next chunk reads what other threads have stored


@triton.jit
def _states_backward(
    k, v, eta, transfer, last, first, second, first_rest, second_rest, d_first, d_second,
    d_first_rest, d_second_rest, dk, dv, d_eta, d_last, N,
    C: tl.constexpr, K: tl.constexpr, F: tl.constexpr, S: tl.constexpr, LAYERS: tl.constexpr, REST: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first. d_first and d_second come as the gradient of the states from the reads."""
    row, SIZE, t = tl.program_id(0).to(tl.int64), K * F, tl.arange(0, C)
    tokens = t[:, None] * K + tl.arange(0, K)[None, :]
    up = tl.arange(0, K)[:, None] * F + tl.arange(0, F)[None, :]
    down = tl.arange(0, F)[:, None] * K + tl.arange(0, K)[None, :]
    for i in range(N):
        n = N - 1 - i
        chunk, here = row * N + n, (row * (N + 1) + n) * S * SIZE
        xk, xv = tl.load(k + chunk * C * K + tokens), tl.load(v + chunk * C * K + tokens)
        rate = tl.load(eta + chunk * C + t)[:, None]
        keep, feed, echo, in_M, in_S = _gates(transfer, last, chunk, C, S)
        W = _weight(first + here, first_rest + row * SIZE, up, REST).to(xk.dtype)
        a = tl.dot(xk, W, input_precision=EXACT)
        if LAYERS == 1:
            error, share = xv - a, 1.0
            if NORMALIZED:
                share = _share(_square(xk))
            out = (rate * share * error).to(xk.dtype)
            d_out, xdk, d_in_M, d_in_S = _shrink(d_first + here, up, SIZE, xk, out, in_M, in_S, S, EXACT)
            d_rate = tl.sum(d_out * error, 1)[:, None]
            d_error = rate * share * d_out
            d_a = -d_error
            if NORMALIZED:
                xdk += 2 * xk * _d_curvature(d_rate * rate, share)
            d_rate *= share
        else:
            s = tl.sigmoid(a)
            h = a * s
            slope, low = s + h * (1 - s), h.to(xk.dtype)
            down_W = _weight(second + here, second_rest + row * SIZE, down, REST).to(xk.dtype)
            error = xv - (xk + tl.dot(low, down_W, input_precision=EXACT))
            through, share = tl.dot(error.to(xk.dtype), tl.trans(down_W), input_precision=EXACT), 1.0
            back, errors, keys = through * slope, tl.maximum(_square(error), TINY), _square(xk)
            if NORMALIZED:
                share = _share(_square(h) + keys * _square(back) / errors)
            out, values = (rate * share * error).to(xk.dtype), (rate * share * back).to(xk.dtype)
            d_values, xdk, d_in_M, d_in_S = _shrink(d_first + here, up, SIZE, xk, values, in_M, in_S, S, EXACT)
            d_out, d_h, more_M, more_S = _shrink(d_second + here, down, SIZE, low, out, in_M, in_S, S, EXACT)
            d_in_M, d_in_S = d_in_M + more_M, d_in_S + more_S
            d_rate = (tl.sum(d_out * error, 1) + tl.sum(d_values * back, 1))[:, None]
            d_back, d_error = rate * share * d_values, rate * share * d_out
            if NORMALIZED:
                more = 2 * _d_curvature(d_rate * rate, share)
                d_h += more * h
                xdk += more * xk * _square(back) / errors
                d_back += more * back * keys / errors
                d_error -= more * error * keys * _square(back) / errors / errors
            d_rate *= share
            d_slope, d_through = d_back * through, (d_back * slope).to(xk.dtype)
            d_error += tl.dot(d_through, down_W, input_precision=EXACT)
            low_error = d_error.to(xk.dtype)
            d_h -= tl.dot(low_error, tl.trans(down_W), input_precision=EXACT)
            dW = tl.dot(tl.trans(d_through), error.to(xk.dtype), input_precision=EXACT)
            dW -= tl.dot(tl.trans(low), low_error, input_precision=EXACT)
            _pull(d_second + here, d_second_rest + row * SIZE, down, SIZE, dW, keep, feed, echo, S, REST)
            W = _weight(first + here, first_rest + row * SIZE, up, REST).to(xk.dtype)
            a = tl.dot(xk, W, input_precision=EXACT)  # once more: registers for it were needed in between
            s = tl.sigmoid(a)
            d_a = d_h * (s + a * s * (1 - s)) + d_slope * s * (1 - s) * (2 + a * (1 - 2 * s))
            xdk -= d_error
        low_a = d_a.to(xk.dtype)
        xdk += tl.dot(low_a, tl.trans(W), input_precision=EXACT)
        dW = tl.dot(tl.trans(xk), low_a, input_precision=EXACT)
        _pull(d_first + here, d_first_rest + row * SIZE, up, SIZE, dW, keep, feed, echo, S, REST)
        tl.store(dk + chunk * C * K + tokens, xdk.to(dk.dtype.element_ty))
        tl.store(dv + chunk * C * K + tokens, d_error.to(dv.dtype.element_ty))
        tl.store(d_eta + chunk * C + t, tl.sum(d_rate, 1))
        tl.store(d_last + (chunk * C + t) * S, d_in_M)
        if S == 2:
            tl.store(d_last + (chunk * C + t) * S + 1, d_in_S)
        tl.debug_barrier()  # the chunk before reads what other threads have stored
