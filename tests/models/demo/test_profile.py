"""The demo profile: what is shipped fits the demo model, and the code that made it is right."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sluice.models.demo import DEMO_MODEL_DIR, DEMO_PROFILE_DIR
from sluice.models.demo.architecture import build_model, demo_config
from sluice.models.demo.head_report import (
    Leaving,
    Outcome,
    Routing,
    full_logits,
    measure,
    measure_method,
    report,
)
from sluice.models.demo.heads import HeadConfig, decode_states, train_classifier, train_q_exit
from sluice.models.demo.packing import Encoder
from sluice.models.demo.profile import make_profile
from sluice.models.demo.routers import RouterConfig, train_routers
from sluice.models.demo.tasks import TASKS, Item, generate
from sluice.models.demo.traces import (
    Conversations,
    Model,
    draw,
    heldout,
    importance,
    load_model,
    run,
)
from sluice.models.depth.order import Unit, drop_order
from sluice.models.depth.registry import EXIT_METHODS
from sluice.models.fingerprint import fingerprint
from sluice.models.profile import Profile
from sluice.models.profile_writer import HEADS_NAME

UNITS = (Unit.BLOCK, Unit.ATTENTION, Unit.MLP)
QUICK = HeadConfig(runs=1, steps=40, inner=8)
QUICK_ROUTERS = RouterConfig(steps=2, rows=2)


@pytest.fixture
def tiny() -> Model:
    model: Model = build_model(demo_config(layers=3, hidden=64, experts=8), seed=1)
    return model.requires_grad_(False).eval()


@pytest.fixture
def saved(tiny: Model, tmp_path: Path) -> Model:
    """As it is once its weights are files: a profile is bound to those."""
    tiny.save_pretrained(tmp_path / "model")
    return load_model(tmp_path / "model")


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model(DEMO_MODEL_DIR)


@pytest.fixture(scope="module")
def shipped() -> Profile:
    return Profile.load(DEMO_PROFILE_DIR)


@pytest.fixture(scope="module")
def tasks() -> list[Conversations]:
    return list(heldout(40, seed=3))


@pytest.fixture(scope="module")
def fulls(demo: Model, tasks: list[Conversations]) -> list[Tensor]:
    return full_logits(demo, tasks)


def first_tensors(bias: list[float], hidden: int = 64) -> dict[str, Tensor]:
    return {"weight": torch.zeros(len(bias), hidden), "bias": torch.tensor(bias)}


def test_which_positions_are_prompt_and_which_decode_steps() -> None:
    item, system = Item("copy", "copy ab", "ab"), "be brief"
    of = Conversations.of([Encoder().encode([item], system), Encoder().encode([item])])
    long, short = 1 + len(system) + 1 + len(item.prompt) + 1, 1 + len(item.prompt) + 1
    prompts, steps = of.owner[of.prompt], of.owner[of.generated]
    assert torch.bincount(prompts).tolist() == [long, short]
    # The prompt's last position gives "a"; the steps on "a" and on "b" give "b" and the end.
    assert torch.bincount(steps).tolist() == [2, 2]
    assert of.decoded.tolist() == [False, True, True] * 2
    assert not (of.prompt & of.generated).any()

    states = torch.randn(*of.owner.shape, 4)
    expected = states[0, long + 3 : long + 3 + short].mean(0)
    torch.testing.assert_close(of.prompt_mean(states)[1], expected)


def test_importance_is_that_of_stock_transformers(tiny: Model) -> None:
    segment = Encoder().encode([next(generate("sort", "train", 1))])
    measured = importance(tiny, Conversations.of([segment]).batch)

    expected: dict[str, list[float]] = {unit: [] for unit in UNITS}
    seen: dict[str, Tensor] = {}

    def change(a: Tensor, b: Tensor) -> float:
        each = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
        return 1.0 - float(each.mean())

    def after_layer(_layer: object, arguments: tuple[Tensor], output: Tensor) -> None:
        middle = arguments[0] + seen["attention"]
        expected[Unit.BLOCK].append(change(arguments[0], output))
        expected[Unit.ATTENTION].append(change(arguments[0], middle))
        expected[Unit.MLP].append(change(middle, middle + seen["mlp"]))

    for layer in tiny.model.layers:
        layer.self_attn.register_forward_hook(lambda _m, _a, out: seen.update(attention=out[0]))
        layer.mlp.register_forward_hook(lambda _m, _a, out: seen.update(mlp=out))
        layer.register_forward_hook(after_layer)
    with torch.no_grad():
        tiny(input_ids=torch.tensor([segment.ids]))

    for unit in UNITS:
        assert measured[unit] == pytest.approx(expected[unit], abs=2e-6), unit
        assert min(measured[unit]) > 1e-4


def test_a_left_step_keeps_its_state_and_a_prompt_runs_every_layer(tiny: Model) -> None:
    of = draw(1, 2)
    always = {"weight": torch.zeros(64), "bias": torch.tensor(9.0)}
    leaving = Leaving(EXIT_METHODS["classifier"], always, 0.5, of, last=2)
    full, states = run(tiny, of.batch), run(tiny, of.batch, leaving)
    assert torch.equal(states[-1][of.generated], full[1][of.generated])
    assert torch.equal(states[-1][of.prompt], full[-1][of.prompt])
    assert (leaving.ran == of.generated).all()

    never = Leaving(EXIT_METHODS["classifier"], always, 1.0, of, last=2)
    assert torch.equal(run(tiny, of.batch, never)[-1], full[-1])
    assert (never.ran == 3.0 * of.generated).all()


def test_a_routed_step_passes_by_the_chosen_block_alone(tiny: Model) -> None:
    of = draw(1, 2)
    routing = Routing(first_tensors([1.0, -1.0, 1.0]), 0.5, of)
    outcome = measure(tiny, of, full_logits(tiny, [of])[0], routing, routing.ran)
    assert outcome.layers == 2.0
    states = run(tiny, of.batch, Routing(first_tensors([1.0, -1.0, 1.0]), 0.5, of))
    assert torch.equal(states[2][of.generated], states[1][of.generated])
    assert not torch.equal(states[3][of.generated], states[2][of.generated])
    assert torch.equal(states[-1][of.prompt], run(tiny, of.batch)[-1][of.prompt])


def test_training_lowers_what_it_is_meant_to(tiny: Model) -> None:
    data = decode_states(tiny, draw(1, 8))
    classifier = train_classifier(data, QUICK, 1)
    logits = (data.states[1:-1] @ classifier["weight"] + classifier["bias"]).T
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, data.agrees[:, :-1].float())
    assert bce < math.log(2) - 0.02

    # The prior alone decides if right answers do not: with much beta, the head follows it.
    config = HeadConfig(steps=300, inner=8, prior=0.2, beta=1e3)
    tensors = train_q_exit(data, config, 1)
    x = torch.cat([data.states[1], data.states[0]], dim=-1)
    for part in range(3):
        x = x @ tensors[f"{part}.weight"].T + tensors[f"{part}.bias"]
        x = x.tanh() if part < 2 else x
    assert float(x.sigmoid().mean()) == pytest.approx(0.2, abs=0.02)


def test_dear_blocks_are_skipped_and_a_price_is_needed_for_that(tiny: Model) -> None:
    of = draw(9, 8)
    pooled = of.prompt_mean(run(tiny, of.batch)[0])
    kept = []
    for cost in (1000.0, 0.0):
        config = RouterConfig(steps=60, rows=4, cost=cost, sharpness=1.0, weight_decay=0.0)
        tensors = train_routers(tiny, config, 1)
        keeps = pooled @ tensors["weight"][0] + tensors["bias"][0] >= 0
        kept.append(float(keeps.float().mean()))
    dear, free = kept
    assert dear < 0.1
    assert free > dear + 0.2


def test_one_seed_makes_one_profile(saved: Model, tmp_path: Path) -> None:
    """Up to rounding: several threads may add in another order."""
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        profile = make_profile(saved, tmp_path / name, seed, QUICK, QUICK_ROUTERS, 4)
        profile.check_folder(tmp_path / "model")
        assert (profile.layers, profile.hidden) == (3, 64)
        assert profile.methods >= {"first", "classifier", "q_exit"}
        assert profile.importance is not None
        importance = torch.tensor(
            [list(profile.importance[unit]) for unit in Unit if unit in profile.importance]
        )
        heads = load_file(tmp_path / name / HEADS_NAME)
        made.append(torch.cat([importance.flatten(), *(t.flatten() for t in heads.values())]))
    again, other = ((made[0] - run).abs().max() for run in made[1:])
    assert again < 1e-3
    assert other > 1e-2


def test_shipped_profile_fits_the_demo_model(demo: Model, shipped: Profile) -> None:
    layers, hidden = demo.config.num_hidden_layers, demo.config.hidden_size
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
    for method in shapes:
        assert all(tensor.dtype == torch.float32 for tensor in shipped.tensors(method).values())
    assert sum(path.stat().st_size for path in DEMO_PROFILE_DIR.iterdir()) < 800_000


def test_shipped_importance_is_measured_again(demo: Model, shipped: Profile) -> None:
    again = importance(demo, draw(77, 32).batch)
    assert shipped.importance is not None
    for unit in UNITS:
        assert list(shipped.importance[unit]) == pytest.approx(again[unit], rel=0.2), unit
    order = drop_order(Unit.BLOCK, shipped.layers, shipped.importance)
    assert order == drop_order(Unit.BLOCK, shipped.layers, {Unit.BLOCK: again["block"]})


def mean(outcomes: list[Outcome], name: str) -> float:
    return sum(float(getattr(each, name)) for each in outcomes) / len(outcomes)


@pytest.mark.parametrize(
    ("method", "threshold"), [("q_exit", 0.5), ("classifier", 0.98), ("first", 0.5)]
)
def test_shipped_heads_keep_the_answers(
    demo: Model,
    shipped: Profile,
    tasks: list[Conversations],
    fulls: list[Tensor],
    method: str,
    threshold: float,
) -> None:
    outcomes = measure_method(demo, shipped, method, threshold, tasks, fulls)
    assert mean(outcomes, "exact_match") >= mean(outcomes, "full_depth") - 0.02
    assert mean(outcomes, "layers") <= 0.7 * shipped.layers


def test_report_has_a_row_per_task(demo: Model, shipped: Profile) -> None:
    text = report(demo, shipped, items_per_task=2, seed=1)
    assert all(f"\n| {task} |" in text for task in TASKS)
