"""Words for calls that were meant otherwise: what was given, what was expected, what to type.

Everything here runs after a call has gone wrong, or takes one look at the type of an argument.
The checks are called by one line where a mistake is seen, so that what is computed stays readable.
"""

from torchopt.misuse.blocks import NoPlainOptimizer as NoPlainOptimizer
from torchopt.misuse.blocks import block as block
from torchopt.misuse.blocks import check_inner_loop as check_inner_loop
from torchopt.misuse.blocks import step_after_block as step_after_block
from torchopt.misuse.given import clipped as clipped
from torchopt.misuse.given import short as short
from torchopt.misuse.given import some as some
from torchopt.misuse.hyperparameters import check_schedule as check_schedule
from torchopt.misuse.hyperparameters import no_number as no_number
from torchopt.misuse.hyperparameters import not_a_value as not_a_value
from torchopt.misuse.hyperparameters import scheduled as scheduled
from torchopt.misuse.hyperparameters import unknown_hyperparameter as unknown_hyperparameter
from torchopt.misuse.hyperparameters import without_kernel as without_kernel
from torchopt.misuse.losses import check_closure as check_closure
from torchopt.misuse.losses import not_a_loss as not_a_loss
from torchopt.misuse.losses import unrelated_loss as unrelated_loss
from torchopt.misuse.transformations import not_a_transformation as not_a_transformation
from torchopt.misuse.trees import advice_for_leaf as advice_for_leaf
from torchopt.misuse.trees import check_parameters as check_parameters
from torchopt.misuse.trees import check_recovered as check_recovered
from torchopt.misuse.trees import check_target as check_target
from torchopt.misuse.trees import check_trees as check_trees
from torchopt.misuse.trees import different_kinds as different_kinds
from torchopt.misuse.trees import no_state as no_state
from torchopt.misuse.trees import not_a_module as not_a_module
from torchopt.misuse.trees import not_a_module_state as not_a_module_state
from torchopt.misuse.trees import not_an_optimizer_state as not_an_optimizer_state
