"""Reading and writing the continuum levels of any module: fast weights in, task loss, fast weights out.

levels = continuum_levels(model)
with reading(current(levels, state, record=True)) as now:
    loss = ...                                            # forward, with the fast weights of each sequence
seen, _ = observe(levels, now, loss, targets=...)         # ordinary backprop of the task loss, row by row
state = absorb(levels, state, seen, tokens)               # accumulate; write the levels whose period is full
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .level import ContinuumLevel, LevelState, Observation
from .linear import Reading, Trace, reading
from .matrix import FastMatrix

FastState = dict[str, LevelState]


def continuum_levels(module: nn.Module) -> dict[str, ContinuumLevel]:
    """All levels of a module that are ever written, by their path."""
    return {path: m for path, m in module.named_modules() if isinstance(m, ContinuumLevel) and m.writable}


def initial_state(levels: dict[str, ContinuumLevel], rows: int, device: torch.device) -> FastState:
    """Fast weights of `rows` sequences that have read nothing."""
    return {path: level.initial_state(rows, device) for path, level in levels.items()}


def current(
    levels: dict[str, ContinuumLevel], state: FastState, *, record: bool = False, exact: bool = False
) -> Reading:
    """The reading in which every level uses the fast weights of `state`; `exact`: they carry their own graph.

    A map that stands in several levels, one inside the other, reads with the sum of what they have written.
    """
    deltas: dict[nn.Module, FastMatrix] = {}
    growth: dict[nn.Module, Tensor] = {}
    for path, level in levels.items():
        grows = level.rule.learned and not exact and torch.is_grad_enabled()
        for name, delta in state[path].delta.items():
            m = level.maps[name]
            factor = (level.inner_log_rate - level.inner_log_rate.detach()).exp() if grows else None
            if m in deltas and not (delta.empty or deltas[m].empty):
                deltas[m] = _grown(deltas[m], growth.pop(m, None)).plus(_grown(delta, factor))
                continue
            if m not in deltas or deltas[m].empty:
                deltas[m] = delta
                if factor is not None:
                    growth[m] = factor
    return Reading(deltas, growth, {} if record else None)


def _grown(delta: FastMatrix, factor: Tensor | None) -> FastMatrix:
    """What was written, times the growth of a learned rate."""
    return delta if factor is None else delta.times(factor.expand(delta.rows))


def once(now: Reading) -> Reading:
    """The same reading for many single tokens: W + D is formed now where it is less work per token than W and D."""
    merged: dict[nn.Module, Tensor] = {}
    for m, delta in now.deltas.items():
        parts = [part for part in (delta.dense, delta.left, delta.right) if part is not None]
        weight: Tensor = m.weight  # type: ignore[assignment]
        if parts and len(parts[0]) * weight.numel() <= weight.numel() + sum(part.numel() for part in parts):
            merged[m] = weight.detach() + delta.to_dense().detach()
    return replace(now, merged=merged)


def observe(
    levels: dict[str, ContinuumLevel],
    now: Reading,
    loss: Tensor,
    *,
    targets: Tensor,
    valid: Tensor | None = None,
    also: Sequence[Tensor] = (),
    retain: bool = False,
    exact: bool = False,
    share: float | None = None,
) -> tuple[dict[str, Observation], list[Tensor | None]]:
    """What a recorded segment says about each level: the gradient of the task loss through all that came later.

    Args:
        now: the reading, recorded, in which `loss` was computed.
        loss: scalar, the SUM of the token losses of the segment over all rows.
        targets: (B,) number of predicted tokens behind `loss`.
        valid: (B, T) bool, False = padding, which never counts as a key; None = all are real.
        also: further tensors whose gradients are wanted from the same backward pass.
        retain: keep the graph for an outer backward. exact: keep the gradient's own graph (meta-gradients).
        share: also add the gradient of `share * loss` to `.grad` of all parameters.
    Returns the observations by level, and the gradients of `also` (None where the loss does not depend on one).
    """
    tape = now.tape or {}
    uses = [(m, trace) for m, traces in tape.items() for trace in traces]
    wanted = [trace.wanted for _, trace in uses] + list(also)
    with torch.autocast(loss.device.type, enabled=False):  # a backward pass has the precision of its forward pass
        grads: tuple[Tensor | None, ...]
        if share is None:
            grads = torch.autograd.grad(
                loss, wanted, retain_graph=retain or exact, create_graph=exact, allow_unused=True
            )
        else:
            grads = _accumulated(loss, wanted, share)
    found: dict[nn.Module, list[tuple[Trace, Tensor]]] = {}
    for (m, trace), grad in zip(uses, grads[: len(uses)], strict=True):
        if grad is not None:
            found.setdefault(m, []).append((trace, grad))
    with torch.autocast(loss.device.type, enabled=False):
        seen = {path: _observation(level, found, targets, valid, exact) for path, level in levels.items()}
    return seen, list(grads[len(uses) :])


def _accumulated(loss: Tensor, wanted: list[Tensor], share: float) -> tuple[Tensor | None, ...]:
    """The gradients of `loss` w.r.t. `wanted`, from a backward pass of `share * loss` into `.grad` of every leaf."""
    for x in wanted:
        x.retain_grad()
    torch.autograd.backward(loss, torch.full_like(loss, share))
    return tuple(None if x.grad is None else x.grad / share for x in wanted)


def _observation(
    level: ContinuumLevel,
    grads: dict[nn.Module, list[tuple[Trace, Tensor]]],
    targets: Tensor,
    valid: Tensor | None,
    exact: bool,
) -> Observation:
    gradient: dict[str, FastMatrix] = {}
    keys: dict[str, FastMatrix] = {}
    seen: dict[str, Tensor] = {}
    for name, m in level.maps.items():
        for trace, grad in grads.get(m, ()) if not level.rule.static else ():
            x = trace.x.to(m.weight.dtype)
            x, grad = (x, grad) if exact else (x.detach(), grad.detach())
            gradient[name] = gradient.get(name, FastMatrix()).plus(trace.gradient(grad, x))
            if valid is not None and valid.shape[1] == x.shape[1]:
                x = x * valid.unsqueeze(-1)
            if level.rule.erase:
                unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
                keys[name] = keys.get(name, FastMatrix()).plus_outer(unit, unit)
            if level.rule.online:
                seen[name] = seen.get(name, 0) + x.transpose(1, 2) @ x
    return Observation(gradient, keys, seen, targets)


def absorb(
    levels: dict[str, ContinuumLevel],
    state: FastState,
    seen: dict[str, Observation],
    tokens: Tensor,
    *,
    exact: bool = False,
) -> FastState:
    """Close a segment of `tokens` (B,) tokens on every level; write the levels whose period is full."""
    if not levels:
        return state
    due = torch.stack([state[path].clock + tokens >= level.period for path, level in levels.items()])
    full = dict(zip(levels, due.cpu(), strict=True))  # the one place where the host waits for the device
    with torch.set_grad_enabled(exact), torch.autocast(tokens.device.type, enabled=False):
        after = {path: level.absorb(state[path], seen[path], tokens, full[path]) for path, level in levels.items()}
        for path, level in levels.items():
            outer = _slower(path)
            if level.rule.reset == "outer" and outer in levels and full[outer].any():
                after[path] = level.forget(after[path], full[outer].to(tokens.device))
            if level.rule.online and full[slowest := _slowest(path, levels)].any():
                after[path] = level.remember_seen(after[path], full[slowest].to(tokens.device))
    return after


def _slower(path: str) -> str:
    """The next slower level: the one it stands in, or the next of the same stack, which is a list from fast to slow."""
    stack, _, index = path.rpartition(".")
    if index == "body":
        return stack
    return f"{stack}.{int(index) + 1}" if index.isdigit() else ""


def _slowest(path: str, levels: dict[str, ContinuumLevel]) -> str:
    """The slowest level of the same stack: the one that keeps the old keys for all of them."""
    while (slower := _slower(path)) in levels and slower != path:
        path = slower
    return path


def tokens_to_write(levels: dict[str, ContinuumLevel], state: FastState) -> Tensor | None:
    """(B,) tokens until the next write of any level, or None if nothing is ever written."""
    waits = [int(level.period) - state[path].clock for path, level in levels.items()]
    return torch.stack(waits).amin(0) if waits else None


def learn(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Tensor], Tensor],
    tokens: Tensor,
    state: FastState | None = None,
) -> FastState:
    """Let every `ContinuumMemory` in `model` learn from a stretch of input. The general write; inputs need not be text.

    Args:
        model: any module that contains continuum levels; its parameters stay as they are.
        loss_fn: loss_fn(model, piece) -> the task loss per row, (B,) or (B, T); not averaged over rows.
        tokens: (B, T, ...) input, one row a sequence, dimension 1 the clock.
        state: fast weights from an earlier call; None = none yet.
    Returns the new state: read with it under `fast_weights(model, state)`.
    Raises ValueError if the model has no level to write or the loss is not given per row.
    """
    with torch.inference_mode(False):
        return _learn(model, loss_fn, tokens.clone() if tokens.is_inference() else tokens, state)


def _learn(
    model: nn.Module, loss_fn: Callable[[nn.Module, Tensor], Tensor], tokens: Tensor, state: FastState | None
) -> FastState:
    levels = continuum_levels(model)
    if not levels:
        raise ValueError("learn: the model has no ContinuumMemory with a finite period; add one, or convert its MLPs")
    rows, length = tokens.shape[:2]
    state = initial_state(levels, rows, tokens.device) if state is None else state
    start = 0
    while start < length:
        wait = tokens_to_write(levels, state)
        assert wait is not None
        piece = tokens[:, start : start + int(wait.min())]
        with torch.enable_grad(), reading(current(levels, state, record=True)) as now:
            loss = loss_fn(model, piece)
        if loss.shape[:1] != (rows,):
            raise ValueError(f"learn: loss_fn returned shape {tuple(loss.shape)}; return the loss per row, ({rows},)")
        count = torch.full((rows,), piece.shape[1], device=tokens.device)
        seen, _ = observe(levels, now, loss.sum(), targets=count)
        state = absorb(levels, state, seen, count)
        start += piece.shape[1]
    return state


def fast_weights(model: nn.Module, state: FastState):  # type: ignore[no-untyped-def]
    """Context in which `model` reads with the fast weights of `state` (one row per sequence)."""
    return reading(current(continuum_levels(model), state))
