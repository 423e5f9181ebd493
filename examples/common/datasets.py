"""Two image data sets for few-shot learning, read without torchvision and without a download.

Both loaders return a :class:`DataSplit`: classes to meta-train on, and classes that meta-training
never sees, on which the result is reported.

* :func:`load_digits_split`: the 8x8 handwritten digits bundled with scikit-learn.
* :func:`load_omniglot`: the Omniglot zip files as published, lying in a folder of yours.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from common import EXTRA
from common.endings import missing


try:
    import numpy as np
except ImportError as error:
    missing("The images need numpy", error)


# Fixed before any accuracy was seen: the first six digits to train on, the last four to test on.
TRAIN_DIGITS = (0, 1, 2, 3, 4, 5)
TEST_DIGITS = (6, 7, 8, 9)

# First present file wins. `small1` and `small2` are subsets of `background`, `evaluation` shares no
# alphabet with any of them.
OMNIGLOT_TRAIN_FILES = (
    "images_background.zip",
    "images_background_small1.zip",
    "images_background_small2.zip",
    "images_evaluation.zip",
)
OMNIGLOT_TEST_FILES = (
    "images_evaluation.zip",
    "images_background_small2.zip",
    "images_background_small1.zip",
)
OMNIGLOT_TREE = "ROOT/ALPHABET/characterNN/XXXX_YY.png"
OMNIGLOT_ENTRY = re.compile(r"[^/]+/(?P<character>[^/]+/character\d+)/\d+_\d+\.png")
OMNIGLOT_PIXELS = 105
OMNIGLOT_DRAWINGS = 20

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class ImageClasses:
    """Images grouped by class.

    Attributes:
        images: One float32 tensor ``[count, 1, height, width]`` in [0, 1] per class; the counts
            may differ. Ink is 1, paper is 0.
        names: One name per class, for example ``'Greek/character07'``.
    """

    images: list[torch.Tensor]
    names: list[str]

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.images)

    def select(self, keep: Callable[[str], bool]) -> ImageClasses:
        """The classes whose name satisfies ``keep``, in the same order."""
        chosen = [index for index, name in enumerate(self.names) if keep(name)]
        return ImageClasses([self.images[i] for i in chosen], [self.names[i] for i in chosen])

    def with_rotations(self) -> ImageClasses:
        """Four times as many classes: each class turned by 0, 90, 180 and 270 degrees.

        A turned character is a new class, the usual Omniglot augmentation. It is meant for
        meta-training only: report results on classes as they were drawn.
        """
        images = [
            torch.rot90(image, turns, dims=(2, 3)).contiguous()
            for turns in range(4)
            for image in self.images
        ]
        names = [f"{name}@{90 * turns}" for turns in range(4) for name in self.names]
        return ImageClasses(images, names)


@dataclass(frozen=True)
class DataSplit:
    """Classes to meta-train on, and classes that are never seen before the test.

    Attributes:
        train: The meta-training classes.
        test: The meta-test classes; none of them, rotated or not, is in ``train``.
        description: One line that says what was read and how it was split.
    """

    train: ImageClasses
    test: ImageClasses
    description: str


def load_digits_split() -> DataSplit:
    """Read scikit-learn's 1,797 handwritten digits; train on 0 to 5, test on 6 to 9.

    Returns:
        Six training and four test classes of 174 to 183 images ``[count, 1, 8, 8]`` each.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"The digits need scikit-learn: {EXTRA}") from error
    bunch = load_digits()
    # scikit-learn stores 16 grey levels above white as 0 to 16.
    pixels = torch.from_numpy(bunch.images).to(torch.float32).div_(16.0).unsqueeze(1)
    labels = torch.from_numpy(bunch.target)

    def classes(digits: tuple[int, ...]) -> ImageClasses:
        return ImageClasses([pixels[labels == digit] for digit in digits], [*map(str, digits)])

    description = f"scikit-learn digits: meta-train on {TRAIN_DIGITS}, meta-test on {TEST_DIGITS}"
    return DataSplit(classes(TRAIN_DIGITS), classes(TEST_DIGITS), description)


def load_omniglot(root: str | Path, image_size: int = 28) -> DataSplit:
    """Read the official Omniglot zip files that lie in ``root`` and split them by alphabet.

    The rule, from whichever of the four official files are present:

    1. Train on the first present of ``images_background``, ``images_background_small1``,
       ``images_background_small2``, ``images_evaluation``.
    2. Test on the first present of ``images_evaluation``, ``images_background_small2``,
       ``images_background_small1`` that has alphabets the training file lacks, and on those
       alphabets only.
    3. If no such file is present, hold out the last third (rounded up, by name) of the training
       file's alphabets.

    So ``background`` and ``evaluation`` give the usual split, and ``small1`` and ``small2`` alone
    give 136 training characters and 106 test characters of three unseen alphabets. Rotations are
    not added here: see :meth:`ImageClasses.with_rotations`.

    Args:
        root: The folder with the zip files.
        image_size: Height and width in pixels to which the 105x105 drawings are averaged down.

    Returns:
        Training and test characters of 20 images ``[20, 1, image_size, image_size]`` each.

    Raises:
        FileNotFoundError: If ``root`` holds none of the four files.
        ValueError: If a file is damaged or is not an Omniglot file; the message names it.
        ImportError: If pillow is not installed.
    """
    folder = Path(root)
    present = [folder / name for name in OMNIGLOT_TRAIN_FILES if (folder / name).is_file()]
    if not present:
        raise FileNotFoundError(
            f"No Omniglot file in {str(folder)!r}: expected one or more of "
            f"{', '.join(OMNIGLOT_TRAIN_FILES)} (https://github.com/brendenlake/omniglot)"
        )
    train_file = present[0]
    train = read_omniglot_zip(train_file, image_size)
    train_alphabets = alphabets(train)
    for name in OMNIGLOT_TEST_FILES:
        if folder / name in present[1:]:
            other = read_omniglot_zip(folder / name, image_size)
            test = other.select(lambda character: _alphabet(character) not in train_alphabets)
            if len(test):
                return _described_split(train, test, train_file.name, name)
    return _hold_out_alphabets(train, train_file)


def alphabets(classes: ImageClasses) -> list[str]:
    """The alphabets of Omniglot classes, sorted by name."""
    return sorted({_alphabet(name) for name in classes.names})


def read_omniglot_zip(path: Path, image_size: int) -> ImageClasses:
    """Read every character of one official Omniglot zip file.

    Args:
        path: The zip file; its tree is ``ROOT/ALPHABET/characterNN/XXXX_YY.png``.
        image_size: Height and width in pixels of the result.

    Returns:
        One class per character, named ``ALPHABET/characterNN`` and sorted by name.

    Raises:
        ValueError: If the file is no zip file, is damaged, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            drawings = _drawings_by_character(path, archive.namelist())
            images = [
                np.stack([_decode(path, entry, archive.read(entry), image_size) for entry in group])
                for group in drawings.values()
            ]
    except _ZIP_ERRORS as error:
        raise ValueError(
            f"{path}: expected an intact Omniglot zip file with {OMNIGLOT_TREE} inside, but it "
            f"cannot be read ({error}); download it again"
        ) from error
    # Dark ink on light paper becomes light on dark, so that the padding of a convolution is paper.
    tensors = [torch.from_numpy(1.0 - stack).unsqueeze(1) for stack in images]
    return ImageClasses(tensors, list(drawings))


def _drawings_by_character(path: Path, entries: list[str]) -> dict[str, list[str]]:
    """Map ``ALPHABET/characterNN`` to its 20 zip entries, both sorted by name."""
    drawings: dict[str, list[str]] = {}
    for entry in sorted(entries):
        # Folders, and what a Mac adds when it packs a folder again, are not data.
        if entry.endswith("/") or entry.startswith("__MACOSX") or "/." in entry:
            continue
        match = OMNIGLOT_ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"{path}: expected only {OMNIGLOT_TREE} inside, found {entry!r}")
        drawings.setdefault(match["character"], []).append(entry)
    if not drawings:
        raise ValueError(f"{path}: expected drawings at {OMNIGLOT_TREE}, found none")
    for character, group in drawings.items():
        if len(group) != OMNIGLOT_DRAWINGS:
            raise ValueError(
                f"{path}: expected {OMNIGLOT_DRAWINGS} drawings of {character}, found {len(group)}"
            )
    return drawings


def _decode(path: Path, entry: str, data: bytes, image_size: int) -> np.ndarray:
    """Decode one PNG to float32 ``[image_size, image_size]`` in [0, 1], as drawn (ink is 0)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"Omniglot needs pillow to decode its PNG files: {EXTRA}") from error
    expected = (OMNIGLOT_PIXELS, OMNIGLOT_PIXELS)
    undecodable = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
    try:
        image = Image.open(io.BytesIO(data))
        size = image.size
        if size == expected:
            grey = image.convert("L").resize((image_size, image_size), Image.Resampling.BOX)
    except undecodable as error:
        raise ValueError(
            f"{path}: expected a PNG image at {entry}, but it cannot be decoded ({error})"
        ) from error
    if size != expected:
        raise ValueError(
            f"{path}: expected {OMNIGLOT_PIXELS}x{OMNIGLOT_PIXELS} pixels at {entry}, "
            f"found {size[0]}x{size[1]}"
        )
    return np.asarray(grey, dtype=np.float32) / 255.0


def _alphabet(character: str) -> str:
    """``'Greek'`` from ``'Greek/character07'``."""
    return character.split("/")[0]


def _hold_out_alphabets(classes: ImageClasses, path: Path) -> DataSplit:
    """Split one file: its last third of alphabets (rounded up, by name) is the test set."""
    names = alphabets(classes)
    if len(names) < 2:
        raise ValueError(
            f"{path}: expected two or more alphabets to split into training and test, found "
            f"{names}; put a second Omniglot file beside it"
        )
    held_out = set(names[-((len(names) + 2) // 3) :])
    train = classes.select(lambda character: _alphabet(character) not in held_out)
    test = classes.select(lambda character: _alphabet(character) in held_out)
    return _described_split(train, test, path.name, path.name)


def _described_split(
    train: ImageClasses, test: ImageClasses, train_file: str, test_file: str
) -> DataSplit:
    """A split whose description counts characters and names the test alphabets."""
    description = (
        f"Omniglot: meta-train on {len(train)} characters of {len(alphabets(train))} alphabets "
        f"({train_file}), meta-test on {len(test)} characters of {', '.join(alphabets(test))} "
        f"({test_file})"
    )
    return DataSplit(train, test, description)
