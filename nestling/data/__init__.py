"""Streams: text to tokens, tokens to contiguous rows.

    documents = read_documents("book.txt")                     # text.py: files and folders, errors that name the remedy
    training, held_out = split_documents(documents, 0.1)       # the last tenth of each document is held out
    tokens = tokenize(training, ByteTokenizer())               # tokens.py: one ring of ids with document borders
    stream = TokenStream(tokens, rows=8, length=256, seed=0)   # stream.py: row b reads on where it stopped

Larger corpora lie in memory-mapped shards (shards.py) behind the same `Tokens`; prepare.py makes them of text, JSONL,
Parquet and data sets of the hub (sources.py), and blocks.py shuffles and mixes them.
"""

from nestling.data.blocks import Blocks, mixture, shuffled
from nestling.data.bundled import TEXTS, bundled_text
from nestling.data.prepare import prepare_shards
from nestling.data.questions import Passage, Question, one_per_article, read_passages, read_records
from nestling.data.shards import open_shards, write_shards
from nestling.data.sources import units_of
from nestling.data.stream import Batch, TokenStream, held_out_windows
from nestling.data.text import load_documents, locate, read_documents, split_documents
from nestling.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from nestling.data.tokens import Corpus, Tokens, tokenize

__all__ = [
    "TEXTS",
    "BPETokenizer",
    "Batch",
    "Blocks",
    "ByteTokenizer",
    "Corpus",
    "Passage",
    "Question",
    "TokenStream",
    "Tokenizer",
    "Tokens",
    "bundled_text",
    "held_out_windows",
    "load_documents",
    "load_tokenizer",
    "locate",
    "mixture",
    "one_per_article",
    "open_shards",
    "prepare_shards",
    "read_documents",
    "read_passages",
    "read_records",
    "shuffled",
    "split_documents",
    "tokenize",
    "units_of",
    "write_shards",
]
