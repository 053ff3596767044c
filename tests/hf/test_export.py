"""A trained run as a folder of transformers: the same logits, the same ids."""

from pathlib import Path

import pytest
import torch

from nestling.cli.main import main
from nestling.data import BPETokenizer, bundled_text
from nestling.train import DataConfig, load_run, run
from tests.hf.needs import need
from tests.train.small_runs import small

need("transformers")
TEXT = "Call me Ishmael. Ünïcödé — and\ttabs\n"


@pytest.mark.parametrize("tokenizer", ["bytes", "pieces"])
def test_export(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    from nestling.hf.files import load

    name = tokenizer
    if tokenizer == "pieces":
        name = str(tmp_path / "tokenizer.json")
        BPETokenizer.train([bundled_text("moby_dick")[:20_000]], 300).save(name)
    config = replace(small(steps=4, eval_every=0), data=DataConfig(text="moby_dick", tokenizer=name))
    run(config, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err

    (model, own), (other, theirs) = load_run(tmp_path / "run"), load(tmp_path / "model")
    ids = torch.tensor(theirs(TEXT)["input_ids"])[None]
    assert ids[0].tolist() == own.encode(TEXT).tolist() and theirs.decode(ids[0]) == TEXT
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids, learn=False).logits)
