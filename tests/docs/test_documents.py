"""What the documents name is there: files, headings, modules and commands."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "models/offline/demo/*/README.md")
    for path in ROOT.glob(pattern)
)
FOLDERS = "server|models|kernels|loadtest|tests|docs|examples|requirements"
PATH = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\w")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
MODULE = re.compile(r"sluice\.(?:server|models|kernels|loadtest)[\w.]*\w")
MOVED = "### Changed"
"""The changelog names what stood elsewhere before under this heading."""

documents = pytest.mark.parametrize(
    "document", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS]
)


def text_of(document: Path) -> str:
    text = document.read_text()
    if document.name == "CHANGELOG.md":
        before, _, after = text.partition(MOVED)
        text = before + after.partition("\n### ")[2]
    return text


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for link, anchor in LINK.findall(document.read_text()):
        target = (document.parent / link).resolve() if link else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}#{anchor}"


@documents
def test_paths_are_there(document: Path) -> None:
    named = [path for path in PATH.findall(text_of(document)) if "NAME" not in path]
    missing = [path for path in named if not (ROOT / path).exists()]
    assert missing == []


@documents
def test_modules_are_there(document: Path) -> None:
    missing = []
    for name in MODULE.findall(text_of(document)):
        package, _, last = name.rpartition(".")
        if find_spec(name) is None and not hasattr(__import__(package, fromlist=[last]), last):
            missing.append(name)
    assert missing == []
