"""A profile: what was measured or trained for one model, as a folder of JSON and safetensors.

`profile.json` holds numbers and lists (`sluice.models.profile.fields`), bound to the model by its
fingerprint; `heads.safetensors` holds trained tensors, named `<method>.<tensor>` in fp32 (a
method's file names and shapes them); `references.safetensors` holds the re-mix references, for
each set `<set>.embeddings`, (references, width), and `<set>.pathways`, (references, layers,
experts). The HTTP edge reads the JSON and the tensors' names, the worker the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from sluice.models.depth.method import DepthMethod
from sluice.models.depth.registry import methods
from sluice.models.depth.skip_order import Importance, Unit
from sluice.models.depth.stream_adapter import StreamAdapter, adapters_of, tensor_names
from sluice.models.profile.checks import problems
from sluice.models.profile.expert_fields import ReferenceSet
from sluice.models.profile.fields import ProfileFields
from sluice.models.profile.fingerprint import fingerprint, model_folder
from sluice.models.profile.frontier_fields import FrontierFields, FrontierPoint
from sluice.models.profile.layer_fields import ExitThreshold
from sluice.models.profile.writer import HEADS_NAME, JSON_NAME, REFERENCES_NAME, SCHEMA, digest_of

if TYPE_CHECKING:
    from torch import Tensor

PROFILE_ENV = "SLUICE_PROFILE"
"""Folder of the profile; an environment variable, so that every process vLLM starts inherits it."""


class ProfileError(ValueError):
    """A profile cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile whose parts have been checked against each other.

    Attributes:
        folder: where it lies.
        fields: what `profile.json` holds.
        methods: names of the methods whose trained tensors are all here.
    """

    folder: Path
    fields: ProfileFields
    methods: frozenset[str]

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Read and check a profile.

        Raises:
            ProfileError: a file is missing, malformed, edited, cut off, or of another schema, or
                its parts do not fit together.
        """
        fields = _fields(folder / JSON_NAME)
        for problem in problems(fields):
            raise ProfileError(f"profile {folder / JSON_NAME}: {problem}")
        for name, digest in fields.files.items():
            _check_file(folder / name, digest)
        for name in (HEADS_NAME, REFERENCES_NAME):
            if name not in fields.files and (folder / name).exists():
                raise ProfileError(f"profile {folder / name}: {JSON_NAME} does not name this file")
        shapes = _shapes(folder / HEADS_NAME)
        _check_adapters(fields, shapes, folder)
        return cls(folder, fields, _trained_methods(frozenset(shapes)))

    @property
    def layers(self) -> int:
        """Decoder layers of the model it was made for."""
        return self.fields.model.layers

    @property
    def hidden(self) -> int:
        """Hidden size of that model."""
        return self.fields.model.hidden

    @property
    def importance(self) -> Importance | None:
        """`1 - cos` of input and output per layer, or None if it was not measured."""
        found = self.fields.importance
        return None if found is None else {Unit(k): v for k, v in found.model_dump().items()}

    @property
    def super_experts(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert), protected by default."""
        return self.fields.super_experts

    @property
    def references(self) -> Mapping[str, ReferenceSet]:
        """Re-mix reference sets by name."""
        return self.fields.references

    @property
    def frontier(self) -> FrontierFields | None:
        """Settings measured together, or None."""
        return self.fields.frontier

    @property
    def presets(self) -> Mapping[str, FrontierPoint]:
        """Measured points that are presets, by the preset's name."""
        if self.frontier is None:
            return {}
        points = {point.name: point for point in self.frontier.points}
        return {preset: points[name] for preset, name in self.frontier.presets.items()}

    def exits(self, method: str) -> tuple[ExitThreshold, ...]:
        """Thresholds that were calibrated for an exit method; the first is its default."""
        return tuple(entry for entry in self.fields.exits if entry.method == method)

    def check_model(
        self, layers: int, hidden: int, fingerprint: str, name: str = "this one"
    ) -> None:
        """Refuse another model.

        Args:
            layers: of the model.
            hidden: its hidden size.
            fingerprint: its `sluice.models.profile.fingerprint`.
            name: what to call it.

        Raises:
            ProfileError: it is not the one that the profile was made for.
        """
        made_for = self.fields.model
        if (layers, hidden) != (made_for.layers, made_for.hidden):
            raise ProfileError(
                f"profile {self.folder} was made for {self.layers} layers of hidden size "
                f"{self.hidden}, and {name} has {layers} of {hidden}"
            )
        if fingerprint != made_for.fingerprint:
            raise ProfileError(
                f"profile {self.folder} was made for a model of {self.layers} layers of hidden "
                f"size {self.hidden} with fingerprint {made_for.fingerprint[:12]}, and that of "
                f"{name} is {fingerprint[:12]}: its configuration or its weights differ"
            )

    def check_folder(self, folder: Path) -> None:
        """Refuse another model than the one in a folder, by its fingerprint alone.

        Raises:
            ProfileError: it is not the one that the profile was made for.
            FingerprintError: its files cannot be read.
        """
        self.check_model(self.layers, self.hidden, fingerprint(folder), str(folder))

    def check_served(self, model_config: Any) -> None:
        """Refuse another model than the one that vLLM has loaded.

        Args:
            model_config: vLLM's `ModelConfig`.

        Raises:
            ProfileError: it is not the one that the profile was made for.
            FingerprintError: its files cannot be read.
        """
        layers, hidden = model_config.get_total_num_hidden_layers(), model_config.get_hidden_size()
        found = fingerprint(model_folder(model_config.model, model_config.revision))
        self.check_model(layers, hidden, found, model_config.model)

    def tensors(self, method: str) -> dict[str, Tensor]:
        """Trained tensors of one method, by their names without the method's prefix."""
        if method not in self.methods:
            return {}
        return _tensors_with(f"{method}.", self.folder / HEADS_NAME)

    def adapters(self, name: str) -> dict[int, StreamAdapter]:
        """The adapters of a name, by the layer after which each acts, fp32."""
        path = self.folder / HEADS_NAME
        return adapters_of(name, self.fields.adapters[name].layers, _tensors_with("", path))

    def reference_tensors(self, name: str) -> dict[str, Tensor]:
        """`embeddings` and `pathways` of one reference set; see the module."""
        return _tensors_with(f"{name}.", self.folder / REFERENCES_NAME)


def _fields(path: Path) -> ProfileFields:
    try:
        wire: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ProfileError(f"profile {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"profile {path}: not JSON: {error}") from None
    version = wire.get("schema_version") if isinstance(wire, dict) else None
    if isinstance(version, int) and version != SCHEMA:
        raise ProfileError(
            f"profile {path}: schema {version} is not {SCHEMA}, which this version of Sluice reads"
        )
    try:
        fields = ProfileFields.model_validate(wire)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise ProfileError(f"profile {path}: {where}: {first['msg']}") from None
    if digest_of(wire) != fields.digest:
        raise ProfileError(
            f"profile {path}: changed after it was written (its digest does not fit); "
            "make it again with `sluice calibrate`"
        )
    return fields


def _check_file(path: Path, digest: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ProfileError(f"profile {path}: {error.strerror}") from error
    if found != digest:
        raise ProfileError(
            f"profile {path}: cut off, or changed after it was written; "
            "make the profile again with `sluice calibrate`"
        )


def _tensors_with(prefix: str, path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {
            name.removeprefix(prefix): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 - not a mapping
            if name.startswith(prefix)
        }


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors by name; none where there is no file."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"profile {path}: {error}") from error


def _check_adapters(
    fields: ProfileFields, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    for name, adapter in fields.adapters.items():
        down, up = (adapter.rank, fields.model.hidden), (fields.model.hidden, adapter.rank)
        for layer in adapter.layers:
            for tensor, shape in zip(tensor_names(name, layer), (down, up), strict=True):
                if shapes.get(tensor) != shape:
                    found = shapes.get(tensor, "missing")
                    raise ProfileError(
                        f"profile {folder / JSON_NAME}: adapters.{name}: {tensor} in {HEADS_NAME} "
                        f"is {found}, not {shape}"
                    )


def _trained_methods(names: frozenset[str]) -> frozenset[str]:
    known: dict[str, DepthMethod] = {**methods().exits, **methods().adaptive}
    return frozenset(
        name
        for name, method in known.items()
        if method.profile_tensors
        and names.issuperset(f"{name}.{tensor}" for tensor in method.profile_tensors)
    )
