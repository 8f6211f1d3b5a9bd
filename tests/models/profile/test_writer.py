"""What a full disk, an interrupt or a wrong field leave of a profile."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file
from support.full_profile import FIELDS, HEADS, REFERENCES

from sluice.models.profile.profile import Profile
from sluice.models.profile.writer import HEADS_NAME, write_profile, write_whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_profile(tmp_path / "profile", FIELDS, HEADS, REFERENCES)
    return tmp_path / "profile"


def full_disk(monkeypatch: pytest.MonkeyPatch, call: str, allowed: int) -> None:
    """From the call after `allowed` on, there is no space left."""
    calls = 0
    stock = {"fsync": os.fsync, "open": Path.open}[call]

    def fails(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        return stock(*arguments, **more)

    monkeypatch.setattr(os if call == "fsync" else Path, call, fails)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.mark.parametrize("call", ["fsync", "open"])
@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_full_disk_leaves_the_old_profile(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, allowed: int
) -> None:
    before = contents(folder)
    heads = {name: tensor + 1 for name, tensor in HEADS.items()}
    references = {name: tensor + 1 for name, tensor in REFERENCES.items()}
    with monkeypatch.context() as patched:
        full_disk(patched, call, allowed)
        with pytest.raises(OSError, match="No space left"):
            write_profile(folder, {**FIELDS, "super_experts": []}, heads, references)
    assert contents(folder) == before
    Profile.load(folder)
    write_profile(folder, {**FIELDS, "super_experts": []}, heads, references)
    assert Profile.load(folder).super_experts == ()
    assert load_file(folder / HEADS_NAME)["classifier.bias"] == 1.5


def test_a_write_that_is_interrupted_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):

        def stop(_descriptor: int, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", stop)
            with pytest.raises(type(error)):
                write_whole(path, b"new")
        assert contents(tmp_path) == {"a.json": b"old"}
    write_whole(path, b"new")
    assert contents(tmp_path) == {"a.json": b"new"}


def test_fields_that_are_no_profiles_are_not_written(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ValidationError, match="super_experts"):
        write_profile(folder, {**FIELDS, "super_experts": 3}, {}, {})
    assert contents(folder) == before
