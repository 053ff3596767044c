"""Models and tokenizers as the command line names them: folders, names on the hub, and files of llama2.c."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ..models import LanguageModel
from .converted import ConvertedConfig, ConvertedForCausalLM
from .llama2c import read_model, read_tokenizer
from .modeling import NestlingConfig, NestlingForCausalLM

OURS: dict[str, Any] = {
    ConvertedConfig.model_type: ConvertedForCausalLM,
    NestlingConfig.model_type: NestlingForCausalLM,
}
LLAMA2C = "tokenizer.llama2c"  # the vocabulary of a llama2.c model beside its converted weights


def is_ours(folder: str | Path) -> bool:
    """Whether a folder holds a converted model, or one of this library, as `save_pretrained` writes them."""
    config = Path(folder) / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") in OURS


def load(folder: str | Path) -> tuple[ConvertedForCausalLM | NestlingForCausalLM, Any]:
    """The model of such a folder, ready to read, and its tokenizer."""
    kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"]
    model = OURS[kind].from_pretrained(folder).eval()
    if (Path(folder) / LLAMA2C).is_file():
        return model, read_tokenizer(Path(folder) / LLAMA2C)
    return model, AutoTokenizer.from_pretrained(folder)


def load_plain(name: str, tokenizer: str | None) -> tuple[PreTrainedModel, Any]:
    """A model to convert, and its tokenizer.

    Args:
        name: a folder, a name on the hub, or a checkpoint file of llama2.c.
        tokenizer: the same for the tokenizer; None = that of the model.
    Raises ValueError for a checkpoint file without a tokenizer file.
    """
    if not Path(name).is_file():
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(tokenizer or name)
    if tokenizer is None:
        raise ValueError(f"{name} is a checkpoint of llama2.c; give its vocabulary with --tokenizer FILE")
    return read_model(name), read_tokenizer(tokenizer)


def save(model: ConvertedForCausalLM, tokenizer: Any, folder: str | Path, source: str | None) -> None:
    """Write model and tokenizer into a folder that `load` reads; `source`: the file of a llama2.c vocabulary."""
    model.save_pretrained(folder)
    if source is not None and Path(source).is_file():
        shutil.copyfile(source, Path(folder) / LLAMA2C)
    else:
        tokenizer.save_pretrained(folder)


def save_trained(model: LanguageModel, tokenizer: Any | None, folder: str | Path) -> None:
    """Write a model of this library, and its tokenizer of the package `tokenizers`; None = its ids are bytes."""
    NestlingForCausalLM.of(model.eval()).save_pretrained(folder)
    fast = byte_tokenizer() if tokenizer is None else tokenizer
    PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False).save_pretrained(folder)


def byte_tokenizer() -> Any:
    """Byte-level pieces that are never joined: the id of a byte is the byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    made = Tokenizer(models.BPE(vocab={mark: byte for byte, mark in bytes_to_unicode().items()}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made
