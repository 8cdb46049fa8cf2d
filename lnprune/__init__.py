"""Structured Lp-norm pruning for PyTorch, at the cost of moving the bytes.

``import lnprune as prune`` stands in for ``from torch.nn.utils import prune``: every public name of that
module is here, with ``ln_structured`` and ``LnStructured`` native. Beyond that module, whole models:
``rank``, ``local_structured``, ``global_structured``, ``remove_all``.
"""

from lnprune.import_report import reporting as _reporting

with _reporting():
    from torch.nn.utils.prune import (
        BasePruningMethod,
        CustomFromMask,
        Identity,
        L1Unstructured,
        PruningContainer,
        RandomStructured,
        RandomUnstructured,
        custom_from_mask,
        global_unstructured,
        identity,
        is_pruned,
        l1_unstructured,
        random_structured,
        random_unstructured,
        remove,
    )

    from lnprune.checkpoints.measuring import rank_checkpoint
    from lnprune.masked_models import load_masked, renew_masked
    from lnprune.measuring import rank
    from lnprune.model import global_structured, load_plan, local_structured, remove_all
    from lnprune.patching import patch
    from lnprune.plans.plan import Plan
    from lnprune.plans.plan_file import PlanEntry
    from lnprune.plans.ranking import Ranking
    from lnprune.prune import LnStructured, channel_mask, channel_norms, ln_structured
    from lnprune.removal.compact import compact, load_compact
    from lnprune.removal.coupling import Coupling, couple
    from lnprune.removal.groups import Group, GroupMember, Refused
    from lnprune.removal.sizes import size_setter
    from lnprune.steps import fake_ops as _fake_ops  # noqa: F401  # torch finds them by the ops' names
    from lnprune.steps import ops, reference
    from lnprune.steps.reference import reference_ranking

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


__all__ = [
    "BasePruningMethod",
    "Coupling",
    "CustomFromMask",
    "Group",
    "GroupMember",
    "Identity",
    "L1Unstructured",
    "LnStructured",
    "Plan",
    "PlanEntry",
    "PruningContainer",
    "RandomStructured",
    "RandomUnstructured",
    "Ranking",
    "Refused",
    "channel_mask",
    "channel_norms",
    "compact",
    "couple",
    "custom_from_mask",
    "global_structured",
    "global_unstructured",
    "identity",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "load_compact",
    "load_masked",
    "load_plan",
    "local_structured",
    "ops",
    "patch",
    "random_structured",
    "random_unstructured",
    "rank",
    "rank_checkpoint",
    "reference",
    "reference_ranking",
    "remove",
    "remove_all",
    "renew_masked",
    "size_setter",
]
