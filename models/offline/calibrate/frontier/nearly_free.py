"""What can be left out at almost no loss: families of settings, searched by bisection.

A family is a list of settings each of which leaves out more than the one before it, down to one
sub-layer or one late exit. Its tokens are compared with full depth's at some of them only: the
more is left out, the less they agree, so the last setting that a preset allows is found in
logarithmically many tries. Where that is not so, a setting is missed, and none is made up: what is
found is measured like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sluice.models.depth.skip_order import Unit, drop_order, skip_first
from sluice.models.offline.calibrate.frontier.greedy_levels import LayerUnit
from sluice.models.offline.calibrate.frontier.settings import Setting, skip_setting
from sluice.models.policy.policy import Phase

_EXIT_THRESHOLDS = (0.99, 0.9)
"""Of `confidence`, which needs nothing trained."""


@dataclass(frozen=True)
class Family:
    """Settings, each of which leaves out more than the one before it.

    Attributes:
        name: what is left out.
        settings: one or more.
    """

    name: str
    settings: tuple[Setting, ...]


def families(
    fields: Mapping[str, Any], chain: Sequence[LayerUnit], layers: int, deepest: int
) -> Iterator[Family]:
    """The greedy levels, each of LLM-Drop's orders, and late exits.

    Args:
        fields: of the profile so far.
        chain: units in the order in which the greedy levels leave them out.
        layers: of the model.
        deepest: most units of an order that are left out.
    """
    orders: dict[str, Sequence[LayerUnit]] = {"level": chain}
    if "importance" in fields:
        importance = {Unit(unit): values for unit, values in fields["importance"].items()}
        for unit in (Unit.ATTENTION, Unit.MLP, Unit.BLOCK):
            orders[unit.value] = drop_order(unit, layers, importance)[:deepest]
    for name, order in orders.items():
        settings = [
            skip_setting(_name(name, count), skip_first(order, count, Phase.DECODE))
            for count in range(1, len(order) + 1)
        ]
        if settings:
            yield Family(name, tuple(settings))
    for threshold in _EXIT_THRESHOLDS:
        late = range(layers - 2, layers - 2 - min(deepest, layers - 1), -1)
        exits = tuple(_exit(threshold, layer) for layer in late)
        if exits:
            yield Family(f"exit at {threshold:g}", exits)


def nearly_free(
    family: Family, keeps: Callable[[str, Setting], bool], presets: Sequence[str]
) -> list[Setting]:
    """The least that a family leaves out, and the most that each preset allows.

    Args:
        family: to search.
        keeps: whether a preset allows a setting.
        presets: the strictest first.

    Returns:
        Settings in the family's order, each once.
    """
    found = {0}
    allowed = 0
    for preset in presets:
        if not keeps(preset, family.settings[allowed]):
            continue
        refused = len(family.settings)
        while refused - allowed > 1:
            middle = (allowed + refused) // 2
            if keeps(preset, family.settings[middle]):
                allowed = middle
            else:
                refused = middle
        found.add(allowed)
    return [family.settings[place] for place in sorted(found)]


def _name(name: str, count: int) -> str:
    if name == "level":
        return f"level {count}"
    named = {"attention": "attention", "mlp": "MLP", "block": "block"}[name]
    return f"{count} {named}{'s' if count > 1 else ''} left out"


def _exit(threshold: float, layer: int) -> Setting:
    # Of a model that was not trained for them few tokens leave, and a test is an LM head.
    rule = {"method": "confidence", "threshold": threshold, "layers": [layer], "sparing": True}
    return Setting(f"exit at {threshold:g} after layer {layer}", {"depth": {"exit": rule}})
