"""Modules with parameters of two kinds: those of an inner problem, and those it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.nn.parameters import FastWeight


class MetaGradientModule(nn.Module):
    r"""A module that tells its own parameters from those it is differentiated with respect to.

    A tensor that requires grad, or a module, that is given to the constructor and then assigned
    to an attribute is a *meta-parameter* or *meta-module*: it belongs to the outer problem.
    Everything else is as in any :class:`torch.nn.Module`; a tensor that requires grad becomes a
    parameter when it is assigned.

    ``parameters()`` and ``modules()`` return only what belongs to the inner problem,
    ``meta_parameters()`` and ``meta_modules()`` the rest. ``to``, ``train``, ``eval`` and
    ``state_dict`` apply to both.

    A module counts as given for the outer problem if it is in training mode or has a parameter
    that requires grad.

    Example:
        >>> import torch, torchopt
        >>> class Net(torchopt.nn.MetaGradientModule):
        ...     def __init__(self, prior, strength):
        ...         super().__init__()
        ...         self.prior = prior
        ...         self.strength = strength
        ...         self.net = torch.nn.Linear(2, 1)
        >>> net = Net(torch.nn.Linear(2, 1), torch.tensor(0.1, requires_grad=True))
        >>> [name for name, _ in net.named_parameters()]
        ['net.weight', 'net.bias']
        >>> [name for name, _ in net.named_meta_parameters()]
        ['strength', 'prior.weight', 'prior.bias']

    Reference:
        TorchOpt 0.7.3, https://arxiv.org/abs/2211.06934.
    """

    _meta_given: list[Any]  # objects, which a copy of this module has copies of
    _meta_parameters: dict[str, Tensor | None]
    _meta_modules: dict[str, nn.Module | None]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Note what is given for the outer problem."""
        self = super().__new__(cls)
        given_: list[Any] = []
        for leaf in tree.flatten((list(args), kwargs))[0]:
            if isinstance(leaf, nn.Module) and _is_for_outer_problem(leaf):
                given_ += [*leaf.modules(), *leaf.parameters()]
            elif isinstance(leaf, Tensor) and leaf.requires_grad:
                given_.append(leaf)
        self.__dict__.update(_meta_given=given_, _meta_parameters={}, _meta_modules={})
        return self

    def _was_given(self, value: Any) -> bool:
        return any(value is x for x in self._meta_given)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()  # what it is given, __new__ has noted

    # Attributes ----------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        for kind in ("_meta_parameters", "_meta_modules"):
            found = self.__dict__.get(kind)
            if found is not None and name in found:
                return found[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and self._was_given(value):
            self.register_meta_module(name, value)
        elif isinstance(value, Tensor) and self._was_given(value):
            self.register_meta_parameter(name, value)
        elif name in self._meta_parameters and (value is None or isinstance(value, Tensor)):
            self._meta_parameters[name] = value
        elif name in self._meta_modules and (value is None or isinstance(value, nn.Module)):
            self._meta_modules[name] = value
        elif _is_new_parameter(self, name, value):
            self.register_parameter(name, value)  # pyright: ignore[reportArgumentType]
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        for kind in (self._meta_parameters, self._meta_modules):
            if name in kind:
                del kind[name]
                return
        super().__delattr__(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._meta_parameters, *self._meta_modules})

    # Registering ---------------------------------------------------------------------------------

    def register_parameter(self, name: str, param: Tensor | None) -> None:
        """Add a parameter of the inner problem; any tensor that requires grad.

        Raises:
            ValueError: If it was given to the constructor, and is one of the outer problem.
        """
        if param is not None and self._was_given(param):
            raise ValueError(
                f"{name!r} was given to the constructor and belongs to the outer problem. Call "
                f"register_meta_parameter({name!r}, ...), or give the constructor a clone."
            )
        if isinstance(param, Tensor) and not isinstance(param, nn.Parameter):
            if param.grad_fn is None:
                param = nn.Parameter(param, requires_grad=param.requires_grad)
            else:
                param.__class__ = FastWeight  # with history: its graph stays
        super().register_parameter(name, param)  # pyright: ignore[reportArgumentType]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a module of the inner problem.

        Raises:
            ValueError: If it was given to the constructor, and is one of the outer problem.
        """
        if module is not None and self._was_given(module):
            raise ValueError(
                f"{name!r} was given to the constructor and belongs to the outer problem. Call "
                f"register_meta_module({name!r}, ...), or give the constructor a copy."
            )
        super().add_module(name, module)

    def register_module(self, name: str, module: nn.Module | None) -> None:
        """Do what :meth:`add_module` does."""
        self.add_module(name, module)

    def register_meta_parameter(self, name: str, param: Tensor | None) -> None:
        """Add a tensor of the outer problem.

        Raises:
            KeyError: If the name is empty, has a dot, or stands for something else.
            TypeError: If it is no tensor.
        """
        self._check_new(name, self._meta_parameters)
        if param is not None and not isinstance(param, Tensor):
            raise TypeError(f"The meta-parameter {name!r} must be a tensor, got {given(param)}.")
        self._meta_parameters[name] = param

    def register_meta_module(self, name: str, module: nn.Module | None) -> None:
        """Add a module of the outer problem.

        Raises:
            KeyError: If the name is empty, has a dot, or stands for something else.
            TypeError: If it is no module.
        """
        self._check_new(name, self._meta_modules)
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"The meta-module {name!r} must be a module, got {given(module)}.")
        self._meta_modules[name] = module

    add_meta_module = register_meta_module

    def _check_new(self, name: str, kind: dict[str, Any]) -> None:
        if "_parameters" not in self.__dict__:
            raise AttributeError(
                f"{name!r} cannot be assigned before super().__init__() has been called."
            )
        if not isinstance(name, str) or not name or "." in name:
            raise KeyError(f"A name must be a string without a dot, got {name!r}.")
        if name in kind:
            return
        for other in (self._parameters, self._buffers, self._modules):
            other.pop(name, None)  # what stood under this name is replaced, as by nn.Module
        self.__dict__.pop(name, None)
        if hasattr(self, name):
            raise KeyError(f"The attribute {name!r} exists already.")

    # Walking -------------------------------------------------------------------------------------

    def named_meta_parameters(
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the outer problem by name, each once.

        With ``recurse`` also the parameters of meta-modules, and the meta-parameters of
        sub-modules.
        """
        seen: set[int] = set()
        for name, param in self._named_meta(prefix, recurse):
            if id(param) not in seen:
                seen.add(id(param))
                yield name, param

    def _named_meta(self, prefix: str, recurse: bool) -> Iterator[tuple[str, Tensor]]:
        dot = f"{prefix}." if prefix else ""
        for name, param in self._meta_parameters.items():
            if param is not None:
                yield dot + name, param
        if not recurse:
            return
        for name, module in self.named_meta_children():
            yield from module.named_parameters(dot + name)
            yield from _metas_within(module, dot + name)
        for name, module in self.named_children():
            yield from _metas_within(module, dot + name)

    def meta_parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yield the tensors of the outer problem, each once."""
        for _, param in self.named_meta_parameters(recurse=recurse):
            yield param

    def named_meta_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the meta-modules by name, each once."""
        seen: set[int] = set()
        for name, module in self._meta_modules.items():
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def meta_children(self) -> Iterator[nn.Module]:
        """Yield the meta-modules, each once."""
        for _, module in self.named_meta_children():
            yield module

    def named_meta_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the meta-modules and their sub-modules by name."""
        memo = set() if memo is None else memo
        for name, module in self._meta_modules.items():
            if module is not None:
                path = f"{prefix}.{name}" if prefix else name
                yield from module.named_modules(memo, path, remove_duplicate)

    def meta_modules(self) -> Iterator[nn.Module]:
        """Yield the meta-modules and their sub-modules."""
        for _, module in self.named_meta_modules():
            yield module

    # What holds for both kinds -------------------------------------------------------------------

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the module and of its meta-modules."""
        for module in self.meta_children():
            module.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if recurse:
            for module in self.meta_children():
                module._apply(fn)
        for name, param in self._meta_parameters.items():
            if param is None:
                continue
            if param.grad_fn is not None:
                self._meta_parameters[name] = fn(param)
                continue
            with torch.no_grad():
                param.data = fn(param.data)
                if param.grad is not None:
                    param.grad = fn(param.grad)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, param in self._meta_parameters.items():
            if param is not None:
                destination[prefix + name] = param if keep_vars else param.detach()
        for name, module in self._meta_modules.items():
            if module is not None:
                module.state_dict(
                    destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars
                )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing, unexpected, errors = missing_keys, unexpected_keys, error_msgs
        own = {f"{prefix}{name}" for name, x in self._meta_parameters.items() if x is not None}
        inside = tuple(f"{prefix}{name}." for name in self._meta_modules)
        theirs = {key for key in state_dict if key.startswith(inside)} if inside else set()
        rest = {key: x for key, x in state_dict.items() if key not in own | theirs}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected, errors
        )
        if not theirs and not own & state_dict.keys():
            return  # written by TorchOpt 0.7.3, which left them out
        for name, param in self._meta_parameters.items():
            self._load_meta_parameter(prefix + name, param, state_dict, missing, errors)
        for name, module in self._meta_modules.items():
            if module is not None:
                start = f"{prefix}{name}."
                part = {k[len(start) :]: x for k, x in state_dict.items() if k.startswith(start)}
                result = _loaded(module, part, start, errors)
                missing.extend(start + key for key in result[0])
                unexpected.extend(start + key for key in result[1])

    @staticmethod
    def _load_meta_parameter(
        key: str, param: Tensor | None, state_dict: Any, missing: Any, errors: Any
    ) -> None:
        if param is None:
            return
        if key not in state_dict:
            missing.append(key)
        elif state_dict[key].shape != param.shape:
            errors.append(
                f"size mismatch for {key}: copying a tensor of shape "
                f"{tuple(state_dict[key].shape)} into one of shape {tuple(param.shape)}."
            )
        else:
            with torch.no_grad():
                param.data.copy_(state_dict[key])

    def extra_repr(self) -> str:
        """Name what belongs to the outer problem."""
        params = [
            f"{n}: {tuple(p.shape)}" for n, p in self._meta_parameters.items() if p is not None
        ]
        modules = [f"{name}: {type(m).__name__}" for name, m in self.named_meta_children()]
        parts = []
        if params:
            parts.append(f"meta-parameters ({', '.join(params)})")
        if modules:
            parts.append(f"meta-modules ({', '.join(modules)})")
        return ", ".join(parts)


def _loaded(module: nn.Module, state: Any, prefix: str, errors: Any) -> tuple[list[str], list[str]]:
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes that differ
        errors.append(f"In the meta-module {prefix.rstrip('.')}: {error}")
        return [], []
    return result.missing_keys, result.unexpected_keys


def _is_for_outer_problem(module: nn.Module) -> bool:
    return module.training or any(p.requires_grad for p in module.parameters())


def _is_new_parameter(module: nn.Module, name: str, value: Any) -> bool:
    """Whether a plain tensor that requires grad is assigned, which becomes a parameter."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.requires_grad
        and "_buffers" in module.__dict__
        and name not in module._buffers
    )


def _metas_within(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the meta-parameters of modules of this kind inside of one."""
    if isinstance(module, MetaGradientModule):
        yield from module._named_meta(prefix, True)
        return
    for name, child in module.named_children():
        yield from _metas_within(child, f"{prefix}.{name}")
