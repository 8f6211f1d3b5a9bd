"""A profile: what was measured or trained for one model, as a folder of JSON and safetensors.

`profile.json` holds the schema version, the model's shape and the importance of its layers;
`heads.safetensors` holds trained tensors, named `<method>.<tensor>` in fp32 (a method's file
names and shapes them); `references.safetensors` holds the re-mix references, for each set
`<set>.embeddings`, (references, width), and `<set>.pathways`, (references, layers, experts). The
HTTP edge reads the JSON and the tensors' names, the worker the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from sluice.models.depth.method import ExitMethod, PromptMethod
from sluice.models.depth.order import Importance, Unit
from sluice.models.depth.registry import EXIT_METHODS, PROMPT_METHODS

if TYPE_CHECKING:
    from torch import Tensor

PROFILE_ENV = "SLUICE_PROFILE"
"""Folder of the profile; an environment variable, so that every process vLLM starts inherits it."""

SCHEMA = 1
JSON_NAME = "profile.json"
HEADS_NAME = "heads.safetensors"
REFERENCES_NAME = "references.safetensors"


class ProfileError(ValueError):
    """A profile cannot be used; the message names the file and what is wrong."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Shape(_Strict):
    layers: int
    hidden: int


class _ImportanceFields(_Strict):
    block: list[float]
    attention: list[float]
    mlp: list[float]


class ReferenceSet(_Strict):
    """A named set of re-mix references (C3PO).

    Attributes:
        layers: decoder layers whose router probabilities it holds, ascending.
        width: of its prompt embeddings.
        encoder: `model` if they are the model's own (`sluice.models.experts.remix`), or the name
            of the encoder that the client has to use.
    """

    layers: tuple[int, ...]
    width: int
    encoder: str = "model"


class _ProfileFields(_Strict):
    schema_version: int
    model: _Shape
    importance: _ImportanceFields | None = None
    super_experts: tuple[tuple[int, int], ...] = ()
    references: dict[str, ReferenceSet] = {}


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile whose parts have been checked against each other.

    Attributes:
        folder: where it lies.
        layers: of the model it was made for.
        hidden: hidden size of that model.
        importance: `1 - cos` of input and output per layer, or None if it was not measured.
        methods: names of the methods whose trained tensors are all here.
        super_experts: (layer, expert), protected by default.
        references: re-mix reference sets by name.
    """

    folder: Path
    layers: int
    hidden: int
    importance: Importance | None
    methods: frozenset[str]
    super_experts: tuple[tuple[int, int], ...] = ()
    references: Mapping[str, ReferenceSet] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Read and check a profile.

        Raises:
            ProfileError: a file is missing, malformed, or of another schema.
        """
        path = folder / JSON_NAME
        try:
            fields = _ProfileFields.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ProfileError(f"profile {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "file"
            raise ProfileError(f"profile {path}: {where}: {first['msg']}") from None
        if fields.schema_version != SCHEMA:
            raise ProfileError(
                f"profile {path}: schema {fields.schema_version} is not {SCHEMA}, "
                "which this version of Sluice reads"
            )
        importance = None
        if fields.importance is not None:
            importance = {Unit(k): tuple(v) for k, v in fields.importance.model_dump().items()}
            for unit, values in importance.items():
                if len(values) != fields.model.layers:
                    raise ProfileError(
                        f"profile {path}: importance.{unit} has {len(values)} entries for "
                        f"{fields.model.layers} layers"
                    )
        return cls(
            folder=folder,
            layers=fields.model.layers,
            hidden=fields.model.hidden,
            importance=importance,
            methods=_trained_methods(folder / HEADS_NAME),
            super_experts=fields.super_experts,
            references=MappingProxyType(dict(fields.references)),
        )

    def check_model(self, layers: int, hidden: int) -> None:
        """Refuse a model of another shape.

        Raises:
            ProfileError: the shapes differ.
        """
        if (layers, hidden) != (self.layers, self.hidden):
            raise ProfileError(
                f"profile {self.folder} was made for {self.layers} layers of hidden size "
                f"{self.hidden}, and the model has {layers} of {hidden}"
            )

    def tensors(self, method: str) -> dict[str, Tensor]:
        """Trained tensors of one method, by their names without the method's prefix."""
        if method not in self.methods:
            return {}
        return _tensors_with(f"{method}.", self.folder / HEADS_NAME)

    def reference_tensors(self, name: str) -> dict[str, Tensor]:
        """`embeddings` and `pathways` of one reference set; see the module."""
        return _tensors_with(f"{name}.", self.folder / REFERENCES_NAME)


def _tensors_with(prefix: str, path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {
            name.removeprefix(prefix): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 - not a mapping
            if name.startswith(prefix)
        }


def _trained_methods(path: Path) -> frozenset[str]:
    if not path.exists():
        return frozenset()
    try:
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"profile {path}: {error}") from error
    methods: dict[str, ExitMethod | PromptMethod] = {**EXIT_METHODS, **PROMPT_METHODS}
    return frozenset(
        name
        for name, method in methods.items()
        if method.profile_tensors
        and names.issuperset(f"{name}.{tensor}" for tensor in method.profile_tensors)
    )
