"""An HTML page as its reader finds it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

VOID = {"meta"}
"""Elements without an end that our pages have."""


class Page(HTMLParser):
    """What a reader of the page finds: elements, tables by caption, and pieces to copy."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[list[Any]]]] = {}
        self.copies: list[Any] = []
        self.text = ""
        self._open: list[str] = []
        self._rows: list[list[list[Any]]] = []
        self._caption = self._copied = ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = {name: value or "" for name, value in attrs}
        self.elements.append((tag, held))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append([])
        elif tag == "data":
            value = float(held["value"])
            if {"td", "th"} & {*self._open}:
                self._rows[-1][-1].append(value)
        elif tag == "code" and held.get("class") == "copy":
            self._copied = " "

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            assert self._caption not in self.tables
            self.tables[self._caption.strip()] = self._rows
        elif tag == "code" and self._copied:
            self.copies.append(json.loads(self._copied))
            self._copied = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._copied:
            self._copied += data
        if "caption" in self._open:
            self._caption += data
        elif {"td", "th"} & {*self._open} and "data" not in self._open and data.strip():
            self._rows[-1][-1].append(data.strip())

    def of(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [
            held
            for name, held in self.elements
            if name == tag
            and wanted.items() <= {k.replace("-", "_"): v for k, v in held.items()}.items()
        ]
