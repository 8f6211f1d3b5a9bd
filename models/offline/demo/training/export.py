"""Writing the demo model as a folder that plain transformers and plain vLLM load."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.models.offline.demo.training.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM


def export(model: "Qwen3MoeForCausalLM", folder: Path) -> None:
    """Write bfloat16 weights, configuration, tokenizer and generation settings, each atomically.

    Files that a reader has open stay intact; files of other names in ``folder`` are left alone.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict(
        {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    )
    copy.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy.save_pretrained(scratch)
        build_tokenizer().save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            os.chmod(path, 0o644)
            os.replace(path, folder / path.name)
