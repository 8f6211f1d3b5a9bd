"""The path of a request, as the router sees it."""

from __future__ import annotations

from starlette._utils import get_route_path
from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """Path below the app's root.

    It is the router's own function: a guard that strips the root in any other way (a root of `/`
    is enough) reads another path than the one that is served.
    """
    return get_route_path(scope)
