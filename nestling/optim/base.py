"""What every optimizer here shares: a memory of gradients becomes a torch.optim.Optimizer.

`Optimizer` does the bookkeeping. An optimizer says what it keeps for a parameter (`init`) and how a list of parameters
is written (`update`), in torch._foreach operations; `foreach=False` calls the same `update` with one parameter at a
time, so that both paths are one piece of code. `RuleOptimizer` makes an optimizer of any rule of nestling.core.rule:
it is what the fast ones are tested against, and the shortest way to a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nestling.core import rule as rules

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Group = dict[str, Any]
State = dict[str, Any]  # what is kept for one parameter: tensors, and its clock "step"


class Optimizer(torch.optim.Optimizer):
    """Param groups, closures, clocks, checks, and the choice between one call for all parameters and one for each.

    A final defines `update`, and where it needs to `init`, `check_group`, `check` and `parts`. The entries of a param
    group are its hyper-parameters: what a schedule changes there is used by the next step. `foreach=None` joins the
    parameters of a group when they are on CUDA, where many small kernels cost more than the arithmetic.
    """

    def __init__(self, params: Params, defaults: Group, foreach: bool | None = None) -> None:
        super().__init__(params, {**defaults, "foreach": foreach})

    def init(self, p: Tensor, group: Group) -> State:
        """What is kept for one parameter before its first gradient."""
        return {}

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> None:
        """Write `params` in place, and what is kept for them. `states[i]["step"]` counts this step already."""
        raise NotImplementedError

    def check_group(self, group: Group) -> None:
        """Raise ValueError for hyper-parameters that cannot be used; rates and decays are checked here for all."""
        for name in ("lr", "weight_decay"):
            if name in group and not group[name] >= 0:
                raise ValueError(f"{name} is {group[name]}; use a number >= 0")

    def check(self, p: Tensor, group: Group) -> None:
        """Raise ValueError for a parameter that the rule cannot write."""

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self.check_group(group)
        for p in group["params"]:
            if not p.is_floating_point() or p.layout != torch.strided:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is {p.dtype}, {p.layout}; {type(self).__name__} takes "
                    "dense real ones: give the others to an optimizer of torch.optim"
                )
            self.check(p, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, and what is kept keeps its dtype."""
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state of torch's optimizer of the same name lacks what is ours
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Write every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for part in self.parts(params, group):
                grads = [self.dense(p) for p in part]
                self.update(part, grads, [self.tick(p, group) for p in part], group)
        return loss

    def parts(self, params: list[Tensor], group: Group) -> Iterable[list[Tensor]]:
        """The parameters that one call of `update` takes together."""
        together = group["foreach"] if group["foreach"] is not None else all(p.is_cuda for p in params)
        return [params] if together else [[p] for p in params]

    def tick(self, p: Tensor, group: Group) -> State:
        """What is kept for `p`, its clock one step on."""
        state = self.state[p]
        if not state:
            state.update(self.init(p, group))
        state["step"] = state.get("step", 0) + 1
        return state

    def dense(self, p: Tensor) -> Tensor:
        """The gradient of p."""
        assert p.grad is not None
        if p.grad.layout != torch.strided:
            raise ValueError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse; {type(self).__name__} reads dense "
                "ones: use sparse=False in the embedding, or torch.optim.SparseAdam for it"
            )
        return p.grad


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Give what was loaded the dtype it was saved in: torch casts it to the parameter's, and factors or memories that
    are wider than a bfloat16 parameter would go on from rounded values."""

    def restored(now: Any, was: Any) -> Any:
        return was.to(now.device) if isinstance(was, Tensor) and was.dtype != now.dtype else now

    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved, held, strict=True):
        for key, value in state_dict["state"].get(i, {}).items():
            optimizer.state[p][key] = tree_map(restored, optimizer.state[p][key], value)


class RuleOptimizer(Optimizer):
    """Any rule of core.rule that needs no layer inputs: W <- W + rule(gradient), the dials named in the param groups.

        rule = chain(momentum("beta"), gradient_descent("lr"))
        RuleOptimizer(params, rule, lr=0.1, beta=0.9)                                     torch.optim.SGD(momentum=0.9)

    The dials are hyper-parameters of the param groups, so schedules and groups of their own rates work. Parameters are
    presented as matrices (inputs, outputs), as core has them; see `matrix`.
    """

    def __init__(self, params: Params, rule: rules.Rule, **dials: float) -> None:
        self.rule, self.dials = rule, tuple(dials)
        super().__init__(params, dials, foreach=False)

    def init(self, p: Tensor, group: Group) -> State:
        return {"memory": self.rule.init({"W": matrix(p).mT})}

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> None:
        for p, g, state in zip(params, grads, states, strict=True):
            dials = {name: p.new_full((), group[name]) for name in self.dials}
            write = rules.Write({"W": matrix(p).mT}, {}, dials)
            updates, state["memory"] = self.rule.update({"W": matrix(g).mT}, state["memory"], write)
            p.add_(updates["W"].mT.reshape(p.shape))


def matrix(p: Tensor) -> Tensor:
    """A parameter as (outputs, inputs): convolution kernels (out, in, ...) flattened, a bias as the weight of the
    constant input 1, (out, 1). A view where torch can make one."""
    return p.flatten(1) if p.dim() > 1 else p.reshape(-1, 1)


def decay_weights(params: list[Tensor], group: Group) -> None:
    """Decoupled weight decay, W <- (1 - lr weight_decay) W: the weights fade by themselves, no memory sees it."""
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
