"""lm-eval's own adapter for transformers and ours give the same scores, for converted models and for those of here."""

import warnings

import pytest
import torch

from tests.hf.needs import need

need("transformers")
need("tokenizers")

import transformers  # noqa: E402

from nestling.data import BPETokenizer  # noqa: E402
from nestling.evals.lm_harness import as_lm  # noqa: E402
from nestling.hf import NestlingForCausalLM, convert_to_cms  # noqa: E402
from nestling.models import build  # noqa: E402
from tests.hf.small import GROUPED, SHAPE  # noqa: E402

LONGEST = 24
TEXTS = ["The cat sat on the mat and the dog on the rug.", "A rug is a mat for a dog, and a cat is no dog."]
ASKED = [
    ("The cat", " sat on the mat"),
    ("A dog", " is"),
    ("The cat sat on the mat and the dog", " ran"),
    ("", "A mat"),
]


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def harness():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("lm_eval", reason="lm-eval is not installed; runs with: pip install 'nestling[eval]'")


def tokenizers():
    """A byte-pair tokenizer of ours, and the same one of transformers, both with the newline before empty contexts."""
    ours = BPETokenizer.train(TEXTS, 300)
    newline = ours.inner.id_to_token(int(ours.encode("\n")[0]))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours.inner, eos_token=newline, pad_token=newline)
    return ours, theirs


def hf_adapter(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=LONGEST, device="cpu")


def compare(theirs, ours):
    requests = [Request(*pair) for pair in ASKED]
    a, b = theirs.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests)
    assert [nats for nats, _ in b] == pytest.approx([nats for nats, _ in a], rel=1e-5)
    assert [greedy for _, greedy in b] == [greedy for _, greedy in a]
    rolling = [Request(text) for text in TEXTS]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-5
    )


def test_a_converted_llama_scores_as_the_llama_does(harness):
    ours, theirs = tokenizers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | GROUPED | {"vocab_size": ours.vocab_size, "bos_token_id": None})
    llama = transformers.LlamaForCausalLM(config).eval()
    reader = convert_to_cms(llama, (4, 8), rates=0.05, calibrate=False).reader
    compare(hf_adapter(llama, theirs), as_lm(reader, ours, max_length=LONGEST))


def test_our_models_go_through_the_adapter_of_transformers(harness):
    ours, theirs = tokenizers()
    torch.manual_seed(0)
    model = build("hope", vocab_size=ours.vocab_size, dim=16, depth=1, heads=1, periods=(8, 16), chunk_size=8)
    adapted, direct = hf_adapter(NestlingForCausalLM.of(model).eval(), theirs), as_lm(model, ours, max_length=LONGEST)
    compare(adapted, direct)
    asked = {"until": ["."], "max_gen_toks": 6}
    said = adapted.generate_until([Request("The cat", dict(asked))], disable_tqdm=True)
    assert said == direct.generate_until([Request("The cat", asked)])
