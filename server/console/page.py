"""The console's files and their routes: `/console` and what lies below it.

The files hold nothing of the server, so that they need no key; whatever the page shows, it asks of
the public API with the key of the person in front of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import HTTPException

PAGE = "index.html"

# Not by `mimetypes`, which asks the operating system and is told other things on other machines.
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""`no-cache` asks each time whether the file is still the same, and 304 says so."""


@dataclass(frozen=True, slots=True)
class ConsoleFile:
    """One file of the console.

    Attributes:
        content: its bytes.
        content_type: with the charset.
        etag: of the content, quoted.
    """

    content: bytes
    content_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file whose suffix is one of the console's.

        Raises:
            KeyError: it is not.
        """
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:32]
        return cls(content, _CONTENT_TYPES[path.suffix], f'"{digest}"')

    def answer(self, request: Request) -> Response:
        """200 with the file, or 304 if the browser has it."""
        headers = {**_HEADERS, "ETag": self.etag}
        known = request.headers.get("if-none-match", "")
        if self.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers={**headers, "Content-Type": self.content_type})


def console_files() -> dict[str, ConsoleFile]:
    """The files beside this module, by name."""
    found = sorted(Path(__file__).parent.iterdir())
    return {path.name: ConsoleFile.read(path) for path in found if path.suffix in _CONTENT_TYPES}


def build_console_router() -> APIRouter:
    """`/console` and `/console/{name}`; a name that is no file of the console is a 404."""
    router = APIRouter(include_in_schema=False)
    files = console_files()
    page = files.pop(PAGE)

    @router.api_route("/console", methods=["GET", "HEAD"])
    async def console(request: Request) -> Response:
        return page.answer(request)

    @router.api_route("/console/{name}", methods=["GET", "HEAD"])
    async def console_file(name: str, request: Request) -> Response:
        file = files.get(name)
        if file is None:
            raise HTTPException(404, f"the console has no file {name!r}")
        return file.answer(request)

    return router
