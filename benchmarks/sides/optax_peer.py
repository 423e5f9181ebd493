"""JAX with Optax, each piece of work compiled as a whole by ``jax.jit``.

Tasks and inner steps are unrolled where they are not batched: measured faster here than ``scan``
and ``lax.map``, and than one compiled call per task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import adam_step as adam_workload
from benchmarks import meta_step as meta_workload
from benchmarks.networks import AdamNumbers, Layer


#: Without it the gradient is nan where a second moment is exactly zero, as it is behind a unit that
#: no sample activates. So small that no other number changes.
EPS_ROOT = 1e-30
Work = Callable[[], list[jax.Array]]


def version() -> str:
    """Return the version of what is measured."""
    return f"optax {optax.__version__}, jax {jax.__version__}"


def meta_step(problem: meta_workload.Problem) -> Work:
    """Return a function that computes one meta-gradient, the tasks unrolled."""
    outer_loss, samples, initial = _prepare(problem)

    def total(weights: list[jax.Array], *columns: jax.Array) -> jax.Array:
        return sum(outer_loss(weights, *task) for task in zip(*columns))

    return _compiled_gradient(total, initial, samples)


def vmap_step(problem: meta_workload.Problem) -> Work:
    """Return a function that computes the meta-gradient of all tasks in one batch."""
    outer_loss, samples, initial = _prepare(problem)

    def total(weights: list[jax.Array], *columns: jax.Array) -> jax.Array:
        return jax.vmap(outer_loss, in_axes=(None, 0, 0, 0, 0))(weights, *columns).sum()

    return _compiled_gradient(total, initial, samples)


def adam_step(problem: adam_workload.Problem) -> Work:
    """Return a function that takes one step, in the memory of the last one."""
    _use_precision(problem.params)
    tx = _adam(problem.adam, eps_root=0.0)
    grads = [jnp.asarray(g) for g in problem.grads]
    params = [jnp.asarray(p) for p in problem.params]
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))

    def work() -> list[jax.Array]:
        nonlocal params, state
        params, state = jax.block_until_ready(compiled(params, state, grads))
        return params

    return work


def _prepare(problem: meta_workload.Problem) -> tuple[Callable, list[jax.Array], list[jax.Array]]:
    """Return the loss of one task after the inner loop, the samples and the initial weights."""
    _use_precision(problem.weights)
    tx = _adam(problem.adam, EPS_ROOT)

    def loss(weights: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        scores = _network(problem.layers, weights, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    def outer_loss(weights: list[jax.Array], *task: jax.Array) -> jax.Array:
        state = tx.init(weights)
        for _ in range(problem.steps):
            grads = jax.grad(loss)(weights, *task[:2])
            updates, state = tx.update(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
        return loss(weights, *task[2:])

    columns = (problem.support_x, problem.support_y, problem.query_x, problem.query_y)
    samples = [jnp.asarray(column) for column in columns]
    return outer_loss, samples, [jnp.asarray(w) for w in problem.weights]


def _compiled_gradient(total: Callable, weights: list[jax.Array], samples: list[jax.Array]) -> Work:
    compiled = jax.jit(jax.grad(total))
    return lambda: jax.block_until_ready(compiled(weights, *samples))


def _adam(numbers: AdamNumbers, eps_root: float) -> optax.GradientTransformation:
    return optax.adam(numbers.lr, *numbers.betas, eps=numbers.eps, eps_root=eps_root)


def _network(layers: tuple[Layer, ...], weights: list[jax.Array], x: jax.Array) -> jax.Array:
    remaining = iter(weights)
    for kind, *_ in layers:
        if kind == "linear":
            x = x @ next(remaining).T + next(remaining)
        elif kind == "relu":
            x = jax.nn.relu(x)
        else:
            raise ValueError(f"This side has no layer {kind!r}.")
    return x


def _use_precision(arrays: list[np.ndarray]) -> None:
    """Let JAX compute in double precision if the arrays are; it rounds them otherwise."""
    jax.config.update("jax_enable_x64", arrays[0].dtype == np.float64)
