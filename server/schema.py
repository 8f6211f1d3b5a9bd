"""The wire form of `routing` (design section 7): strict, unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from sluice.models.policy import Phase
from sluice.server.errors import RoutingError

LayerList = Annotated[list[StrictInt], Field(max_length=4096)]


class StrictFields(BaseModel):
    """Base of everything a user writes: frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SkipFields(StrictFields):
    """`routing.depth.skip`: 0-based layers that do not run."""

    blocks: LayerList = []
    attention: LayerList = []
    mlp: LayerList = []


class DepthFields(StrictFields):
    """`routing.depth`."""

    skip: SkipFields | None = None
    phase: Phase | None = None


class PresetFields(StrictFields):
    """One entry of a presets file: a routing object with a description."""

    description: StrictStr = ""
    depth: DepthFields = DepthFields()


class RoutingFields(StrictFields):
    """`routing` of a request."""

    preset: StrictStr | None = None
    depth: DepthFields = DepthFields()
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
