"""`routing.experts.remix`: from its wire form to a `Remix`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sluice.models.depth.parameters import Number
from sluice.models.policy.experts import Remix, RemixMethod, RemixScope
from sluice.models.profile.expert_fields import OWN_ENCODER, ReferenceSet
from sluice.models.routing.checks import check_fields, in_range, invalid, number
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.experts import parameters as controls
from sluice.models.routing.experts.named import EXPERTS, ExpertLimits
from sluice.models.routing.schema import RemixFields

_REMIX = f"{EXPERTS}.remix"
_ALWAYS_TAKEN = ("scope", "alpha", "layers", "top")
_NEIGHBOURHOOD = ("references", "neighbors", "kernel", "bandwidth")
_TAKEN = {
    RemixMethod.KERNEL: (*_NEIGHBOURHOOD, "max_similarity", "embedding"),
    RemixMethod.MODE: _NEIGHBOURHOOD,
    RemixMethod.SUPPLIED: ("pathway",),
}


def remix_rule(
    fields: RemixFields,
    wanted: Mapping[int, int],
    references: Mapping[str, ReferenceSet],
    limits: ExpertLimits,
) -> Remix | None:
    """Check a re-mix against its method, the profile and the model.

    Args:
        fields: what the client wrote.
        wanted: experts per token by layer.
        references: sets of the profile.
        limits: of the request.

    Returns:
        None where nothing would change, because the row's own share is 1.

    Raises:
        RoutingError: no reference set to take, a field that the method does not take, misses or
            refuses, or layers without experts or references.
    """
    method = fields.method
    check_fields(fields, (*_ALWAYS_TAKEN, *_TAKEN[method]), method.value, _REMIX)
    name, chosen = None, None
    if method is not RemixMethod.SUPPLIED:
        name = _reference_set(fields, references)
        chosen = references[name]
    layers = _layers(fields.layers, chosen, limits)
    pathway = None
    if method is RemixMethod.SUPPLIED:
        rows = _pathway(fields.pathway, len(layers), limits.shape.experts)
        # The rows follow their layers into ascending order.
        pathway = tuple(row for _, row in sorted(zip(layers, rows, strict=True)))
    most = max(wanted[layer] for layer in layers)
    remix = Remix(
        method=method,
        scope=fields.scope or RemixScope.LAST,
        alpha=_number(fields.alpha, controls.ALPHA, fields, "alpha"),
        layers=tuple(sorted(layers)),
        top=int(_number(fields.top, controls.remix_top(limits.shape, most), fields, "top")),
        references=name,
        pathway=pathway,
    )
    if chosen is not None:
        remix = _with_neighbourhood(remix, fields, chosen)
    return None if remix.alpha == 1.0 else remix


def _reference_set(fields: RemixFields, references: Mapping[str, ReferenceSet]) -> str:
    """Name of the set: what was given, or the only one."""
    if not references:
        raise RoutingError(
            f"method {fields.method.value!r} needs re-mix references: "
            "start the server with a --profile that has some",
            param=f"{_REMIX}.method",
            reason="needs_profile",
        )
    known, param = ", ".join(sorted(references)), f"{_REMIX}.references"
    if fields.references is None:
        if len(references) > 1:
            raise invalid(f"the profile has several reference sets, name one ({known})", param)
        return next(iter(references))
    if fields.references not in references:
        raise invalid(f"reference set {fields.references!r} does not exist ({known})", param)
    return fields.references


def _layers(
    given: list[int] | None, chosen: ReferenceSet | None, limits: ExpertLimits
) -> Sequence[int]:
    """Critical layers, in the order of the request."""
    if given is None:
        return controls.remix_layers(limits.shape) if chosen is None else chosen.layers
    param = f"{_REMIX}.layers"
    if not given:
        raise invalid("a re-mix needs at least one layer", param)
    for position, layer in enumerate(given):
        where = f"{param}.{position}"
        limits.check_layer(layer, where)
        if layer in given[:position]:
            raise invalid(f"layer {layer} is named twice", where)
        if chosen is not None and layer not in chosen.layers:
            known = ", ".join(map(str, chosen.layers))
            raise invalid(f"the references hold layers {known}, and not {layer}", where)
    return given


def _with_neighbourhood(remix: Remix, fields: RemixFields, chosen: ReferenceSet) -> Remix:
    """The re-mix with what chooses and weighs its references."""
    by_prompt = remix.method is RemixMethod.KERNEL
    kernel = fields.kernel or controls.REMIX_KERNELS[0]
    bandwidth = None
    if kernel == "gaussian":
        bandwidth = _number(fields.bandwidth, controls.BANDWIDTH, fields, "bandwidth")
    elif fields.bandwidth is not None:
        raise invalid(f"bandwidth means nothing to kernel {kernel!r}", f"{_REMIX}.bandwidth")
    return replace(
        remix,
        neighbors=int(_number(fields.neighbors, controls.NEIGHBORS, fields, "neighbors")),
        kernel=kernel,
        bandwidth=bandwidth,
        max_similarity=(
            _number(fields.max_similarity, controls.MAX_SIMILARITY, fields, "max_similarity")
            if by_prompt
            else None
        ),
        embedding=_embedding(fields.embedding, chosen) if by_prompt else None,
    )


def _embedding(given: list[float] | None, chosen: ReferenceSet) -> tuple[float, ...] | None:
    """The prompt's embedding by the client's encoder, or None for the model's own."""
    param = f"{_REMIX}.embedding"
    if given is None:
        if chosen.encoder != OWN_ENCODER:
            raise invalid(
                f"the references were embedded by {chosen.encoder!r}: send the prompt's embedding "
                f"by the same encoder, {chosen.width} numbers",
                param,
            )
        return None
    if len(given) != chosen.width:
        raise invalid(
            f"embedding has {len(given)} numbers, and those of the references {chosen.width}",
            param,
        )
    for position, value in enumerate(given):
        in_range(value, controls.EMBEDDING, f"{param}.{position}")
    return tuple(given)


def _pathway(
    given: list[list[float]] | None, layers: int, experts: int
) -> tuple[tuple[float, ...], ...]:
    """Probabilities that the client supplies, one row per layer."""
    param = f"{_REMIX}.pathway"
    if given is None:
        raise invalid(f"method {RemixMethod.SUPPLIED.value!r} needs a pathway", param)
    if len(given) != layers:
        raise invalid(f"pathway has {len(given)} rows for {layers} layers", param)
    for position, row in enumerate(given):
        where = f"{param}.{position}"
        if len(row) != experts:
            raise invalid(f"a row needs one number per expert, {experts}, not {len(row)}", where)
        for expert, value in enumerate(row):
            in_range(value, controls.PATHWAY, f"{where}.{expert}")
        if sum(row) < controls.SMALLEST:
            raise invalid("a row needs a positive sum", where)
    return tuple(tuple(row) for row in given)


def _number(value: float | None, parameter: Number, fields: RemixFields, name: str) -> float:
    return number(value, parameter, fields.method.value, f"{_REMIX}.{name}")
