"""Clipping of the gradients of single examples: beside Optax, and beside a loop over examples."""

import pytest
import torch
from adapting import assert_derivative
from conftest import nonzero
from tolerances import assert_close

import torchopt
from torchopt import per_example_global_norm_clip as clip


pytestmark = pytest.mark.usefixtures("float64_by_default")

GRADS = [
    torch.tensor(
        [[0.3, -1.0, 2.0], [0.0, 0.0, 0.0], [0.1, 0.2, -0.3], [5.0, 1.0, 2.0]], dtype=torch.float64
    ),
    torch.tensor([[0.5, 1.5], [0.0, 0.0], [-0.1, 0.05], [1.0, 3.0]], dtype=torch.float64)[
        ..., None
    ],
]
#: ``optax.per_example_global_norm_clip(GRADS, clip)`` of Optax 0.2.8, in float64.
OPTAX = {
    0.0: ([0.0, 0.0, 0.0], [0.0, 0.0], 3),
    0.4: (
        [0.45978500653527554, 0.11805475147524205, 0.11687270986298626],
        [0.03584095406743035, 0.4575228622022911],
        2,
    ),
    1.0: (
        [0.9994625163381889, -0.004863121311894841, 0.7421817746574656],
        [0.23960238516857588, 1.0688071555057277],
        2,
    ),
    float("inf"): ([5.4, 0.2, 3.7], [1.4, 4.55], 0),
}


@pytest.mark.parametrize("most", OPTAX)
def test_values_of_optax(most):
    first, second, number = OPTAX[most]
    for given in (most, torch.tensor(most)):
        (a, b), clipped = clip(GRADS, given)
        assert_close(a, torch.tensor(first))
        assert_close(b.flatten(), torch.tensor(second))
        assert clipped.item() == number
        assert clipped.shape == ()


def test_private_training_is_that_of_a_loop_over_examples():
    x, y = torch.randn(6, 3), torch.randn(6)
    params = {"w": torch.randn(3), "b": torch.zeros(())}

    def loss(params, x, y):
        return (x @ params["w"] + params["b"] - y).square()

    tx, most = torchopt.sgd(0.1), 0.7
    state, expected = tx.init(params), dict(params)
    for _ in range(3):
        of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
        total, clipped = clip(of_each, most)
        params, state = tx.apply_gradients(
            {n: g / 6 for n, g in total.items()}, state, params, inplace=False
        )
        sums = {n: torch.zeros_like(p) for n, p in expected.items()}
        number = 0
        for one, target in zip(x, y):
            g = torch.func.grad(loss)(expected, one, target)
            norm = torch.cat([v.reshape(-1) for v in g.values()]).norm()
            number += int(norm > most)
            sums = {n: s + g[n] * min(1.0, most / norm.item()) for n, s in sums.items()}
        expected = {n: p - 0.1 * sums[n] / 6 for n, p in expected.items()}
        assert clipped.item() == number > 0
    for n in params:
        assert_close(params[n], expected[n])


def test_no_example_moves_the_sum_by_more_than_the_clip():
    grads = {"a": 5 * nonzero(8, 3), "b": 5 * nonzero(8)}
    total, _ = clip(grads, 0.3)
    for k in range(8):
        others, _ = clip({n: torch.cat([g[:k], g[k + 1 :]]) for n, g in grads.items()}, 0.3)
        moved = torch.cat([(total[n] - others[n]).reshape(-1) for n in grads]).norm()
        assert moved <= 0.3 * (1 + 1e-12)


def test_derivatives_where_nothing_and_everything_is_clipped():
    grads = [nonzero(4, 3, requires_grad=True), nonzero(4, requires_grad=True)]
    most = torch.tensor(1.1, requires_grad=True)

    def run():
        (a, b), _ = clip(grads, most)
        return a.square().sum() + b.sin()

    with torch.no_grad():
        grads[0][0] *= 0.1
        grads[1][0] *= 0.1
    assert 0 < clip(grads, most)[1] < 4
    assert_derivative(run, [most, *grads], directions=3)
    zero = torch.zeros(2, 3, requires_grad=True)
    for value in (0.0, 1.0):
        (total,), _ = clip([zero], value)
        (found,) = torch.autograd.grad(total.sum(), zero, create_graph=True)
        assert found.isfinite().all()


def test_trees_dtypes_and_what_is_absent():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex128):
        g = nonzero(4, 3).to(dtype) * 3
        total, number = clip({"a": g, "b": None}, 1.0)
        assert total["b"] is None
        assert total["a"].dtype == dtype
        wide = g.to(torch.complex128 if dtype.is_complex else torch.float64)
        norms = wide.abs().square().sum(1).sqrt()
        expected = (wide * norms.clamp(max=1.0).div(norms)[:, None]).sum(0)
        tolerance = {torch.float32: 1e-6, torch.complex128: 1e-12}.get(dtype, 1e-2)
        torch.testing.assert_close(
            total["a"].to(expected.dtype), expected, rtol=tolerance, atol=tolerance
        )
        assert number == 4
    large = torch.full((1, 2), 300.0, dtype=torch.float16)  # whose square is too large
    assert clip([large], 1.0)[0][0].tolist() == pytest.approx([0.5**0.5] * 2, rel=1e-3)


def test_mapped():
    stacked = torch.stack([GRADS[0], 2 * GRADS[0]])
    found, number = torch.func.vmap(lambda g: clip([g], 1.0))(stacked)
    for k in range(2):
        expected, clipped = clip([stacked[k]], 1.0)
        assert_close(found[0][k], expected[0])
        assert number[k] == clipped


REFUSED = {
    "scalar": ([torch.ones(3), torch.ones(())], 1.0, ValueError, r"first dimension.*\(\).*'1'"),
    "other": ([torch.ones(3, 2), torch.ones(2, 2)], 1.0, ValueError, r"\(2, 2\).*3 examples"),
    "whole": ([torch.ones(3, dtype=torch.int64)], 1.0, TypeError, "floating tensors"),
    "number": ([3.0], 1.0, TypeError, "floating tensors.*3.0"),
    "empty": ([None], 1.0, ValueError, "got no gradients"),
    "negative": (GRADS, -1.0, ValueError, "l2_norm_clip must be >= 0"),
    "several": (GRADS, torch.ones(2), ValueError, "one number"),
    "schedule": (GRADS, lambda t: 1.0, TypeError, "must be a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    grads, most, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        clip(grads, most)
