"""The idx reader on made files, the split, the batches, and the two networks."""

import lzma
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from recipes import vision_tasks
from recipes.vision_tasks import MLP, Images, ViT, batches, load, measure, read_idx, split


def idx(shape: tuple[int, ...], body: bytes) -> bytes:
    return lzma.compress(bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + body)


def test_idx_files_are_read_as_they_were_made(tmp_path: Path) -> None:
    path = tmp_path / "made.idx3.xz"
    path.write_bytes(idx((2, 300, 1), bytes(i % 251 for i in range(600))))
    assert torch.equal(read_idx(path), (torch.arange(600) % 251).byte().view(2, 300, 1))
    path.write_bytes(idx((2, 3), bytes(5)))
    with pytest.raises(ValueError, match="5 bytes for the shape"):
        read_idx(path)
    path.write_bytes(lzma.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x00"))
    with pytest.raises(ValueError, match="unsigned bytes"):
        read_idx(path)


def test_images_are_found_by_folder_or_by_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NESTLING_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="--data DIR.*NESTLING_DATA"):
        load("fashion_mnist", "train", tmp_path)
    (tmp_path / "vision").mkdir()
    stem = tmp_path / "vision" / "fashion_mnist_train20k"
    stem.with_name(f"{stem.name}_images.idx3.xz").write_bytes(idx((3, 28, 28), bytes(2352)))
    stem.with_name(f"{stem.name}_labels.idx1.xz").write_bytes(idx((3,), bytes([7, 0, 9])))
    images = load("fashion_mnist", "train", tmp_path)
    assert images.labels.tolist() == [7, 0, 9] and images.pixels.shape == (3, 28, 28)
    monkeypatch.setenv("NESTLING_DATA", str(tmp_path))
    assert torch.equal(load("fashion_mnist", "train").pixels, images.pixels)
    with pytest.raises(ValueError, match="mnist test"):
        load("fashion_mnist", "validation")


def test_the_split_shares_nothing_and_the_batches_repeat() -> None:
    images = Images(torch.arange(100.0).view(100, 1, 1), torch.arange(100))
    train, validation = split(images, 3)
    assert len(train) == 80 and len(validation) == 20
    assert sorted([*train.labels.tolist(), *validation.labels.tolist()]) == list(range(100))
    assert not torch.equal(split(images, 4)[1].labels, validation.labels)
    rows = list(batches(80, 32, 5, seed=1))
    assert [len(r) for r in rows] == [32] * 5 and len(set(torch.cat(rows[:2]).tolist())) == 64
    assert all(torch.equal(a, b) for a, b in zip(rows, batches(80, 32, 5, seed=1), strict=True))
    assert not torch.equal(rows[0], next(batches(80, 32, 1, seed=2)))
    with pytest.raises(ValueError, match="does not fit"):
        next(batches(8, 9, 1, seed=0))


@pytest.mark.parametrize("network", [MLP, ViT])
def test_the_networks_have_their_sizes_and_learn_a_batch(network: type) -> None:
    model = network()
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 200_000
    images = Images(torch.randn(24, 28, 28), torch.arange(24) % vision_tasks.CLASSES)
    before, _ = measure(model, images, size=10)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(images.pixels), images.labels).backward()
        optimizer.step()
    after, accuracy = measure(model, images, size=10)
    assert after < before / 2 and accuracy > 0.8


def test_attention_of_the_vit_reads_every_patch() -> None:
    pixels = torch.randn(1, 28, 28, requires_grad=True)
    ViT()(pixels)[0, 0].backward()
    assert pixels.grad is not None and bool((pixels.grad != 0).all())
