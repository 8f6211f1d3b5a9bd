"""The demo model in plain transformers."""

from pathlib import Path
from typing import Any

import torch

from sluice.models.offline.demo.training.experts import (
    IMPLEMENTATION,
    register_experts_implementation,
)

Model = Any
"""A transformers decoder of the Qwen3-MoE architecture, fp32, in evaluation mode."""


def load_model(folder: Path) -> Model:
    """Load a weights folder in fp32, frozen, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    register_experts_implementation()
    model: Model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation(IMPLEMENTATION)
    return model.requires_grad_(False).train(False)
