"""Tensors by name in a folder of their own, written whole or not at all."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


#: What names begin with that are not whole, or no longer.
PARTIAL = ".partial-"


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by ``torch.distributed.checkpoint``; whoever sees the path sees all of them."""
    dcp = _library()
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            alone = {"no_dist": True} if _knows_no_dist(dcp.save) else {}
            dcp.save(
                {name: tensor.detach() for name, tensor in tensors.items()},
                storage_writer=dcp.FileSystemWriter(partial),
                **alone,
            )
        os.replace(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (cause := _no_room(error)) is not None:
            raise OSError(
                cause.errno,
                f"A checkpoint could not be written to {path} ({cause.strerror}). Those before it "
                "are whole: make room, and start the same program again, which continues there",
            ) from error
        raise


def read(path: Path) -> dict[str, Tensor]:
    """Return what was written, on the CPU."""
    try:
        return _read(path)
    except Exception as error:
        run = "-".join(path.name.split("-")[:2])
        raise RuntimeError(
            f"{path} is damaged ({type(error).__name__}: {error}), so that the run cannot go on "
            f"from there. Remove what it has written ({path.parent / run}-*), to start over."
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    dcp = _library()
    reader = dcp.FileSystemReader(path)
    found = {}
    for name, kind in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(kind, dcp.TensorStorageMetadata)
        found[name] = torch.empty(kind.size, dtype=kind.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        alone = {"no_dist": True} if _knows_no_dist(dcp.load) else {}
        dcp.load(found, storage_reader=dcp.FileSystemReader(path), **alone)
    return found


def remove(path: Path) -> None:
    """Remove what was written, so that nobody sees a part of it."""
    gone = path.with_name(f"{PARTIAL}{os.getpid()}-gone-{path.name}")
    try:
        os.replace(path, gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file."""
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _no_room(error: BaseException) -> OSError | None:
    """Return the error of the system behind one of the library, which packs errors."""
    failures = getattr(error, "failures", None)
    packed = [value[0] for value in failures.values()] if isinstance(failures, dict) else []
    found = (e for e in (error, *packed) if isinstance(e, OSError))
    return next(found, None)


def _library() -> Any:
    """Return the part of torch that is imported late: it takes a second."""
    return importlib.import_module("torch.distributed.checkpoint")


def _knows_no_dist(function: Any) -> bool:
    return "no_dist" in inspect.signature(function).parameters
