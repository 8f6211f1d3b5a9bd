"""The shipped weights: plain transformers loads them and every task reaches the bar."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.models.offline.demo.evaluate import BAR, TaskScore, evaluate_local
from sluice.models.offline.demo.tasks.tasks import TASKS
from sluice.models.offline.demo.training.model import demo_config
from sluice.models.offline.demo.training.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def scores() -> dict[str, TaskScore]:
    return evaluate_local(DEMO_MODEL_DIR, items_per_task=60, seed=2)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_reaches_the_bar(scores: dict[str, TaskScore], task: str) -> None:
    assert scores[task].items == 60
    assert scores[task].exact_match >= BAR, scores[task].misses


def test_the_folder_is_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in DEMO_MODEL_DIR.iterdir()) <= 20_000_000


def test_the_folder_has_the_architecture_of_the_training_script() -> None:
    shipped, ours = AutoConfig.from_pretrained(DEMO_MODEL_DIR), demo_config()
    assert shipped.architectures == ["Qwen3MoeForCausalLM"]
    assert shipped.num_hidden_layers >= 8
    for name in ("num_hidden_layers", "hidden_size", "num_experts", "head_dim", "vocab_size"):
        assert getattr(shipped, name) == getattr(ours, name)


def test_the_shipped_tokenizer_is_the_one_in_the_code() -> None:
    shipped, ours = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR), build_tokenizer()
    assert shipped.get_vocab() == ours.get_vocab()
    assert shipped.chat_template == ours.chat_template
    assert shipped.decode(shipped.encode("  a  b c ")) == "  a  b c "


def test_generation_stops_at_the_end_of_a_turn() -> None:
    settings = json.loads((DEMO_MODEL_DIR / "generation_config.json").read_text())
    assert settings["eos_token_id"] == build_tokenizer().eos_token_id
