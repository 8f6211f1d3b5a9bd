"""Step: C3PO's references for re-mixing (arXiv 2504.07964)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sluice.models.experts.remix import prompt_embedding
from sluice.models.offline.calibrate.step import Calibration, Step, check_least, option
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError, Example
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.moe import MoeLayer, Routed, moe_layers, recorded
from sluice.models.offline.hf_model.samples import Sample, SampleBatch

ONE_SET = "all"
"""Name of the set that is not parted by task."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class References(Step):
    """Keeps the prompts that the model answers right, and how their last tokens were routed.

    An answer is right if full depth's greedy one, as text without end tokens, equals the example's
    but for white space around them. Embeddings are the model's own (`prompt_embedding`); a pathway
    is, layer by layer, the router's scores of all experts: their softmax, or their sigmoid where
    the family scores so, before any correction, group limit or scaling. Both are kept in fp16.
    """

    name: ClassVar[str] = "references"
    help: ClassVar[str] = "prompts that are answered right, as re-mix references (C3PO)"
    needs_experts: ClassVar[bool] = True

    last_layers: int = option(0, "layers of a pathway, counted from the last one; 0 is all")
    by_task: bool = option(False, f"one set for each task, instead of one set, {ONE_SET!r}")
    most: int = option(1000, "references of a set, at most: the first of the file")

    def refusal(self, calibration: Calibration) -> str | None:
        """See `Step.refusal`."""
        if all(example.answer is None for example in calibration.prompts):
            return "no prompt has an answer to hold the model's own against"
        return super().refusal(calibration)

    def run(self, calibration: Calibration) -> Part:
        """Find the references.

        Raises:
            CalibrationError: an option is out of range, or the model has no experts.
        """
        check_least(self, {"last_layers": 0, "most": 1})
        layers = moe_layers(calibration.model.causal_lm)
        if self.last_layers > len(layers):
            raise CalibrationError(
                f"references: last_layers is {self.last_layers}, and {len(layers)} layers have "
                "routed experts"
            )
        layers = layers[-self.last_layers :]
        fields, tensors = {}, {}
        for name, samples in self._right(calibration).items():
            embeddings, pathways = _recorded(calibration, samples, layers)
            tensors[f"{name}.embeddings"] = embeddings
            tensors[f"{name}.pathways"] = pathways
            numbers = [layer.layer for layer in layers]
            fields[name] = {"layers": numbers, "width": embeddings.size(1), "encoder": "model"}
        return Part({"references": fields}, references=tensors)

    def _right(self, calibration: Calibration) -> Mapping[str, Sequence[Sample]]:
        """Samples that are answered right, by the name of their set; no set is empty."""
        sets: dict[str, list[Sample]] = {}
        for example, sample in zip(calibration.prompts, calibration.samples, strict=True):
            if example.answer is not None:
                chosen = sets.setdefault(example.task if self.by_task else ONE_SET, [])
                if (
                    len(chosen) < self.most
                    and sample not in chosen
                    and _is_right(calibration.model, example, sample)
                ):
                    chosen.append(sample)
        for name, chosen in sets.items():
            if not chosen:
                _LOG.warning("references: no set %r: none of its prompts is answered right", name)
        return {name: chosen for name, chosen in sets.items() if chosen}


def _is_right(model: HFModel, example: Example, sample: Sample) -> bool:
    assert example.answer is not None
    answer = list(sample.answer)
    while answer and answer[-1] in model.ends:
        answer.pop()
    return model.decode(answer).strip() == example.answer.strip()


@torch.no_grad()
def _recorded(
    calibration: Calibration, samples: Sequence[Sample], layers: Sequence[MoeLayer]
) -> tuple[Tensor, Tensor]:
    """Embeddings, (samples, hidden), and pathways, (samples, layers, experts), in fp16."""
    model = calibration.model
    pathways = torch.empty(len(samples), len(layers), layers[0].count, dtype=torch.float16)
    embeddings = torch.empty(len(samples), model.hidden, dtype=torch.float16)
    index = {layer.layer: place for place, layer in enumerate(layers)}
    embed = model.causal_lm.get_input_embeddings()
    batches = list(model.batches(samples))
    for places, batch in calibration.track(batches, "reference pathways", len(batches)):

        def keep(
            layer: MoeLayer,
            routed: Routed,
            of: SampleBatch = batch,
            rows: Sequence[int] = tuple(places),
        ) -> None:
            found = layer.scores(routed.logits[of.last]).half()
            pathways[list(rows), index[layer.layer]] = found.cpu()

        with recorded(layers, keep):
            final_states(model, batch)
        for row, place in enumerate(places):
            prompt = prompt_embedding(embed(batch.ids[row, batch.prompts[row]]))
            embeddings[place] = prompt.half().cpu()
    return embeddings, pathways
