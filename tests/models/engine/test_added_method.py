"""One file adds a depth method: requests, capabilities, policies, engine and report all know it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.edge import (
    ADAPTIVE,
    ALL_EXITS,
    CAPABILITIES,
    EXIT,
    depth,
    policy,
    refused,
)
from support.engine import engine
from support.reference import Reference
from support.tiny import LAYERS as TINY_LAYERS
from support.tiny import VOCABULARY, make_model

from sluice.models.depth import adaptive, exits
from sluice.models.depth.registry import MethodDefinitionError, methods
from sluice.models.policy.policy import (
    AdaptiveRule,
    ExitRule,
    MissingKV,
    Phase,
    RoutingPolicy,
    SkipSet,
)
from sluice.models.telemetry.report import build_report
from sluice.server.http.listing import capabilities_listing

DEEPEST = '''
from sluice.models.depth.method import ExitMethod
from sluice.models.depth.parameters import Number


class Deepest(ExitMethod):
    """A token leaves after the first exit at or behind a layer."""

    name = "deepest"
    description = "at a layer or behind it"
    source = "this test"
    parameters = {"deepest": Number(0, 1000, integer=True)}

    def threshold(self, rule, index, max_tokens):
        return rule.number("deepest")

    def leaves(self, at):
        return at.threshold <= at.layer
'''
STRIDE = '''
import numpy as np

from sluice.models.depth.method import PromptMethod
from sluice.models.depth.parameters import Choice, Flag, Number


class Stride(PromptMethod):
    """Generated tokens skip every so manieth block."""

    name = "stride"
    description = "leaves out every so manieth layer"
    source = "this test"
    parameters = {
        "stride": Number(2, 8, default=2, integer=True),
        "side": Choice(("first", "last"), "last"),
        "whole": Flag(needs_whole_prompt=True),
    }
    pool = "last"

    def statistic(self, layer, before, after, tensors):
        return after.new_full((len(after),), layer, dtype=float)

    def skipped_blocks(self, pooled, rule):
        stride = int(rule.number("stride"))
        return pooled % stride == (0 if rule.get("side") == "first" else stride - 1)
'''
PROMPT = [(37 * i * i + 11 * i + 5) % VOCABULARY for i in range(45)]
TOKENS = 12


def add(patch: pytest.MonkeyPatch, package: ModuleType, folder: Path, name: str, text: str) -> None:
    """Put one file beside those of a package of methods."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    patch.setattr(package, "__path__", [*package.__path__, str(folder)])
    module = f"{package.__name__}.{name}"
    # Undone in reverse: the module goes, and with it the package's attribute.
    patch.setitem(sys.modules, module, ModuleType(module))
    patch.delitem(sys.modules, module)
    patch.setattr(package, name, None, raising=False)


@pytest.fixture(scope="class")
def _added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("methods")
    with pytest.MonkeyPatch.context() as patch:
        add(patch, exits, folder / "exits", "deepest", DEEPEST)
        add(patch, adaptive, folder / "adaptive", "stride", STRIDE)
        yield


@pytest.mark.usefixtures("_added")
class TestAddedMethods:
    def test_requests_are_accepted(self) -> None:
        assert policy(depth(exit={"method": "deepest", "deepest": 2, "kv": "recompute"})).exit == (
            ExitRule("deepest", ALL_EXITS, deepest=2, kv=MissingKV.RECOMPUTE)
        )
        assert policy(depth(adaptive={"method": "stride"})).adaptive == (
            AdaptiveRule("stride", stride=2, side="last")
        )
        preset = depth(adaptive={"method": "stride", "stride": 3, "side": "first"})
        assert policy({}, preset=preset).adaptive == AdaptiveRule("stride", stride=3, side="first")

    @pytest.mark.parametrize(
        ("routing", "param"),
        [
            (depth(exit={"method": "deepest"}), f"{EXIT}.deepest"),
            (depth(exit={"method": "deepest", "deepest": 1.5}), f"{EXIT}.deepest"),
            (depth(exit={"method": "deepest", "deepest": 1001}), f"{EXIT}.deepest"),
            (
                depth(exit={"method": "deepest", "deepest": 1, "threshold": 0.5}),
                f"{EXIT}.threshold",
            ),
            (depth(exit={"method": "deepest", "deepest": 1, "stride": 2}), f"{EXIT}.stride"),
            (depth(exit={"method": "confidence", "deepest": 1}), f"{EXIT}.deepest"),
            (depth(adaptive={"method": "stride", "stride": 9}), f"{ADAPTIVE}.stride"),
            (depth(adaptive={"method": "stride", "stride": "2"}), f"{ADAPTIVE}.stride"),
            (depth(adaptive={"method": "stride", "side": "left"}), f"{ADAPTIVE}.side"),
            (depth(adaptive={"method": "stride", "side": 1}), f"{ADAPTIVE}.side"),
            (depth(adaptive={"method": "stride", "whole": 1}), f"{ADAPTIVE}.whole"),
            (depth(adaptive={"method": "lac", "stride": 2}), f"{ADAPTIVE}.stride"),
        ],
    )
    def test_what_is_refused(self, routing: dict[str, object], param: str) -> None:
        assert refused(routing) == (param, "invalid_field")

    def test_a_flag_may_need_whole_prompts(self) -> None:
        whole = depth(adaptive={"method": "stride", "whole": True})
        assert refused(whole) == (f"{ADAPTIVE}.whole", "unsupported_combination")

    def test_capabilities_list_them(self) -> None:
        found = capabilities_listing(CAPABILITIES)["depth"]
        assert found["exit"]["deepest"] == {
            "parameters": {"deepest": {"low": 0, "high": 1000, "default": None, "integer": True}},
            "source": "this test",
            "available": True,
            "reason": None,
            "description": "at a layer or behind it",
            "per_token": True,
            "decay": False,
            "sparing": False,
            "kv": ["propagate", "recompute"],
            "calibrated": [],
        }
        assert found["adaptive"]["stride"]["parameters"] == {
            "stride": {"low": 2, "high": 8, "default": 2, "integer": True}
        }
        assert found["adaptive"]["stride"]["sides"] == ["first", "last"]
        assert found["adaptive"]["stride"]["whole"] is False

    def test_an_engine_runs_them(self, models_folder: Path) -> None:
        folder = make_model("llama", models_folder / "added")
        reference = Reference(folder)
        tested = tuple(range(TINY_LAYERS - 1))
        leaves = RoutingPolicy(exit=ExitRule("deepest", tested, deepest=2), report=True)
        strides = RoutingPolicy(adaptive=AdaptiveRule("stride", stride=3, side="last"))
        with engine(folder) as running:
            outputs = running.run([PROMPT, PROMPT], [leaves, strides], TOKENS, ("a", "b"))
            records = [running.take_record(key) for key in ("a", "b")]
        answers = [output.outputs[0].token_ids for output in outputs]
        # No difference of two probabilities lies below zero, so that every token leaves.
        always = RoutingPolicy(exit=ExitRule("confidence", (2,), threshold=0.0))
        assert answers[0] == reference.run(PROMPT, always, TOKENS).tokens
        skip = SkipSet.of(blocks=(2, 5), phase=Phase.DECODE)
        assert answers[1] == reference.greedy(PROMPT, skip, TOKENS)
        left, strode = (
            build_report(each, record)
            for each, record in zip((leaves, strides), records, strict=True)
        )
        assert left["policy"]["depth"]["exit"]["method"] == "deepest"
        assert left["policy"]["depth"]["exit"]["deepest"] == 2
        assert left["exit_layers"] == [2] * (TOKENS - 1)
        # The first token of the answer is the prompt's, which no exit tests.
        assert left["token_layers"] == [TINY_LAYERS - 1, *left["exit_layers"]]
        assert "token_layers" not in strode, "nobody asked for a report"
        assert strode["policy"]["depth"]["adaptive"] == {
            "method": "stride",
            "stride": 3,
            "side": "last",
        }
        assert strode["mask"] == {"attention": [2, 5], "mlp": [2, 5]}


def test_policies_round_trip_through_json() -> None:
    for each in (
        RoutingPolicy(exit=ExitRule("deepest", (0, 1), deepest=1)),
        RoutingPolicy(adaptive=AdaptiveRule("stride", stride=3, side="last", whole=True)),
    ):
        assert RoutingPolicy.from_dict(json.loads(json.dumps(each.to_dict()))) == each


def test_without_their_files_nobody_knows_them() -> None:
    assert refused(depth(exit={"method": "deepest"})) == (f"{EXIT}.method", "invalid_field")
    assert refused(depth(exit={"method": "confidence", "deepest": 1}))[0] == f"{EXIT}.deepest"
    assert refused(depth(adaptive={"method": "stride"})) == (f"{ADAPTIVE}.method", "invalid_field")


FAULTS = {
    "no method": (exits, "x = 1\n", "must define one public ExitMethod or StaticExit"),
    "two methods": (exits, DEEPEST + "class Other(Deepest):\n    name = 'o'\n", "defines 2"),
    "of another kind": (exits, STRIDE, "must define one public ExitMethod or StaticExit"),
    "no test": (exits, DEEPEST.replace("def leaves", "def leave"), "Deepest lacks leaves"),
    "no name": (exits, DEEPEST.replace("name =", "title ="), "Deepest lacks name"),
    "no words": (exits, DEEPEST.replace("description =", "about ="), "lacks description"),
    "no parameters": (exits, DEEPEST.replace("parameters =", "params ="), "lacks parameters"),
    "no threshold": (exits, DEEPEST.replace("def threshold", "def limit"), "'threshold'"),
    "a name twice": (exits, DEEPEST.replace('"deepest"\n', '"lac"\n'), "both called 'lac'"),
    "a field's name": (exits, DEEPEST.replace('{"deepest"', '{"kv"'), "called 'kv'"),
    "another kind of number": (
        exits,
        DEEPEST.replace('{"deepest"', '{"patience": Number(0, 1), "deepest"'),
        "'patience' is of another kind",
    ),
    "no pool": (adaptive, STRIDE.replace("pool =", "pooled ="), "Stride lacks pool"),
    "no mask": (adaptive, STRIDE.replace("def skipped_blocks", "def skip"), "lacks skipped_blocks"),
    "a mode of no kind": (
        adaptive,
        STRIDE
        + "\n    def in_mode(self, rule):\n        return self if rule.get('side') else None\n"
        + "\nStride.parameters['side'] = Choice(('first', ''), 'first')\n",
        "side '' lacks a kind",
    ),
    "no shares": (
        adaptive,
        STRIDE.replace("Number(2, 8, default=2, integer=True)", "LayerShares()").replace(
            "Flag, Number", "Flag, LayerShares"
        ),
        "lacks default_shares",
    ),
}


@pytest.mark.parametrize(("package", "text", "complaint"), FAULTS.values(), ids=FAULTS)
def test_what_a_method_misses_is_told_at_once(
    package: ModuleType,
    text: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(monkeypatch, package, tmp_path, "faulty", text)
    with pytest.raises(MethodDefinitionError, match=complaint):
        methods()
