"""Copy tensors, of which some have a history, with the ties between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchopt.nn import marks


_SPELLINGS = {
    "reference": "reference",
    "ref": "reference",
    "copy": "copy",
    "clone": "copy",
    "deepcopy": "deepcopy",
    "deepclone": "deepcopy",
}


class CopiesHistory(TorchFunctionMode):
    """Lets ``copy.deepcopy`` copy tensors with history, which PyTorch refuses.

    A module may have them among its attributes: ``weight`` under ``weight_norm``, a stored output.
    """

    def __init__(self, copier: Callable[[Any], Any]) -> None:
        super().__init__()
        self._copier = copier

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            copied = args[1][id(args[0])] = self._copier(args[0])
            return copied
        return func(*args, **(kwargs or {}))


class Copier:
    """Copies tensors one way; a tensor met twice gives the same copy."""

    def __init__(self, by: str, device: Any) -> None:
        if not isinstance(by, str) or by not in _SPELLINGS:
            raise ValueError(f"by must be 'reference', 'copy' or 'deepcopy', got {by!r:.80}.")
        self.by = _SPELLINGS[by]
        self.device = device
        self.copies: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        """Return the copy of a value, always the same one."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.copies:
            copied = self._copy(value)
            if copied is not value and isinstance(value, nn.Parameter):
                marks.carry(value, copied)
            self.copies[id(value)] = (value, copied)  # the original is kept alive: ids
        return self.copies[id(value)][1]

    def buffer(self, value: Tensor, detach: bool) -> Tensor:
        """Return the copy of a buffer, without history if ``detach``."""
        return self(value).detach().clone() if detach else self(value)

    def _copy(self, value: Tensor) -> Tensor:
        if nn.parameter.is_lazy(value) and not (self.by == "reference" and self.device is None):
            raise ValueError(
                "A lazy parameter has no shape yet and cannot be copied. Run the network once "
                "before: net(x)."
            )
        if self.by == "reference":
            return value if self.device is None else value.to(self.device)
        if self.by == "copy":
            cloned = value.clone()
            return cloned if self.device is None else cloned.to(self.device)
        cloned = value.detach().clone()
        if self.device is not None:
            cloned = cloned.to(self.device)
        if isinstance(value, nn.Parameter):
            return nn.Parameter(cloned, requires_grad=value.requires_grad)
        return cloned.requires_grad_(value.requires_grad)
