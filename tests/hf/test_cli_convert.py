"""`nestling convert`, and what the other commands do with what it made."""

import json
import lzma

import pytest
import torch

from tests.hf.needs import need

need("transformers")

from nestling.cli.main import main  # noqa: E402
from nestling.hf import NestlingForCausalLM  # noqa: E402
from nestling.hf.files import load  # noqa: E402
from nestling.models import build  # noqa: E402
from tests.hf.small import DATA, plain  # noqa: E402


def called(capsys, *arguments):
    """Exit code, and the output or the error line."""
    code = main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err.splitlines()[-1]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The converted pretrained model, calibrated on its own kind of text, and a text to read."""
    folder = tmp_path_factory.mktemp("stories")
    (folder / "old.txt").write_bytes(lzma.decompress((DATA / "stories_40.txt.xz").read_bytes())[:6000])
    (folder / "new.txt").write_text("The brillig borogoves outgrabe, all mimsy in the wabe. " * 12)
    model = [DATA / "stories260K.bin.xz", "--tokenizer", DATA / "tok512.bin.xz"]
    options = ["--periods", "64", "128", "--rates", "0.05", "--old", folder / "old.txt", "--out", folder / "model"]
    assert main([str(a) for a in ("convert", *model, *options)]) == 0
    return folder


def test_a_converted_folder_reads_and_generates(stories, capsys):
    model, tokenizer = load(stories / "model")
    assert model.config.periods == [64, 128] and model.config.calibrated and tokenizer.vocab_size == 512
    memory = stories / "memory.safetensors"
    code, said = called(
        capsys, "read", stories / "new.txt", "--model", stories / "model", "--state", memory, "--compare", "--json"
    )
    report = json.loads(said)
    assert code == 0 and report["gain"] > 5 and memory.is_file()
    code, said = called(
        capsys,
        "generate",
        "--model",
        stories / "model",
        "--state",
        memory,
        "--prompt",
        "The",
        "--tokens",
        "6",
        "--json",
    )
    assert code == 0 and len(json.loads(said)["tokens"]) == 6


def test_it_prints_the_levels(stories, capsys, tmp_path):
    model = [DATA / "stories260K.bin.xz", "--tokenizer", DATA / "tok512.bin.xz"]
    code, said = called(capsys, "convert", *model, "--out", tmp_path / "a", "--json")
    periods = {box["period"] for box in json.loads(said)["levels"] if box["clock"] == "token"}
    assert code == 0 and periods == {0, 256, 512, 1024}
    code, said = called(capsys, "convert", *model, "--out", tmp_path / "b", "--periods", "32", "inf")
    assert code == 0 and "cms 32" in said and "text that it sampled itself" in said


def test_what_is_wrong_is_one_line(stories, capsys, tmp_path):
    checkpoint = DATA / "stories260K.bin.xz"
    for arguments, code, words in (
        (("convert", checkpoint, "--out", tmp_path / "x"), 1, "--tokenizer FILE"),
        (("convert", checkpoint, "--out", stories), 2, "is not empty"),
        (("convert", checkpoint, "--out", tmp_path / "x", "--periods", "3.5"), 2, "neither a whole number"),
    ):
        assert called(capsys, *arguments)[0] == code
        assert words in called(capsys, *arguments)[1]
    plain().save_pretrained(tmp_path / "plain")
    code, said = called(capsys, "read", stories / "new.txt", "--model", tmp_path / "plain")
    assert code == 1 and "nestling convert" in said


def test_models_of_the_library_are_loaded_too(tmp_path):
    NestlingForCausalLM.of(build("hope-attention", vocab_size=256, dim=16, depth=1, heads=1)).save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError, KeyError)):  # it was saved without a tokenizer
        load(tmp_path)
    assert isinstance(
        NestlingForCausalLM.from_pretrained(tmp_path).reader(torch.ones(1, 3).long()).logits, torch.Tensor
    )
