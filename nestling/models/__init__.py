"""Models: memories stacked by period. `build` makes one by name."""

from .baselines import Baseline
from .config import ModelConfig
from .decoder import Decoder
from .generate import Generation
from .hope import Hope
from .hope_attention import HopeAttention
from .learning_decoder import LearningDecoder
from .lm import LanguageModel
from .presets import MODELS, NAMES, PRESETS, build, config_of, count, from_config, matched
from .reading_model import Output, ReadingModel
from .samba import Samba
from .state import Segment, State
from .state_file import load_state, read_tree, save_state, write_tree
from .transformer import Transformer

__all__ = [
    "MODELS",
    "NAMES",
    "PRESETS",
    "Baseline",
    "Decoder",
    "Generation",
    "Hope",
    "HopeAttention",
    "LanguageModel",
    "LearningDecoder",
    "ModelConfig",
    "Output",
    "ReadingModel",
    "Samba",
    "Segment",
    "State",
    "Transformer",
    "build",
    "config_of",
    "count",
    "from_config",
    "load_state",
    "matched",
    "read_tree",
    "save_state",
    "write_tree",
]
