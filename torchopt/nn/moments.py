"""What modules held at a moment, so that a checkpointed function can run again as it ran first.

:func:`torch.utils.checkpoint.checkpoint` calls its function a second time in the backward pass, and
the function reads its weights from its module then. A differentiable optimizer, a recovery or the
end of an ``inner_loop`` block has put others there meanwhile, and PyTorch compares shapes only. So
whatever this library puts into a module goes through :func:`put`, which tells the moments that
are still needed what was there before. Where nothing is checkpointed no moment is needed.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


#: Stands for an entry that does not exist.
ABSENT: Any = object()

#: The moments that are still needed, oldest first; some may be dead.
references: list[weakref.ref[Moment]] = []
#: Modules that something was put into, if ``noting`` is not empty.
written: weakref.WeakSet[nn.Module] = weakref.WeakSet()
noting: list[bool] = []
_running = threading.RLock()  # backward passes on several devices have a thread for each


class Moment:
    """The modules at one moment: what has been replaced since, as it was then.

    It holds nothing that was computed later, so that no cycle passes through the graph, where
    Python's collector cannot see. Nor does it keep a module alive: a function that reads one does,
    and a moment is told of modules that came later, too.
    """

    __slots__ = ("__weakref__", "before", "spoiled")

    def __init__(self) -> None:
        #: Module -> kind and name -> what stood there.
        self.before: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], Any]]
        self.before = weakref.WeakKeyDictionary()
        self.spoiled: str | None = None  # why it cannot come back

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """Let the modules hold what they held at this moment, for a ``with`` block."""
        if self.spoiled is not None:
            raise RuntimeError(self.spoiled)
        if not self.before:
            yield
            return
        with _running:
            entries = [
                (kind, name, module, value)
                for module, before in self.before.items()
                for (kind, name), value in before.items()
            ]
            holders = {id(_holder(m, kind)): _holder(m, kind) for kind, _, m, _ in entries if kind}
            present = [(holder, dict(holder)) for holder in holders.values()]
            modes = [(m, m.training) for kind, name, m, _ in entries if not kind]
            try:
                for kind, name, module, value in entries:
                    put(module, kind, name, value)
                yield
            finally:
                for module, mode in modes:
                    put(module, "", "training", mode)
                for kind, name, module, _ in entries:
                    if kind:
                        record(module, kind, name)
                for holder, content in present:  # as a whole: for the order
                    holder.clear()
                    holder.update(content)
                for _, _, module, _ in entries:
                    refresh(module)


def now() -> Moment:
    """Return this moment; it has to be kept as long as somebody may go back to it."""
    latest = references[-1]() if references else None
    if latest is None or latest.before or latest.spoiled:
        latest = Moment()
        references[:] = [*_alive(), weakref.ref(latest)]
    return latest


def put(module: nn.Module, kind: str, name: str, value: Any) -> None:
    """Put something into a module.

    Args:
        module: The module.
        kind: ``"_parameters"``, ``"_buffers"``, ``"_modules"``, or ``""`` for an attribute.
        name: Its name.
        value: What is to stand there; ``ABSENT`` removes it.
    """
    if references or noting:
        record(module, kind, name)
    if value is ABSENT:
        _holder(module, kind).pop(name, None)
    else:
        _holder(module, kind)[name] = value
    if kind == "_parameters":
        refresh(module)


def spoil(module: nn.Module, name: str, tensor: Tensor, why: str) -> None:
    """Say of all moments at which a module held this parameter that its values are lost."""
    for reference in _alive():
        moment: Any = reference()
        if moment.before.get(module, {}).get(("_parameters", name), tensor) is tensor:
            moment.spoiled = why


def refresh(module: nn.Module) -> None:
    """Recurrent modules compute with a second list of their weights; keep it the same."""
    if isinstance(module, nn.RNNBase):
        names = module._flat_weights_names
        module._flat_weights = [getattr(module, name, None) for name in names]


def rerun(moment: Moment, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function with the modules as they were."""
    if moment.before or moment.spoiled is not None:
        with moment.unread():
            return function(*args)
    return function(*args)


def _holder(module: nn.Module, kind: str) -> dict[str, Any]:
    return getattr(module, kind) if kind else module.__dict__


def record(module: nn.Module, kind: str, name: str) -> None:
    """Tell the moments what is there, before it changes."""
    if noting:
        written.add(module)
    key = (kind, name)
    old = _holder(module, kind).get(name, ABSENT)
    dead = 0
    for reference in reversed(references):
        moment = reference()
        if moment is None:
            dead += 1
        elif key in (before := moment.before.setdefault(module, {})):
            break  # then all earlier ones know it
        else:
            before[key] = old
    if dead > 8 or dead == len(references):
        references[:] = _alive()


def _alive() -> list[weakref.ref[Moment]]:
    return [reference for reference in references if reference() is not None]
