"""Finding the MLPs of a pretrained model, and making their linear maps ones that a sequence can bend."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..memories.continuum import FastLinear
from .context import LAYER_TYPES

NAMES = ("mlp", "feed_forward", "ffn")  # what families call the MLP of a layer
EXPERTS = ("moe", "expert", "router", "sparse")
PLAIN = (nn.Linear, Conv1D)  # linear maps that become FastLinear; subclasses may compute something else
ALIBI = {"bloom", "mpt"}  # positions come from the padding mask, which rows of different age do not have


def check_family(model: PreTrainedModel) -> None:
    """Raises ValueError, naming the family, for a model whose context is not an ordinary attention cache."""
    config = model.config.get_text_config()
    family = model.config.model_type
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if model.config.is_encoder_decoder or other or family in ALIBI:
        what = "an encoder" if model.config.is_encoder_decoder else "ALiBi" if not other else ", ".join(sorted(other))
        raise ValueError(
            f"convert_to_cms: {type(model).__name__} ({family}) has {what}; "
            "use a decoder whose layers are full or sliding-window attention with positions of their own"
        )


def find_mlps(model: PreTrainedModel, target_modules: str | Sequence[str] | None) -> list[str]:
    """The paths of the MLPs of a model, first layer first.

    Args:
        target_modules: None = by their usual names; a list of names (the end of a path), or one regular expression for
            the whole path.
    Raises ValueError, naming the family, if there are none or one of them is a mixture of experts.
    """
    family = f"{type(model).__name__} ({model.config.model_type})"
    if target_modules is None:
        paths = list(_by_name(model))
        remedy = f"none of its layers has a part named {', '.join(NAMES)}; name them with target_modules"
    else:
        paths = [path for path, _ in model.named_modules() if _matches(path, target_modules)]
        remedy = f"target_modules={target_modules!r} matches no module; give ends of paths, or a regular expression"
    if not paths:
        raise ValueError(f"convert_to_cms: {family}: {remedy}")
    for path in paths:
        _check_mlp(family, path, model.get_submodule(path))
    return paths


def _by_name(model: PreTrainedModel) -> Iterator[str]:
    count = model.config.get_text_config().num_hidden_layers
    for path, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            found = [f"{path}.{i}.{n}" for i, one in enumerate(layers) for n, _ in one.named_children() if n in NAMES]
            if found:
                yield from found
                return


def _matches(path: str, target: str | Sequence[str]) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in target)


def _check_mlp(family: str, path: str, module: nn.Module) -> None:
    parts = [type(m).__name__ for m in module.modules()] + [name for name, _ in module.named_modules()]
    mixed = any(word in part.lower() for part in parts for word in EXPERTS)
    if mixed or any(p.dim() > 2 for p in module.parameters()):
        raise ValueError(
            f"convert_to_cms: {family}: {path} ({type(module).__name__}) is a mixture of experts, in which a token "
            "chooses its weights; convert a dense model, or name its dense MLPs with target_modules"
        )
    if not any(type(m) in PLAIN for m in module.modules()):
        raise ValueError(
            f"convert_to_cms: {family}: {path} ({type(module).__name__}) has no plain linear map (quantised ones "
            "cannot be written); load the model in float32 or bfloat16, or choose others with target_modules"
        )


def bendable(module: nn.Module) -> nn.Module:
    """The same module with FastLinear in the place of its linear maps; the parameters stay the same objects."""
    made = fast_linear(module)
    if made is not None:
        return made
    for name, child in list(module.named_children()):
        setattr(module, name, bendable(child))
    return module


def fast_linear(old: nn.Module) -> FastLinear | None:
    """The FastLinear with the weights of a linear map; None for anything else."""
    if type(old) is nn.Linear:
        made = FastLinear.__new__(FastLinear)
        made.adopt(old.weight, old.bias)
        return made
    if isinstance(old, Conv1D):
        conv = FastConv1D.__new__(FastConv1D)
        conv.adopt(old.weight, old.bias)
        return conv
    return None


class FastConv1D(FastLinear):
    """The linear map of GPT-2, which stores its matrix the other way round; so that it gives the same bits."""

    def adopt(self, weight: Tensor, bias: Tensor | None) -> None:
        """Become the map with the kernel (I, O) and bias."""
        super().adopt(weight, bias)
        self.in_features, self.out_features = weight.shape
        del self.weight
        self.kernel = weight

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        return super().__getattr__("kernel").t() if name == "weight" else super().__getattr__(name)  # type: ignore[operator]


def probe(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """Read two rows of three tokens. Raises ValueError, naming the family, if a map does not see rows as rows."""
    wrong: list[str] = []

    def look(m: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[:2] != (2, 3):
            wrong.append(f"{names[m]} sees {tuple(inputs[0].shape)}")

    names = {m: path for path, m in _maps(model, paths)}
    hooks = [m.register_forward_pre_hook(look) for m in names]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(2, 3, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if wrong:
        family = f"{type(model).__name__} ({model.config.model_type})"
        raise ValueError(
            f"convert_to_cms: {family}: {wrong[0]}, not one row per sequence; choose others with target_modules"
        )


def _maps(model: nn.Module, paths: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for top in paths:
        for path, m in model.get_submodule(top).named_modules():
            if type(m) in PLAIN:
                yield f"{top}.{path}" if path else top, m
