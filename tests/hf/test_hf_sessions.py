"""Sessions over pretrained models, and with tokenizers of transformers."""

import pytest
import torch

from tests.hf.needs import need

need("transformers")

import tokenizers  # noqa: E402
import transformers  # noqa: E402

from nestling import Session  # noqa: E402
from nestling.core.state import flatten  # noqa: E402
from nestling.hf import convert_to_cms  # noqa: E402
from tests.hf.small import converted, stories_model, stories_tokenizer  # noqa: E402

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture
def letters():
    """A tokenizer of transformers with a begin-of-text token and a chat template: one letter, one id."""
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(i): i - 29 for i in range(32, 125)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def test_the_begin_of_text_is_read_once(letters):
    session = Session(converted(), letters)
    assert session.read("ab c").tokens == 5 and session.read("ab c").tokens == 4
    assert session.state.tree.mixers[0].tokens.tolist() == [[1, 68, 69, 3, 70, 68, 69, 3, 70]]
    other = Session(converted(), letters)
    other.read(iter(["ab c", "ab c"]))
    assert other.state.tree.mixers[0].tokens.tolist() == session.state.tree.mixers[0].tokens.tolist()


def test_chat_uses_the_template(letters, monkeypatch):
    session, asked = Session(converted(), letters), []
    said = iter([68, 69, 2])
    model = session.model
    monkeypatch.setattr("nestling.models.Generation.sample", lambda self, logits: torch.tensor([next(said)]))
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, *a, **k: asked.append(ids.tolist()) or generate(ids, *a, **k))
    assert session.chat("ab") == "ab" and asked[-1] == [[1, *letters.encode("[ab]>", add_special_tokens=False)]]
    assert session.tokens == 9
    said = iter([70, 2])
    assert session.chat("c") == "c" and asked[-1] == [letters.encode("[c]>", add_special_tokens=False)]


def test_a_session_of_a_converted_model_is_kept(letters, tmp_path):
    session = Session(converted(), letters)
    session.read("what is read here is learned, and outlives the context " * 2)
    session.save(tmp_path / "session")
    back = Session.load(tmp_path / "session", converted(), letters)
    assert back.generate("so ", 5, temperature=0) == session.generate("so ", 5, temperature=0)
    ours, theirs = flatten(back.state.tree)[0], flatten(session.state.tree)[0]
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    with pytest.raises(ValueError, match="belongs to model llama-"):
        Session.load(tmp_path / "session", converted(seed=1), letters)
    assert session.report().bytes <= session.report().bound
    assert [row.level for row in session.report().levels] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_the_pretrained_model_learns_a_text_by_heart():
    model = convert_to_cms(stories_model(), (64, 128), rates=0.02, calibrate=False)
    session = Session(model, stories_tokenizer())
    verse = "Jabberwocks burble in tulgey woods while slithy toves gyre and gimble near the wabe. "
    first = session.read(verse * 6).nats
    session.reset("context")
    again = session.read(verse * 6, learn=False).nats
    fresh = Session(model, stories_tokenizer()).read(verse * 6, learn=False).nats
    assert again < 0.9 * fresh and first < fresh
    assert session.generate("Once upon a time", 5, temperature=0)
