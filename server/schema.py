"""The wire form of `routing` (design section 7): strict, unknown keys are errors.

Checked here: types, and ranges that hold for every model. What depends on the model or the method
is checked in `sluice.server.resolve`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from sluice.models.depth.order import Unit
from sluice.models.policy import MissingKV, Phase
from sluice.server.errors import RoutingError

_MOST_LAYERS = 4096

LayerList = Annotated[list[StrictInt], Field(max_length=_MOST_LAYERS)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1)]


class StrictFields(BaseModel):
    """Base of everything a user writes: frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SkipFields(StrictFields):
    """`routing.depth.skip`: 0-based layers that do not run, or a fraction of what `by` counts."""

    blocks: LayerList = []
    attention: LayerList = []
    mlp: LayerList = []
    fraction: Annotated[Number, Field(gt=0, lt=1)] | None = None
    by: Unit | None = None


class ExitFields(StrictFields):
    """`routing.depth.exit`: where and when a generated token leaves the layers."""

    method: StrictStr
    layers: LayerList | None = None
    min_layer: StrictInt | None = None
    threshold: Number | None = None
    patience: StrictInt | None = None
    decay: Annotated[Number, Field(gt=0)] | None = None
    kv: MissingKV | None = None


class AdaptiveFields(StrictFields):
    """`routing.depth.adaptive`: the model chooses what the request runs."""

    method: StrictStr
    mode: StrictStr | None = None
    threshold: Number | None = None
    budget: Number | None = None
    retention: Annotated[list[Share], Field(max_length=_MOST_LAYERS)] | None = None
    masked_prefill: StrictBool | None = None


class DepthFields(StrictFields):
    """`routing.depth`."""

    skip: SkipFields | None = None
    exit: ExitFields | None = None
    adaptive: AdaptiveFields | None = None
    phase: Phase | None = None


class PolicyFields(StrictFields):
    """What presets and requests have in common."""

    depth: DepthFields = DepthFields()
    effort: Share | None = None


class PresetFields(PolicyFields):
    """One entry of a presets file: a routing object with a description."""

    description: StrictStr = ""


class RoutingFields(PolicyFields):
    """`routing` of a request."""

    preset: StrictStr | None = None
    report: StrictBool = False


def parse_routing(value: Any) -> RoutingFields:
    """Validate the `routing` object of a request body.

    Raises:
        RoutingError: names the first offending field, and all of them in the message.
    """
    try:
        return RoutingFields.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        named = [(dotted("routing", problem["loc"]), problem["msg"]) for problem in problems]
        raise RoutingError(
            "; ".join(f"{param}: {message}" for param, message in named),
            param=named[0][0],
            reason="invalid_field",
        ) from None


def dotted(root: str, location: tuple[int | str, ...]) -> str:
    """`("depth", "skip", "blocks", 0)` under `routing` as `routing.depth.skip.blocks.0`."""
    return ".".join([root, *map(str, location)])
