"""`routing.experts.budget`: from its wire form to an `ExpertBudget`."""

from __future__ import annotations

from sluice.models.expert_policy import BudgetMethod, ExpertBudget
from sluice.models.expert_shape import ExpertShape
from sluice.server.rules import expert_controls as controls
from sluice.server.rules.checks import check_fields, in_range, invalid
from sluice.server.rules.expert_limits import EXPERTS
from sluice.server.schema import BudgetFields

_BUDGET = f"{EXPERTS}.budget"


def budget_rule(fields: BudgetFields, least: int, shape: ExpertShape) -> ExpertBudget:
    """Check a budget against its method and the model.

    Args:
        fields: what the client wrote.
        least: experts per token, of the layer where they are fewest.
        shape: of the model's experts.

    Raises:
        RoutingError: the method's number is missing or out of range, or the other's was given.
    """
    oea = fields.method is BudgetMethod.OEA
    name = "k0" if oea else "experts"
    check_fields(fields, (name,), fields.method.value, _BUDGET)
    value = fields.k0 if oea else fields.experts
    if value is None:
        raise invalid(f"method {fields.method.value!r} needs {name}", f"{_BUDGET}.{name}")
    parameter = controls.oea_k0(least) if oea else controls.budget_experts(shape)
    in_range(value, parameter, f"{_BUDGET}.{name}")
    return ExpertBudget(fields.method, k0=fields.k0, experts=fields.experts)
