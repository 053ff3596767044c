"""States as files and as values: equal bits back, bound to a model, damage found."""

import math

import pytest
import torch

import nestling
from nestling.core.state import flatten
from nestling.models import State
from tests.models.tiny import read, text, tiny

FAST = {"periods": (4, 8, math.inf), "inner_lr": 0.05}


@pytest.fixture
def saved(tmp_path):
    model = tiny("hope", **FAST)
    _, state = read(model, text(2, 14))
    nestling.save_state(state, tmp_path / "memory.safetensors")
    return model, state, tmp_path / "memory.safetensors"


def test_a_state_comes_back_with_equal_bits(saved):
    model, state, path = saved
    back = nestling.load_state(path)
    ours, shape = flatten(back.tree)
    theirs, other = flatten(state.tree)
    assert shape == other and all(torch.equal(ours[name], x) for name, x in theirs.items())
    assert torch.equal(read(model, text(2, 9), state=back)[0], read(model, text(2, 9), state=state)[0])
    assert not path.with_name(path.name + ".partial").exists()


def test_another_model_refuses_it_and_names_both(saved):
    model, _, path = saved
    other = tiny("hope", seed=1, **FAST)
    with pytest.raises(ValueError) as error:
        other(text(2, 9), nestling.load_state(path))
    assert model.fingerprint() in str(error.value) and other.fingerprint() in str(error.value)
    assert "\n" not in str(error.value)
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-9
    with pytest.raises(ValueError, match="belongs to model"):
        model(text(2, 9), nestling.load_state(path))


def test_a_damaged_file_is_one_clear_error(saved):
    _, _, path = saved
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:4], b"", flipped(whole, len(whole) - 3), flipped(whole, 30)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged|not a nestling state") as error:
            nestling.load_state(path)
        assert "\n" not in str(error.value) and path.name in str(error.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        nestling.load_state(path.with_name("absent"))


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_pickle_is_never_opened(tmp_path):
    torch.save({"x": torch.zeros(2)}, tmp_path / "pickle")
    with pytest.raises(ValueError):
        nestling.load_state(tmp_path / "pickle")


def test_states_of_different_models_do_not_stack(saved):
    model, state, path = saved
    other = tiny("hope", seed=1, **FAST)
    foreign = read(other, text(1, 5))[1]
    for left, right in ((state, foreign), (nestling.load_state(path), foreign), (foreign, nestling.load_state(path))):
        with pytest.raises(ValueError, match="states of one model stack"):
            State.stack([left, right])
    assert State.stack([nestling.load_state(path), state]).rows == 4
    with pytest.raises(ValueError, match="empty"):
        State.stack([])


def test_the_number_of_rows_must_fit(saved):
    model, state, _ = saved
    with pytest.raises(ValueError, match="2 rows, tokens have 3"):
        model(text(3, 4), state)
