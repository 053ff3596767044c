"""Session: reads, talks, keeps, forks, forgets and takes back; and never mixes."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import nestling
from nestling import Session
from nestling.core.state import flatten
from nestling.data import ByteTokenizer
from nestling.models import State, build
from nestling.sessions import session as module
from nestling.sessions.words import BLOCK, blocks

PERIODS = (8, 16, math.inf)


def small(seed=0, **options):
    torch.manual_seed(seed)
    shape = dict(vocab_size=256, dim=16, depth=2, heads=2, window=16, periods=PERIODS, inner_lr=0.05)
    return build("hope-attention", **shape | options)


def same(a: State | None, b: State | None) -> bool:
    """Equal bits."""
    (ours, shape), (theirs, other) = flatten(a and a.tree), flatten(b and b.tree)
    return shape == other and all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.fixture
def session():
    return Session(small(), ByteTokenizer())


def text(length, seed=1):
    letters = random.Random(seed)
    return "".join(letters.choice("abcdefgh ") for _ in range(length))


@pytest.mark.parametrize("call", [5, 8, 32, 1024])
def test_reading_is_one_call_of_the_model(session, monkeypatch, call):
    monkeypatch.setattr(module, "CALL", call)
    whole = text(100)
    ids = torch.from_numpy(ByteTokenizer().encode(whole))[None]
    event = session.read(whole)
    with torch.no_grad():
        out = session.model(ids)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    assert event.tokens == session.tokens == 100
    if call >= 8:  # calls end where segments do, so that all but the last token are predicted
        assert abs(event.nats - float(expected)) < 1e-5
    assert session.state.writes.tolist() == out.state.writes.tolist() == [[12, 6]]
    for name, x in flatten(session.state.tree.fast)[0].items():
        torch.testing.assert_close(x, flatten(out.state.tree.fast)[0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_pieces_and_streams_are_the_same_text(session):
    parts = [text(n, seed=n) for n in (3, 1, 30, 13)]
    other, third = session.fork(), session.fork()
    session.read("".join(parts))
    other.read(iter(parts))
    for part in parts:
        third.read(part)
    with torch.no_grad():
        logits = [s.model(torch.full((1, 9), 97), s.state).logits for s in (session, other, third)]
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0])


def test_a_long_text_is_cut_at_spaces_and_loses_nothing():
    long = "word " * 30_000
    pieces = list(blocks(long))
    assert "".join(pieces) == long and max(map(len, pieces)) <= BLOCK
    assert all(piece.startswith(" ") for piece in pieces[1:])
    assert "".join(blocks("x" * (BLOCK + 5))) == "x" * (BLOCK + 5)


def test_memory_stays_bounded_however_long_the_text(session):
    sizes = []
    for part in range(6):
        session.read(text(64, seed=part))
        sizes.append(session.state.nbytes)
    assert max(sizes) <= session.report().bound


def test_frozen_reading_learns_nothing(session):
    event = session.read(text(40), learn=False)
    assert not event.learn and session.state.writes.tolist() == [[0, 0]]
    ids = torch.from_numpy(ByteTokenizer().encode(text(40)))[None]
    with torch.no_grad():
        logits = session.model(ids, learn=False).logits
    assert abs(event.nats - float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))) < 1e-5


def test_generate_goes_on_from_the_memory(session):
    session.read(text(40))
    before = session.state
    ids = torch.from_numpy(ByteTokenizer().encode("the "))[None]
    expected = session.model.generate(ids, 6, before, temperature=0).all()[0].tolist()
    said = session.generate("the ", 6, temperature=0)
    assert said == ByteTokenizer().decode(expected) and session.tokens == 50
    session.undo()
    assert session.generate(ids, 6, temperature=0) == said
    session.undo()
    assert session.state is before and [event.what for event in session.events] == ["read"]
    with pytest.raises(ValueError, match="prompt is empty"):
        session.generate("", 3)
    with pytest.raises(ValueError, match="text is empty"):
        session.read("")


def test_chat_stops_where_the_next_turn_begins(session, monkeypatch):
    said = iter(ByteTokenizer().encode(" Hello.\nUser: more and more"))
    monkeypatch.setattr(nestling.models.Generation, "sample", lambda self, logits: torch.tensor([int(next(said))]))
    assert session.chat("Hi?") == "Hello."
    assert session.events[-1].tokens == len("User: Hi?\nAssistant:") + len(" Hello.\nUser:")


def test_undo_and_snapshots(session):
    states = [session.state]
    for i in range(3):
        session.read(text(20, seed=i))
        states.append(session.state)
    session.snapshot("three")
    for i in range(6):
        session.read(text(9, seed=9 + i))
    assert sum(not s.kept for s in session.snapshots) == session.keep == 4
    for _ in range(4):
        session.undo()
    with pytest.raises(ValueError, match=r"nothing to take back; named snapshots: three"):
        session.undo()
    session.undo("three")
    assert session.state is states[3] and len(session.events) == 3
    session.read(text(5))
    session.undo("three")
    assert session.state is states[3]
    with pytest.raises(ValueError, match="no snapshot 'two'"):
        session.undo("two")
    with pytest.raises(ValueError, match="exists already"):
        session.snapshot("three")
    forgetful = Session(session.model, ByteTokenizer(), keep=0)
    forgetful.read(text(9))
    assert forgetful.snapshots == ()


def test_reset_forgets_what_it_names(session):
    session.read(text(45))
    paths = list(session.state.tree.fast)
    moved = lambda: {row.level: row.moved for row in session.report().levels}  # noqa: E731
    assert all(moved().values())
    session.reset(level=16)
    assert [path for path, far in moved().items() if far == 0] == [p for p in paths if p.endswith(".1")]
    session.reset(level=paths[0])
    assert moved()[paths[0]] == 0 and moved()[paths[2]] > 0
    session.read(text(20, seed=3))
    session.reset("context")
    assert session.state.tree.mixers == [None, None] and moved()[paths[2]] > 0
    session.reset()
    assert session.state is None and session.tokens == 0
    session.undo()
    assert moved()[paths[2]] > 0
    with pytest.raises(ValueError, match=r"no level 7; give a period \(8, 16\)"):
        session.reset(level=7)


def test_a_reset_level_goes_on_from_its_initial_state(session):
    """The open segment, whatever was known of it, is asked again with the weights as they are."""
    session.read(text(24))
    session.reset(level=8)
    session.reset(level=16)
    session.read(text(17, seed=2))
    assert all(math.isfinite(row.moved) for row in session.report().levels)
    assert session.state.writes.tolist() == [[5, 2]]


def test_the_report_says_what_was_written(session):
    assert session.report().bytes == 0 and "0 tokens" in str(session.report())
    session.read(text(50))
    report = session.report()
    assert report.tokens == 50 and report.bytes == session.state.nbytes <= report.bound
    rows = {row.level: row for row in report.levels}
    row = rows["blocks.0.channel.stack.0"]
    assert (row.period, row.writes, row.waiting) == (8, 6, 2)
    delta = session.state.tree.fast["blocks.0.channel.stack.0"].delta
    weights = {name: p.detach() for name, p in session.model.named_parameters()}
    squares = [float(d.to_dense().square().sum()) for d in delta.values()]
    sizes = [float(weights[f"blocks.0.channel.stack.0.body.{name}.weight"].square().sum()) for name in delta]
    assert abs(row.moved - math.sqrt(sum(squares) / sum(sizes))) < 1e-6
    assert "read: 50 tokens" in str(report) and report.to_dict()["events"][0]["tokens"] == 50


def test_the_progress_line(session, capsys):
    session.read(text(200), progress=True)
    shown = capsys.readouterr().err
    assert "[####################] 200 tokens" in shown and "nats" in shown and "MiB" in shown
    session.read(iter([text(20)]), progress=True)
    assert "[" not in capsys.readouterr().err.replace("\x1b[2K", "")
    session.read(text(20), progress=False)
    assert capsys.readouterr().err == ""


# --- files --------------------------------------------------------------------------------------------------------


def test_files_of_other_models_tokenizers_and_sessions_are_refused(session, tmp_path):
    session.read(text(20))
    path = tmp_path / "session.safetensors"
    session.save(path)
    back = Session.load(path, session.model, ByteTokenizer(), session=session.id)
    assert same(back.state, session.state) and back.events == session.events and back.id == session.id
    for model, tokenizer, name, word in (
        (small(seed=1), ByteTokenizer(), None, "belongs to model"),
        (session.model, Reversed(), None, "belongs to tokenizer bytes, not reversed"),
        (session.model, ByteTokenizer(), session.fork().id, f"belongs to session {session.id}"),
    ):
        with pytest.raises(ValueError, match=word):
            Session.load(path, model, tokenizer, session=name)
    whole = path.read_bytes()
    half = len(whole) // 2
    for broken in (whole[:half], whole[:-1], b"", whole[half:] + whole[:half], flipped(whole, len(whole) - 3)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"session\.safetensors.*(damaged|not a nestling session)") as error:
            Session.load(path, session.model, ByteTokenizer())
        assert "\n" not in str(error.value)
    nestling.save_state(session.state, path)
    with pytest.raises(ValueError, match="not a nestling session file"):
        Session.load(path, session.model, ByteTokenizer())


class Reversed(ByteTokenizer):
    fingerprint = "reversed"


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_session_that_has_read_nothing_is_saved_too(session, tmp_path):
    session.save(tmp_path / "empty")
    back = Session.load(tmp_path / "empty", session.model, ByteTokenizer())
    back.read(text(20))
    session.read(text(20))
    assert same(back.state, session.state)


CHILD = """
import sys
from nestling import Session
from nestling.data import ByteTokenizer
from tests.sessions.test_session import small, text
path = sys.argv[1]
session = Session.load(path, small(), ByteTokenizer())
session.read(text(33, seed=5))
print(session.generate("ab", 5, temperature=0), flush=True)
session.save(path + ".continued")
while True:
    session.save(path)
"""


def test_another_process_goes_on_with_equal_bits_and_its_death_damages_nothing(session, tmp_path):
    session.read(text(37))
    path = tmp_path / "session"
    session.save(path)
    command = [sys.executable, "-c", CHILD, path]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert started.stdout is not None
    try:
        said = started.stdout.readline().rstrip("\n")
        continued = tmp_path / "session.continued"
        while not continued.exists() and started.poll() is None:
            time.sleep(0.01)
        time.sleep(0.05)
    finally:
        os.kill(started.pid, signal.SIGKILL)
        started.communicate()
    session.read(text(33, seed=5))
    assert session.generate("ab", 5, temperature=0) == said
    theirs = Session.load(continued, session.model, ByteTokenizer())
    assert same(theirs.state, session.state)
    left = Session.load(path, session.model, ByteTokenizer())  # killed while saving, again and again
    assert left.tokens in (37, session.tokens)


def test_a_save_cut_short_leaves_the_earlier_file(session, tmp_path, monkeypatch):
    session.read(text(20))
    session.save(tmp_path / "session")
    before = session.state
    session.read(text(20, seed=2))

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        session.save(tmp_path / "session")
    monkeypatch.undo()
    assert same(Session.load(tmp_path / "session", session.model, ByteTokenizer()).state, before)
    assert os.listdir(tmp_path) == ["session"]


def test_a_thousand_sessions_never_mix(tmp_path):
    """Read, fork, save and load at random; then every one of them must be as if it had been alone."""
    torch.manual_seed(0)
    shape = dict(vocab_size=256, dim=4, depth=1, heads=1, window=4, periods=(3,), inner_lr=0.3, hidden=6)
    model, words, pick = build("hope-attention", **shape).double(), ByteTokenizer(), random.Random(0)
    sessions = [Session(model, words, keep=0) for _ in range(1000)]
    read = [""] * len(sessions)
    for turn in range(1500):
        i, what = turn if turn < 1000 else pick.randrange(1000), pick.random()
        if turn < 1000 or what < 0.4:
            words_read = "".join(pick.choice("abcdefgh") for _ in range(pick.randint(1, 7)))
            sessions[i].read(words_read, progress=False)
            read[i] += words_read
        elif what < 0.8:
            j = pick.randrange(1000)
            sessions[j], read[j] = sessions[i].fork(), read[i]
        else:
            sessions[i].save(tmp_path / f"{i % 7}")
            sessions[i] = Session.load(tmp_path / f"{i % 7}", model, words)
    assert len({session.id for session in sessions}) == 1000
    longest = max(map(len, read))
    tokens = torch.zeros(1000, longest, dtype=torch.long)
    for row, one in enumerate(read):
        tokens[row, : len(one)] = torch.from_numpy(words.encode(one))
    mask = torch.arange(longest) < torch.tensor([len(one) for one in read])[:, None]
    with torch.no_grad():
        alone = model(tokens, mask=mask).state
        probe = torch.full((1000, 4), 97)
        expected = model(probe, alone).logits
        found = model(probe, State.stack([session.state for session in sessions])).logits
    assert [session.tokens for session in sessions] == alone.tokens.tolist()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    distinct = {one: row for row, one in enumerate(read) if len(one) > 6}  # each text gives a memory of its own
    rows = expected[list(distinct.values())].flatten(1)
    assert len(rows) > 200 and float(torch.cdist(rows, rows).fill_diagonal_(1).min()) > 1e-3
