"""From a request body to a policy: the one place where routing is accepted or refused.

Every endpoint's JSON body passes `Admission.admit`. What leaves it is either the body as it came
(no routing: stock) or a body that vLLM's own routes understand: the base model's id, the policy
in `vllm_xargs`, and a `cache_salt` that keeps K/V of different policies apart.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.presets import CUSTOM_PRESET, MODEL_SEPARATOR
from sluice.models.routing.resolve import merge_preset, resolve
from sluice.models.routing.schema import PresetFields, RoutingFields, parse_routing
from sluice.server.access.capability import Caller, Capability, check_access

ROUTED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
_INCOMPATIBLE = {"use_beam_search": "beam search", "prompt_embeds": "prompt embeddings"}
_ANYBODY = Caller(None, Capability.BASIC)
_EXTRA_ARGS_FIELDS = ("vllm_xargs", "extra_args")


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request with routing.

    Attributes:
        body: what vLLM's route gets.
        extra: the policy and the key of its record.
        preset: name of the preset, or `custom`.
        effort: what the request or its preset asked for, or None.
    """

    body: dict[str, Any]
    extra: RoutingExtraArgs
    preset: str
    effort: float | None


@dataclass(frozen=True, slots=True)
class Admission:
    """Checks requests against what the engine can do.

    Attributes:
        capabilities: of the engine.
        presets: by name, the profile's among them; the others have been resolved once at start-up.
    """

    capabilities: Capabilities
    presets: dict[str, PresetFields]

    def check_presets(self) -> None:
        """Resolve every preset but the profile's, which may have been measured on another engine.

        Raises:
            RoutingError: a preset asks for something this model cannot do; `param` names it.
        """
        profile = self.capabilities.profile
        measured = profile.presets if profile else {}
        for name in self.presets:
            if name in measured:
                continue
            try:
                self.preset_policy(name)
            except RoutingError as error:
                param = error.param.replace("routing", f"presets.{name}", 1)
                raise RoutingError(error.message, param=param, reason=error.reason) from None

    def admit(self, path: str, body: dict[str, Any], caller: Caller) -> Admitted | None:
        """Accept or refuse the routing of a request; None if it has none.

        Args:
            path: route path.
            body: parsed JSON object; not changed.
            caller: who sent it.

        Raises:
            ForbiddenError: the caller may not ask for this policy; comes before all that depends on
                the path or the model.
            RoutingError: the routing cannot be done exactly as asked.
        """
        _refuse_smuggled(body)
        model, model_preset = self._split_model(body.get("model"))
        if body.get("routing") is None and model_preset is None:
            return None
        fields = RoutingFields() if body.get("routing") is None else parse_routing(body["routing"])
        fields = _with_model_preset(fields, model_preset)
        param = "model" if model_preset is not None else "routing.preset"
        merged = merge_preset(fields, self.presets, param)
        with _refusals_of(fields.preset):
            flag = self.capabilities.expert_routing
            check_access(fields, merged, param, caller, expert_routing=flag)
            if path not in ROUTED_PATHS:
                raise RoutingError(
                    f"routing is not available on {path}; use {' or '.join(sorted(ROUTED_PATHS))}",
                    param="model" if body.get("routing") is None else "routing",
                    reason="unsupported_endpoint",
                )
            policy = self._resolve(fields, merged, param)
            for field, name in _INCOMPATIBLE.items():
                if body.get(field):
                    raise RoutingError(
                        f"routing does not run together with {name}",
                        param=field,
                        reason="unsupported_combination",
                    )
        extra = RoutingExtraArgs(policy, uuid.uuid4().hex)
        return Admitted(
            body=_engine_body(body, model, extra),
            extra=extra,
            preset=fields.preset or CUSTOM_PRESET,
            effort=merged.effort,
        )

    def preset_policy(self, name: str) -> RoutingPolicy:
        """The policy of a preset alone.

        Raises:
            RoutingError: it asks for something this model cannot do.
        """
        fields = merge_preset(RoutingFields(preset=name), self.presets, "routing.preset")
        return resolve(fields, self.capabilities)

    def preset_refusal(self, name: str) -> RoutingError | None:
        """Why this server cannot serve a preset to anybody, or None if it can."""
        fields = RoutingFields(preset=name)
        merged = merge_preset(fields, self.presets, "routing.preset")
        flag = self.capabilities.expert_routing
        try:
            check_access(fields, merged, "routing.preset", _ANYBODY, expert_routing=flag)
            resolve(merged, self.capabilities)
        except RoutingError as error:
            return error
        return None

    def _resolve(self, own: RoutingFields, merged: RoutingFields, param: str) -> RoutingPolicy:
        """The policy of merged fields; where the preset alone fails, it is named."""
        try:
            return resolve(merged, self.capabilities)
        except RoutingError as error:
            refusal = None if own.preset is None else self.preset_refusal(own.preset)
            if refusal is None or refusal.message != error.message:
                raise
            raise RoutingError(
                f"preset {own.preset!r} is not available: {error.message}",
                param=param,
                reason=error.reason,
            ) from None

    def _split_model(self, model: Any) -> tuple[Any, str | None]:
        """`<model>@<preset>` as (model, preset); any other id as it is."""
        if isinstance(model, str) and model not in self.capabilities.models:
            base, separator, preset = model.rpartition(MODEL_SEPARATOR)
            if separator and base in self.capabilities.models:
                return base, preset
        return model, None


@contextmanager
def _refusals_of(preset: str | None) -> Iterator[None]:
    """Name the preset of a request that is refused for what it asks."""
    try:
        yield
    except RoutingError as error:
        error.preset = preset
        raise


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


def _engine_body(body: dict[str, Any], model: Any, extra: RoutingExtraArgs) -> dict[str, Any]:
    """The body as vLLM's route understands it."""
    engine_body = {key: value for key, value in body.items() if key != "routing"}
    if model is not None:
        engine_body["model"] = model
    xargs = body.get("vllm_xargs") or {}
    if isinstance(xargs, dict):  # vLLM's own validation answers anything else.
        engine_body["vllm_xargs"] = {**xargs, EXTRA_ARGS_KEY: extra.encode()}
    salt = body.get("cache_salt")
    if salt is None or isinstance(salt, str):
        own = extra.cache_salt(salt)
        if own is not None:
            engine_body["cache_salt"] = own
    if body.get("stream") and extra.policy.report:
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
