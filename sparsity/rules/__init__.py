"""Rules that change masks in a training step, one for each kind of `sparsity.update`; the callback calls them.

`rule` shrinks masks at the schedule's events. `regrow` also moves them (`moves`), `straight_through` trains the masked weights
(`latent`), and `alternating` has dense phases.
"""

from sparsity.pruner import Pruner
from sparsity.rules.alternating import AlternatingRule
from sparsity.rules.regrow import RegrowRule
from sparsity.rules.rule import Rule
from sparsity.rules.straight_through import StraightThroughRule
from sparsity.update import AcDc, Regrowing, Ste

__all__ = ["Rule", "rule_for"]


def rule_for(pruner: Pruner) -> Rule:
    """Return the rule of a pruner's update."""
    update = pruner.choices.update
    if isinstance(update, Regrowing):
        return RegrowRule(pruner)
    if isinstance(update, Ste):
        return StraightThroughRule(pruner)
    return AlternatingRule(pruner) if isinstance(update, AcDc) else Rule(pruner)
