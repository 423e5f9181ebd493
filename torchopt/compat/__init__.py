"""The import paths of TorchOpt 0.7.3: one table of old paths and of what stands behind them here.

``import torchopt`` makes the modules of the table importable, and lets those that exist in both
versions find the old names too. Nothing is looked up before it is asked for. What 0.7.3 had and
this version has not fails with an error that says where to read on.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any, NoReturn


#: Module of 0.7.3, module of today (``-``: not here yet), and names; ``old=new`` where they differ.
#: Modules stand without ``torchopt.``, which is the dot.
TABLE = """
.                             -                    distributed
accelerated_op                core.accelerated_op  is_available=accelerated_op_available
accelerated_op                -                    AdamOp adam_op
alias                         optimizers.adam      adam
alias                         optimizers.adamw     adamw
alias                         optimizers.rmsprop   rmsprop
alias                         optimizers.sgd       sgd
alias                         optimizers.adagrad   adagrad
alias                         optimizers.adadelta  adadelta
alias                         optimizers.adamax    adamax
alias                         optimizers.radam     radam
alias.adadelta                optimizers.adadelta  adadelta
alias.adagrad                 optimizers.adagrad   adagrad
alias.adam                    optimizers.adam      adam
alias.adamax                  optimizers.adamax    adamax
alias.adamw                   optimizers.adamw     adamw
alias.radam                   optimizers.radam     radam
alias.rmsprop                 optimizers.rmsprop   rmsprop
alias.sgd                     optimizers.sgd       sgd
alias.utils                   compat.names         flip_sign_and_add_weight_decay
alias.utils                   transforms.basic     scale_by_neg_lr=scale_by_learning_rate
base                          core.state_parts     EmptyState UninitializedState
base                          core.transform       GradientTransformation
base                          core.chaining        ChainedGradientTransformation=Chain
base                          transforms.basic     identity
base                          compat.names         IdentityGradientTransformation
clip                          transforms.clip      clip_grad_norm
combine                       core.chaining        chain chain_flat
linalg                        compat.linalg        cg ns ns_inv
optim                         optimizers.adam      Adam
optim                         optimizers.adamw     AdamW
optim                         optimizers.rmsprop   RMSProp=RMSprop RMSprop
optim                         optimizers.sgd       SGD
optim                         optim.func_optimizer FuncOptimizer
optim                         optimizers.adagrad   AdaGrad=Adagrad Adagrad
optim                         optimizers.adadelta  AdaDelta=Adadelta Adadelta
optim                         optimizers.adamax    AdaMax=Adamax Adamax
optim                         optimizers.radam     RAdam
optim.adadelta                optimizers.adadelta  AdaDelta=Adadelta Adadelta
optim.adagrad                 optimizers.adagrad   AdaGrad=Adagrad Adagrad
optim.adam                    optimizers.adam      Adam
optim.adamax                  optimizers.adamax    AdaMax=Adamax Adamax
optim.adamw                   optimizers.adamw     AdamW
optim.base                    optim.optimizer      Optimizer
optim.func                    optim.func_optimizer FuncOptimizer
optim.func.base               optim.func_optimizer FuncOptimizer
optim.meta                    optimizers.adam      MetaAdam
optim.meta                    optimizers.adamw     MetaAdamW
optim.meta                    optimizers.rmsprop   MetaRMSprop MetaRMSProp=MetaRMSprop
optim.meta                    optimizers.sgd       MetaSGD
optim.meta                    optim.meta_optimizer MetaOptimizer
optim.meta                    optimizers.adagrad   MetaAdaGrad=MetaAdagrad MetaAdagrad
optim.meta                    optimizers.adadelta  MetaAdaDelta=MetaAdadelta MetaAdadelta
optim.meta                    optimizers.adamax    MetaAdaMax=MetaAdamax MetaAdamax
optim.meta                    optimizers.radam     MetaRAdam
optim.meta.adadelta           optimizers.adadelta  MetaAdaDelta=MetaAdadelta MetaAdadelta
optim.meta.adagrad            optimizers.adagrad   MetaAdaGrad=MetaAdagrad MetaAdagrad
optim.meta.adam               optimizers.adam      MetaAdam
optim.meta.adamax             optimizers.adamax    MetaAdaMax=MetaAdamax MetaAdamax
optim.meta.adamw              optimizers.adamw     MetaAdamW
optim.meta.base               optim.meta_optimizer MetaOptimizer
optim.meta.radam              optimizers.radam     MetaRAdam
optim.meta.rmsprop            optimizers.rmsprop   MetaRMSprop MetaRMSProp=MetaRMSprop
optim.meta.sgd                optimizers.sgd       MetaSGD
optim.radam                   optimizers.radam     RAdam
optim.rmsprop                 optimizers.rmsprop   RMSProp=RMSprop RMSprop
optim.sgd                     optimizers.sgd       SGD
schedule.polynomial           schedules            linear_schedule polynomial_schedule
schedule.exponential_decay    schedules            exponential_decay
transform                     compat.names         scale_by_adam scale_by_accelerated_adam
transform                     optimizers.rmsprop   scale_by_rms scale_by_stddev
transform                     transforms.basic     add_decayed_weights nan_to_num scale
transform                     transforms.basic     scale_by_schedule
transform                     transforms.momentum  trace
transform                     transforms.wrap      masked
transform                     optimizers.adagrad   scale_by_rss
transform                     optimizers.adadelta  scale_by_adadelta
transform                     compat.names         scale_by_adamax
transform                     compat.names         scale_by_radam
transform                     -                    utils
transform.add_decayed_weights transforms.basic     add_decayed_weights
transform.add_decayed_weights transforms.wrap      masked
transform.nan_to_num          transforms.basic     nan_to_num
transform.scale               transforms.basic     scale
transform.scale_by_adadelta   optimizers.adadelta  scale_by_adadelta
transform.scale_by_adadelta   core.state_parts     ScaleByAdadeltaState
transform.scale_by_adam       compat.names         scale_by_adam scale_by_accelerated_adam
transform.scale_by_adam       core.state_parts     ScaleByAdamState
transform.scale_by_adamax     compat.names         scale_by_adamax
transform.scale_by_adamax     core.state_parts     ScaleByAdamaxState
transform.scale_by_radam      compat.names         scale_by_radam
transform.scale_by_rms        optimizers.rmsprop   scale_by_rms
transform.scale_by_rms        core.state_parts     ScaleByRmsState
transform.scale_by_rss        optimizers.adagrad   scale_by_rss
transform.scale_by_rss        core.state_parts     ScaleByRssState
transform.scale_by_schedule   transforms.basic     scale_by_schedule
transform.scale_by_schedule   core.state_parts     ScaleByScheduleState
transform.scale_by_stddev     optimizers.rmsprop   scale_by_stddev
transform.scale_by_stddev     core.state_parts     ScaleByRStdDevState
transform.trace               transforms.momentum  trace
transform.trace               core.state_parts     TraceState
typing                        core.state_parts     EmptyState UninitializedState
typing                        core.transform       GradientTransformation
typing                        core.chaining        ChainedGradientTransformation=Chain
typing                        core.opt_state       OptState
typing                        core.accelerated_op  Device
typing                        typing               Params=TensorTree Updates=TensorTree
typing                        typing               OptionalTensorTree=TensorTree
typing                        torch                Size Tensor
typing                        torch.distributions  Distribution
typing                        torch.futures        Future
typing                        compat.names         Scalar Numeric ScalarOrSchedule ListOfTensors
typing                        compat.names         TupleOfTensors SequenceOfTensors TensorOrTensors
typing                        compat.names         OptionalTensor ListOfOptionalTensors
typing                        compat.names         TupleOfOptionalTensors SequenceOfOptionalTensors
typing                        compat.names         OptionalTensorOrOptionalTensors TensorContainer
typing                        compat.names         ModuleTensorContainers
typing                        diff.zero_order.noise Samplable SampleFunc
typing                        linear_solve.solver  LinearSolver
typing                        -                    RRef
update                        core.apply           apply_updates
utils                         nn.snapshot          ModuleState extract_state_dict recover_state_dict
utils                         nn.snapshot          stop_gradient module_clone
utils                         nn.snapshot          module_detach_=stop_gradient
utils                         -                    extract_module_containers
diff.zero_order               nn.zero_order        ZeroOrderGradientModule
diff.zero_order.decorator     diff.zero_order      zero_order
diff.zero_order.nn            nn.zero_order        ZeroOrderGradientModule
diff.zero_order.nn.module     nn.zero_order        ZeroOrderGradientModule
diff.implicit                 nn.implicit_module   ImplicitMetaGradientModule
"""


def parsed(table: str) -> tuple[dict[str, dict[str, tuple[str, str]]], set[str]]:
    """Return what is here, as module -> name -> (module, name) of today, and what is not."""
    here: dict[str, dict[str, tuple[str, str]]] = {}
    absent: set[str] = set()
    for line in table.strip().splitlines():
        old, new, *names = line.split()
        old = f"torchopt.{old}".rstrip(".")
        target = new if new.partition(".")[0] == "torch" else f"torchopt.{new}"
        for name in names:
            before, _, today = name.partition("=")
            if new == "-":
                absent.add(f"{old}.{before}")
            else:
                here.setdefault(old, {})[before] = (target, today or before)
    return here, absent


HERE, ABSENT = parsed(TABLE)

#: A module of today that 0.7.3 called otherwise.
MODULES = {
    "torchopt.diff.implicit.nn": "torchopt.nn",
    "torchopt.hook": "torchopt.transforms.hook",
    "torchopt.pytree": "torchopt.base.pytree",
    "torchopt.schedule": "torchopt.schedules",
}


class OldModule(ModuleType):
    """A module that 0.7.3 had: its names stand in the table."""

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *HERE.get(self.__name__, {})})


def look_up(module: ModuleType, name: str) -> Any:
    """Return what a module of 0.7.3 had under a name.

    Raises:
        AttributeError: If that is nothing, or nothing that is here yet.
    """
    path = f"{module.__name__}.{name}"
    if name in HERE.get(module.__name__, {}):
        target, today = HERE[module.__name__][name]
        value = getattr(importlib.import_module(target), today)
    elif path in sys.modules or path in MODULES:
        value = importlib.import_module(path)
    elif path in ABSENT:
        raise AttributeError(_told(path), name=name, obj=module)
    else:
        raise AttributeError(
            f"module {module.__name__!r} has no attribute {name!r}", name=name, obj=module
        )
    setattr(module, name, value)
    return value


class Renamed:
    """Loads a module of today under its name of 0.7.3: it is the same module."""

    @staticmethod
    def create_module(spec: Any) -> ModuleType:
        """Return the module, whose spec Python is about to overwrite."""
        module = importlib.import_module(MODULES[spec.name])
        spec.loader_state = module.__spec__
        return module

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Give it its own spec back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


class Absent:
    """Stands last: finds renamed modules, and says of what 0.7.3 had that it is not here."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        """Find a renamed module, refuse what is absent, leave all else to Python."""
        if name in MODULES:
            return importlib.machinery.ModuleSpec(name, Renamed)  # pyright: ignore[reportArgumentType]
        parent = name
        while parent and parent not in ABSENT:
            parent = parent.rpartition(".")[0]
        if parent:
            _refuse(name)
        return None


def _refuse(name: str) -> NoReturn:
    raise ImportError(_told(name), name=name)


def _told(path: str) -> str:
    return (
        f"{path} of TorchOpt 0.7.3 is not in this version. What there is instead, and what is yet "
        "to come, stands in docs/coming_from/torchopt.md."
    )


def install() -> None:
    """Make the table's modules importable, and its names known to the modules of today.

    They are entered into ``sys.modules``, not found by an importer: importing a module such as
    ``torchopt.transform.scale`` would replace the function of that name by it.
    """
    names = dict.fromkeys(["torchopt", *HERE, *(path.rpartition(".")[0] for path in ABSENT)])
    for name in names:
        if _is_of_today(name):
            importlib.import_module(name)
        elif name in HERE and name not in sys.modules:
            sys.modules[name] = module = OldModule(name, f"{name} of TorchOpt 0.7.3.")
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__ = []  # so that importing what is absent asks the finder below
    for module in (sys.modules[name] for name in names if name in sys.modules):
        if not isinstance(vars(module).get("__getattr__"), _Finder):
            _teach(module)
    if not any(finder is Absent for finder in sys.meta_path):
        sys.meta_path.append(Absent)  # pyright: ignore[reportArgumentType]


def _is_of_today(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is none
        return False


class _Finder:
    """The ``__getattr__`` of a module: its own names first, then those of 0.7.3."""

    def __init__(self, module: ModuleType, own: Any) -> None:
        self.module, self.own = module, own

    def __call__(self, name: str) -> Any:
        if self.own is not None:
            try:
                return self.own(name)
            except AttributeError:
                pass
        return look_up(self.module, name)


def _teach(module: ModuleType) -> None:
    if module.__name__ == "torchopt":
        return  # asks here itself
    vars(module)["__getattr__"] = _Finder(module, vars(module).get("__getattr__"))
    vars(module).setdefault("__path__", [])
