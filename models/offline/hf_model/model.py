"""The model under calibration, in plain transformers, with its parts by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sluice.models.offline.hf_model.examples import CalibrationError, Example
from sluice.models.offline.hf_model.samples import Sample, SampleBatch
from sluice.models.profile.fingerprint import FingerprintError, fingerprint, model_folder
from sluice.models.vllm_adapter.families import FAMILIES, DecoderFamily, family_of

BATCH_TOKENS = 4096
"""Tokens, padding included, that the model runs at a time."""

_HUB = "models--"
"""Beginning of a repository's folder in the hub's cache."""


@dataclass
class HFModel:
    """A model that is loaded when it is first needed, and let go with `release`.

    Attributes:
        folder: of its files.
        family: the supported family it is of.
        config: transformers' own.
        fingerprint: see `sluice.models.profile.fingerprint`.
        device: that it runs on.
        dtype: of its weights, or `auto` for the checkpoint's. Metrics are taken in fp32.
    """

    folder: Path
    family: DecoderFamily
    config: Any
    fingerprint: str
    device: torch.device
    dtype: torch.dtype | str = "auto"
    _model: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, model: str, device: str = "cpu", dtype: torch.dtype | str = "auto") -> HFModel:
        """Describe a model; weights are read later.

        Args:
            model: a folder, or a name in the hub's cache.
            device: `cpu` or `cuda`.
            dtype: see the class.

        Raises:
            CalibrationError: it is not there, has no safetensors weights, or is of a family that
                Sluice does not know.
        """
        from transformers import AutoConfig

        try:
            folder = model_folder(model)
            found = fingerprint(folder)
        except FingerprintError as error:
            raise CalibrationError(str(error)) from None
        config = AutoConfig.from_pretrained(folder)
        architecture = (config.architectures or ["none"])[0]
        family = family_of(architecture)
        if family is None:
            known = ", ".join(each.architecture for each in FAMILIES)
            raise CalibrationError(
                f"{folder}: architecture {architecture} is not supported (supported: {known})"
            )
        return cls(folder, family, config, found, torch.device(device), dtype)

    @property
    def name(self) -> str:
        """Name of the folder, or of the repository if it is a snapshot in the hub's cache."""
        folder = self.folder.resolve()
        cached = next((each.name for each in folder.parents if each.name.startswith(_HUB)), None)
        return cached.removeprefix(_HUB).replace("--", "/") if cached else folder.name

    @property
    def causal_lm(self) -> Any:
        """Transformers' causal language model, frozen, in evaluation mode."""
        if self._model is None:
            from transformers import AutoModelForCausalLM

            # Weights made in inference mode could not be differentiated through later.
            with torch.inference_mode(False):
                loaded: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
                self._model = loaded.to(self.device).requires_grad_(False).train(False)
        return self._model

    def release(self) -> None:
        """Let the weights go, before an engine loads them."""
        self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def tokenizer(self) -> Any:
        """Of the model.

        Raises:
            CalibrationError: it has none.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise CalibrationError(f"{self.folder}: no tokenizer: {error}") from None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Decoder layers; each has `input_layernorm`, `self_attn`, `post_attention_layernorm` and
        `mlp`.
        """
        layers: nn.ModuleList = self.causal_lm.model.layers
        return list(layers)

    @cached_property
    def has_experts(self) -> bool:
        """Whether a layer has routed experts; weights are not loaded for it.

        A family with experts may have models all of whose layers are dense.
        """
        if not self.family.moe:
            return False
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(self.config)
        return any(hasattr(block.mlp, "experts") for block in skeleton.model.layers)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its continuation."""
        return int(self.config.max_position_embeddings)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer; weights are not loaded for it."""
        from transformers import GenerationConfig

        try:
            found = GenerationConfig.from_pretrained(self.folder).eos_token_id
        except OSError:
            found = self.config.eos_token_id
        if found is None:
            return frozenset()
        return frozenset(found if isinstance(found, list) else [found])

    def encode(self, example: Example) -> tuple[int, ...]:
        """Token ids of a prompt, as a server would make them."""
        tokenizer = self.tokenizer
        if example.text is not None:
            return tuple(tokenizer(example.text)["input_ids"])
        if example.messages is None and tokenizer.chat_template is None:
            return tuple(tokenizer(example.prompt)["input_ids"])
        if tokenizer.chat_template is None:
            raise CalibrationError(f"{self.folder}: messages need a chat template, it has none")
        ids = tokenizer.apply_chat_template(
            example.conversation, add_generation_prompt=True, return_dict=True
        )
        return tuple(ids["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer's tokens, without special ones."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def logits(self, states: Tensor) -> Tensor:
        """Final norm and LM head on a residual stream, (..., hidden) to (..., vocabulary)."""
        out: Tensor = self.causal_lm.lm_head(self.causal_lm.model.norm(states))
        return out

    def batches(
        self, samples: Sequence[Sample], tokens: int = BATCH_TOKENS
    ) -> Iterator[tuple[list[int], SampleBatch]]:
        """Samples of like length side by side, with their places in `samples`."""
        order = sorted(range(len(samples)), key=lambda i: -_length(samples[i]))
        while order:
            count = max(1, tokens // _length(samples[order[0]]))
            taken, order = order[:count], order[count:]
            yield taken, SampleBatch.of([samples[i] for i in taken], self.device)


def _length(sample: Sample) -> int:
    return len(sample.prompt) + len(sample.answer)
