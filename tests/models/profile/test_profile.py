"""Profiles on disk: what is read back, and what is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import TENSORS, write_checkpoint
from support.full_profile import EVEN, FIELDS, HEADS, MODEL, REFERENCES

from sluice.models.depth.skip_order import Unit
from sluice.models.profile.fingerprint import FingerprintError, fingerprint
from sluice.models.profile.profile import Profile, ProfileError
from sluice.models.profile.writer import (
    HEADS_NAME,
    JSON_NAME,
    REFERENCES_NAME,
    digest_of,
    write_profile,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_profile(tmp_path / "profile", FIELDS, HEADS, REFERENCES)
    return tmp_path / "profile"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> None:
    """Change `profile.json`, with a digest that fits if `sign`."""
    wire = json.loads((folder / JSON_NAME).read_text())
    change(wire)
    if sign:
        wire["digest"] = digest_of(wire)
    (folder / JSON_NAME).write_text(json.dumps(wire))


def refusal(folder: Path) -> str:
    with pytest.raises(ProfileError) as caught:
        Profile.load(folder)
    return str(caught.value)


def test_what_is_written_is_read(folder: Path) -> None:
    profile = Profile.load(folder)
    assert (profile.layers, profile.hidden, profile.methods) == (3, 4, {"classifier"})
    assert profile.importance == dict.fromkeys((Unit.BLOCK, Unit.ATTENTION, Unit.MLP), EVEN)
    assert profile.super_experts == ((2, 1),)
    assert profile.presets["fast"].routing == {"depth": {"skip": {"blocks": [2]}}}
    assert profile.exits("confidence") == profile.fields.exits
    assert profile.exits("entropy") == ()
    for held, given in ((profile.tensors("classifier"), HEADS), ({}, {})):
        own = [name for name in given if name.startswith("classifier.")]
        assert held.keys() == {name.removeprefix("classifier.") for name in own}
    assert torch.equal(profile.tensors("classifier")["weight"], HEADS["classifier.weight"])
    assert profile.tensors("first") == {}
    (layer,) = profile.adapters("a")
    assert layer == 1
    assert torch.equal(profile.adapters("a")[1].up, HEADS["adapter.a.1.up"])
    assert profile.reference_tensors("a")["pathways"].shape == (2, 1, 8)
    assert sorted(os.listdir(folder)) == [HEADS_NAME, JSON_NAME, REFERENCES_NAME]


def test_a_profile_of_nothing_but_its_model(tmp_path: Path) -> None:
    write_profile(tmp_path, {"model": MODEL}, {}, {})
    profile = Profile.load(tmp_path)
    assert (profile.importance, profile.frontier, profile.presets) == (None, None, {})
    assert os.listdir(tmp_path) == [JSON_NAME]


def test_a_later_profile_leaves_nothing_of_the_earlier_one(folder: Path) -> None:
    write_profile(folder, {"model": MODEL}, {}, REFERENCES)
    assert sorted(os.listdir(folder)) == [JSON_NAME, REFERENCES_NAME]
    assert Profile.load(folder).methods == frozenset()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_json_that_is_cut_off(folder: Path, share: float) -> None:
    content = (folder / JSON_NAME).read_bytes()
    (folder / JSON_NAME).write_bytes(content[: int(share * len(content))])
    assert refusal(folder).startswith(f"profile {folder / JSON_NAME}: not JSON: ")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000], ids=["no text", "too deep"])
def test_a_json_that_is_none(folder: Path, content: bytes) -> None:
    (folder / JSON_NAME).write_bytes(content)
    assert refusal(folder).startswith(f"profile {folder / JSON_NAME}: not JSON")


def test_a_json_that_is_not_there(folder: Path) -> None:
    (folder / JSON_NAME).unlink()
    assert refusal(folder) == f"profile {folder / JSON_NAME}: No such file or directory"


@pytest.mark.parametrize(
    "change",
    [
        lambda wire: wire["importance"]["block"].__setitem__(0, 0.6),
        lambda wire: wire["frontier"]["presets"].update(fast="full"),
        lambda wire: wire.pop("super_experts"),
        lambda wire: wire.update(digest="0" * 64),
        lambda wire: wire.pop("digest"),
    ],
    ids=["a number", "a preset", "a part", "the digest", "no digest"],
)
def test_an_edited_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(folder, lambda wire: None, sign=False)
    Profile.load(folder)  # Laid out otherwise, and the same.
    edit(folder, change, sign=False)
    assert "changed after it was written" in refusal(folder)
    assert str(folder / JSON_NAME) in refusal(folder)


@pytest.mark.parametrize("version", [1, 3, True])
def test_another_schema(folder: Path, version: int) -> None:
    edit(folder, lambda wire: wire.update(schema_version=version))
    assert f"schema {version} is not 2" in refusal(folder)


def evidence(wire: dict[str, Any], **changes: Any) -> None:
    """Give a profile evidence of its importance of blocks, with changes."""
    block = {"intervals": [[0, 1]] * 3, "order": [2, 0, 1], "p_values": [0.5, 0.01]}
    wire["importance_evidence"] = {"prompts": 9, "block": block | changes}


MISFITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown part": (lambda w: w.update(more=1), "more: Extra inputs"),
    "unknown field": (lambda w: w["importance"].update(norm=[]), "importance.norm: Extra inputs"),
    "unknown field of an entry": (
        lambda w: w["frontier"]["points"][1].update(cost=1),
        "frontier.points.1.cost: Extra inputs",
    ),
    "missing field": (lambda w: w["model"].pop("fingerprint"), "model.fingerprint: Field required"),
    "text for a number": (
        lambda w: w["saturation"].__setitem__(1, "much"),
        "saturation.1: Input should be",
    ),
    "not a number": (
        lambda w: w["saturation"].__setitem__(1, float("nan")),
        "saturation.1: Input should be a finite number",
    ),
    "no version": (lambda w: w.pop("schema_version"), "schema_version: Field required"),
    "importance": (
        lambda w: w["importance"]["mlp"].pop(),
        "importance.mlp has 2 entries for 3 layers",
    ),
    "contribution": (
        lambda w: w["layer_metrics"]["contribution"]["attention"].append(1),
        "layer_metrics.contribution.attention has 4 entries for 3 layers",
    ),
    "zd": (lambda w: w["layer_metrics"]["zd"].pop(), "layer_metrics.zd has 2 entries"),
    "saturation": (lambda w: w["saturation"].clear(), "saturation has 0 entries for 3 layers"),
    "skip ratios": (lambda w: w["skip_ratios"].append(1), "skip_ratios has 4 entries"),
    "experts per layer": (lambda w: w["expert_k"][0]["top_k"].pop(), "expert_k.0.top_k has 2"),
    "scores": (lambda w: w["behaviours"]["refusal"]["scores"].clear(), "refusal.scores has 0"),
    "score intervals": (
        lambda w: w["behaviours"]["refusal"].update(intervals=[]),
        "refusal.intervals has 0 entries for 1 experts",
    ),
    "p-values": (
        lambda w: w["behaviours"]["refusal"].update(p_values=[0.5, 0.5]),
        "refusal.p_values has 2 entries for 1 experts",
    ),
    "importance intervals": (
        lambda w: evidence(w, intervals=[[0, 1]]),
        "importance_evidence.block.intervals has 1 entries for 3 layers",
    ),
    "order": (
        lambda w: evidence(w, order=[0, 1, 1]),
        "importance_evidence.block.order does not name each of 3 layers once",
    ),
    "pairs of the order": (
        lambda w: evidence(w, p_values=[0.5]),
        "importance_evidence.block.p_values has 1 entries for 2 pairs",
    ),
    "map": (lambda w: w["expert_map"]["load"].pop(), "expert_map.load has 1 rows for 2 layers"),
    "ragged map": (lambda w: w["expert_map"]["load"][0].pop(), "rows of 2 and 3 experts"),
    "layer that is not there": (
        lambda w: w["skip_sets"]["a"]["mlp"].append(3),
        "skip_sets.a.mlp: layer 3 does not exist",
    ),
    "layers out of order": (
        lambda w: w["skip_sets"]["a"]["attention"].reverse(),
        "skip_sets.a.attention: layers must be ascending",
    ),
    "adapter of a layer that is not there": (
        lambda w: w["adapters"]["a"].update(layers=[3]),
        "adapters.a.layers: layer 3 does not exist",
    ),
    "adapter of unordered layers": (
        lambda w: w["adapters"]["a"].update(mlp=[2, 1]),
        "adapters.a.mlp: layers must be ascending",
    ),
    "adapter of another rank": (
        lambda w: w["adapters"]["a"].update(rank=3),
        "adapters.a: adapter.a.1.down in heads.safetensors is (2, 4), not (3, 4)",
    ),
    "adapter without its tensors": (
        lambda w: w["adapters"]["a"].update(layers=[2]),
        "adapters.a: adapter.a.2.down in heads.safetensors is missing, not (2, 4)",
    ),
    "exit of no method": (
        lambda w: w["exits"][0].update(method="patience"),
        "exits.0.method: 'patience' is no exit method with a threshold",
    ),
    "exit threshold": (
        lambda w: w["exits"][0].update(threshold=1.5),
        "exits.0.threshold: 1.5 is outside 0 to 1",
    ),
    "exit after the last layer": (
        lambda w: w["exits"][0].update(layers=[0, 2]),
        "exits.0.layers: names no layer, or the last",
    ),
    "exit after no layer": (lambda w: w["exits"][0].update(layers=[]), "exits.0.layers: names no"),
    "preset of no point": (
        lambda w: w["frontier"]["presets"].update(fast="fastest"),
        "frontier.presets.fast: there is no point 'fastest'",
    ),
    "points of one name": (
        lambda w: w["frontier"]["points"][1].update(name="full"),
        "frontier.points: 'full' is there 2 times",
    ),
    "effort that leaves out something else": (
        lambda w: w["frontier"]["effort"][1].update(attention=[1]),
        "frontier.effort.1 leaves out no more",
    ),
    "effort that leaves out nothing": (
        lambda w: w["frontier"]["effort"][0].update(attention=[]),
        "frontier.effort.0 leaves out no more",
    ),
    "effort that rises": (
        lambda w: w["frontier"]["effort"][1].update(effort=0.75),
        "frontier.effort.1.effort: 0.75 is not between 0 and 0.75",
    ),
    "effort of full depth": (
        lambda w: w["frontier"]["effort"][0].update(effort=1),
        "frontier.effort.0.effort: 1 is not between 0 and 1",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named_by_its_path(folder: Path, name: str) -> None:
    change, complaint = MISFITS[name]
    edit(folder, change)
    message = refusal(folder)
    assert message.startswith(f"profile {folder / JSON_NAME}: ")
    assert complaint in message


@pytest.mark.parametrize("name", [HEADS_NAME, REFERENCES_NAME])
def test_tensors_that_are_not_those_that_were_written(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for changed in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        (folder / name).write_bytes(changed)
        assert f"{folder / name}: cut off, or changed after it was written" in refusal(folder)
    (folder / name).unlink()
    assert refusal(folder) == f"profile {folder / name}: No such file or directory"


def test_tensors_that_the_profile_does_not_name(tmp_path: Path) -> None:
    write_profile(tmp_path / "with", FIELDS, HEADS, {})
    write_profile(tmp_path / "without", FIELDS, {}, {})
    (tmp_path / "without" / HEADS_NAME).write_bytes((tmp_path / "with" / HEADS_NAME).read_bytes())
    assert f"{HEADS_NAME}: {JSON_NAME} does not name this file" in refusal(tmp_path / "without")


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one")
    other = write_checkpoint(tmp_path / "other", {**TENSORS, "a": TENSORS["a"] + 1})
    shape = {"layers": 3, "hidden": 4}
    write_profile(
        tmp_path / "profile", {"model": {**shape, "fingerprint": fingerprint(one)}}, {}, {}
    )
    profile = Profile.load(tmp_path / "profile")
    profile.check_folder(one)
    profile.check_model(3, 4, fingerprint(one))
    with pytest.raises(ProfileError) as caught:
        profile.check_folder(other)
    named = (tmp_path / "profile", fingerprint(one)[:12], other, fingerprint(other)[:12])
    assert all(str(name) in str(caught.value) for name in named)
    for layers, hidden in ((2, 4), (3, 5)):
        with pytest.raises(ProfileError, match=f"has {layers} of {hidden}"):
            profile.check_model(layers, hidden, fingerprint(one))
    with pytest.raises(FingerprintError, match=r"config\.json"):
        profile.check_folder(tmp_path)


def test_an_engine_refuses_it_without_our_server(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.engine import engine
    from support.tiny import make_model

    from sluice.models.profile.profile import PROFILE_ENV

    served = make_model("llama", models_folder / "profiled-llama")
    config = json.loads((served / "config.json").read_text())
    shape = {"layers": config["num_hidden_layers"], "hidden": config["hidden_size"]}
    monkeypatch.setenv(PROFILE_ENV, str(tmp_path))
    write_profile(tmp_path, {"model": {**shape, "fingerprint": fingerprint(served)}}, {}, {})
    with engine(served):
        pass
    write_profile(tmp_path, {"model": {**shape, "fingerprint": "0" * 64}}, {}, {})
    with pytest.raises(ProfileError, match="with fingerprint 000000000000"), engine(served):
        pass
