"""Hugging Face: pretrained models whose MLPs keep learning, and the models of this library in transformers.

Importing it registers both with the Auto classes. Needs the extra `hf` (transformers); `import nestling` does not.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .convert import convert_to_cms
from .converted import ConvertedConfig, ConvertedForCausalLM, ReadingOutput
from .pretrained import PretrainedReader

AutoConfig.register(ConvertedConfig.model_type, ConvertedConfig, exist_ok=True)
AutoModelForCausalLM.register(ConvertedConfig, ConvertedForCausalLM, exist_ok=True)

__all__ = [
    "ConvertedConfig",
    "ConvertedForCausalLM",
    "PretrainedReader",
    "ReadingOutput",
    "convert_to_cms",
]
