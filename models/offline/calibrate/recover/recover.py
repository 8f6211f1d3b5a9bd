"""Step: low-rank adapters that make up for blocks left out of generated tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sluice.models.depth.stream_adapter import StreamAdapter, tensors_of
from sluice.models.offline.calibrate.depth.training_data import TrainSplit, row_parts
from sluice.models.offline.calibrate.frontier.greedy_levels import (
    greedy_levels,
    level_samples,
    without,
)
from sluice.models.offline.calibrate.recover.adapter_training import (
    KeptTraining,
    Training,
    divergence,
    shallow_states,
    train,
)
from sluice.models.offline.calibrate.step import Calibration, Step, check_least, option
from sluice.models.offline.calibrate.workspace import Part, key_of
from sluice.models.offline.hf_model.examples import CalibrationError, spaced_indices
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.samples import Sample
from sluice.models.offline.intervals import (
    LEAST_PROMPTS,
    SIGNIFICANCE,
    corrected,
    mean_above,
    token_share,
)
from sluice.models.policy.policy import Phase
from sluice.models.profile.layer_fields import AdapterFields
from sluice.models.profile.values import Interval

_TRIED = 4
"""Blocks that are tried for each level but the first."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recover(Step):
    """Trains an adapter for each share of the blocks, and keeps those that are shown to help.

    The blocks are those of the greedy levels
    (`sluice.models.offline.calibrate.frontier.greedy_levels`), left out of generated tokens. An
    adapter acts after each run of adjacent blocks that are left out
    (`sluice.models.depth.stream_adapter`). It is the second stage of FiRST (arXiv 2410.12513),
    which trains LoRA under its skips, with adapters beside the layers instead of in them: they
    belong to a request's own tokens and cost as much whatever the neighbours ask for.

    The training half of the prompts (`TrainSplit`) trains, the other half measures. An adapter is
    kept if the divergence from full depth falls there: Student's t-test of the prompts'
    differences, one-sided, adjusted for the number of adapters.
    """

    name: ClassVar[str] = "recover"
    help: ClassVar[str] = "low-rank adapters that make up for blocks left out of generated tokens"
    only_named: ClassVar[bool] = True

    shares: str = option("0.1,0.2", "shares of the blocks to leave out, an adapter for each")
    rank: int = option(64, "rank of an adapter's maps")
    steps: int = option(300, "steps of Adam for each adapter")
    tokens: int = option(1024, "tokens of a step, padding included, if a sample is not longer")
    learning_rate: float = option(1e-3, "peak; it decays to zero along a cosine")
    samples: int = option(0, "prompts that blocks are chosen by; 0: by the number of layers")

    @property
    def training(self) -> Training:
        """How an adapter is trained."""
        return Training(self.rank, self.steps, self.tokens, self.learning_rate)

    def run(self, calibration: Calibration) -> Part:
        """Train and measure.

        Raises:
            CalibrationError: an option is out of range, or there are too few prompts.
        """
        counts = self._counts(calibration.model.layers)
        split = TrainSplit.of(calibration)
        if len(split.test) < LEAST_PROMPTS:
            raise CalibrationError(
                f"recover: {len(split.test)} prompts with answers of two tokens or more would be "
                f"left to measure on, and fewer than {LEAST_PROMPTS} show nothing"
            )
        chosen = spaced_indices(
            level_samples(calibration.model.layers, self.samples), len(split.train)
        )
        levels = greedy_levels(
            calibration,
            [split.train[place] for place in chosen],
            max(counts),
            sub_layers=False,
            tried=_TRIED,
        )
        found = {}
        for count in counts:
            blocks = without([level.unit for level in levels[:count]]).mlp
            adapters = self._trained(calibration, blocks, split.train)
            found[f"without-{count}"] = _Found(
                blocks,
                adapters,
                _measured(calibration, {}, blocks, split.test),
                _measured(calibration, adapters, blocks, split.test),
            )
        return self._part(found, split)

    def _counts(self, layers: int) -> list[int]:
        """Numbers of blocks."""
        least = {"rank": 1, "steps": 1, "tokens": 1, "samples": 0}
        check_least(self, least)
        if self.learning_rate <= 0:
            raise CalibrationError("recover: learning_rate must be above 0")
        try:
            shares = [float(each) for each in self.shares.split(",")]
            counts = sorted({math.floor(share * layers + 0.5) for share in shares})
        except (ValueError, OverflowError):
            raise CalibrationError(
                f"recover: shares are numbers with commas between them, not {self.shares!r}"
            ) from None
        if counts[0] < 1 or counts[-1] >= layers:
            raise CalibrationError(
                f"recover: shares leave out {counts[0]} to {counts[-1]} of {layers} blocks: "
                "at least 1 must go, and 1 must stay"
            )
        return counts

    def _trained(
        self, calibration: Calibration, blocks: Sequence[int], samples: Sequence[Sample]
    ) -> dict[int, StreamAdapter]:
        """Adapters by layer; what was trained before a stop is not trained again."""
        key = key_of(calibration.key(self), [*blocks])
        kept = KeptTraining(calibration.workspace, f"recover-{len(blocks)}", key)
        return train(calibration, blocks, samples, self.training, kept)

    def _part(self, found: Mapping[str, _Found], split: TrainSplit) -> Part:
        """Those that help."""
        p_values = corrected([mean_above(each.gains) for each in found.values()])
        fields: dict[str, Any] = {}
        heads: dict[str, Tensor] = {}
        for (name, each), p_value in zip(found.items(), p_values, strict=True):
            if p_value > SIGNIFICANCE:
                _LOG.warning(
                    "recover: the adapter for blocks %s is not shown to help on %d prompts that it "
                    "was not trained on (p = %.2g), and is not kept: give it more prompts",
                    ", ".join(map(str, each.blocks)),
                    len(split.test),
                    p_value,
                )
                continue
            fields[name] = AdapterFields(
                attention=each.blocks,
                mlp=each.blocks,
                phase=Phase.DECODE,
                layers=tuple(each.adapters),
                rank=self.rank,
                prompts=len(split.train),
                held_out=len(split.test),
                before=each.before.agreement,
                after=each.after.agreement,
                divergence_before=each.before.divergence,
                divergence_after=each.after.divergence,
            ).model_dump(mode="json")
            heads |= tensors_of(name, each.adapters)
        return Part({"adapters": fields}, heads)


@dataclass(frozen=True)
class _Measured:
    """What is left of full depth on held-out prompts, sample by sample.

    Attributes:
        agreed: generated tokens whose next token is full depth's.
        compared: generated tokens.
        lost: their divergence from full depth, summed, nats.
    """

    agreed: Sequence[int]
    compared: Sequence[int]
    lost: Sequence[float]

    @property
    def agreement(self) -> Interval:
        """Share of the tokens that agree."""
        return token_share(self.agreed, self.compared)

    @property
    def divergence(self) -> float:
        """Mean over tokens, nats."""
        return sum(self.lost) / sum(self.compared)


class _Found(NamedTuple):
    """What was trained for a set of blocks, and what came of it."""

    blocks: tuple[int, ...]
    adapters: Mapping[int, StreamAdapter]
    before: _Measured
    after: _Measured

    @property
    def gains(self) -> list[float]:
        """How much the divergence of each sample falls, mean over its tokens."""
        rows = zip(self.before.lost, self.after.lost, self.before.compared, strict=True)
        return [(before - after) / tokens for before, after, tokens in rows]


@torch.no_grad()
def _measured(
    calibration: Calibration,
    adapters: Mapping[int, StreamAdapter],
    blocks: Collection[int],
    samples: Sequence[Sample],
) -> _Measured:
    model = calibration.model
    agreed, compared, lost = [0] * len(samples), [0] * len(samples), [0.0] * len(samples)
    batches = [*model.batches(samples)]
    for places, batch in calibration.track(batches, "held-out prompts", len(batches)):
        where, owner = batch.where[batch.decoded], batch.owner[batch.decoded]
        full = final_states(model, batch).flatten(0, 1)[where]
        own = shallow_states(model, adapters, blocks, batch).flatten(0, 1)[where]
        for part in row_parts(model, len(where)):
            expected, given = model.logits(full[part]), model.logits(own[part])
            same = (expected.argmax(-1) == given.argmax(-1)).tolist()
            apart = divergence(expected, given).tolist()
            for sample, agrees, nats in zip(owner[part].tolist(), same, apart, strict=True):
                place = places[sample]
                agreed[place] += agrees
                compared[place] += 1
                lost[place] += nats
    return _Measured(agreed, compared, lost)
