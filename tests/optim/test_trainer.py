"""The Trainer of transformers takes our optimizers by `optimizer_cls_and_kwargs`: for real, where it is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nestling import optim

WHY = "{} is not installed; the Trainer is tested where both are: pip install transformers accelerate"
transformers = pytest.importorskip("transformers", reason=WHY.format("transformers"))
pytest.importorskip("accelerate", reason=WHY.format("accelerate"))
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

VOCABULARY, LENGTH = 32, 16


def tiny() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def trainer(model: nn.Module, made: Any, folder: Path, steps: int = 12) -> Any:
    rows = [torch.arange(i, i + LENGTH) % VOCABULARY for i in range(VOCABULARY)]  # what follows is known
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        save_steps=6,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    return transformers.Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=made)


CASES = {
    "Muon": (lambda: optim.param_groups, {"lr": 0.02}),
    "M3": (lambda: optim.param_groups, {"lr": 0.02, "matrices": optim.M3}),
    "Momentum": (optim.Momentum, {"lr": 0.1, "momentum": 0.9}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_trains_and_resumes(name: str, tmp_path: Path) -> None:
    """The loss falls, and a run that goes on from the checkpoint of step 6 ends in the same weights."""
    model = tiny()
    whole = trainer(model, CASES[name], tmp_path)
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    again = tiny()
    resumed = trainer(again, CASES[name], tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_trainers_schedule_reaches_every_level(tmp_path: Path) -> None:
    model = tiny()
    made = trainer(model, CASES["M3"], tmp_path, steps=2)
    made.train()
    optimizer = made.optimizer.optimizer  # inside accelerate's wrapper
    assert isinstance(optimizer, optim.MultiLevel)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}  # linear decay has ended
    assert all(group["initial_lr"] == 0.02 for group in optimizer.param_groups)
