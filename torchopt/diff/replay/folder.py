"""A run whose carries are kept in a folder, and which goes on there after it was killed.

What one run of :math:`T` steps writes begins with ``T<T>-<settings>-``, where the settings are a
digest of all that decides its numbers:

=====================  ============================================================================
``settings``           what the digest is of, to say what differs
``step<t>-carry``      the carry before step t, kept by the schedule
``step<t>-latest``     the same, for going on only; the one before is removed
``step<t>-rows``       what the steps before t have returned as ``y``, since the file before
``step<T>-end``        the last carry
``loss``               a digest of the cotangents that the backward pass began with
``step<t>-back``       what the backward pass holds when it has come back through step t
``step<t>-backrows``   the derivatives by ``xs`` of the steps from t on, up to the file before
=====================  ============================================================================

Each is written under another name first, and renamed. Carries that the way back makes again stay
in memory. The file of a carry is removed when the derivative has
come back through its step *and* a ``back`` is there from which one could go on without it.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.diff.replay import files, place
from torchopt.diff.replay.fingerprint import digest
from torchopt.diff.replay.loop import Loop, called
from torchopt.diff.replay.random_state import RandomState
from torchopt.diff.replay.store import Carry
from torchopt.diff.replay.watcher import Reached, Watcher
from torchopt.version import __version__


if TYPE_CHECKING:
    from torchopt.diff.replay.job import Job
    from torchopt.diff.replay.programs import Back


#: Who wrote the files of these names last.
_OWNERS: weakref.WeakValueDictionary[str, Folder] = weakref.WeakValueDictionary()


class Folder(Watcher):
    """Keeps the carries of one loop in files, and what is needed to go on after a kill.

    Args:
        path: The folder; it is made if it is not there.
        loop: The loop.
        name: How errors call the adjoint.
        needed: How many bytes its carries take.

    Raises:
        OSError: If nothing can be written there, or there is no room.
        RuntimeError: If another process uses the folder.
        ValueError: If the folder holds a run with other settings.
    """

    def __init__(self, path: str, loop: Loop, name: str, needed: int = 0) -> None:
        self.loop, self.length = loop, loop.length
        self.folder = Path(path)
        self.store = self
        settings = _settings(loop, name)
        self.prefix = f"T{self.length}-{digest(json.dumps(settings))[:16]}-"
        self.every = math.isqrt(self.length)
        self.rows_from = 0
        self.back_rows, self.back_at = 0, self.length
        self.dropped: list[int] = []
        self.back: Back | None = None
        self.refilled: dict[int, Carry] = {}
        self.last = False
        self.random: RandomState | None = None
        place.claim(self.folder)
        self.leave = weakref.finalize(self, place.leave, self.folder, os.getpid())
        try:
            place.refuse_others(self.folder, self.prefix, settings)
            if not self._steps("carry") and not self._steps("end"):
                place.refuse_without_room(self.folder, needed)
            if not self._path("settings").exists():
                files.write_text(self._path("settings"), json.dumps(settings, indent=1))
        except BaseException:
            self.leave()
            raise
        self.over = [False]
        self.name = str(self.folder / self.prefix)
        _OWNERS[self.name] = self
        weakref.finalize(self, _remove_later, self.over, self.folder, self.prefix)

    def _path(self, kind: str, step: int | None = None) -> Path:
        place = "" if step is None else f"step{step}-"
        return self.folder / f"{self.prefix}{place}{kind}"

    def _steps(self, kind: str) -> list[int]:
        paths = self.folder.glob(f"{self.prefix}step*-{kind}")
        return sorted(int(p.name.removeprefix(f"{self.prefix}step").split("-")[0]) for p in paths)

    # Carries -------------------------------------------------------------------------------------

    def put(self, step: int, carry: Carry) -> None:
        """Write a carry; on the way back, where a few are made again and again, keep it here."""
        if self.back is None:
            self._write(self._path("carry", step), carry)
        else:
            self.refilled[step] = carry

    def get(self, step: int) -> Carry:
        """Read a carry, with tensors on the devices that those of the start are on."""
        if step not in self.refilled and not self._path("carry", step).exists():
            self.refilled[step] = self._made_again(step)
        return self.refilled.get(step) or self._read(self._path("carry", step))

    def drop(self, step: int) -> None:
        """Forget a carry; its file is removed once one could go on without it."""
        self.refilled.pop(step, None)
        self.dropped.append(step)

    def _made_again(self, step: int) -> Carry:
        """Return a carry that an earlier process kept in its memory."""
        assert self.back is not None
        job, xs, consts = self.back.job, self.back.xs, self.back.consts
        near = max(s for s in (*self._steps("carry"), *self.refilled) if s < step)
        found = self.get(near)
        leaves, random = list(found.leaves), found.random
        random.put_back()
        for t in range(near, step):
            leaves, _ = job.advance(leaves, job.x(xs, t), consts)
        return Carry(leaves, RandomState.now(job.devices, random))

    def _write(self, path: Path, carry: Carry) -> None:
        if path.exists():
            return
        tensors = {"random.cpu": carry.random.cpu}
        tensors.update({f"random.cuda.{i}": x for i, x in carry.random.cuda.items()})
        for i, (leaf, start) in enumerate(zip(carry.leaves, self.loop.start)):
            if isinstance(leaf, (Tensor, bool, int, float, complex)):
                kept = leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=_exact(leaf))
                tensors[f"carry.{tree.dotted(self.loop.paths[i])}"] = kept
            elif leaf is not start and leaf != start:
                what = called(tree.dotted(self.loop.paths[i]), "the carry")
                raise TypeError(
                    f"A folder keeps tensors and numbers, and {what} is {given(leaf)}, which "
                    "changes from step to step. Let it be a tensor, or store='memory'."
                )
        files.write(path, tensors)

    def _read(self, path: Path) -> Carry:
        found = files.read(path)
        leaves = list(self.loop.start)
        for i, start in enumerate(leaves):
            kept = found.get(f"carry.{tree.dotted(self.loop.paths[i])}")
            if isinstance(start, Tensor):
                assert kept is not None
                leaves[i] = kept.to(start.device)
            elif kept is not None:
                leaves[i] = type(start)(kept.item())
        cuda = {int(n.split(".")[2]): x for n, x in found.items() if n.startswith("random.cuda.")}
        return Carry(leaves, RandomState(found["random.cpu"], cuda))

    # Forwards ------------------------------------------------------------------------------------

    def start_forward(self, job: Job) -> Reached | None:
        """Read where an earlier process got to, if there was one.

        Raises:
            ValueError: If it drew other random numbers.
        """
        end = self._steps("end")
        carries = [step for step in self._steps("carry") if step % self.every == 0]
        reached = end or [*carries, *self._steps("latest")]
        if not reached or max(reached) == 0:
            # it begins again, with the random numbers of today: nothing of the other may stay
            for kind in ("carry", "rows"):
                for step in self._steps(kind):
                    files.remove(self._path(kind, step))
            return None
        step = max(reached)
        kind = "end" if end else "carry" if self._path("carry", step).exists() else "latest"
        carry = self._read(self._path(kind, step))
        self._refuse_other_draws(carry.random)
        rows: list[list[Any]] = []
        for to in self._steps("rows"):
            if to > step:
                files.remove(self._path("rows", to))
            else:
                rows += self._read_rows(self._path("rows", to), to - len(rows), job)
        self.rows_from = step
        return Reached(step, carry.leaves, rows, carry.random)

    def _refuse_other_draws(self, latest: RandomState) -> None:
        first = self._path("carry", 0)
        if not first.exists():
            return
        start = self._read(first).random
        if not start.same(latest) and not start.same(RandomState.now(start.cuda)):
            raise ValueError(
                f"{self.folder} holds an unfinished run whose steps draw random numbers, and the "
                "generator was in another state at its start. Call torch.manual_seed with the same "
                f"seed before the loop, or empty the folder ({self.prefix}*)."
            )

    def forward(self, job: Job, step: int, leaves: Sequence[Any], rows: list[list[Any]]) -> None:
        """Write what a later process needs to go on from here, now and then."""
        last = step == self.length
        if not last and step % self.every:
            return
        kept = not last and step in job.schedule(self.length).kept()
        if step > self.rows_from:
            self._write_rows(self._path("rows", step), rows[self.rows_from :])
            self.rows_from = step
        if kept:
            return  # its carry is put next
        before = self._steps("latest")
        self.random = RandomState.now(job.devices, self.random)
        self._write(self._path("end" if last else "latest", step), Carry(list(leaves), self.random))
        for old in before:
            files.remove(self._path("latest", old))

    def _write_rows(self, path: Path, rows: Sequence[Sequence[Any]]) -> None:
        tensors = {
            f"{n}.{i}": y if isinstance(y, Tensor) else torch.tensor(y, dtype=_exact(y))
            for n, row in enumerate(rows)
            for i, y in enumerate(row)
            if y is not None
        }
        if tensors and not path.exists():
            files.write(path, tensors)

    def _read_rows(self, path: Path, count: int, job: Job) -> list[list[Any]]:
        found = files.read(path)
        return [
            [_like(found.get(f"{n}.{i}"), like) for i, like in enumerate(job.loop.y_likes)]
            for n in range(count)
        ]

    # Backwards -----------------------------------------------------------------------------------

    def start_backward(
        self, back: Back, cotangents: Sequence[Tensor | None], last: bool
    ) -> int | None:
        """Read how far an earlier process came back, if there was one.

        Raises:
            RuntimeError: If it differentiated something else.
        """
        self.last, self.back = last, back
        if not last:
            return None
        mark, found = self._path("loss"), digest(*cotangents)
        done = self._steps("back")
        if done and mark.read_text(encoding="utf-8") != found:
            raise RuntimeError(
                f"{self.folder} holds a backward pass that was interrupted, and it differentiated "
                "another loss of this run's results. Compute the same loss, or empty the folder "
                f"({self.prefix}*)."
            )
        files.write_text(mark, found)
        if not done:
            return None
        _read_back(back, files.read(self._path("back", done[0])))
        for step in reversed(self._steps("backrows")):
            if step < done[0]:
                files.remove(self._path("backrows", step))
                continue
            back.by_xs += _read_back_rows(files.read(self._path("backrows", step)), back)
        self.back_rows, self.back_at = len(back.by_xs), done[0]
        return done[0]

    def backward(self, step: int, back: Back, whole: bool) -> None:
        """Write what the backward pass holds, now and then, and remove what it has used up."""
        if not self.last or not whole or step == 0 or self.back_at - step < self.every:
            return
        self.back_at = step
        rows = back.by_xs[self.back_rows :]
        tensors = {
            f"{n}.{i}": g for n, row in enumerate(rows) for i, g in enumerate(row) if g is not None
        }
        path = self._path("backrows", step)
        if back.xs and not path.exists():
            files.write(path, {"count": torch.tensor(len(rows)), **tensors})
        self.back_rows = len(back.by_xs)
        before = self._steps("back")
        files.write(self._path("back", step), _held(back))
        for old in before:
            if old != step:
                files.remove(self._path("back", old))
        for used in self.dropped:
            files.remove(self._path("carry", used))
        self.dropped = []

    def end_backward(self) -> None:
        """Remove all files, at once or when the graph that may need them is gone."""
        self.back = None
        if self.last:
            _remove(self.folder, self.prefix)
            self.leave()
        else:
            self.over[0] = True


def _settings(loop: Loop, name: str) -> dict[str, str]:
    """Return what decides the numbers of a run, by what errors call it."""
    kinds = [
        (path, x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else (path, type(x).__name__)
        for path, x in zip(loop.paths, loop.start)
    ]
    return {
        "the number of steps": str(loop.length),
        "the adjoint": name,
        "the structure of the carry": digest(*map(repr, kinds)),
        "the values of the carry": digest(*loop.start),
        "xs": digest(*loop.xs),
        "step (its code, or what it closes over)": digest(loop.step),
        "the versions": f"torch {torch.__version__}, torchopt {__version__}",
    }


def _remove_later(over: list[bool], folder: Path, prefix: str) -> None:
    """Remove the files of a run that is over, unless the same run has been begun again."""
    if over[0] and str(folder / prefix) not in _OWNERS:
        _remove(folder, prefix)


def _remove(folder: Path, prefix: str) -> None:
    for path in sorted(folder.glob(f"{prefix}*"), key=lambda p: p.name.endswith("settings")):
        if path.is_dir():
            files.remove(path)
        else:
            path.unlink(missing_ok=True)


def _held(back: Back) -> dict[str, Tensor]:
    carry = {f"carry.{i}": x for i, x in enumerate(back.carry) if x is not None}
    return {**carry, **{f"consts.{i}": x for i, x in enumerate(back.by_consts) if x is not None}}


def _read_back(back: Back, found: dict[str, Tensor]) -> None:
    back.carry = [
        None if (x := found.get(f"carry.{i}")) is None else x.to(like.device)
        for i, like in enumerate(back.job.carry)
    ]
    back.by_consts = [
        None if (x := found.get(f"consts.{i}")) is None else x.to(like.device)
        for i, like in enumerate(back.consts)
    ]


def _read_back_rows(found: dict[str, Tensor], back: Back) -> list[list[Tensor | None]]:
    return [
        [
            None if (x := found.get(f"{n}.{i}")) is None else x.to(like.device)
            for i, like in enumerate(back.xs)
        ]
        for n in range(int(found["count"]))
    ]


def _exact(number: Any) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    if isinstance(number, int):
        return torch.int64
    return torch.complex128 if isinstance(number, complex) else torch.float64


def _like(kept: Tensor | None, like: Any) -> Any:
    if kept is None:
        return None
    return kept.to(like.device) if isinstance(like, Tensor) else type(like)(kept.item())
