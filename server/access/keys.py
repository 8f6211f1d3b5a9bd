"""API keys from a YAML or JSON file: hashes only, each with an id and a capability.

keys:
  - id: alice
    sha256: 64 hex digits, from `sluice keys hash`
    capability: experts
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, StrictStr, ValidationError

from sluice.models.routing.problems import first_problem
from sluice.models.routing.schema import StrictFields
from sluice.server.access.capability import Caller, Capability

KEY = re.compile(r"[!-~]+")
"""Visible ASCII: what a header carries unchanged."""

_Id = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\z")]
_Hex = Annotated[StrictStr, Field(pattern=r"^[0-9a-fA-F]{64}\z")]
_EMPTY = hashlib.sha256(b"").digest()


class KeysFileError(ValueError):
    """A keys file cannot be used; the message names the file and the entry, never its content."""


class _KeyFields(StrictFields):
    id: _Id
    sha256: _Hex
    capability: Capability


class _KeysFile(StrictFields):
    keys: Annotated[list[_KeyFields], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Keys:
    """Known keys.

    Attributes:
        entries: SHA-256 digest of a key, and who it is.
    """

    entries: tuple[tuple[bytes, Caller], ...]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a keys file (JSON is YAML).

        Raises:
            KeysFileError: the file is missing, not YAML, empty of keys, an entry is not valid, or
                two entries share an id or a key.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise KeysFileError(f"keys file {path}: {error}") from None
        except yaml.YAMLError as error:
            # The error's own text quotes the line, which may be a key that was not hashed.
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}" if mark else "somewhere"
            raise KeysFileError(f"keys file {path}: not YAML, {where}") from None
        try:
            fields = _KeysFile.model_validate(content).keys
        except ValidationError as error:
            where, text = first_problem(error, str(path))
            raise KeysFileError(f"keys file {where}: {text}") from None
        digests = [bytes.fromhex(entry.sha256) for entry in fields]
        _check_unique([entry.id for entry in fields], path, "id")
        _check_unique(digests, path, "sha256")
        if _EMPTY in digests:
            raise KeysFileError(
                f"keys file {path}.keys.{digests.index(_EMPTY)}.sha256: hash of an empty key"
            )
        callers = [Caller(entry.id, entry.capability) for entry in fields]
        return cls(tuple(zip(digests, callers, strict=True)))

    def caller(self, key: str) -> Caller | None:
        """Who a key belongs to, or None if it is unknown. Takes as long for any key."""
        digest = digest_of(key)
        owner: Caller | None = None
        for known, caller in self.entries:
            if hmac.compare_digest(digest, known):
                owner = caller
        return owner


def digest_of(key: str) -> bytes:
    """SHA-256 of a key, 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


def _check_unique(values: Sequence[object], path: Path, name: str) -> None:
    for position, value in enumerate(values):
        first = values.index(value)
        if first < position:
            raise KeysFileError(
                f"keys file {path}.keys.{position}.{name}: the same as of entry {first}"
            )
