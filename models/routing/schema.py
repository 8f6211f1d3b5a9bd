"""The wire form of `routing`: strict, unknown keys are errors.

Checked here: types, and ranges that hold for every model. What depends on the model or the method
is checked in `sluice.models.routing.resolve`. The fields of an exit and of an adaptive control are
those named here and the parameters of the methods (`sluice.models.depth.registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

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
from sluice.models.routing.problems import described, shortened, unknown_field

_MOST_LAYERS = 4096
_MOST_EXPERTS = 4096
_MOST_ENTRIES = 32768
_MOST_DEPTH = 8
_MOST_VALUES = 200_000
"""Numbers, words, lists and objects in one `routing`; the largest models have 25,000 experts."""

LayerList = Annotated[list[StrictInt], Field(max_length=_MOST_LAYERS, fail_fast=True)]
ExpertList = Annotated[list[StrictInt], Field(max_length=_MOST_EXPERTS, fail_fast=True)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1)]
_Entry = TypeVar("_Entry")
Entries = Annotated[list[_Entry], Field(max_length=_MOST_ENTRIES, fail_fast=True)]
Vector = Annotated[list[Real], Field(max_length=_MOST_ENTRIES, fail_fast=True)]


def _one_or_per_layer(item: Any) -> PlainValidator:
    """One value or a list of them. A plain union would put its members' names into the paths."""
    one, many = (
        TypeAdapter(item),
        TypeAdapter(Annotated[list[item], Field(max_length=_MOST_LAYERS, fail_fast=True)]),
    )

    def validate(value: Any) -> Any:
        return (many if isinstance(value, list) else one).validate_python(value)

    return PlainValidator(validate)


WholePerLayer = Annotated[int | list[int], _one_or_per_layer(StrictInt)]
NumberPerLayer = Annotated[float | list[float], _one_or_per_layer(Real)]


class StrictFields(BaseModel):
    """Base of everything a user writes: frozen, unknown keys are errors, null is not given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("not_an_object", "must be an object")
        for name in value:
            if name not in cls.model_fields:
                context = {
                    "text": unknown_field(str(name), cls.model_fields),
                    "field": shortened(str(name)),
                }
                raise PydanticCustomError("unknown_field", "{text}", context)
        return {name: child for name, child in value.items() if child is not None}


class SkipFields(StrictFields):
    """`routing.depth.skip`: 0-based layers that do not run, a fraction of what `by` counts, or
    those that a trained adapter makes up for.
    """

    blocks: LayerList = []
    attention: LayerList = []
    mlp: LayerList = []
    fraction: Annotated[Real, Field(gt=0, lt=1)] | None = None
    by: Unit | None = None
    adapter: StrictStr | None = None


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
    sparing: StrictBool | None = None
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
            return Annotated[list[Share], Field(max_length=_MOST_LAYERS, fail_fast=True)]


@cache
def _with_parameters(
    base: type[_Fields], parameters: tuple[tuple[str, Parameter], ...]
) -> type[_Fields]:
    """The fields with one more for every parameter."""
    more: dict[str, Any] = {name: (_field_type(p) | None, None) for name, p in parameters}
    return create_model(base.__name__, __base__=base, **more)


@dataclass(frozen=True, slots=True)
class _OfMethods:
    """Reads the fields of the methods that are there when a request comes."""

    base: type[MethodFields]
    parameters: Callable[[], Mapping[str, Parameter]]

    def fields(self) -> type[MethodFields]:
        """The model of the fields."""
        return _with_parameters(self.base, tuple(self.parameters().items()))

    def validate(self, value: Any) -> MethodFields:
        """Read a value.

        Raises:
            pydantic.ValidationError: it is not valid.
        """
        if isinstance(value, self.base):
            return value
        return self.fields().model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(self.validate)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return handler(self.fields().__pydantic_core_schema__)


class DepthFields(StrictFields):
    """`routing.depth`."""

    skip: SkipFields | None = None
    exit: (
        Annotated[ExitFields, _OfMethods(ExitFields, lambda: parameter_kinds(offered_exits()))]
        | None
    ) = None
    adaptive: (
        Annotated[
            AdaptiveFields,
            _OfMethods(AdaptiveFields, lambda: parameter_kinds(adaptive_methods())),
        ]
        | None
    ) = None
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
    pathway: Annotated[list[Vector], Field(max_length=_MOST_LAYERS, fail_fast=True)] | None = None


class ContrastFields(StrictFields):
    """`routing.experts.contrast`: logits against those of a weak pass."""

    weak_rank: StrictInt
    beta: Real | None = None
    alpha: Share | None = None


class ExpertFields(StrictFields):
    """`routing.experts`: which experts serve the tokens. None is not given."""

    deactivate: Entries[NamedExperts] | None = None
    mode: Literal["mask", "drop"] | None = None
    activate: Entries[ActivateFields] | None = None
    bias: Entries[BiasFields] | None = None
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
        RoutingError: names the first offending field, and a few more in the message.
    """
    _check_size(value)
    try:
        return RoutingFields.model_validate(value)
    except ValidationError as error:
        param, message = described(error, "routing")
        raise RoutingError(message, param=param, reason="invalid_field") from None


def _check_size(value: Any) -> None:
    """Refuse an object that no model has a use for, before anything is made of it."""
    level, values = [value], 0
    for _ in range(_MOST_DEPTH):
        values += len(level)
        if values > _MOST_VALUES:
            raise _too_large(f"holds more than {_MOST_VALUES} values")
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise _too_large(f"is nested over {_MOST_DEPTH} levels deep")


def _too_large(what: str) -> RoutingError:
    return RoutingError(f"routing {what}", param="routing", reason="invalid_field")
