"""What the report says follows from the numbers, and all numbers are in it."""

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nestling.demo import figures
from nestling.demo.report import page
from nestling.demo.sentences import change, sentences
from nestling.demo.tables import tables
from nestling.evals import Forgetting
from tests.demo.made_up import PATH, read, results


@pytest.mark.parametrize(
    ("value", "reference", "words"),
    [
        (1.9, 2.0, "5.0 % lower than"),
        (2.1, 2.0, "5.0 % higher than"),
        (2.0, 2.0, "within 0.05 % of"),
        (2.0009, 2.0, "within 0.05 % of"),
        (2.0011, 2.0, "0.1 % higher than"),
    ],
)
def test_the_words_follow_the_numbers(value: float, reference: float, words: str) -> None:
    assert change(value, reference) == words


def test_sentences_of_a_good_run() -> None:
    training, length, reading, transformer, forgetting, memory, caveat = sentences(results())
    assert "Hope's loss is 1.8000 nats per token, 10.0 % lower than that of Transformer++ (2.0000)" in training
    assert "1.7500, 16.7 % lower than the better of two" in length
    assert "the one with a window of 16 (2.1000)" in length
    assert "2.4000 bits per byte over the second half, 20.0 % lower than" in reading
    assert "25.0 % lower than Transformer++ with a window of 16 (3.2000)" in transformer
    assert "1.8360 nats, 2.0 % higher than before reading (1.8000)" in forgetting
    assert "98,765 bytes" in memory
    assert "all 12 tensors came back with equal bits" in memory
    assert "one seed" in caveat


def test_sentences_of_a_bad_run() -> None:
    """Nothing is claimed that the numbers do not say."""
    r = results()
    bad = replace(
        r,
        quick=True,
        held_out=r.held_out | {"hope": replace(r.held_out["hope"], short=2.5, long=2.5)},
        reading=r.reading | {"hope-learning": read(3.3, writes=True)},
        forgetting=Forgetting(before=1.8, after=1.8, windows=4, length=16),
        memory=replace(r.memory, equal_reading=False),
    )
    training, length, reading, transformer, forgetting, memory, caveat = sentences(bad)
    assert "25.0 % higher than" in training
    assert "19.0 % higher than the better" in length
    assert "10.0 % higher than the same Hope with its CMS frozen" in reading
    assert "3.1 % higher than" in transformer
    assert "within 0.05 % of before reading" in forgetting
    assert "its tensors are equal, its losses on the next 99 tokens are NOT equal" in memory
    assert "its numbers mean nothing" in caveat
    full = replace(r, held_out=r.held_out | {"transformer-window": replace(r.held_out["transformer"], long=2.3)})
    assert "full attention (2.2000)" in sentences(full)[1]


class Cells(HTMLParser):
    """The text of a page by kind of element, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] in ("td", "th", "li", "caption", "pre"):
            self.cells.append(data)


def test_every_number_is_in_the_report() -> None:
    r = results()
    written = page(r, [("Heading", "<svg></svg>")])
    parsed = Cells()
    parsed.feed(written)
    for table in tables(r):
        assert table.title in parsed.cells
        for cell in [*table.columns, *(cell for row in table.rows for cell in row if cell)]:
            assert cell in parsed.cells
            assert cell in table.text()
    for sentence in sentences(r):
        assert sentence in parsed.cells
    inside = re.search(r'<script type="application/json" id="results">(.*?)</script>', written, re.S)
    assert inside is not None
    assert json.loads(inside[1]) == json.loads(json.dumps(r.to_dict()))
    assert json.loads(inside[1])["seeds"] == [7]
    assert parsed.loads == []  # one file, nothing else is fetched
    for figure in ("2030-01-02", "seed 7", "a processor, 2 cores", "1 thread,", "torch 9", "321 seconds"):
        assert figure in written.replace("1 thread<", "1 thread,<")


def test_text_from_the_model_is_only_text() -> None:
    """A sample may hold anything; it never becomes markup, nor ends the embedded data."""
    written = page(results(), [])
    assert html.escape("Emma <& ") in written
    assert html.escape("</script><b>") in written
    assert written.count("</script>") == 1


def test_figures_draw_the_curves() -> None:
    r = results()
    drawn = {name: getattr(figures, name)(r) for name in ("training", "positions", "reading")}
    curves = {name: [line.get_xydata().tolist() for line in f.axes[0].lines] for name, f in drawn.items()}
    assert curves["training"][0] == [list(point) for point in r.training["hope"].validation]
    assert len(curves["positions"]) == 4  # three models and the mark of the training length
    assert curves["reading"][2] == [list(point) for point in r.reading["hope-learning"].by_position]
    writes = figures.writes(r.reading["hope-learning"], {PATH: "block 0"})
    assert writes.axes[0].lines[0].get_xydata().tolist() == [[64.0, 0.01], [128.0, 0.02]]
    svg = figures.svg_of(writes)
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
