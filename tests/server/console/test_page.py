"""The console's files as they are served, without a server or a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sluice.server.console import page
from sluice.server.console.page import build_console_router, console_files

FOLDER = Path(page.__file__).parent
KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
NAMES = sorted(console_files())
PATHS = {name: "/console" if name == "index.html" else f"/console/{name}" for name in NAMES}


class Elements(HTMLParser):
    """The elements of the page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed((FOLDER / "index.html").read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(build_console_router())
    return TestClient(app, follow_redirects=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_file(client: TestClient, name: str) -> None:
    answer = client.get(PATHS[name])
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == KINDS[name.rpartition(".")[2]]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    head = client.head(PATHS[name])
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(answer.content))


@pytest.mark.parametrize("name", NAMES)
def test_the_browser_asks_whether_it_has_changed(client: TestClient, name: str) -> None:
    etag = client.get(PATHS[name]).headers["etag"]
    for known in (etag, f'"other", W/{etag}'):
        answer = client.get(PATHS[name], headers={"if-none-match": known})
        assert (answer.status_code, answer.content) == (304, b""), known
        assert answer.headers["etag"] == etag
    assert client.get(PATHS[name], headers={"if-none-match": '"other"'}).status_code == 200


def test_files_have_tags_of_their_own() -> None:
    assert len({file.etag for file in console_files().values()}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_may_run_or_load(client: TestClient, name: str) -> None:
    header = client.get(PATHS[name]).headers["content-security-policy"]
    policy = dict(part.strip().split(" ", 1) for part in header.split(";"))
    for loads in ("script-src", "style-src", "img-src", "connect-src"):
        assert policy.pop(loads) == "'self'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert policy.pop("default-src") == "'none'"
    closed = {"base-uri", "form-action", "frame-ancestors", "trusted-types"}
    assert policy == dict.fromkeys(closed, "'none'")


@pytest.mark.parametrize(
    "path",
    [
        "/console/",
        "/console/other.js",
        "/console/index.html",
        "/console/page.py",
        "/console/__init__.py",
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    answer = client.get(path)
    if path == "/console/":
        assert (answer.status_code, answer.headers["location"]) == (
            307,
            "http://testserver/console",
        )
    else:
        assert answer.status_code == 404


@pytest.mark.parametrize("climb", ["..%2fplugin.py", "%2e%2e/plugin.py", "..%5cplugin.py"])
def test_no_way_out_of_the_folder(client: TestClient, climb: str) -> None:
    assert client.get(f"/console/{climb}").status_code == 404


def test_the_page_takes_no_other_method(client: TestClient) -> None:
    assert client.post("/console").status_code == 405


def test_the_page_names_its_files_and_no_others() -> None:
    found = Elements().found
    named = {held[key] or "" for _, held in found for key in ("src", "href") if key in held}
    files = {name.removeprefix("console/") for name in named if not name.startswith("#")}
    imports = {
        name
        for script in FOLDER.glob("*.js")
        for name in re.findall(r'^import .* from "\./(.*)";$', script.read_text(), re.M)
    }
    assert files | imports | {"index.html"} == {*NAMES}


def test_nothing_is_inline() -> None:
    found = Elements().found
    assert all("src" in held for tag, held in found if tag == "script")
    assert all(tag != "style" for tag, _ in found)
    attributes = {name for _, held in found for name in held}
    assert not [name for name in attributes if name == "style" or name.startswith("on")]


def test_files_are_of_a_size_to_be_read() -> None:
    for name in NAMES:
        assert len((FOLDER / name).read_text().splitlines()) <= 300, name
