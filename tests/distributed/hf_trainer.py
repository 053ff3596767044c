"""The Trainer of transformers on a model of this library whose levels write. Run by test_hf_trainer.py.

torchrun --nproc-per-node 2 tests/distributed/hf_trainer.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from nestling.hf import NestlingForCausalLM
from nestling.models import build

STEPS, ROWS, LENGTH, VOCABULARY = 4, 4, 25, 32


def rows() -> list[dict[str, torch.Tensor]]:
    """Sequences that count on, each asked for from a place of its own: processes have different numbers of targets."""
    made = []
    for i in range(STEPS * ROWS):
        ids = (torch.arange(LENGTH) * (i % 3 + 1) + i) % VOCABULARY
        labels = ids.clone()
        labels[: i % 5 * 3] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, object]:
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]} | {"learn": True}


def fresh() -> NestlingForCausalLM:
    """The same initial weights on every process."""
    torch.manual_seed(0)
    made = build("hope-attention", "tiny", vocab_size=VOCABULARY, dim=16, depth=1, heads=2, periods=(8.0, 16.0))
    return NestlingForCausalLM.of(made)


def train(folder: Path) -> None:
    """Train, save, and leave what every process has learned in the folder."""
    options = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS // int(os.environ.get("WORLD_SIZE", "1")),
        logging_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no", seed=0,
    )  # fmt: skip
    trainer = Trainer(fresh(), options, train_dataset=rows(), data_collator=collate)
    trainer.train()
    trainer.save_model(str(folder))
    rank = trainer.args.process_index
    torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), folder / f"rank {rank}.pt")
    if rank == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses.json").write_text(json.dumps({"processes": trainer.args.world_size, "losses": losses}))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
