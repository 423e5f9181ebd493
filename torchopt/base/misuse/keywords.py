"""Keywords that a named class does not take, and what they are called here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchopt.base.misuse.given import short


#: Keywords of Optax and of Keras, and what to write instead; where the class takes that.
ELSEWHERE = {
    "learning_rate": "lr",
    "step_size": "lr",
    "b1": "betas=(b1, b2)",
    "b2": "betas=(b1, b2)",
    "beta1": "betas=(beta1, beta2)",
    "beta2": "betas=(beta1, beta2)",
    "beta_1": "betas=(beta_1, beta_2)",
    "beta_2": "betas=(beta_1, beta_2)",
    "decay": "alpha",
    "epsilon": "eps",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "mu_dtype": "exp_avg_dtype",
    "accumulator_dtype": "momentum_buffer_dtype",
}


#: Options of ``torch.optim`` that choose another algorithm, and which class that is here.
OTHER_ALGORITHMS = {"decoupled_weight_decay": " torchopt.AdamW decouples the weight decay."}


def check_keywords(
    caller: str, given: Iterable[str], known: Sequence[str], former: Sequence[str]
) -> None:
    """Refuse a keyword that is neither known nor a former name.

    Raises:
        TypeError: With the nearest one.
    """
    for name in given:
        if name in known or name in former:
            continue
        advice = ""
        other = ELSEWHERE.get(name, "")
        near = difflib.get_close_matches(name, known, 1, 0.75)
        if other.partition("=")[0] in known:
            advice = f" Here it is {other}."
        elif near:
            advice = f" Did you mean {near[0]}?"
        else:
            advice = f" It takes {', '.join(known)}."
        raise TypeError(f"{caller}() has no argument {name!r}.{advice}")


def without_fixed(caller: str, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> Any:
    """Return keywords without options of ``torch.optim`` that can have one value only.

    Raises:
        ValueError: For one with another value.
    """
    for name, value in fixed.items():
        if name in given and given[name] != value:
            raise ValueError(
                f"{caller}({name}={short(given[name])}) is another algorithm; leave it at {value}."
                f"{OTHER_ALGORITHMS.get(name, '')}"
            )
    return {name: value for name, value in given.items() if name not in fixed}
