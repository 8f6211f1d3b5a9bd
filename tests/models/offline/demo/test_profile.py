"""The demo profile: what is shipped fits the demo model, and is measured again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.calibration import plain_track

from sluice.models.depth.skip_order import Unit, drop_order
from sluice.models.offline.calibrate.depth.importance import Importance
from sluice.models.offline.calibrate.registry import STEPS
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.calibrate.workspace import Workspace
from sluice.models.offline.demo import DEMO_MODEL_DIR, DEMO_PROFILE_DIR
from sluice.models.offline.demo.calibration import ANSWERED, REFUSED, draw
from sluice.models.offline.hf_model.examples import Example
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.profile.fingerprint import fingerprint
from sluice.models.profile.profile import Profile

UNITS = (Unit.BLOCK, Unit.ATTENTION, Unit.MLP)


@pytest.fixture(scope="module")
def shipped() -> Profile:
    return Profile.load(DEMO_PROFILE_DIR)


def test_it_fits_the_demo_model(shipped: Profile) -> None:
    layers, hidden = 8, 128
    shipped.check_model(layers, hidden, fingerprint(DEMO_MODEL_DIR))
    shapes = {
        method: {name: tuple(tensor.shape) for name, tensor in shipped.tensors(method).items()}
        for method in ("first", "classifier", "q_exit")
    }
    inner = shapes["q_exit"]["0.weight"][0]
    assert shapes == {
        "first": {"weight": (layers, hidden), "bias": (layers,)},
        "classifier": {"weight": (hidden,), "bias": ()},
        "q_exit": {
            "0.weight": (inner, 2 * hidden),
            "0.bias": (inner,),
            "1.weight": (inner, inner),
            "1.bias": (inner,),
            "2.weight": (1, inner),
            "2.bias": (1,),
        },
    }
    assert sum(path.stat().st_size for path in DEMO_PROFILE_DIR.iterdir()) < 1_500_000


def test_every_step_was_run(shipped: Profile) -> None:
    assert shipped.fields.calibration.keys() == {step.name for step in STEPS if not step.only_named}
    found = shipped.fields
    for name in (
        "importance",
        "layer_metrics",
        "exits",
        "saturation",
        "expert_map",
        "expert_k",
        "skip_ratios",
        "skip_sets",
    ):
        assert getattr(found, name), name
    assert found.frontier is not None
    assert found.frontier.measure == "exact match"
    assert found.behaviours.keys() == {REFUSED, ANSWERED}


def test_its_levels_beat_other_choices_at_equal_compute(shipped: Profile) -> None:
    """The uniform choice and the mean of five at random, wherever four blocks or fewer go."""
    frontier = shipped.fields.frontier
    assert frontier is not None
    for units in (1, 2, 3, 4):
        entries = [entry for entry in frontier.equal_compute if entry.units == units]
        quality: dict[str, list[float]] = {"chain": [], "uniform": [], "random": []}
        for entry in entries:
            quality[entry.chosen].append(entry.quality.value)
            assert entry.generated_fraction == pytest.approx(1 - units / 8, abs=0.05)
        (chain,), (uniform,) = quality["chain"], quality["uniform"]
        assert len(quality["random"]) == 5
        assert chain >= max(uniform, *quality["random"])


def test_its_importance_is_measured_again(shipped: Profile, tmp_path: Path) -> None:
    """On other prompts."""
    items, _ = draw(77, 8, 1)
    calibration = Calibration(
        model=HFModel.of(str(DEMO_MODEL_DIR), dtype=torch.float32),
        prompts=tuple(Example(prompt=item.prompt) for item in items),
        tasks=(),
        new_tokens=48,
        seed=0,
        workspace=Workspace(tmp_path),
        track=plain_track,
    )
    again = Importance().run(calibration).fields["importance"]
    assert shipped.importance is not None
    for unit in UNITS:
        assert list(shipped.importance[unit]) == pytest.approx(again[unit], rel=0.2), unit
    order = drop_order(Unit.BLOCK, shipped.layers, shipped.importance)
    assert order == drop_order(Unit.BLOCK, shipped.layers, {Unit.BLOCK: again["block"]})
