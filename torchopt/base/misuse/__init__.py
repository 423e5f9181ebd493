"""Words for calls that were meant otherwise: what was given, what was expected, what to type.

Everything here runs after a call has gone wrong, or takes one look at the type of an argument.
The checks are called by one line where a mistake is seen, so that what is computed stays readable.
"""

# ruff: noqa: F401 - for the library itself; a public name would be imported `as` itself
from torchopt.base.misuse.blocks import (
    NoPlainOptimizer,
    block,
    check_inner_loop,
    step_after_block,
)
from torchopt.base.misuse.given import (
    clipped,
    given,
    short,
    some,
)
from torchopt.base.misuse.hyperparameters import (
    WITHOUT_KERNEL,
    check_joined,
    check_schedule,
    check_values,
    not_a_value,
    refuse_switches,
    scheduled,
    stray_comma,
    unknown_hyperparameter,
    without_number,
)
from torchopt.base.misuse.keywords import (
    check_keywords,
    without_fixed,
)
from torchopt.base.misuse.losses import (
    check_closure,
    not_a_loss,
    unrelated_loss,
)
from torchopt.base.misuse.transformations import (
    check_declarations,
    check_decorated,
    no_step,
    not_a_result,
    not_a_transformation,
)
from torchopt.base.misuse.trees import (
    advice_for_leaf,
    check_group,
    check_parameters,
    check_recovered,
    check_trees,
    different_kinds,
    given_params,
    no_state,
    not_a_module,
    not_a_module_state,
    not_an_optimizer_state,
    with_history,
)
