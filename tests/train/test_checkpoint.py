"""A checkpoint is there whole or not at all, is checked before it is used, and survives a full disk."""

import errno
import json
import shutil

import pytest
import torch

import nestling.train.checkpoint as module
from nestling.train.checkpoint import (
    PARTS,
    DamagedCheckpoint,
    checkpoints,
    newest_weights,
    read_checkpoint,
    read_latest,
    write_checkpoint,
)
from tests.train.small_runs import same


def parts(seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=g)
    filled = dict.fromkeys(PARTS)
    filled["model"] = {"a.weight": weight, "tied": weight, "view": weight.T[1:], "scalar": torch.tensor(2.5)}
    filled["state"] = {"deep": [torch.arange(3), None, {"x": weight.double()}], "empty": [], "name": "n", "number": 0.1}
    filled["progress"] = {"step": seed, "stream": {"position": 7}}
    return filled


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_round_trip_gives_equal_bits(tmp_path):
    path = write_checkpoint(tmp_path, 5, parts())
    assert path.name == "step-00000005" and same(read_checkpoint(path), parts())
    assert not list(path.glob("*.pt")) and all(p.suffix in (".json", ".safetensors") for p in path.iterdir())


def test_last_two_are_kept(tmp_path):
    for step in (2, 4, 6, 10):
        write_checkpoint(tmp_path, step, parts(step))
    assert names(tmp_path) == ["step-00000006", "step-00000010"]


def test_loaded_tensors_stand_alone(tmp_path):
    loaded = read_checkpoint(write_checkpoint(tmp_path, 1, parts()))["model"]
    loaded["tied"].zero_()
    assert loaded["a.weight"].abs().sum() > 0 and all(t.data_ptr() % 16 == 0 for t in loaded.values())


FILES = [f"{part}.{kind}" for part in PARTS for kind in ("json", "safetensors")] + ["manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "gone"])
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path, name, damage):
    write_checkpoint(tmp_path, 1, parts(1))
    file = write_checkpoint(tmp_path, 2, parts(2)) / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "flip":
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    said = []
    path, loaded = read_latest(tmp_path, said.append)
    assert path.name == "step-00000001" and same(loaded, parts(1))
    assert len(said) == 1 and "step-00000002" in said[0] and "taking the one before" in said[0]
    assert names(tmp_path) == ["step-00000001", "step-00000002.aside-0"]


def test_weights_load_whatever_became_of_the_parts_for_training_and_nothing_is_moved(tmp_path, monkeypatch):
    files = module._files

    def of_another_version(name, tree):
        form = json.dumps({"class": "nestling.gone.State", "fields": {}}).encode()
        return [files(name, tree)[0], (f"{name}.json", form)] if name == "state" else files(name, tree)

    monkeypatch.setattr(module, "_files", of_another_version)
    path = write_checkpoint(tmp_path, 2, parts(2))
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        read_checkpoint(path)
    assert same(newest_weights(tmp_path, pytest.fail), parts(2)["model"])
    write_checkpoint(tmp_path, 3, parts(3))
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"")
    said = []
    assert same(newest_weights(tmp_path, said.append), parts(2)["model"])
    assert len(said) == 1 and "step-00000003 is damaged" in said[0]
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    assert newest_weights(tmp_path, pytest.fail) is None
    assert read_latest(tmp_path, pytest.fail) is None
    (write_checkpoint(tmp_path, 1, parts()) / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="every checkpoint .* is damaged; start again"):
        read_latest(tmp_path, lambda line: None)
    (write_checkpoint(tmp_path, 1, parts()) / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="every checkpoint .* is damaged; start again"):
        newest_weights(tmp_path, lambda line: None)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    path = write_checkpoint(tmp_path, 1, parts())
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="secret is missing"):
        read_checkpoint(path)


def test_whole_files_with_wrong_content_are_refused(tmp_path, monkeypatch):
    """Checksums only say that nothing changed; a stranger can write them too."""
    files = module._files
    for broken in ({"class": "os.system", "fields": {}}, {"tensor": "missing"}, 3):
        skeleton = json.dumps(broken).encode()

        def other(name, tree, skeleton=skeleton):
            return [files(name, tree)[0], (f"{name}.json", skeleton)]

        monkeypatch.setattr(module, "_files", other)
        path = write_checkpoint(tmp_path, 1, parts())
        with pytest.raises(DamagedCheckpoint, match="cannot be read"):
            read_checkpoint(path)
        shutil.rmtree(path)
    monkeypatch.setattr(module, "_files", files)
    monkeypatch.setattr(module, "save_tensors", lambda tensors: b"\x08" * 40)
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        read_checkpoint(write_checkpoint(tmp_path, 1, parts()))


@pytest.mark.parametrize("file", range(2 * len(PARTS) + 1))
def test_full_disk_leaves_the_old_checkpoints(tmp_path, monkeypatch, file):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, parts(step))
    written = []

    def full(path, content):
        written.append(path)
        if len(written) > file:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, 3, parts(3))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert same(read_latest(tmp_path, pytest.fail)[1], parts(2))


def test_remains_of_a_kill_are_not_checkpoints_and_go_away(tmp_path):
    write_checkpoint(tmp_path, 1, parts(1))
    for left in (".writing-00000002", ".removing-step-00000000"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001"]
    write_checkpoint(tmp_path, 2, parts(2))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_retention(tmp_path):
    for step in (2, 3, 4, 6, 7):
        write_checkpoint(tmp_path, step, parts(step), keep=1, keep_every=4)
    assert names(tmp_path) == ["step-00000004", "step-00000007"]
