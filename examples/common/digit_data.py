"""Handwritten digits with a bias: too few images of one digit, or wrong labels.

The images are scikit-learn's 1,797 digits of 8x8 pixels, or MNIST from the official files. Both
problems come with a small clean, balanced set, as the paper of ``examples/reweight.py`` asks for.
"""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import EXTRA
from common.endings import missing


try:
    import numpy as np
except ImportError as error:
    missing("The images need numpy", error)


MNIST_FILES = {
    part: (f"{name}-images-idx3-ubyte", f"{name}-labels-idx1-ubyte")
    for part, name in (("train", "train"), ("test", "t10k"))
}
DIGITS_TEST_SHARE = 0.45  # of each digit: what is left must also fill the training set


@dataclass(frozen=True)
class Images:
    """Images ``[count, 1, height, width]`` in [0, 1], ink is 1, with their labels ``[count]``."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return len(self.y)

    def __getitem__(self, index: Tensor) -> Images:
        """The images at some places, or where a mask is true."""
        return Images(self.x[index], self.y[index])

    def of(self, label: int) -> Images:
        """The images with one label."""
        return self[self.y == label]

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        return Images(self.x.to(device), self.y.to(device))

    @staticmethod
    def join(*parts: Images) -> Images:
        """One set after the other."""
        return Images(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))


@dataclass(frozen=True)
class Source:
    """Images to train on and images to test on.

    Attributes:
        train: To make training sets of; ``None`` if every seed divides ``test`` in its own way.
        test: To test on.
        distort: Whether training images are distorted, so that a few originals give many images.
    """

    train: Images | None
    test: Images
    distort: bool

    def divided(self, generator: torch.Generator) -> tuple[Images, Images]:
        """Return images to train on and, none of them among those, images to test on."""
        if self.train is not None:
            return self.train, self.test
        train, test = [], []
        for label in self.test.y.unique().tolist():
            images = shuffled(self.test.of(label), generator)
            count = int(DIGITS_TEST_SHARE * len(images))
            places = torch.arange(len(images))
            test.append(images[places[:count]])
            train.append(images[places[count:]])
        return Images.join(*train), Images.join(*test)


@dataclass(frozen=True)
class Problem:
    """A biased training set, a small clean one and a test set.

    Attributes:
        train: Without the images in ``clean``.
        marked: For each training image, whether it is of the rare digit or has a wrong label.
        clean: A few images with right labels, as many of each class.
        test: Undistorted images with right labels.
        classes: Number of classes.
    """

    train: Images
    marked: Tensor
    clean: Images
    test: Images
    classes: int

    def to(self, device: torch.device) -> Problem:
        """The same on a device."""
        train, clean, test = (part.to(device) for part in (self.train, self.clean, self.test))
        return Problem(train, self.marked.to(device), clean, test, self.classes)


def shuffled(images: Images, generator: torch.Generator) -> Images:
    """Return images in random order."""
    return images[torch.randperm(len(images), generator=generator)]


def distorted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, stretch, shear and shift each image a little: by up to 10 degrees and a twelfth."""
    count = len(images)

    def uniform(bound: float) -> Tensor:
        return bound * (2 * torch.rand(count, generator=generator) - 1)

    angle, shear = uniform(math.pi / 18), uniform(0.12)
    width, height = uniform(0.12).exp(), uniform(0.12).exp()
    matrix = torch.stack(
        [
            torch.stack([angle.cos() * width, shear - angle.sin() * height, uniform(1 / 6)], 1),
            torch.stack([angle.sin() * width, angle.cos() * height, uniform(1 / 6)], 1),
        ],
        dim=1,
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def drawn(images: Images, count: int, source: Source, generator: torch.Generator) -> Images:
    """Return ``count`` images, repeated if there are fewer, distorted if the source says so."""
    if count > len(images) and not source.distort:
        raise ValueError(
            f"{count} images of one kind are asked for, there are {len(images)}: choose a smaller "
            "training set."
        )
    images = shuffled(images, generator)[torch.arange(count) % len(images)]
    if not source.distort:
        return images
    return Images(distorted(images.x, generator), images.y)


def imbalanced(
    source: Source,
    digits: tuple[int, int],
    proportion: float,
    size: int,
    clean: int,
    generator: torch.Generator,
) -> Problem:
    """Make two digits of very different frequency; the clean set is split off the training set.

    Args:
        source: The images.
        digits: The rare and the frequent digit; they become the classes 0 and 1.
        proportion: Share of the frequent one.
        size: Training images, the clean ones included.
        clean: Clean images, half of each digit.
        generator: Of all choices.

    Raises:
        ValueError: If there would be no rare image left to train on, or there are too few images.
    """
    rare = round(size * (1 - proportion))
    half = clean // 2
    if clean != 2 * half or rare <= half:
        raise ValueError(
            f"{size} training images at {proportion} have {rare} of the rare digit; {clean} clean "
            "images, half of each digit, must leave some of them: choose others."
        )
    pool, test = source.divided(generator)
    parts, held_out, marked, tests = [], [], [], []
    for label, (digit, count) in enumerate(zip(digits, (rare, size - rare))):
        images = drawn(pool.of(digit), count, source, generator)
        images = Images(images.x, torch.full((count,), label))
        places = torch.arange(count)
        held_out.append(images[places[:half]])
        parts.append(images[places[half:]])
        marked.append(torch.full((count - half,), label == 0))
        chosen = test.of(digit)
        tests.append(Images(chosen.x, torch.full((len(chosen),), label)))
    fewest = torch.arange(min(len(t) for t in tests))  # so that the test is balanced
    test = Images.join(*(t[fewest] for t in tests))
    return Problem(Images.join(*parts), torch.cat(marked), Images.join(*held_out), test, 2)


def flipped(
    source: Source, rate: float, size: int, clean: int, generator: torch.Generator
) -> Problem:
    """Give a share of the training images a wrong label, drawn evenly from the other nine.

    Args:
        source: The images.
        rate: Share of wrong labels.
        size: Training images, the clean ones not included.
        clean: Clean images, a tenth of each digit.
        generator: Of all choices.

    Raises:
        ValueError: If ``clean`` is no multiple of ten, or there are too few images.
    """
    if clean % 10 or clean < 10:
        raise ValueError(f"{clean} clean images are no multiple of the ten digits.")
    pool, test = source.divided(generator)
    each, parts, rest = clean // 10, [], []
    for digit in range(10):
        images = shuffled(pool.of(digit), generator)
        if len(images) <= each:
            raise ValueError(f"{each} clean images of each digit leave none to train on.")
        places = torch.arange(len(images))
        parts.append(images[places[:each]])
        rest.append(images[places[each:]])
    held_out = drawn(Images.join(*parts), clean, source, generator)
    train = drawn(Images.join(*rest), size, source, generator)
    wrong = torch.zeros(size, dtype=torch.bool)
    wrong[torch.randperm(size, generator=generator)[: round(rate * size)]] = True
    shift = torch.randint(1, 10, (size,), generator=generator)
    labels = torch.where(wrong, (train.y + shift) % 10, train.y)
    return Problem(Images(train.x, labels), wrong, held_out, test, 10)


def load_digits() -> Source:
    """Read scikit-learn's digits.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"The digits need scikit-learn: {EXTRA}") from error
    bunch = datasets.load_digits()
    pixels = torch.from_numpy(bunch.images).to(torch.float32).div_(16.0).unsqueeze(1)
    return Source(None, Images(pixels, torch.from_numpy(bunch.target).long()), distort=True)


def load_mnist(root: Path) -> Source:
    """Read the four official MNIST files, gzipped (``.gz``) or not, that lie in ``root``.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one is damaged or of another kind.
    """
    train, test = (
        Images(
            torch.from_numpy(read_idx(_found(root, images), 3)).to(torch.float32)[:, None] / 255,
            torch.from_numpy(read_idx(_found(root, labels), 1)).long(),
        )
        for images, labels in (MNIST_FILES["train"], MNIST_FILES["test"])
    )
    for name, part in (("training", train), ("test", test)):
        if len(part.x) != len(part.y):
            raise ValueError(
                f"{root}: {len(part.x)} {name} images have {len(part.y)} labels; download again."
            )
    return Source(train, test, distort=False)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read unsigned bytes from an IDX file: magic number, sizes, data.

    Raises:
        ValueError: If the file is damaged or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again.") from error
    head = 4 + 4 * dimensions
    expected = bytes([0, 0, 8, dimensions])  # 8 stands for unsigned bytes
    if content[:4] != expected or len(content) < head:
        raise ValueError(
            f"{path}: expected an IDX file of bytes in {dimensions} dimensions, which begins with "
            f"{expected.hex()}, found {content[:4].hex()}; download it again."
        )
    shape = struct.unpack(f">{dimensions}I", content[4:head])
    if len(content) - head != math.prod(shape):
        raise ValueError(
            f"{path}: expected {math.prod(shape)} bytes of data for the shape {shape}, found "
            f"{len(content) - head}; download it again."
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape).copy()


def _found(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"No file {name} or {name}.gz in {str(root)!r}, one of MNIST's four.")
