"""`/openapi.json`: vLLM's description, with our title, our version and `routing` in each body."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from sluice.models.routing.schema import RoutingFields
from sluice.server.endpoints import ROUTED
from sluice.server.telemetry.build_info import sluice_version

_TITLE = "Sluice"
_COMPONENTS = "#/components/schemas/"


def describe_routing(app: FastAPI) -> None:
    """Have an app describe `routing` where its routes take it."""
    stock = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.title, app.version = _TITLE, sluice_version()
            app.openapi_schema = with_routing(stock())
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def with_routing(schema: dict[str, Any]) -> dict[str, Any]:
    """A description of an app with a field more in the body of every route that takes routing.

    Args:
        schema: OpenAPI; changed in place.
    """
    routing = RoutingFields.model_json_schema(ref_template=_COMPONENTS + "{model}")
    schemas = schema["components"]["schemas"]
    schemas |= routing.pop("$defs")
    schemas[RoutingFields.__name__] = routing
    for path in ROUTED & schema["paths"].keys():
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"]["$ref"].removeprefix(_COMPONENTS)
        properties = schemas[name]["properties"]
        properties["routing"] = {"$ref": _COMPONENTS + RoutingFields.__name__}
    return schema
