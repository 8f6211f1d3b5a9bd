"""The keys file, and the command that hashes for it."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path

import pytest

from sluice.server.access.capability import Caller, Capability
from sluice.server.access.keys import Keys, KeysFileError, digest_of
from sluice.server.cli import main as cli


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(name: object = "alice", key: str = "k", capability: str = "basic") -> dict[str, object]:
    return {"id": name, "sha256": sha256(key), "capability": capability}


def written(folder: Path, content: object) -> Path:
    path = folder / "keys.yaml"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_key_is_its_callers_and_nobody_elses(tmp_path: Path) -> None:
    entries = [entry(name, f"key of {name}", name) for name in Capability]
    keys = Keys.load(written(tmp_path, {"keys": entries}))
    for capability in Capability:
        assert keys.caller(f"key of {capability}") == Caller(capability.value, capability)
    for wrong in ("", "key of", "key of basic ", sha256("key of basic"), "b\N{SNOWMAN}"):
        assert keys.caller(wrong) is None


def test_every_entry_is_compared_and_no_comparison_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [entry(name, name) for name in "abc"]
    keys = Keys.load(written(tmp_path, {"keys": entries}))
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("sluice.server.access.keys.hmac.compare_digest", compare)
    assert keys.caller("a") is not None
    assert compared == [(digest_of("a"), digest_of(name)) for name in "abc"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("keys: [", "not YAML, line 1"),
        ("[]", "keys.yaml: "),
        ("keys: []", "keys.yaml.keys: "),
        ({"keys": [entry()], "more": 1}, "keys.yaml.more: "),
        ({"keys": [entry(), {**entry("bob", "l"), "key": "l"}]}, "keys.yaml.keys.1.key: "),
        ({"keys": [{"id": "alice", "capability": "basic"}]}, "keys.yaml.keys.0.sha256: "),
        ({"keys": [{**entry(), "sha256": "ab"}]}, "keys.yaml.keys.0.sha256: "),
        ({"keys": [{**entry(), "sha256": sha256("k") + "\n"}]}, "keys.yaml.keys.0.sha256: "),
        ({"keys": [{**entry(), "sha256": 12}]}, "keys.yaml.keys.0.sha256: "),
        ({"keys": [{**entry(), "sha256": sha256("")}]}, "keys.0.sha256: hash of an empty key"),
        ({"keys": [entry(capability="root")]}, "keys.yaml.keys.0.capability: "),
        ({"keys": [entry("a b")]}, "keys.yaml.keys.0.id: "),
        ({"keys": [entry("a\n")]}, "keys.yaml.keys.0.id: "),
        ({"keys": [entry("")]}, "keys.yaml.keys.0.id: "),
        ({"keys": [entry("a" * 65)]}, "keys.yaml.keys.0.id: "),
        ({"keys": [entry(7)]}, "keys.yaml.keys.0.id: "),
        ({"keys": [entry("a", "k"), entry("b", "l"), entry("a", "m")]}, "2.id: .* entry 0"),
        ({"keys": [entry("a", "k"), entry("b", "k")]}, "1.sha256: .* entry 0"),
    ],
)
def test_a_bad_file_is_named_with_its_entry(
    tmp_path: Path, content: object, complaint: str
) -> None:
    with pytest.raises(KeysFileError, match=complaint):
        Keys.load(written(tmp_path, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError, match="nowhere"):
        Keys.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    ["keys: [{id: a, sha256: my-secret: x}]", {"keys": [{**entry(), "sha256": "my-secret"}]}],
)
def test_a_key_that_was_not_hashed_is_not_repeated(tmp_path: Path, content: object) -> None:
    with pytest.raises(KeysFileError) as caught:
        Keys.load(written(tmp_path, content))
    assert "my-secret" not in str(caught.value)


def hash_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *options: str,
    text: str = "",
) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["sluice", "keys", "hash", *options])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    cli.main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_hash_of_a_key_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    assert hash_command(monkeypatch, capsys, text=f"a-key{ending}") == [
        f"sha256: {sha256('a-key')}"
    ]


def test_a_new_key_comes_with_its_hash_and_opens_the_door(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second = (hash_command(monkeypatch, capsys, "--new") for _ in "ab")
    assert first != second
    key = first[0].removeprefix("key: ")
    assert len(key) >= 43
    file = f"keys: [{{id: a, capability: admin, {first[1]}}}]"
    assert Keys.load(written(tmp_path, file)).caller(key) == Caller("a", Capability.ADMIN)


@pytest.mark.parametrize(
    "text", ["", "\n", "two words", "one\ntwo\n", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]
)
def test_what_no_header_carries_is_no_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with pytest.raises(SystemExit, match="visible ASCII"):
        hash_command(monkeypatch, capsys, text=text)
