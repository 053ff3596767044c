"""The Trainer of transformers for converted models: it finds their weights again when a run is resumed.

    from nestling.hf.trainer import Trainer

    Trainer(model, args, train_dataset=...).train(resume_from_checkpoint=True)

A converted model lies in a file of its own, so that no plain class loads it by mistake, and transformers' Trainer looks
for the plain file. Everything else of a checkpoint (optimizer, schedule, random states, place in the data) is the same.
"""

from __future__ import annotations

from pathlib import Path

import transformers
from torch import nn

from .converted import VARIANT, ConvertedForCausalLM


class Trainer(transformers.Trainer):
    """As in transformers. Rates that are learned are parameters, so they and their moments are part of a checkpoint.

    Fast weights are not: every batch of a `Trainer` starts sequences of its own.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a folder that `save_model` wrote."""
        if not self._reload(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """The same, of the best checkpoint."""
        if not self._reload(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _reload(self, folder: str | None) -> bool:
        """Whether the folder holds a converted model, which then is what this one becomes."""
        model = self.accelerator.unwrap_model(self.model)
        if folder is None or not isinstance(model, ConvertedForCausalLM):
            return False
        if not any(Path(folder).glob(f"model*.{VARIANT}*")):  # one file, or shards and their index
            return False
        saved = ConvertedForCausalLM.from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
        return True
