"""Write down where the optimizers and transformations of Optax go: ``optax_trajectories.json``.

Run with a Python that has the pinned Optax, from the root of the repository::

    python -m benchmarks.install_peers jax
    .venvs/jax/bin/python tests/data/optax_trajectories.py

``tests/test_optax_trajectories.py`` takes the same steps. Every line of ``CALLS`` is an expression
in Optax's names, always with keywords (but for the parts of a chain), so that one table there can
say what each is called in TorchOpt. The gradient of step ``t`` is ``gradients[t] + CURVATURE * p``
and its loss that of which it is the gradient. After each of the steps ``KEPT`` the file has the
parameters. Optax computes schedules of the step count in float32: those here are exact in it.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any


FILE = Path(__file__).with_suffix(".json")
COMMAND = ".venvs/jax/bin/python tests/data/optax_trajectories.py"
STEPS, KEPT, CURVATURE, LOWEST = 8, (1, 4, 8), 0.3, 4.0
SHAPES = {"w": (2, 3), "b": (3,), "s": ()}
ONLY_W = '{"w": True, "b": False, "s": False}'
ROWS_OUT = 'weight_dimension_numbers={"w": MuonDimensionNumbers(1, 0)}'

CALLS = [
    # as torch.optim has them
    "sgd(learning_rate=0.1)",
    "sgd(learning_rate=0.1, momentum=0.8)",
    "sgd(learning_rate=0.07, momentum=0.6, nesterov=True)",
    "adam(learning_rate=0.05, b1=0.8, b2=0.95, eps=0.001)",
    "adam(learning_rate=0.05, b1=0.7, b2=0.9, eps=0.01, eps_root=0.02)",
    "adam(learning_rate=linear_schedule(init_value=0.125, end_value=0.03125, transition_steps=4), "
    "b1=0.6, b2=0.9, eps=0.01)",
    "adamw(learning_rate=0.05, b1=0.8, b2=0.95, eps=0.001, weight_decay=0.2)",
    "adamw(learning_rate=0.1, b1=0.5, b2=0.7, eps=0.01, eps_root=0.1, weight_decay=0.4, "
    f"mask={ONLY_W})",
    "nadam(learning_rate=0.05, b1=0.8, b2=0.95, eps=0.001)",
    "nadamw(learning_rate=0.1, b1=0.6, b2=0.8, eps=0.01, weight_decay=0.3)",
    "adamax(learning_rate=0.05, b1=0.8, b2=0.7, eps=0.01)",
    "adamax(learning_rate=0.2, b1=0.5, b2=0.95, eps=0.2)",
    "radam(learning_rate=0.05, b1=0.8, b2=0.95, eps=0.0)",
    "radam(learning_rate=0.1, b1=0.6, b2=0.999, eps=0.0)",
    "rmsprop(learning_rate=0.05, decay=0.8, eps=0.01, eps_in_sqrt=False)",
    "rmsprop(learning_rate=0.03, decay=0.7, eps=0.1, initial_scale=0.4, eps_in_sqrt=False, "
    "centered=True, momentum=0.6)",
    "rmsprop(learning_rate=0.02, decay=0.9, eps=0.05, initial_scale=0.5, eps_in_sqrt=False, "
    "momentum=0.7, nesterov=True)",
    "adagrad(learning_rate=0.2, initial_accumulator_value=0.3, eps=0.0)",
    "adagrad(learning_rate=0.5, initial_accumulator_value=0.02, eps=0.0)",
    "adadelta(learning_rate=0.9, rho=0.8, eps=0.01)",
    "adadelta(learning_rate=3.0, rho=0.6, eps=0.001, weight_decay=0.3)",
    "adafactor(learning_rate=0.2, min_dim_size_to_factor=1, decay_rate=0.6, "
    "clipping_threshold=1.0, eps=0.0)",
    "adafactor(learning_rate=0.1, min_dim_size_to_factor=1, decay_rate=0.9, "
    "clipping_threshold=1.3, eps=0.0)",
    # of papers
    "adabelief(learning_rate=0.03, b1=0.8, b2=0.95, eps=0.000001, eps_root=0.0001)",
    "adabelief(learning_rate=0.1, b1=0.6, b2=0.8, eps=0.05, eps_root=0.1)",
    "adan(learning_rate=0.03, b1=0.7, b2=0.5, b3=0.9, eps=0.001, eps_root=0.0, weight_decay=0.2)",
    "adan(learning_rate=0.1, b1=0.9, b2=0.5, b3=0.6, eps=0.1, eps_root=0.0)",
    "ademamix(learning_rate=0.03, b1=0.7, b2=0.9, b3=0.95, alpha=3.0, eps=0.001, eps_root=0.0, "
    "weight_decay=0.2)",
    "ademamix(learning_rate=0.1, b1=0.5, b2=0.8, b3=0.9, alpha=0.7, eps=0.1, eps_root=0.0, "
    f"weight_decay=0.4, mask={ONLY_W})",
    "adopt(learning_rate=0.03, b1=0.7, b2=0.9, eps=0.5)",
    "adopt(learning_rate=0.05, b1=0.5, b2=0.6, eps=0.4, use_clipping=False)",
    "lion(learning_rate=0.03, b1=0.7, b2=0.9, weight_decay=0.2)",
    f"lion(learning_rate=0.1, b1=0.4, b2=0.6, weight_decay=0.5, mask={ONLY_W})",
    "lamb(learning_rate=0.03, b1=0.8, b2=0.95, eps=0.000001, weight_decay=0.2)",
    "lamb(learning_rate=0.1, b1=0.6, b2=0.8, eps=0.1, eps_root=0.2, weight_decay=0.5, "
    f"mask={ONLY_W})",
    "lars(learning_rate=0.05, weight_decay=0.1, trust_coefficient=0.2, eps=0.01, momentum=0.7)",
    f"lars(learning_rate=0.1, weight_decay=0.3, weight_decay_mask={ONLY_W}, trust_coefficient=0.2, "
    f"trust_ratio_mask={ONLY_W}, momentum=0.5, nesterov=True)",
    "yogi(learning_rate=0.03, b1=0.8, b2=0.95, eps=0.001)",
    "yogi(learning_rate=0.1, b1=0.5, b2=0.7, eps=0.1)",
    "novograd(learning_rate=0.03, b1=0.8, b2=0.6, eps=0.001, weight_decay=0.2)",
    "novograd(learning_rate=0.1, b1=0.5, b2=0.9, eps=0.5, weight_decay=0.0)",
    "sm3(learning_rate=0.03, momentum=0.8)",
    "sm3(learning_rate=0.2, momentum=0.5)",
    "sign_sgd(learning_rate=0.03)",
    "signum(learning_rate=0.03, beta=0.8)",
    "signum(learning_rate=0.1, beta=0.4)",
    "optimistic_gradient_descent(learning_rate=0.1, alpha=1.2, beta=0.7)",
    "optimistic_gradient_descent(learning_rate=0.2, alpha=0.6, beta=1.5)",
    'polyak_sgd(max_learning_rate=0.8, scaling=1.0, f_min=1.0, eps=0.2, variant="sps")',
    'polyak_sgd(max_learning_rate=0.2, scaling=1.0, f_min=3.0, eps=0.1, variant="sps+")',
    "prodigy(learning_rate=0.9, betas=(0.8, 0.95), beta3=0.9, eps=0.001, estim_lr0=0.05, "
    "estim_lr_coef=5.0, weight_decay=0.1)",
    "prodigy(learning_rate=1.2, betas=(0.7, 0.9), eps=0.01, estim_lr0=0.1, estim_lr_coef=2.0, "
    "safeguard_warmup=True)",
    "prodigy(learning_rate=linear_schedule(init_value=1.0, end_value=0.25, transition_steps=4), "
    "betas=(0.8, 0.9), estim_lr0=0.05, estim_lr_coef=5.0)",
    "dadapt_adamw(learning_rate=0.9, betas=(0.8, 0.95), eps=0.001, estim_lr0=0.05, "
    "weight_decay=0.1)",
    "dadapt_adamw(learning_rate=0.5, betas=(0.9, 0.6), eps=0.01, estim_lr0=0.2)",
    "dadapt_adamw(learning_rate=linear_schedule(init_value=1.0, end_value=0.25, "
    "transition_steps=4), betas=(0.9, 0.6), estim_lr0=0.1)",
    "schedule_free_sgd(learning_rate=0.1, b1=0.8)",
    "schedule_free_sgd(learning_rate=0.2, b1=0.6, weight_decay=0.3)",
    "schedule_free_adamw(learning_rate=0.05, b1=0.8, b2=0.95, eps=0.001)",
    "schedule_free_adamw(learning_rate=0.1, b1=0.6, b2=0.7, eps=0.1, weight_decay=0.2)",
    "muon(learning_rate=0.05, beta=0.8, eps=0.0, weight_decay=0.2, nesterov=False, "
    "consistent_rms=0.2, muon_" + ROWS_OUT + ")",
    "muon(learning_rate=0.1, ns_coeffs=(3.0, -3.2, 1.2), ns_steps=3, beta=0.6, eps=0.0, "
    "weight_decay=0.0, nesterov=False, muon_" + ROWS_OUT + ")",
    # transformations
    "chain(scale_by_adam(b1=0.8, b2=0.9, eps=0.01, eps_root=0.1), scale(-0.1))",
    "chain(scale_by_adamax(b1=0.8, b2=0.7, eps=0.02), scale(-0.1))",
    "chain(scale_by_radam(b1=0.8, b2=0.97, eps=0.0), scale(-0.1))",
    "chain(scale_by_rms(decay=0.8, eps=0.1, initial_scale=0.3, eps_in_sqrt=False), scale(-0.1))",
    "chain(scale_by_stddev(decay=0.8, eps=0.1, initial_scale=0.6, eps_in_sqrt=False), scale(-0.1))",
    "chain(scale_by_rss(initial_accumulator_value=0.4, eps=0.0), scale(-0.3))",
    "chain(scale_by_adadelta(rho=0.7, eps=0.05), scale(-1.5))",
    "chain(scale_by_belief(b1=0.8, b2=0.9, eps=0.02, eps_root=0.03), scale(-0.1))",
    "chain(scale_by_yogi(b1=0.7, b2=0.8, eps=0.02, initial_accumulator_value=0.3), scale(-0.1))",
    "chain(scale_by_adan(b1=0.7, b2=0.5, b3=0.8, eps=0.02), scale(-0.1))",
    "chain(scale_by_ademamix(b1=0.7, b2=0.8, b3=0.9, alpha=2.0, eps=0.02), scale(-0.1))",
    "chain(scale_by_adopt(b1=0.7, b2=0.8, eps=0.4), scale(-0.1))",
    "chain(scale_by_lion(b1=0.6, b2=0.8), scale(-0.1))",
    "chain(scale_by_novograd(b1=0.6, b2=0.8, eps=0.02, weight_decay=0.3), scale(-0.1))",
    "chain(scale_by_sm3(b1=0.6, eps=0.02), scale(-0.1))",
    "chain(scale_by_sign(), scale(-0.1))",
    "chain(scale_by_optimistic_gradient(alpha=0.7, beta=1.3), scale(-0.1))",
    'chain(scale_by_polyak(max_learning_rate=0.9, f_min=1.5, eps=0.1, variant="sps"), scale(-1.0))',
    "chain(scale_by_trust_ratio(min_norm=1.2, trust_coefficient=0.5, eps=0.1), scale(-0.1))",
    "chain(scale_by_trust_ratio(), scale(-0.1))",
    "chain(scale_by_muon(beta=0.7, eps=0.0, nesterov=False, " + ROWS_OUT + "), scale(-0.1))",
    "chain(scale_by_learning_rate(learning_rate=0.1), trace(decay=0.7, nesterov=True))",
    "chain(trace(decay=0.6), scale_by_schedule(step_size_fn=polynomial_schedule(init_value=-0.25, "
    "end_value=-0.0625, power=2.0, transition_steps=4)))",
    "chain(ema(decay=0.7), scale(-0.1))",
    "chain(ema(decay=0.7, debias=False), scale(-0.1))",
    "chain(add_decayed_weights(weight_decay=0.3), scale(-0.1))",
    f"chain(add_decayed_weights(weight_decay=0.3, mask={ONLY_W}), scale(-0.1))",
    "chain(centralize(), scale(-0.1))",
    "chain(clip_by_block_rms(threshold=0.4), scale(-0.5))",
    "chain(clip_by_global_norm(max_norm=0.9), scale(-0.5))",
    "chain(clip(max_delta=0.4), scale(-0.5))",
    "chain(adaptive_grad_clip(clipping=0.3, eps=1.8, axis=1), scale(-0.5))",
    "chain(adaptive_grad_clip(clipping=0.4, eps=1.2), scale(-0.5))",
    "chain(scale(-0.5), keep_params_nonnegative())",
    "chain(zero_nans(), identity(), scale(-0.1))",
    "chain(scale(-0.5), reduce_on_plateau(factor=0.5, patience=1, rtol=0.1, atol=0.2))",
    "named_chain(('moments', scale_by_adam(b1=0.8, b2=0.9, eps=0.1)), ('size', scale(-0.1)))",
    # wrappers
    f"masked(inner=sgd(learning_rate=0.3, momentum=0.5), mask={ONLY_W})",
    f"chain(sgd(learning_rate=0.3), freeze(mask={ONLY_W}))",
    f"selective_transform(optimizer=sgd(learning_rate=0.3), freeze_mask={ONLY_W})",
    "partition(transforms={'a': sgd(learning_rate=0.3, momentum=0.5), 'b': set_to_zero(), "
    "'c': adam(learning_rate=0.1, b1=0.8, eps=0.1)}, "
    "param_labels={'w': 'a', 'b': 'c', 's': 'b'})",
    "MultiSteps(opt=sgd(learning_rate=0.5, momentum=0.6), every_k_schedule=2)",
    "MultiSteps(opt=adam(learning_rate=0.5, b1=0.7, eps=0.1), every_k_schedule=2, "
    "use_grad_mean=False)",
    "apply_if_finite(inner=adam(learning_rate=0.1, b1=0.7, eps=0.1), max_consecutive_errors=2)",
    "lookahead(fast_optimizer=sgd(learning_rate=0.3, momentum=0.5), sync_period=2, "
    "slow_step_size=0.4)",
    "lookahead(fast_optimizer=sgd(learning_rate=0.3, momentum=0.5), sync_period=2, "
    "slow_step_size=0.4, reset_state=True)",
]

#: Where Optax cannot take all of the tree.
LEAVES = {"sm3": "wb", "muon": "w", "scale_by_sm3": "wb", "scale_by_muon": "w"}
LEAVES["adaptive_grad_clip(clipping=0.3"] = "w"
LEAVES["adaptive_grad_clip(clipping=0.4"] = "bs"


def leaves_of(call: str) -> str:
    """Return the names of the parameters that a call is given."""
    return next((names for text, names in LEAVES.items() if text in call), "wbs")


def numbers() -> dict[str, Any]:
    """Draw parameters and the constant parts of gradients, short ones."""
    numpy = importlib.import_module("numpy")
    draw = numpy.random.default_rng(12)

    def tree(scale: float) -> dict[str, Any]:
        return {
            n: numpy.round(scale * draw.normal(size=shape), 3).tolist()
            for n, shape in SHAPES.items()
        }

    numpy_of = {"params": tree(1.0), "gradients": []}
    steady = tree(0.6)
    for _ in range(STEPS):
        noise = tree(0.6)
        numpy_of["gradients"].append(
            {n: numpy.round(numpy.add(steady[n], noise[n]), 3).tolist() for n in SHAPES}
        )
    return numpy_of


class Walk:
    """Takes the steps of one call in Optax."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.numpy = importlib.import_module("numpy")
        self.optax = importlib.import_module("optax")
        contrib = importlib.import_module("optax.contrib")
        self.names = {**vars(contrib), **vars(self.optax)}
        self.names["MultiSteps"] = self._in_double
        self.given = given

    def _in_double(self, **arguments: Any) -> Any:
        return self.optax.MultiSteps(**arguments, accumulator_dtype="float64")

    def __call__(self, call: str) -> list[dict[str, Any]]:
        """Return the parameters after each of the steps that are kept."""
        arrays = importlib.import_module("jax.numpy")
        tx = self.optax.with_extra_args_support(eval(call, dict(self.names)))
        leaves = leaves_of(call)
        params: Any = {n: arrays.asarray(self.given["params"][n], float) for n in leaves}
        if call.startswith("lookahead"):
            params = self.optax.LookaheadParams.init_synced(params)
        state, kept = tx.init(params), []
        for step, constant in enumerate(self.given["gradients"], start=1):
            at = getattr(params, "fast", params)
            parts = {n: arrays.asarray(constant[n], float) for n in leaves}
            grads = {n: c + CURVATURE * at[n] for n, c in parts.items()}
            each = [(c * at[n] + CURVATURE / 2 * at[n] ** 2).sum() for n, c in parts.items()]
            updates, state = tx.update(grads, state, params, value=LOWEST + sum(each))
            params = self.optax.apply_updates(params, updates)
            if step in KEPT:
                now = getattr(params, "fast", params)
                assert all(now[n].dtype == "float64" for n in leaves), call
                kept.append({n: self.numpy.asarray(now[n]).tolist() for n in leaves})
        return kept


def public_names(*modules: Any) -> list[str]:
    """Return what is called in small letters, or is a class of a transformation."""
    return sorted(
        {
            n
            for module in modules
            for n, value in vars(module).items()
            if callable(value) and not n.startswith("_")
        }
    )


def main() -> None:
    """Write the file."""
    os.environ["JAX_ENABLE_X64"] = "1"
    jax, optax = (importlib.import_module(name) for name in ("jax", "optax"))
    contrib = importlib.import_module("optax.contrib")
    provenance = {
        "command": COMMAND,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "optax": optax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "dtype": "float64",
    }
    given = numbers()
    walk = Walk(given)
    rows = {call: walk(call) for call in CALLS}
    head = {
        "provenance": provenance,
        "steps": STEPS,
        "kept": KEPT,
        "curvature": CURVATURE,
        "lowest": LOWEST,
        **given,
        "names": public_names(optax, contrib),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    entries = [f"  {json.dumps(call)}: {json.dumps(row)}" for call, row in rows.items()]
    lines.append('"trajectories": {\n' + ",\n".join(entries) + "\n}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{len(rows)} trajectories, {FILE.stat().st_size / 1000:.0f} kB in {FILE}")


if __name__ == "__main__":
    main()
