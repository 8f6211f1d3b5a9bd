"""From a request body to a policy: the one place where routing is accepted or refused.

`Admission.admit` reads the JSON body of every endpoint. A body without routing goes on to vLLM as
it came. For one with routing it makes a body that vLLM's own routes understand: the base model's
id, the policy in `vllm_xargs`, and a `cache_salt` that keeps the K/V of different policies apart.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sluice.models.depth.prefix_sharing import cache_salt
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.presets import (
    CUSTOM_PRESET,
    MODEL_SEPARATOR,
    request_policy,
)
from sluice.models.routing.resolve import merge_preset, resolve
from sluice.models.routing.schema import PresetFields, RoutingFields, parse_routing
from sluice.server.access.capability import Caller, Capability, check_access
from sluice.server.endpoints import ROUTED
from sluice.server.reserved import refuse_reserved

CACHE_SECRET_ENV = "SLUICE_CACHE_SECRET"
"""Environment variable with the secret of cache salts, the same in all API server processes."""

_LEAST_CALLER = Caller(None, Capability.BASIC)
_USAGE_BY_CHOICE = frozenset({"/v1/chat/completions", "/v1/completions"})
_BOOLEAN = TypeAdapter(bool)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request with routing.

    Attributes:
        body: what vLLM's route gets.
        extra: the policy and the key of its record.
        preset: name of the preset, or `custom`.
        effort: what the request or its preset asked for, or None.
        model: (what vLLM calls the model, what the client called it) where they differ.
    """

    body: dict[str, Any]
    extra: RoutingExtraArgs
    preset: str
    effort: float | None
    model: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """Checks requests against what the engine can do.

    Attributes:
        capabilities: of the engine.
        presets: by name, those of the presets file and of the profile.
        secret: of the server, for cache salts that nobody can guess.
    """

    capabilities: Capabilities
    presets: dict[str, PresetFields]
    secret: str = ""

    def admit(self, path: str, body: dict[str, Any], caller: Caller) -> Admitted | None:
        """Accept or refuse the routing of a request; None if it has none.

        Args:
            path: route path.
            body: parsed JSON object; not changed.
            caller: who sent it.

        Raises:
            ForbiddenError: the caller may not ask for this policy. This is checked before anything
                that depends on the path or the model.
            RoutingError: the routing cannot be done exactly as asked.
        """
        refuse_reserved(body)
        _refuse_literal_extra_body(body)
        model, model_preset = self._split_model(body.get("model"))
        if body.get("routing") is None and model_preset is None:
            return None
        fields = RoutingFields() if body.get("routing") is None else parse_routing(body["routing"])
        fields = _with_model_preset(fields, model_preset)
        param = "model" if model_preset is not None else "routing.preset"
        merged = merge_preset(fields, self.presets, param)
        with _errors_name(fields.preset):
            self._check_access(fields, merged, param, caller)
            if path not in ROUTED:
                raise RoutingError(
                    f"routing is not available on {path}; use {', '.join(sorted(ROUTED))}",
                    param="model" if body.get("routing") is None else "routing",
                    reason="unsupported_endpoint",
                )
            policy = request_policy(merged, self.presets, self.capabilities, param)
            _check_combination(body)
        extra = RoutingExtraArgs(policy, uuid.uuid4().hex)
        return Admitted(
            body=_engine_body(path, body, model, extra, self.secret),
            extra=extra,
            preset=fields.preset or CUSTOM_PRESET,
            effort=merged.effort,
            model=None if model_preset is None else (self.capabilities.models[0], body["model"]),
        )

    def preset_refusal(self, name: str) -> RoutingError | None:
        """Why no caller can have a preset on this server, or None if all can."""
        fields = RoutingFields(preset=name)
        merged = merge_preset(fields, self.presets, "routing.preset")
        try:
            self._check_access(fields, merged, "routing.preset", _LEAST_CALLER)
            resolve(merged, self.capabilities)
        except RoutingError as error:
            return error
        return None

    def _check_access(
        self, fields: RoutingFields, merged: RoutingFields, param: str, caller: Caller
    ) -> None:
        flag = self.capabilities.expert_routing
        check_access(fields, merged, param, caller, expert_routing=flag)

    def _split_model(self, model: Any) -> tuple[Any, str | None]:
        """`<model>@<preset>` as (model, preset); any other id as it is."""
        if isinstance(model, str) and model not in self.capabilities.models:
            base, separator, preset = model.rpartition(MODEL_SEPARATOR)
            if separator and base in self.capabilities.models:
                return base, preset
        return model, None


@contextmanager
def _errors_name(preset: str | None) -> Iterator[None]:
    """Put the request's preset into the errors of its routing, for the metric's label."""
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


def _refuse_literal_extra_body(body: dict[str, Any]) -> None:
    """Refuse `extra_body` as a field: it is a keyword of OpenAI's client, which unpacks it."""
    extra_body = body.get("extra_body")
    if isinstance(extra_body, dict) and "routing" in extra_body:
        raise RoutingError(
            "extra_body is no field of the API: send `routing` beside `model`, at the top level of "
            "the body",
            param="extra_body.routing",
            reason="invalid_field",
        )


def _check_combination(body: dict[str, Any]) -> None:
    """Refuse what does not run together with routing."""
    given = {
        "use_beam_search": ("beam search", _is_true(body.get("use_beam_search"))),
        "prompt_embeds": ("prompt embeddings", body.get("prompt_embeds") not in (None, "", [])),
        "background": ("background responses", _is_true(body.get("background"))),
    }
    for field, (name, asks) in given.items():
        if asks:
            raise RoutingError(
                f"routing does not run together with {name}",
                param=field,
                reason="unsupported_combination",
            )


def _is_true(value: Any) -> bool:
    """Whether vLLM reads a value as true; what it cannot read it refuses itself."""
    try:
        return value is not None and _BOOLEAN.validate_python(value)
    except ValidationError:
        return False


def _engine_body(
    path: str, body: dict[str, Any], model: Any, extra: RoutingExtraArgs, secret: str
) -> dict[str, Any]:
    """The body as vLLM's route understands it.

    A field of vLLM's that is not valid stays as it is, for vLLM to refuse.
    """
    engine_body = {key: value for key, value in body.items() if key != "routing"}
    if model is not None:
        engine_body["model"] = model
    xargs = body.get("vllm_xargs")
    if xargs is None or isinstance(xargs, dict):
        engine_body["vllm_xargs"] = {**(xargs or {}), EXTRA_ARGS_KEY: extra.encode()}
    salt = body.get("cache_salt")
    if _is_salt(salt):
        policy_salt = cache_salt(extra, salt, secret)
        if policy_salt is not None:
            engine_body["cache_salt"] = policy_salt
    if path in _USAGE_BY_CHOICE and _is_true(body.get("stream")) and extra.policy.report:
        # The usage chunk carries the report, so the server must send one.
        options = body.get("stream_options")
        if options is None or isinstance(options, dict):
            engine_body["stream_options"] = {**(options or {}), "include_usage": True}
    return engine_body


def _is_salt(salt: Any) -> bool:
    """Whether vLLM takes a client's salt."""
    from vllm.entrypoints.generate.base.protocol import validate_cache_salt
    from vllm.exceptions import VLLMValidationError

    try:
        validate_cache_salt(salt)
    except VLLMValidationError:
        return False
    return True
