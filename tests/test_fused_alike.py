"""Lists of tensors that are recognised, and initial slots that take no memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import nonzero
from fusing import kernel_calls_fixture, needs_library  # noqa: F401
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.base import signatures
from torchopt.base.signatures import KINDS, KnownSignatures
from torchopt.core.packed import Packed, Packing
from torchopt.kernels import inplace
from torchopt.optimizers.adam import ScaleByAdam


class Marked(Tensor):
    """A subclass that does nothing."""


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda x: x.new_ones(4, 3),
    "strides": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x.new_ones(3).expand(4, 3).t(),
    "dtype": Tensor.float,
    "device": lambda x: x.to("meta"),
    "layout": Tensor.to_sparse,
    "negative bit": torch._neg_view,
    "requires grad": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "subclass": lambda x: x.as_subclass(Marked),
}


def one_list() -> list[Tensor]:
    return [nonzero(2, 2), nonzero(4, 3).t(), nonzero()]


class TestAlike:
    @pytest.fixture(autouse=True)
    def _guards(self):
        if signatures._Guards is None:
            pytest.skip("this torch has no guards")

    def test_new_tensors_of_the_same_kind(self):
        kinds = KnownSignatures()
        assert not kinds.knows(one_list())
        kinds.add(one_list())
        assert kinds.knows(one_list())

    @pytest.mark.parametrize("change", list(CHANGES))
    def test_every_difference_is_seen(self, change):
        kinds, first = KnownSignatures(), nonzero(3, 4)
        kinds.add([nonzero(2), first])
        assert kinds.knows([nonzero(2), nonzero(3, 4)])
        assert not kinds.knows([nonzero(2), CHANGES[change](first)])

    def test_other_numbers_of_tensors_and_what_is_none(self):
        kinds = KnownSignatures()
        kinds.add(one_list())
        for other in ([], one_list()[:2], [*one_list(), nonzero()], [None, None, None], [1, 2, 3]):
            assert not kinds.knows(other)

    def test_tensors_of_transformations_are_others(self):
        kinds, seen = KnownSignatures(), []
        kinds.add([nonzero(3)])

        def look(x: Tensor) -> Tensor:
            seen.append(kinds.knows([x]))
            return x.sum()

        torch.func.grad(look)(nonzero(3))
        torch.func.vmap(look)(nonzero(2, 3))
        assert seen == [False, False]

    def test_the_last_few_kinds_are_kept(self):
        kinds = KnownSignatures()
        lists = [[nonzero(n)] for n in range(1, KINDS + 2)]
        for tensors in lists:
            kinds.add(tensors)
        assert [kinds.knows(tensors) for tensors in lists] == [False] + [True] * KINDS


@needs_library
class TestStepsWithAndWithout:
    def test_without_guards_everything_is_checked(self, monkeypatch):
        outcomes = []
        for guards in (signatures._Guards, None):
            monkeypatch.setattr(signatures, "_Guards", guards)
            torch.manual_seed(2)
            params = [nn.Parameter(nonzero(3, 4)), nn.Parameter(nonzero(2))]
            optimizer = torchopt.Adam(params, 0.1, use_accelerated_op=True)
            taken, original = [], inplace.Stepper.step
            with monkeypatch.context() as context:
                context.setattr(
                    inplace.Stepper,
                    "step",
                    lambda *a, taken=taken, step=original: taken.append(step(*a)) or taken[-1],
                )
                for _ in range(3):
                    for p in params:
                        p.grad = nonzero(*p.shape)
                    optimizer.step()
            assert taken == [False, True, True]  # the first makes the slots
            outcomes.append([p.detach() for p in params])
        for one, other in zip(*outcomes):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("change", ["negative bit", "strides", "expanded"])
    def test_a_gradient_of_another_kind_after_known_ones(self, change):
        outcomes = []
        for setting in (None, False):
            torch.manual_seed(3)
            p = nn.Parameter(nonzero(3, 4))
            optimizer = torchopt.Adam([p], 0.1, use_accelerated_op=setting)
            for k in range(5):
                g = nonzero(3, 4)
                p.grad = CHANGES[change](g) if k == 3 else g
                optimizer.step()
            outcomes.append(p.detach())
        assert_close(*outcomes)


class TestFirstSlots:
    @needs_library
    def test_slots_that_start_from_the_parameter_do(self, kernel_calls):
        @torchopt.transformation
        class Own(ScaleByAdam):
            slots = (
                torchopt.Slot("exp_avg", start=lambda param, **_: 0.5 * param),
                torchopt.Slot("exp_avg_sq", start=lambda param, **_: param.square()),
                torchopt.Slot("max_exp_avg_sq", when="amsgrad"),
            )

        outcomes = []
        for setting in (True, False):
            torch.manual_seed(4)
            net = nn.Linear(3, 2).double()
            start = list(net.parameters())
            tx = torchopt.chain(Own(), torchopt.scale(-0.1)).with_accelerated_op(setting)
            optimizer = torchopt.MetaOptimizer(net, tx)
            x = nonzero(4, 3)
            for _ in range(3):
                optimizer.step(net(x).square().sum())
            grads = torch.autograd.grad(net(x).square().sum(), start)
            outcomes.append([*(p.detach() for p in net.parameters()), *grads])
        assert kernel_calls
        for one, other in zip(*outcomes):
            assert_close(one, other)


class TestZeros:
    SHAPES = (torch.Size([2, 3]), torch.Size([]), torch.Size([0, 4]))

    def test_they_take_no_memory_and_unpack_to_zeros(self):
        packed = Packing(self.SHAPES).filled(0.0, torch.float32, torch.device("cpu"))
        assert packed.flat.untyped_storage().nbytes() == 4
        assert packed.readable() == [None] * 3
        assert [x.shape for x in packed] == list(self.SHAPES)
        for x in packed:
            assert torch.equal(x, torch.zeros_like(x))
            x += 1  # a user's own copies
        assert torch.equal(packed.packing.unpack(packed.flat)[0], torch.zeros(2, 3))

    def test_other_numbers_are_written_out(self):
        packed = Packing(self.SHAPES).filled(0.5, torch.float64, torch.device("cpu"))
        assert packed.readable() is packed
        assert torch.equal(packed.flat, torch.full((7,), 0.5, dtype=torch.float64))

    @pytest.mark.parametrize("number", [0.0, 0.25])
    def test_an_expanded_copy_is_never_read_beyond_its_end(self, number):
        packing = Packing(self.SHAPES)
        flat = torch.full((), number).expand(packing.total)  # not of the packing's own
        read = Packed(flat, packing).readable()
        assert isinstance(read, Packed)
        assert read.flat.is_contiguous()
        assert torch.equal(read.flat, torch.full((7,), number))
        copied = copy.deepcopy(packing.filled(0.0, torch.float32, torch.device("cpu")))
        read = copied.readable()
        assert type(read) is list or torch.equal(read.flat, torch.zeros(7))

    @needs_library
    def test_a_first_step_reads_them_as_zeros(self, kernel_calls):
        outcomes = []
        for setting in (True, False):
            torch.manual_seed(5)
            net = nn.Linear(40, 30).double()
            start = list(net.parameters())
            optimizer = torchopt.MetaAdam(net, 0.1, eps=0.1, use_accelerated_op=setting)
            x = nonzero(4, 40)
            optimizer.step(net(x).square().sum())
            (state,) = optimizer.extract_state()
            slots = [slot[n] for slot in state.slots.values() for n in ("weight", "bias") if slot]
            total = sum(s.sin().sum() for s in slots) + net(x).square().sum()
            grads = torch.autograd.grad(total, start)
            outcomes.append([*(s.detach() for s in slots), *grads])
        assert kernel_calls
        for one, other in zip(*outcomes):
            assert_close(one, other)
