"""Every method by the name a request gives it.

A method is found by its file: each module of `sluice.models.depth.exits` and
`sluice.models.depth.adaptive` has one. A module that was added to a package's `__path__` is found
like any other. What a method misses is told here, before a request can name it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType, UnionType
from typing import TypeVar, get_args

from sluice.models.depth import adaptive, exits
from sluice.models.depth.method import (
    AdaptiveMethod,
    DepthMethod,
    ExitMethod,
    PromptMethod,
    PromptTokenMethod,
    StaticExit,
    TokenMethod,
)
from sluice.models.depth.parameters import Choice, LayerShares, Number, Parameter
from sluice.models.policy.policy import AdaptiveRule

RESERVED = frozenset({"method", "layers", "min_layer", "decay", "sparing", "kv", "parameters"})
"""Names that no parameter may have: fields of every exit or rule."""

_Exit = ExitMethod | StaticExit
_Adaptive = PromptMethod | TokenMethod | PromptTokenMethod
_Method = TypeVar("_Method", bound=DepthMethod)


class MethodDefinitionError(TypeError):
    """A method's file lacks something, or clashes with another; the message names both."""


@dataclass(frozen=True, slots=True)
class Methods:
    """All methods by name, those that HTTP does not offer among them."""

    exits: Mapping[str, _Exit]
    adaptive: Mapping[str, AdaptiveMethod]


def methods() -> Methods:
    """All methods.

    Raises:
        MethodDefinitionError: one is not fit to run.
    """
    return _methods(tuple(exits.__path__), tuple(adaptive.__path__))


def offered_exits() -> Mapping[str, _Exit]:
    """Exits that a request may name."""
    return {name: method for name, method in methods().exits.items() if method.offered}


def token_exits() -> Mapping[str, ExitMethod]:
    """Exits that a request may name and that decide token by token."""
    return {n: method for n, method in offered_exits().items() if isinstance(method, ExitMethod)}


def exit_method(name: str) -> ExitMethod:
    """The method of an `ExitRule`, offered or not."""
    method = methods().exits[name]
    assert isinstance(method, ExitMethod)
    return method


def adaptive_methods() -> Mapping[str, AdaptiveMethod]:
    """Adaptive methods, in their default modes."""
    return methods().adaptive


def adaptive_method(rule: AdaptiveRule) -> _Adaptive:
    """The method that does what a rule says."""
    method = methods().adaptive[rule.method].in_mode(rule)
    assert isinstance(method, _Adaptive)
    return method


def parameter_kinds(methods: Mapping[str, DepthMethod]) -> Mapping[str, Parameter]:
    """Every parameter of some methods by name, as one of them has it."""
    return {name: p for method in methods.values() for name, p in method.parameters.items()}


@cache
def _methods(exit_folders: tuple[str, ...], adaptive_folders: tuple[str, ...]) -> Methods:
    """The methods of the packages; the folders are theirs, and tell when to look again."""
    exit_classes = [_method_class(m, _Exit) for m in _modules(exits, exit_folders)]
    adaptive_classes = [_method_class(m, _Adaptive) for m in _modules(adaptive, adaptive_folders)]
    for each in exit_classes:
        _check_threshold(each)
    for each in adaptive_classes:
        _check_modes(each)
    _check_names([*exit_classes, *adaptive_classes])
    _check_kinds(exit_classes)
    _check_kinds(adaptive_classes)
    return Methods(
        _listed(method for each in exit_classes if isinstance(method := each(), _Exit)),
        _listed(method for each in adaptive_classes if isinstance(method := each(), _Adaptive)),
    )


def _listed(found: Iterable[_Method]) -> Mapping[str, _Method]:
    """Methods by name, in the order of lists: those that run without a profile come first."""
    ordered = sorted(found, key=lambda method: (bool(method.profile_tensors), method.name))
    return {method.name: method for method in ordered}


def _modules(package: ModuleType, folders: tuple[str, ...]) -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(folders):
        yield importlib.import_module(f"{package.__name__}.{info.name}")


def _method_class(module: ModuleType, kinds: UnionType) -> type[DepthMethod]:
    """The one public method class that a module defines.

    Raises:
        MethodDefinitionError: there is none or several, or the one is not complete.
    """
    classes = [
        each
        for name, each in vars(module).items()
        if inspect.isclass(each)
        and issubclass(each, kinds)
        and each.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(classes) != 1:
        wanted = " or ".join(kind.__name__ for kind in get_args(kinds))
        raise MethodDefinitionError(
            f"{module.__name__} must define one public {wanted}, and defines {len(classes)}"
        )
    method: type[DepthMethod] = classes[0]
    missing = sorted({*method.__abstractmethods__, *_unset_attributes(method)})
    if missing:
        raise MethodDefinitionError(f"{_title(method)} lacks {', '.join(missing)}")
    for name, parameter in method.parameters.items():
        if name in RESERVED or not name.isidentifier():
            raise MethodDefinitionError(f"{_title(method)}: no parameter may be called {name!r}")
        if isinstance(parameter, LayerShares) and not _overrides(
            method, DepthMethod, "default_shares"
        ):
            raise MethodDefinitionError(f"{_title(method)} lacks default_shares for {name!r}")
    return method


def _unset_attributes(method: type[DepthMethod]) -> Iterator[str]:
    """Class attributes that a base of the method declares and nobody sets."""
    for base in method.__mro__:
        yield from (n for n in vars(base).get("__annotations__", ()) if not hasattr(method, n))


def _check_threshold(method: type[DepthMethod]) -> None:
    """An exit that is held against a threshold takes one, or has another of its own."""
    if not issubclass(method, ExitMethod):
        return
    threshold = method.parameters.get("threshold")
    if isinstance(threshold, Number) and not threshold.optional:
        return
    if threshold is not None or method.decays or not _overrides(method, ExitMethod, "threshold"):
        raise MethodDefinitionError(
            f"{_title(method)} lacks a parameter 'threshold', or a method of this name"
        )


def _check_modes(method: type[DepthMethod]) -> None:
    """Every choice leads to a method that is complete: modes are not files of their own."""
    default = method()
    assert isinstance(default, AdaptiveMethod)
    for name, parameter in method.parameters.items():
        for value in parameter.values if isinstance(parameter, Choice) else ():
            mode = default.in_mode(AdaptiveRule(method.name, **{name: value}))
            missing = sorted(_unset_attributes(type(mode)))
            if missing or not isinstance(mode, _Adaptive):
                lack = ", ".join(missing) or "a kind"
                raise MethodDefinitionError(f"{_title(method)}: {name} {value!r} lacks {lack}")


def _overrides(method: type, base: type, name: str) -> bool:
    return getattr(method, name, None) is not getattr(base, name)


def _check_names(found: Iterable[type[DepthMethod]]) -> None:
    """No two methods share a name: a profile keeps all their tensors side by side."""
    by_name: dict[str, type] = {}
    for method in found:
        other = by_name.setdefault(method.name, method)
        if other is not method:
            raise MethodDefinitionError(
                f"{_title(method)} and {_title(other)} are both called {method.name!r}"
            )


def _check_kinds(found: Iterable[type[DepthMethod]]) -> None:
    """A parameter that several methods take is of one kind: it is one field of the request."""
    kinds: dict[str, tuple[object, type]] = {}
    for method in found:
        for name, parameter in method.parameters.items():
            kind = (type(parameter), getattr(parameter, "integer", False))
            known, other = kinds.setdefault(name, (kind, method))
            if known != kind:
                raise MethodDefinitionError(
                    f"{_title(method)}: parameter {name!r} is of another kind than in "
                    f"{_title(other)}"
                )


def _title(method: type) -> str:
    return f"{method.__module__}.{method.__name__}"
