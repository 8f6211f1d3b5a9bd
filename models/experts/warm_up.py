"""The routing operations, run once before anybody waits for them."""

from __future__ import annotations

import torch

from sluice.kernels.batch_budget import OEA, batch_budget
from sluice.kernels.count_selections import count_selections
from sluice.kernels.route_rows import RouteRows, Shared
from sluice.kernels.route_topk import route_topk
from sluice.kernels.router_scores import router_scores
from sluice.kernels.router_spec import RouterSpec
from sluice.models.expert_shape import ExpertShape
from sluice.models.experts.ledger import StepLedger
from sluice.models.experts.table import ExpertTable


def warm_up(spec: RouterSpec, shape: ExpertShape, device: torch.device) -> None:
    """Route one row, so that the operations are compiled for a model.

    Args:
        spec: of one of its layers.
        shape: of its experts.
        device: where it runs.
    """
    table = ExpertTable(shape, (), device).layer(0)
    one = torch.zeros(1, dtype=torch.int32, device=device)
    rows = RouteRows(one, one.long(), one[:0], one[:0])
    shared = Shared.nothing(shape.experts, device)
    counts = StepLedger(1, len(shape.layers), shape.experts, device).counts
    correction = spec.corrections.to(device)
    logits = torch.zeros((1, shape.experts), device=device)
    repeat = device.type == "cpu"
    _, ids = route_topk(
        logits, [], rows, shared, table, counts, correction, 0, *spec.numbers, spec.top_k, repeat
    )
    count_selections(ids, rows.owners, counts, 0)
    numbers = spec.score_numbers
    scores, choice = router_scores(logits, rows, shared, table, correction, *numbers)
    batch_budget(choice, scores, OEA, 1)
