"""Which tensors of a state are split when the maps that made them are (`LanguageModel.splits`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..core.spread import Split


def split_of_state(names: Iterable[str], splits: Mapping[str, Split]) -> dict[str, Split]:
    """Of the names that `flatten` gives the tensors of a `Carried`, those that are split, and how.

    splits: of the model, by the names of its weights.
    """
    rules = dict[str, Split]()
    for name, split in splits.items():
        path, _, kind = name.removesuffix(".weight").rpartition(".")
        level, _, body = path.rpartition(".")
        if body == "body":  # fast weights of `up` and `down`: (B, O, I), or factors (B, R, O) and (B, R, I)
            matrix = Split(1 + split.dim, split.blocks)
            factor = ("left", "right")[split.dim], Split(2, split.blocks)
            for root, fields in (("fast", ("delta", "gradient", "moments")), ("segment.ready", ("gradient",))):
                for field in fields:
                    held = f"{root}.{level}.{field}.{kind}"
                    rules |= {f"{held}.{x}": matrix for x in ("dense", "m", "v")} | {f"{held}.{factor[0]}": factor[1]}
        elif kind == "qkv":  # caches (B, S, H, d)
            block = path.split(".")[1]
            rules |= {f"{root}.{block}.{x}": Split(2) for root in ("mixers", "segment.mixers") for x in ("k", "v")}
    return {name: rules[name] for name in names if name in rules}
