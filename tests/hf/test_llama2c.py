"""The reader of llama2.c files, on the pretrained model of the tests (260K parameters, TinyStories)."""

import lzma
import re

import pytest
import torch

from tests.hf.needs import need

need("transformers")

from nestling.hf import convert_to_cms  # noqa: E402
from nestling.hf.llama2c import read_model, read_tokenizer  # noqa: E402
from tests.hf.small import DATA, stories_model, stories_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def stories():
    tokenizer = stories_tokenizer()
    texts = lzma.decompress((DATA / "stories_40.txt.xz").read_bytes()).decode()
    split = re.split(r"(?<!\n)\n(?!\n)", texts)
    assert len(split) == 40
    return [torch.from_numpy(tokenizer.encode(story))[None] for story in split]


@torch.no_grad()
def mean_loss(model, stories):
    loss = sum(
        torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum") for ids in stories
    )
    return float(loss) / sum(ids.shape[1] - 1 for ids in stories)


def test_the_loss_is_the_published_one_also_after_conversion(stories):
    model = stories_model()
    before = mean_loss(model, stories)
    assert sum(ids.shape[1] - 1 for ids in stories) == 12_770
    assert round(before, 3) == 1.308
    one = stories[0]
    with torch.no_grad():
        logits = model(one).logits
    learner = convert_to_cms(model, (128, 256), old_text=stories[1][:, :200])
    with torch.no_grad():
        assert torch.equal(learner(one).logits, logits)
        read = learner(one, learn=True)
    torch.testing.assert_close(read.logits[:, :128], logits[:, :128], rtol=0, atol=2e-6)
    assert (read.logits[:, 128:] - logits[:, 128:]).abs().max() > 1e-3
    assert [box.period for box in learner.levels() if box.period] == [128, 128, 256, 256, 256]


def test_the_tokenizer_gives_the_published_ids():
    tokenizer = stories_tokenizer()
    assert tokenizer.encode("Once upon a time").tolist() == [1, 403, 407, 261, 378]
    for text in ("Once upon a time", "", " two  spaces\nand a line", "naïve café, 日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.by_words = False
    tokenizer.known = {}
    assert tokenizer.encode("Once upon a time").tolist() == [1, 403, 407, 261, 378]
    with pytest.raises(ValueError, match="outside the vocabulary of 512"):
        tokenizer.decode([512])


def test_the_model_tells_its_story():
    model, tokenizer = stories_model(), stories_tokenizer()
    prompt = torch.from_numpy(tokenizer.encode("Once upon a time"))[None]
    made = model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert tokenizer.decode(made[0].tolist()).startswith(story[:60])


@pytest.mark.parametrize("cut", [20, 1000, -4])
def test_damaged_files_are_refused(tmp_path, cut):
    data = lzma.decompress((DATA / "stories260K.bin.xz").read_bytes())
    (tmp_path / "cut.bin").write_bytes(data[:cut])
    with pytest.raises(ValueError, match=r"cut\.bin"):
        read_model(tmp_path / "cut.bin")
    vocabulary = lzma.decompress((DATA / "tok512.bin.xz").read_bytes())
    (tmp_path / "cut.tok").write_bytes(vocabulary[:cut])
    with pytest.raises(ValueError, match="not a tokenizer"):
        read_tokenizer(tmp_path / "cut.tok")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_model(tmp_path / "missing.bin")
