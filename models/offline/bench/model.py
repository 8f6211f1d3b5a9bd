"""The models that speed is measured on: decoders of 150 to 200 M random parameters.

`python -m sluice.models.offline.bench.model --out FOLDER` writes the dense one, with the demo
model's tokenizer, so that it can be served.

The vocabulary is small so that layers, which can be skipped, and not the LM head, which can not,
make up a step, as in the large models they stand for.
"""

from __future__ import annotations

import argparse
import shutil
from enum import StrEnum
from pathlib import Path
from typing import Any

from sluice.models.offline.demo import DEMO_MODEL_DIR

VOCABULARY = 4096
LAYERS = 20
"""Of the dense model."""
EXPERT_LAYERS = 12
"""Of the mixture of experts."""
EXPERTS = 64
TOP_K = 4
_SEED = 0
_WIDTH = 768
_HEADS = 12
_EXPERT_WIDTH = 96


class BenchModel(StrEnum):
    """Which model a row is measured on."""

    DENSE = "dense"
    MOE = "mixture of experts"


def make_bench_model(kind: BenchModel, folder: Path) -> int:
    """Write a model, fp32, and return its number of parameters."""
    import torch
    import transformers

    torch.manual_seed(_SEED)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": _WIDTH,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config: transformers.PretrainedConfig
    if kind is BenchModel.DENSE:
        config = transformers.LlamaConfig(
            **common, intermediate_size=2048, num_hidden_layers=LAYERS
        )
    else:
        config = transformers.OlmoeConfig(
            **common,
            intermediate_size=_EXPERT_WIDTH,
            num_hidden_layers=EXPERT_LAYERS,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(bos_token_id=None, eos_token_id=None)
    model.save_pretrained(folder)
    return int(model.num_parameters())


def step_weights(loaded: float) -> float:
    """Weights that a decode step of the mixture of experts reads.

    Args:
        loaded: distinct experts per layer that its rows run.
    """
    attention = 4 * _WIDTH * _WIDTH
    experts = loaded * 3 * _WIDTH * _EXPERT_WIDTH
    return EXPERT_LAYERS * (attention + EXPERTS * _WIDTH + experts) + VOCABULARY * _WIDTH


def main() -> None:
    """Write the dense model."""
    parser = argparse.ArgumentParser(prog="python -m sluice.models.offline.bench.model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    args = parser.parse_args()
    make_bench_model(BenchModel.DENSE, args.out)
    for file in DEMO_MODEL_DIR.glob("*token*"):
        shutil.copy(file, args.out)
    for file in DEMO_MODEL_DIR.glob("chat_template*"):
        shutil.copy(file, args.out)


if __name__ == "__main__":
    main()
