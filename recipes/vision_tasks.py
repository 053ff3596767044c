"""Fashion-MNIST and MNIST in memory, and the two small networks that are trained on them.

    images = load("fashion_mnist", "train", folder)      # folder: --data DIR, or the variable NESTLING_DATA
    train, validation = split(images, seed)              # validation is one fifth of train; the test file waits

The files are idx, packed with xz. Batches are drawn by seed, so that every optimizer sees the same ones in one order.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.data.text import locate

FILES = {
    ("fashion_mnist", "train"): "fashion_mnist_train20k",
    ("fashion_mnist", "test"): "fashion_mnist_test5k",
    ("mnist", "train"): "mnist_train",
    ("mnist", "test"): "mnist_test5k",
}
MOMENTS = {"fashion_mnist": (0.286, 0.353), "mnist": (0.1307, 0.3081)}  # mean and deviation of a pixel in 0 ... 1
CLASSES, SIDE = 10, 28


@dataclass(frozen=True)
class Images:
    """Pixels (N, 28, 28) in units of their deviation, and labels (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Images:
        return Images(self.pixels[rows], self.labels[rows])


def read_idx(path: Path) -> Tensor:
    """The bytes of an idx file: two zeros, type 8 (unsigned bytes), number of dimensions, sizes, then the bytes."""
    raw = lzma.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} starts with {raw[:3]!r}; an idx file of unsigned bytes starts with b'\\0\\0\\x08'")
    begin = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, begin, 4)]
    if len(raw) - begin != math.prod(shape):
        raise ValueError(f"{path} has {len(raw) - begin} bytes for the shape {shape}; copy it again")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=begin).view(shape)


def load(name: str, part: str, folder: str | Path | None = None) -> Images:
    """A part of a data set, from `folder`/vision. Raises FileNotFoundError that says how to name the folder."""
    if (name, part) not in FILES:
        raise ValueError(f"no part {part!r} of {name!r}; there are {', '.join(' '.join(key) for key in FILES)}")
    pixels, labels = (
        read_idx(locate(f"vision/{FILES[name, part]}_{kind}.xz", folder)) for kind in ("images.idx3", "labels.idx1")
    )
    mean, deviation = MOMENTS[name]
    return Images((pixels.float() / 255 - mean) / deviation, labels.long())


def split(images: Images, seed: int) -> tuple[Images, Images]:
    """Four fifths to train on and one fifth for validation, by seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out = len(images) // 5
    return images.take(order[held_out:]), images.take(order[:held_out])


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` times the rows of a batch (size,): epochs of `count` rows, each shuffled, their rests left out."""
    if size > count:
        raise ValueError(f"a batch of {size} does not fit in {count} rows; use at most that many")
    generator = torch.Generator().manual_seed(seed)
    made = 0
    while made < steps:
        for rows in torch.randperm(count, generator=generator).split(size)[: count // size]:
            if made < steps:
                made += 1
                yield rows


class MLP(nn.Sequential):
    """Three linear layers, 118K parameters at width 128; (B, 28, 28) to (B, 10)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(SIDE * SIDE, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, CLASSES),
        )


class ViT(nn.Module):
    """A pre-norm vision Transformer, read by the mean of its patches: 155K parameters at patch 7, width 64, depth 3."""

    def __init__(self, patch: int = 7, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        if SIDE % patch:
            raise ValueError(f"patch is {patch}; use a divisor of {SIDE}")
        self.patch = patch
        self.embed = nn.Linear(patch * patch, width)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:  # (B, 28, 28) -> (B, 10)
        patches = F.unfold(pixels.unsqueeze(1), self.patch, stride=self.patch).mT  # (B, patches, patch * patch)
        x = self.blocks(self.embed(patches) + self.positions)
        return self.head(self.norm(x).mean(1))


class Block(nn.Module):
    """Attention and an MLP of four times the width, each on the normalised stream. Queries, keys and values are
    matrices of their own, as optimizers that read whole matrices want them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        z = self.norm1(x)
        q, k, v = (f(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def measure(model: nn.Module, images: Images, size: int = 1000) -> tuple[float, float]:
    """Mean cross-entropy in nats, and accuracy."""
    loss, right = 0.0, 0
    for pixels, labels in zip(images.pixels.split(size), images.labels.split(size), strict=True):
        logits = model(pixels)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
    return loss / len(images), right / len(images)
