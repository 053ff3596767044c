"""Hugging Face: pretrained models whose MLPs keep learning, and the models of this library in transformers.

Importing it registers both with the Auto classes. Needs the extra `hf` (transformers); `import nestling` does not.
"""

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    raise ImportError("nestling.hf needs the package transformers: pip install 'nestling[hf]'") from error

from .cache import NestlingCache
from .convert import convert_to_cms
from .converted import ConvertedConfig, ConvertedForCausalLM
from .modeling import NestlingConfig, NestlingForCausalLM
from .pretrained import PretrainedReader
from .reading import ReadingOutput

for config, model in ((ConvertedConfig, ConvertedForCausalLM), (NestlingConfig, NestlingForCausalLM)):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)

__all__ = [
    "ConvertedConfig",
    "ConvertedForCausalLM",
    "NestlingCache",
    "NestlingConfig",
    "NestlingForCausalLM",
    "PretrainedReader",
    "ReadingOutput",
    "convert_to_cms",
]
