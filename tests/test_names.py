"""The names that other people's scripts rely on."""

import pytest

import nestling

NAMES = [
    "__version__",
    "learn",
    "levels",
    "load_state",
    "save_state",
    "Session",
    "core",
    "ops",
    "optim",
    "memories",
    "models",
    "memories.Attention",
    "memories.SelfModifyingTitans",
    "memories.ContinuumMemory",
    "memories.TitansMemory",
    "memories.HierarchicalTitans",
    "memories.DeltaRule",
    "models.build",
    "models.State",
    "ops.dispatch.delta_rule",
    "ops.dispatch.newton_schulz",
    "ops.newton_schulz.reference.newton_schulz",
]
OPS = (
    "linear_attention",
    "selective_scan",
    "delta_rule",
    "gated_delta_rule",
    "titans",
    "ttt",
    "self_modifying",
    "cms_update",
)
OPTIMIZERS = (
    "Momentum",
    "PreconditionedMomentum",
    "DeltaMomentum",
    "DeepMomentum",
    "DGD",
    "Muon",
    "M3",
    "MultiLevel",
    "param_groups",
)
NAMES += [f"optim.{name}" for name in OPTIMIZERS]
NAMES += [f"ops.{op}.{form}.{op}" for op in OPS for form in ("reference", "chunk")]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_exists(name: str) -> None:
    found: object = nestling
    for part in name.split("."):
        found = getattr(found, part)
