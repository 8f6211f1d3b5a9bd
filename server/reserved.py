"""What only the server may write into a request: our extra argument, and our cache salts."""

from __future__ import annotations

from typing import Any

from sluice.models.depth.prefix_sharing import SALT_PREFIX
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY
from sluice.models.routing.errors import RoutingError

_EXTRA_ARGS_FIELDS = ("vllm_xargs", "extra_args")
_SALT_FIELD = "cache_salt"

_Path = tuple[Any, str | int] | None
"""A place in a body: the place of its parent, and the key or index there. None is the body."""


def refuse_reserved(body: dict[str, Any]) -> None:
    """Refuse what is ours, at any depth of any endpoint's body.

    A loop and not a recursion, since a body may be nested deeper than Python recurses. Places are
    spelt out only for an error: a body of small values under a long key would fill the memory.

    Raises:
        RoutingError: names the field.
    """
    pending: list[tuple[_Path, Any]] = [(None, body)]
    while pending:
        place, value = pending.pop()
        if isinstance(value, list):
            nested = (dict, list)
            pending += [
                ((place, index), child)
                for index, child in enumerate(value)
                if isinstance(child, nested)
            ]
            continue
        for key, child in value.items():
            if isinstance(child, dict):
                if key in _EXTRA_ARGS_FIELDS and EXTRA_ARGS_KEY in child:
                    where = _dotted(((place, key), EXTRA_ARGS_KEY))
                    raise _reserved(where, f"{where} is reserved; send a `routing` object")
                pending.append(((place, key), child))
            elif isinstance(child, list):
                pending.append(((place, key), child))
            elif key == _SALT_FIELD and isinstance(child, str) and child.startswith(SALT_PREFIX):
                where = _dotted((place, key))
                raise _reserved(where, f"{where}: salts that begin with {SALT_PREFIX!r} are ours")


def _dotted(place: _Path) -> str:
    names: list[str] = []
    while place is not None:
        place, name = place
        names.append(str(name))
    return ".".join(reversed(names))


def _reserved(param: str, message: str) -> RoutingError:
    return RoutingError(message, param=param, reason="reserved_argument")
