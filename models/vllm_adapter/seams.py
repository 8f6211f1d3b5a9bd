"""Whether a vLLM has the names that Sluice uses of it, read from its sources.

Nothing is imported, so that the sources of another version can be asked too. Attributes that a
class sets on `self` count as its names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Seam:
    """Names that Sluice uses of one class, or of one module.

    Attributes:
        file: below vLLM's package folder.
        owner: the class; empty for the module's own functions.
        names: methods, attributes or fields; functions of a module.
    """

    file: str
    owner: str
    names: tuple[str, ...]

    def moved(self, found: Iterable[str] | None) -> list[str]:
        """What is not among the names that were found; None is a class or file that is gone."""
        known = set(found or ())
        where = f"{self.owner or 'the module'} in {self.file}"
        if found is None:
            return [where]
        return [f"`{name}` on {where}" for name in self.names if name not in known]


def names_in(source: str, owner: str) -> set[str] | None:
    """Names that a class, or with an empty `owner` a module, defines; None without the class."""
    tree = ast.parse(source)
    if not owner:
        return {name for node in tree.body for name in _defined(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            own = {name for each in node.body for name in _defined(each)}
            return own | {name for each in ast.walk(node) for name in _set_on_self(each)}
    return None


def moved(folder: Path, seams: Iterable[Seam]) -> list[str]:
    """What a vLLM no longer has, in words.

    Args:
        folder: of its package.
        seams: to look for.
    """
    sources: dict[str, str | None] = {}
    gone: list[str] = []
    for seam in seams:
        if seam.file not in sources:
            path = folder / seam.file
            sources[seam.file] = path.read_text(encoding="utf-8") if path.is_file() else None
        source = sources[seam.file]
        gone += seam.moved(None if source is None else names_in(source, seam.owner))
    return gone


def _defined(node: ast.stmt) -> Iterable[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.ImportFrom():
            return [alias.asname or alias.name for alias in node.names]
        case ast.Assign():
            return [target.id for target in node.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _set_on_self(node: ast.AST) -> Iterable[str]:
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
            return [name]
    return []
