"""What makes two models one to a profile, and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import CONFIG, TENSORS, write_checkpoint
from torch import Tensor

from sluice.models.profile.fingerprint import FingerprintError, fingerprint, model_folder

LARGE = torch.arange(4096.0)
"""Four times what is read of a tensor."""


@pytest.fixture
def known(tmp_path: Path) -> str:
    return fingerprint(write_checkpoint(tmp_path / "known"))


@pytest.mark.parametrize("shards", [2, 4])
def test_sharding_does_not_matter(tmp_path: Path, known: str, shards: int) -> None:
    assert fingerprint(write_checkpoint(tmp_path / "other", shards=shards)) == known
    turned = dict(reversed(TENSORS.items()))
    assert fingerprint(write_checkpoint(tmp_path / "turned", turned, shards=shards)) == known


@pytest.mark.parametrize(
    "key", ["_name_or_path", "transformers_version", "dtype", "torch_dtype"], ids=str
)
def test_where_it_came_from_and_how_it_is_loaded_do_not_matter(
    tmp_path: Path, known: str, key: str
) -> None:
    config = {**CONFIG, key: "another"}
    assert fingerprint(write_checkpoint(tmp_path / "other", config=config)) == known


CHANGES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "a value": ({"b": TENSORS["b"] + 1e-3}, {}),
    "a type": ({"b": TENSORS["b"].half()}, {}),
    "a type of equal bytes": ({"b": TENSORS["b"].view(torch.int32)}, {}),
    "a shape": ({"b": TENSORS["b"].view(6, 4)}, {}),
    "a tensor more": ({"e": TENSORS["a"]}, {}),
    "a value of the configuration": ({}, {"hidden_size": 9}),
    "a key of the configuration": ({}, {"rope_theta": 1e4}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_makes_another_model(tmp_path: Path, known: str, name: str) -> None:
    tensors, config = CHANGES[name]
    other = write_checkpoint(
        tmp_path / "other", {**{k: v.clone() for k, v in TENSORS.items()}, **tensors},
        {**CONFIG, **config},
    )  # fmt: skip
    assert fingerprint(other) != known


def test_tensors_that_change_places_make_another_model(tmp_path: Path, known: str) -> None:
    swapped = {**TENSORS, "a": TENSORS["b"], "b": TENSORS["a"]}
    assert fingerprint(write_checkpoint(tmp_path / "swapped", swapped)) != known
    fewer = {name: TENSORS[name] for name in "abc"}
    assert fingerprint(write_checkpoint(tmp_path / "fewer", fewer)) != known


def test_a_large_tensor_is_known_by_its_middle(tmp_path: Path) -> None:
    """Training changes all of a tensor, so that is enough; the module says so."""
    first = fingerprint(write_checkpoint(tmp_path / "a", {"a": LARGE}))
    for place, same in ((0, True), (2048, False), (4095, True)):
        changed = LARGE.clone()
        changed[place] = -1.0
        folder = write_checkpoint(tmp_path / f"{place}", {"a": changed})
        assert (fingerprint(folder) == first) is same, place


@pytest.mark.parametrize("missing", [1, 40, 100])
def test_a_file_that_is_cut_off(tmp_path: Path, missing: int) -> None:
    folder = write_checkpoint(tmp_path / "cut", {"a": LARGE})
    file = folder / "model-0.safetensors"
    file.write_bytes(file.read_bytes()[:-missing])
    with pytest.raises(FingerprintError, match=r"model-0\.safetensors: tensor a is cut off"):
        fingerprint(folder)


def header(fields: Any) -> bytes:
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


NO_FILES: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is a README, not a tensor",
    "a header longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "a header beyond every file": b"\xff" * 16,
    "a header that is a list": header([1]),
    "a tensor without a place": header({"a": {"dtype": "F32", "shape": [1]}}),
    "a tensor whose place is text": header({"a": {"data_offsets": ["0", "4"]}}),
    "a tensor whose place is a number": header({"a": {"data_offsets": 4}}),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_a_file_that_is_none(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model-0.safetensors").write_bytes(NO_FILES[name])
    with pytest.raises(FingerprintError, match=r"model-0\.safetensors: not a safetensors file"):
        fingerprint(folder)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match=r"config\.json: No such file"):
        fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FingerprintError, match=r"config\.json: Expecting"):
        fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FingerprintError, match=r"config\.json: not a JSON object"):
        fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FingerprintError, match="no safetensors weights"):
        fingerprint(tmp_path)


def test_a_folder_is_where_it_says(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "no/such/folder", "a b"])
def test_a_name_that_is_not_here(name: str) -> None:
    with pytest.raises(FingerprintError, match=f"{name}: neither a folder nor a model"):
        model_folder(name)


def test_a_name_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--someone--small"
    snapshot = repository / "snapshots" / ("a" * 40)
    write_checkpoint(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert model_folder("someone/small") == snapshot
    assert model_folder("someone/small", "a" * 40) == snapshot
    with pytest.raises(FingerprintError, match="someone/small: neither"):
        model_folder("someone/small", "b" * 40)
