"""Training: a typed config, a loop, a folder that survives kill -9.

run(RunConfig(...), "runs/first")           # run.py: builds tokenizer, data and model, then
train(model, stream, config, folder)        # loop.py: the loop, readable from top to bottom
load_run("runs/first")                      # the trained model and its tokenizer
"""

from nestling.train.checkpoint import DamagedCheckpoint, checkpoints, read_checkpoint
from nestling.train.config import (
    DataConfig,
    GuardConfig,
    ModelChoice,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from nestling.train.config_file import coerce, config_from_json, config_to_json, difference, from_dict, read_config
from nestling.train.loop import TrainResult, train
from nestling.train.metrics import read_metrics
from nestling.train.run import Prepared, load_run, prepare, resume, run

__all__ = [
    "DamagedCheckpoint",
    "DataConfig",
    "GuardConfig",
    "ModelChoice",
    "OptimConfig",
    "ParallelConfig",
    "Prepared",
    "RunConfig",
    "TrainConfig",
    "TrainResult",
    "checkpoints",
    "coerce",
    "config_from_json",
    "config_to_json",
    "difference",
    "from_dict",
    "load_run",
    "prepare",
    "read_checkpoint",
    "read_config",
    "read_metrics",
    "resume",
    "run",
    "train",
]
