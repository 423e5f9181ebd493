"""Modules that solve an inner problem, and are differentiated by the condition of its solution."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base.eager import eager
from torchopt.base.misuse.given import given, some
from torchopt.diff.implicit.condition import Argument, Condition
from torchopt.diff.implicit.decorators import check_residual, check_solve
from torchopt.diff.implicit.solving import asking_for_grad
from torchopt.diff.stationarity import gradient_of, scalar
from torchopt.nn.buffers import keep_buffers
from torchopt.nn.meta_module import MetaGradientModule
from torchopt.nn.parameters import parameter_sites
from torchopt.nn.sites import as_leaf, holders, meta_sites, own_sites


class ImplicitMetaGradientModule(MetaGradientModule):
    r"""A module whose ``solve`` is differentiated by the condition that its result satisfies.

    .. math::
        \nabla_w L(w^\star, \theta) = 0 \quad\Longrightarrow\quad
        \frac{\partial w^\star}{\partial\theta}
        = -(\nabla^2_{ww} L)^{-1}\, \nabla^2_{w\theta} L

    with the parameters :math:`w` of the module and its meta-parameters :math:`\theta`, see
    :class:`MetaGradientModule`. After ``solve`` the parameters are functions of the
    meta-parameters: a loss of them has their gradient.

    A subclass is declared with its linear solver,
    ``class Net(ImplicitMetaGradientModule, linear_solve=solve_cg())``, and defines

    * ``solve(self, *args)``: changes the parameters until they solve the problem; what it returns,
      usually ``self``, is handed on. It runs as under ``torch.no_grad()`` and on constants for the
      meta-parameters: write ``with torch.enable_grad():`` around what it differentiates;
    * ``objective(self, *args)``, with the same arguments: the scalar :math:`L`; or
      ``optimality(self, *args)``: a tuple with one tensor for each of ``parameters()``, all zero at
      the solution. Where a class defines both, ``optimality`` counts.

    Arguments of ``solve`` that require grad are differentiated by as meta-parameters are. Frozen
    parameters are constants, and buffers are after each evaluation what they were before.

    Options of the class, which subclasses inherit:

    * ``linear_solve``: as ``solve`` of :func:`torchopt.diff.implicit.custom_root`;
    * ``residual_check``: the largest absolute entry of the gradient, or of ``optimality``, that is
      accepted at the solution; ``None`` does not look.

    Raises:
        TypeError: When the class is made, if a method is missing, static or a class method.
        RuntimeError: In ``solve``, if there are no parameters or no meta-parameters.
        ValueError: In ``solve``, if ``objective`` is not scalar, or ``optimality`` does not fit to
            the parameters.

    Example:
        >>> import torch, torchopt
        >>> solver = torchopt.linear_solve.solve_cg()
        >>> class Mean(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solver):
        ...     def __init__(self, strength):
        ...         super().__init__()
        ...         self.strength = strength
        ...         self.w = torch.nn.Parameter(torch.zeros(()))
        ...
        ...     def objective(self, x):
        ...         return (self.w - x).square().mean() + self.strength * self.w.square()
        ...
        ...     def solve(self, x):
        ...         optimizer = torchopt.SGD(self.parameters(), lr=0.1)
        ...         with torch.enable_grad():
        ...             for _ in range(100):
        ...                 optimizer.zero_grad()
        ...                 self.objective(x).backward()
        ...                 optimizer.step()
        ...         return self
        >>> strength = torch.tensor(1.0, requires_grad=True)
        >>> net = Mean(strength).solve(torch.tensor([1.0, 3.0]))
        >>> torch.autograd.grad(net.w, strength)  # of 2 / (1 + strength)
        (tensor(-0.5000),)

    Reference:
        Rajeswaran et al., Meta-learning with implicit gradients, NeurIPS 2019,
        https://arxiv.org/abs/1909.04630.
    """

    linear_solve: Callable[..., Any] | None = None
    residual_check: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Read the options of the class, and wrap its ``solve``."""
        if "linear_solve" in kwargs:
            check_solve(solve := kwargs.pop("linear_solve"))
            cls.linear_solve = None if solve is None else staticmethod(solve)  # pyright: ignore[reportAttributeAccessIssue]
        if "residual_check" in kwargs:
            check_residual(value := kwargs.pop("residual_check"))
            cls.residual_check = value
        try:
            super().__init_subclass__(**kwargs)
        except TypeError as error:  # of no class that would take it
            if not kwargs or "takes no keyword arguments" not in str(error):
                raise
            raise TypeError(
                f"class {cls.__name__}(ImplicitMetaGradientModule, ...) has no argument "
                f"{sorted(kwargs)[0]!r}; it has ['linear_solve', 'residual_check']."
            ) from None
        for name in ("solve", "objective", "optimality"):
            _check_method(cls, name)
        if cls.solve is ImplicitMetaGradientModule.solve:
            raise TypeError(
                f"The class {cls.__name__} must define solve(self, ...), which changes the "
                "parameters until they solve the inner problem."
            )
        if _defining(cls) is ImplicitMetaGradientModule:
            raise TypeError(
                f"The class {cls.__name__} must define objective(self, ...), a scalar, or "
                "optimality(self, ...), a tuple like self.parameters(), with the arguments of "
                "solve."
            )
        if "solve" in vars(cls):
            cls.solve = _differentiable(cls.solve)

    def solve(self, *args: Any, **kwargs: Any) -> Any:
        """Solve the inner problem; to be defined."""
        raise NotImplementedError

    def objective(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the scalar that ``solve`` minimises; to be defined, or ``optimality``."""
        raise NotImplementedError

    def optimality(self, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        """Return what is zero at the solution, one tensor for each parameter."""
        raise NotImplementedError


def _check_method(cls: type, name: str) -> None:
    value = vars(cls).get(name)
    if value is None and name not in vars(cls):
        return
    if isinstance(value, (staticmethod, classmethod)):
        kind = "static" if isinstance(value, staticmethod) else "a class method"
        raise TypeError(
            f"{cls.__name__}.{name} is {kind}; it must be a plain method: def {name}(self, ...)."
        )
    if not callable(value):
        raise TypeError(f"{cls.__name__}.{name} must be a method, got {given(value)}.")


def _defining(cls: type) -> type:
    """Return the class that says what is zero at the solution: the most derived one."""
    names = {"objective", "optimality"}
    return next(base for base in cls.__mro__ if names & vars(base).keys())


def _differentiable(solve: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``solve`` as a method after which the parameters have their derivatives."""

    @functools.wraps(solve)
    @eager
    def wrapped(self: ImplicitMetaGradientModule, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get("_is_solving"):  # super().solve(...)
            return solve(self, *args, **kwargs)
        problem = _Problem(self, args, kwargs)
        with problem.as_constants(), torch.no_grad(), asking_for_grad("solve"):
            output = solve(self, *args, **kwargs)
        problem.connect()
        return output

    return wrapped


class _Problem:
    """One call of ``solve``.

    Args:
        module: Its module.
        args: Of the call.
        kwargs: Of the call.

    Raises:
        RuntimeError: If the module has no parameters or no meta-parameters.
    """

    def __init__(
        self, module: ImplicitMetaGradientModule, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        self.title = type(module).__name__
        found = own_sites(module)
        self.sites = {name: site for name, site in found.items() if site.tensor.requires_grad}
        if not self.sites:
            reason = f": all are frozen ({some(list(found))})" if found else ""
            raise RuntimeError(
                f"{self.title} has no parameters to solve for{reason}. Assign modules or "
                "nn.Parameters that were not given to the constructor."
            )
        self.metas = meta_sites(module)
        if not self.metas:
            raise RuntimeError(
                f"{self.title} has no meta-parameters to be differentiated by. Give its "
                "constructor tensors that require grad, or modules, and assign them to "
                "attributes; a module in eval() mode whose parameters are all frozen "
                "(requires_grad=False) is none."
            )

    @contextlib.contextmanager
    def as_constants(self) -> Iterator[None]:
        """Let parameters be leaves, and meta-parameters constants, while the solver runs.

        A parameter stays the same object from one call to the next, for the sake of optimizers
        that were made once; unless it has got a history elsewhere.
        """
        leaves = self.module.__dict__.setdefault("_solved_leaves", {})
        metas = {name: site.tensor for name, site in self.metas.items()}
        self.module.__dict__["_is_solving"] = True
        try:
            for name, site in self.sites.items():
                leaves[name] = as_leaf(site.tensor, leaves.get(name))
                site.place(leaves[name])
            for name, site in self.metas.items():
                site.place(metas[name].detach())
            yield
        finally:
            self.module.__dict__["_is_solving"] = False
            for name, site in self.metas.items():
                site.place(metas[name])

    def connect(self) -> None:
        """Put the solution into the module as a function of what it depends on.

        Raises:
            ValueError: If ``solve`` has left other parameters than there were.
        """
        found = own_sites(self.module)
        solution: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            new = found.get(name)
            if new is None or new.tensor.shape != site.tensor.shape:
                now = "is gone" if new is None else f"has the shape {tuple(new.tensor.shape)}"
                raise ValueError(
                    f"{self.title}.solve must leave the parameters that there were: {name!r} of "
                    f"shape {tuple(site.tensor.shape)} {now}."
                )
            solution[name] = new.tensor.detach()
        self.modes = [(part, part.training) for part in self._parts()]
        arguments = [
            Argument(0, {n: site.tensor for n, site in self.metas.items()}, True, "it"),
            *(Argument(k, x, True, f"its argument {k}") for k, x in enumerate(self.args, 1)),
            *(Argument(key, x, True, repr(key)) for key, x in self.kwargs.items()),
        ]
        self.by_optimality = "optimality" in vars(_defining(type(self.module)))
        kind = "optimality" if self.by_optimality else "objective"
        tags = () if self.by_optimality else ("symmetric",)
        solve, bound = type(self.module).linear_solve, self.module.residual_check
        title = f"{self.title}.{kind}"
        condition = Condition(
            _Evaluated(self), solution, arguments, solve, tags, title, self.holding
        )
        if condition.is_differentiated(bound):
            for name, tensor in condition.solution().items():
                found[name].place(tensor)

    def _parts(self) -> list[nn.Module]:
        metas = [m for holder in holders(self.module) for m in holder.meta_modules()]
        return list(dict.fromkeys([*self.module.modules(), *metas]))

    # Evaluating the condition --------------------------------------------------------------------

    def evaluated(
        self, x: Mapping[str, Tensor], metas: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return what is zero at the solution, for given tensors."""
        with self.holding(x, metas):
            if self.by_optimality:
                return self._by_name(self.module.optimality(*args, **kwargs))

            def objective(*tensors: Tensor) -> Tensor:
                for name, tensor in zip(x, tensors):
                    self.sites[name].place(tensor)
                title = f"{self.title}.objective"
                return scalar(self.module.objective(*args, **kwargs), title)

            return dict(zip(x, gradient_of(objective, list(x.values()))))

    @contextlib.contextmanager
    def holding(
        self, x: Mapping[str, Tensor], metas: Mapping[str, Tensor], *_: Any, **__: Any
    ) -> Iterator[None]:
        """Let the module hold given tensors, in the modes that it was solved in.

        Also while products are taken: checkpointed blocks are computed again then.
        """
        places = [(self.sites[name], tensor) for name, tensor in x.items()]
        places += [(self.metas[name], tensor) for name, tensor in metas.items()]
        before = [(site, site.now()) for site, _ in places]
        modes = [(part, part.training) for part, _ in self.modes]
        try:
            for part, mode in self.modes:
                part.training = mode
            for site, tensor in places:
                site.place(tensor)
            with keep_buffers(*self._parts()):
                yield
        finally:
            for site, tensor in before:
                site.place(tensor)
            for part, mode in modes:
                part.training = mode

    def _by_name(self, values: Any) -> dict[str, Tensor]:
        """Return what ``optimality`` returned by the names of parameters."""
        if isinstance(values, Tensor):
            values = (values,)
        if not isinstance(values, (tuple, list)):
            raise TypeError(
                f"{self.title}.optimality must return a tuple with one tensor for each of "
                f"self.parameters(), got {given(values)}."
            )
        names = list(parameter_sites(self.module))
        if len(values) == len(self.sites):
            names = list(self.sites)
        if len(values) != len(names):
            raise ValueError(
                f"{self.title}.optimality must return one tensor for each of the {len(names)} "
                f"parameters ({some(names)}), got {len(values)}."
            )
        return {name: x for name, x in zip(names, values) if name in self.sites}


class _Evaluated:
    """A condition that is given all that it depends on: it is not searched for tensors."""

    __slots__ = ("problem",)

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.problem.evaluated(*args, **kwargs)
