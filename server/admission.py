"""From a request body to a policy: the one place where routing is accepted or refused.

Every endpoint's JSON body passes `Admission.admit`. What leaves it is either the body as it came
(no routing: stock) or a body that vLLM's own routes understand: the base model's id, the ticket
in `vllm_xargs`, and a `cache_salt` that keeps K/V of different policies apart.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from sluice.models.policy import (
    EXTRA_ARGS_KEY,
    Phase,
    PolicyTicket,
    RoutingPolicy,
    SkipSet,
    salted,
)
from sluice.server.capabilities import Capabilities
from sluice.server.errors import RoutingError
from sluice.server.presets import CUSTOM_PRESET, MODEL_SEPARATOR
from sluice.server.schema import DepthFields, PresetFields, RoutingFields, parse_routing

ROUTED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
_EXTRA_ARGS_FIELDS = ("vllm_xargs", "extra_args")


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request with routing.

    Attributes:
        body: what vLLM's route gets.
        ticket: the policy and the key of its record.
        preset: name of the preset, or `custom`.
    """

    body: dict[str, Any]
    ticket: PolicyTicket
    preset: str


@dataclass(frozen=True, slots=True)
class Admission:
    """Checks requests against what the engine can do.

    Attributes:
        capabilities: of the engine.
        presets: by name; each has been resolved once at start-up.
    """

    capabilities: Capabilities
    presets: dict[str, PresetFields]

    def check_presets(self) -> None:
        """Resolve every preset.

        Raises:
            RoutingError: a preset asks for something this model cannot do.
        """
        for name in self.presets:
            self.policy(RoutingFields(preset=name))

    def admit(self, path: str, body: dict[str, Any]) -> Admitted | None:
        """Accept or refuse the routing of a request; None if it has none.

        Args:
            path: route path.
            body: parsed JSON object; not changed.

        Raises:
            RoutingError: the routing cannot be done exactly as asked.
        """
        _refuse_smuggled(body)
        model, model_preset = self._split_model(body.get("model"))
        if body.get("routing") is None and model_preset is None:
            return None
        if path not in ROUTED_PATHS:
            raise RoutingError(
                f"routing is not available on {path}; use {' or '.join(sorted(ROUTED_PATHS))}",
                param="model" if body.get("routing") is None else "routing",
                reason="unsupported_endpoint",
            )
        fields = parse_routing(body.get("routing") or {})
        fields = _with_model_preset(fields, model_preset)
        param = "model" if model_preset is not None else "routing.preset"
        policy = self.policy(fields, preset_param=param)
        if body.get("use_beam_search"):
            raise RoutingError(
                "routing does not run together with beam search",
                param="use_beam_search",
                reason="unsupported_combination",
            )
        ticket = PolicyTicket(policy, uuid.uuid4().hex)
        return Admitted(
            body=_engine_body(body, model, ticket),
            ticket=ticket,
            preset=fields.preset or CUSTOM_PRESET,
        )

    def policy(
        self, fields: RoutingFields, *, preset_param: str = "routing.preset"
    ) -> RoutingPolicy:
        """Resolve preset and explicit fields to a policy this model can run.

        `depth.skip` and `depth.phase`, where given, each replace the preset's.

        Raises:
            RoutingError: unknown preset, layer out of range, nothing left to run, or an engine
                that runs no depth controls.
        """
        if self.capabilities.refusal is not None:
            raise RoutingError(
                f"routing is not available: {self.capabilities.refusal}",
                param="routing",
                reason="unsupported_model",
            )
        depth = DepthFields()
        if fields.preset is not None:
            if fields.preset not in self.presets:
                known = ", ".join(sorted(self.presets)) or "none are loaded"
                raise RoutingError(
                    f"preset {fields.preset!r} does not exist (presets: {known})",
                    param=preset_param,
                    reason="unknown_preset",
                )
            depth = self.presets[fields.preset].depth
        skip_fields = fields.depth.skip or depth.skip
        phase = fields.depth.phase or depth.phase
        if skip_fields is None:
            if phase is not None:
                raise RoutingError(
                    "routing.depth.phase has nothing to act on without routing.depth.skip",
                    param="routing.depth.phase",
                    reason="invalid_field",
                )
            return RoutingPolicy(report=fields.report)
        for name in ("blocks", "attention", "mlp"):
            self._check_layers(name, getattr(skip_fields, name))
        skip = SkipSet.of(
            blocks=tuple(skip_fields.blocks),
            attention=tuple(skip_fields.attention),
            mlp=tuple(skip_fields.mlp),
            phase=phase or Phase.BOTH,
        )
        if len(skip.attention) == len(skip.mlp) == self.capabilities.layers:
            raise RoutingError(
                "routing.depth.skip leaves nothing to run: keep at least one attention or MLP",
                param="routing.depth.skip",
                reason="nothing_left_to_run",
            )
        return RoutingPolicy(skip=skip, report=fields.report)

    def _check_layers(self, name: str, layers: list[int]) -> None:
        for position, layer in enumerate(layers):
            if not 0 <= layer < self.capabilities.layers:
                raise RoutingError(
                    f"layer {layer} does not exist: the model has layers 0 to "
                    f"{self.capabilities.layers - 1}",
                    param=f"routing.depth.skip.{name}.{position}",
                    reason="layer_out_of_range",
                )

    def _split_model(self, model: Any) -> tuple[Any, str | None]:
        """`<model>@<preset>` as (model, preset); any other id as it is."""
        if isinstance(model, str) and model not in self.capabilities.models:
            base, separator, preset = model.rpartition(MODEL_SEPARATOR)
            if separator and base in self.capabilities.models:
                return base, preset
        return model, None


def _with_model_preset(fields: RoutingFields, preset: str | None) -> RoutingFields:
    if preset is None:
        return fields
    if fields.preset not in (None, preset):
        raise RoutingError(
            f"the model id selects preset {preset!r} and routing.preset {fields.preset!r}",
            param="routing.preset",
            reason="unsupported_combination",
        )
    return fields.model_copy(update={"preset": preset})


def _engine_body(body: dict[str, Any], model: Any, ticket: PolicyTicket) -> dict[str, Any]:
    """The body as vLLM's route understands it."""
    engine_body = {key: value for key, value in body.items() if key != "routing"}
    if model is not None:
        engine_body["model"] = model
    xargs = body.get("vllm_xargs") or {}
    if isinstance(xargs, dict):  # vLLM's own validation answers anything else.
        engine_body["vllm_xargs"] = {**xargs, EXTRA_ARGS_KEY: ticket.encode()}
    salt = body.get("cache_salt")
    if salt is None or isinstance(salt, str):
        own = salted(ticket.policy.prompt_kv_digest, salt)
        if own is not None:
            engine_body["cache_salt"] = own
    if body.get("stream") and ticket.policy.report:
        # The report rides on the usage chunk, so asking for it asks for that chunk.
        options = body.get("stream_options") or {}
        if isinstance(options, dict):
            engine_body["stream_options"] = {**options, "include_usage": True}
    return engine_body


def _refuse_smuggled(body: dict[str, Any]) -> None:
    """Refuse our key in any extra-arguments field, at any depth of any endpoint's body.

    Iterative: a body nested deeper than Python recurses must not end the search early.
    """
    pending: list[tuple[str, Any]] = [("", body)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            for key, child in value.items():
                where = f"{path}.{key}" if path else key
                if (
                    key in _EXTRA_ARGS_FIELDS
                    and isinstance(child, dict)
                    and EXTRA_ARGS_KEY in child
                ):
                    raise RoutingError(
                        f"{where}.{EXTRA_ARGS_KEY} is reserved; send a `routing` object",
                        param=f"{where}.{EXTRA_ARGS_KEY}",
                        reason="reserved_argument",
                    )
                pending.append((where, child))
        elif isinstance(value, list):
            pending += [
                (f"{path}.{index}", child)
                for index, child in enumerate(value)
                if isinstance(child, dict | list)
            ]
