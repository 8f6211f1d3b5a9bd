"""The wire form of `routing`: strict, unknown keys are errors.

Checked here: types, and ranges that hold for every model. What depends on the model or the method
is checked in `sluice.models.routing.resolve`. The fields of an exit and of an adaptive control are
those named here and the parameters of the methods (`sluice.models.depth.registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    create_model,
)

from sluice.models.depth.parameters import Choice, Flag, LayerShares, Number, Parameter
from sluice.models.depth.registry import (
    RESERVED,
    adaptive_methods,
    offered_exits,
    parameter_kinds,
)
from sluice.models.depth.skip_order import Unit
from sluice.models.policy.experts import BudgetMethod, RemixMethod, RemixScope
from sluice.models.policy.policy import MissingKV, Phase
from sluice.models.routing.errors import RoutingError

_MOST_LAYERS = 4096
_MOST_EXPERTS = 4096
_MOST_ENTRIES = 65536

LayerList = Annotated[list[StrictInt], Field(max_length=_MOST_LAYERS)]
ExpertList = Annotated[list[StrictInt], Field(max_length=_MOST_EXPERTS)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1)]
Vector = Annotated[list[Real], Field(max_length=_MOST_ENTRIES)]


def _one_or_per_layer(item: Any) -> PlainValidator:
    """One value or a list of them. A plain union would put its members' names into the paths."""
    one, many = (
        TypeAdapter(item),
        TypeAdapter(Annotated[list[item], Field(max_length=_MOST_LAYERS)]),
    )

    def validate(value: Any) -> Any:
        return (many if isinstance(value, list) else one).validate_python(value)

    return PlainValidator(validate)


WholePerLayer = Annotated[int | list[int], _one_or_per_layer(StrictInt)]
NumberPerLayer = Annotated[float | list[float], _one_or_per_layer(Real)]


class StrictFields(BaseModel):
    """Base of everything a user writes: frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SkipFields(StrictFields):
    """`routing.depth.skip`: 0-based layers that do not run, or a fraction of what `by` counts."""

    blocks: LayerList = []
    attention: LayerList = []
    mlp: LayerList = []
    fraction: Annotated[Real, Field(gt=0, lt=1)] | None = None
    by: Unit | None = None


class MethodFields(StrictFields):
    """A method and its parameters; a parameter that is not given is None."""

    method: StrictStr

    @property
    def parameters(self) -> dict[str, Any]:
        """What is given of the methods' parameters, by name."""
        names = type(self).model_fields.keys() - RESERVED
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


class ExitFields(MethodFields):
    """`routing.depth.exit`: where and when a generated token leaves the layers."""

    layers: LayerList | None = None
    min_layer: StrictInt | None = None
    decay: Annotated[Real, Field(gt=0)] | None = None
    kv: MissingKV | None = None


class AdaptiveFields(MethodFields):
    """`routing.depth.adaptive`: the model chooses what the request runs."""


_Fields = TypeVar("_Fields", bound=MethodFields)


def _field_type(parameter: Parameter) -> Any:
    match parameter:
        case Number():
            return StrictInt if parameter.integer else Real
        case Choice():
            return StrictStr
        case Flag():
            return StrictBool
        case LayerShares():
            return Annotated[list[Share], Field(max_length=_MOST_LAYERS)]


@cache
def _with_parameters(
    base: type[_Fields], parameters: tuple[tuple[str, Parameter], ...]
) -> type[_Fields]:
    """The fields with one more for every parameter."""
    more: dict[str, Any] = {name: (_field_type(p) | None, None) for name, p in parameters}
    return create_model(base.__name__, __base__=base, **more)


def _of_methods(
    base: type[_Fields], parameters: Callable[[], Mapping[str, Parameter]]
) -> PlainValidator:
    """Reads the fields of the methods that are there when a request comes."""

    def validate(value: Any) -> _Fields | None:
        if value is None or isinstance(value, base):
            fields: _Fields | None = value
            return fields
        given: _Fields = _with_parameters(base, tuple(parameters().items())).model_validate(value)
        return given

    return PlainValidator(validate)


class DepthFields(StrictFields):
    """`routing.depth`."""

    skip: SkipFields | None = None
    exit: Annotated[
        ExitFields | None, _of_methods(ExitFields, lambda: parameter_kinds(offered_exits()))
    ] = None
    adaptive: Annotated[
        AdaptiveFields | None,
        _of_methods(AdaptiveFields, lambda: parameter_kinds(adaptive_methods())),
    ] = None
    phase: Phase | None = None


class NamedExperts(StrictFields):
    """An entry of `routing.experts.deactivate`: experts of one layer, by number."""

    layer: StrictInt
    experts: ExpertList


class ActivateFields(NamedExperts):
    """An entry of `routing.experts.activate`: experts that always serve, with a weight."""

    weight: Real | None = None


class BiasFields(StrictFields):
    """An entry of `routing.experts.bias`: a number added to an expert's selection score."""

    layer: StrictInt
    expert: StrictInt
    value: Real


class BudgetFields(StrictFields):
    """`routing.experts.budget`: the decode rows of a step share a set of experts."""

    method: BudgetMethod
    k0: StrictInt | None = None
    experts: StrictInt | None = None


class RemixFields(StrictFields):
    """`routing.experts.remix`: router probabilities pulled towards those of references."""

    method: RemixMethod
    scope: RemixScope | None = None
    alpha: Real | None = None
    layers: LayerList | None = None
    top: StrictInt | None = None
    references: StrictStr | None = None
    neighbors: StrictInt | None = None
    kernel: Literal["gaussian", "cosine"] | None = None
    bandwidth: Real | None = None
    max_similarity: Share | None = None
    embedding: Vector | None = None
    pathway: Annotated[list[Vector], Field(max_length=_MOST_LAYERS)] | None = None


class ContrastFields(StrictFields):
    """`routing.experts.contrast`: logits against those of a weak pass."""

    weak_rank: StrictInt
    beta: Real | None = None
    alpha: Share | None = None


class ExpertFields(StrictFields):
    """`routing.experts`: which experts serve the tokens. None is not given."""

    deactivate: Annotated[list[NamedExperts], Field(max_length=_MOST_ENTRIES)] | None = None
    mode: Literal["mask", "drop"] | None = None
    activate: Annotated[list[ActivateFields], Field(max_length=_MOST_ENTRIES)] | None = None
    bias: Annotated[list[BiasFields], Field(max_length=_MOST_ENTRIES)] | None = None
    top_k: WholePerLayer | None = None
    top_p: Share | None = None
    skip_ratio: NumberPerLayer | None = None
    budget: BudgetFields | None = None
    remix: RemixFields | None = None
    contrast: ContrastFields | None = None
    protect_super_experts: StrictBool | None = None


class PolicyFields(StrictFields):
    """What presets and requests have in common."""

    depth: DepthFields = DepthFields()
    experts: ExpertFields | None = None
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
