"""Step: exit thresholds whose risk is bounded (CALM, arXiv 2207.07061)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sluice.models.depth.method import row_cosine
from sluice.models.depth.registry import exit_method
from sluice.models.offline.calibrate.depth.exit_candidates import Candidate, exit_candidates
from sluice.models.offline.calibrate.depth.exit_grid import turning_points
from sluice.models.offline.calibrate.depth.exit_simulation import ExitSetting, full_tokens, left
from sluice.models.offline.calibrate.depth.layer_saturation import (
    SimilarTokens,
    saturation_thresholds,
)
from sluice.models.offline.calibrate.depth.risk_bound import RiskBound
from sluice.models.offline.calibrate.depth.training_data import (
    TokenStates,
    TrainSplit,
    likeliest,
)
from sluice.models.offline.calibrate.step import Calibration, Step, check_least, option
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.samples import SampleBatch
from sluice.models.profile.layer_fields import ExitThreshold

METHODS = ("confidence", "entropy", "saturation", "classifier", "q_exit")

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exits(Step):
    """Finds, for each exit method, the loosest threshold that Learn-then-Test lets pass.

    The risk is textual consistency by token: the share of a prompt's decode steps whose token is
    not full depth's, given full depth's own answer so far, with keys and values propagated. It is
    averaged over prompts, which are the units that the bound takes for exchangeable; `agreement`
    in the result is averaged likewise, `mean_layers` over tokens. What is tried, after which layers
    and at which threshold, is put in order by tokens of the first half
    (`sluice.models.offline.calibrate.depth.exit_candidates`); the second half's prompts are the
    test (`TrainSplit`), and no head was trained on them. The bound holds for each method by itself,
    without decay of the threshold, and for prompts like these.

    A method none of whose exits passes has no entry; the log and `exit_failures` say why.
    `classifier` and `q_exit` need the step `heads`. `saturation` gets a threshold for each layer,
    see `sluice.models.offline.calibrate.depth.layer_saturation`.
    """

    name: ClassVar[str] = "exits"
    help: ClassVar[str] = "exit thresholds with a bounded risk of other tokens than full depth's"
    needs: ClassVar[tuple[str, ...]] = ("heads",)

    tolerance: float = option(0.05, "delta: share of tokens that may differ from full depth's")
    error: float = option(0.05, "epsilon: probability that more of them differ")
    first: int = option(1, "first layer after which tokens may leave")
    every: int = option(2, "layers from one exit to the next")
    thresholds: int = option(10, "exits that a method is tried with, at most, from the safest on")
    tokens: int = option(1024, "generated tokens that these are chosen by, at most")

    def passes(self, calibration: Calibration) -> float:
        """See `Step.passes`; half of the prompts are tested, with an LM head at every exit."""
        head = calibration.model.hidden * int(calibration.model.config.vocab_size)
        layer = 12 * calibration.model.hidden**2
        exits = len(self.layers(calibration)) * head / (layer * calibration.model.layers)
        return len(METHODS) * self.thresholds * 0.5 * (1 + exits)

    @property
    def bound(self) -> RiskBound:
        """What is to be shown of each method."""
        return RiskBound(self.tolerance, self.error)

    def refusal(self, calibration: Calibration) -> str | None:
        """See `Step.refusal`."""
        self._check()
        if not self.layers(calibration):
            layers = calibration.model.layers
            return f"no exit: the model's last layer is {layers - 1}, the first exit {self.first}"
        held = len(calibration.prompts) // 2
        if held < self.bound.least:
            return (
                f"{held} prompts, half of those given, show no tolerance of {self.tolerance} with "
                f"error {self.error}, whatever the tokens: it takes {self.bound.least}"
            )
        return super().refusal(calibration)

    def layers(self, calibration: Calibration) -> tuple[int, ...]:
        """Layers with an exit."""
        return tuple(range(self.first, calibration.model.layers - 1, self.every))

    def run(self, calibration: Calibration) -> Part:
        """Calibrate.

        Raises:
            CalibrationError: an option is out of range, or no answers have a second token.
        """
        self._check()
        split = TrainSplit.of(calibration)
        if not split.test:
            raise CalibrationError("exits: fewer than two answers have a second token")
        grid = TokenStates.of(calibration, split.train, self.tokens, calibration.seed)
        held = _Held(calibration, split)
        right = self._right(calibration, grid)
        entries, failures = [], {}
        for name in METHODS:
            found = self._calibrated(calibration, name, grid, right, held)
            if isinstance(found, str):
                _LOG.warning("exits: no threshold for %s: %s", name, found)
                failures[name] = found
            else:
                entries.append(found.model_dump(mode="json"))
        saturation = self._saturation(calibration, grid, held)
        return Part({"exits": entries, "exit_failures": failures, "saturation": saturation})

    @torch.no_grad()
    def _right(self, calibration: Calibration, grid: TokenStates) -> Tensor:
        """Whether full depth's token is the likeliest at each exit, bool, (exits, tokens)."""
        model = calibration.model
        full = likeliest(model, grid.states[-1])
        layers = self.layers(calibration)
        return torch.stack([likeliest(model, grid.states[layer + 1]) == full for layer in layers])

    def _calibrated(
        self,
        calibration: Calibration,
        name: str,
        grid: TokenStates,
        right: Tensor,
        held: _Held,
    ) -> ExitThreshold | str:
        """The entry of a method, or why it has none."""
        method, tensors = exit_method(name), _tensors(calibration, name)
        if any(tensor not in tensors for tensor in method.profile_tensors):
            return "its head was not trained"
        layers = self.layers(calibration)
        with torch.no_grad():
            points = turning_points(calibration.model, method, tensors, layers, grid.states)
        candidates = exit_candidates(
            points,
            right,
            grid.weights,
            layers,
            calibration.model.layers,
            self.thresholds,
            self.tolerance,
            lower_is_stricter=method.leaves_below,
        )
        tracked = calibration.track(candidates, f"exits by {name}", len(candidates))
        passed = self.bound.last_shown(
            held.trial(ExitSetting(method, tensors, each.threshold, each.layers))
            for each in tracked
        )
        if passed is None:
            return _said(self.bound, candidates[0])
        trial, losses = passed
        return ExitThreshold(
            method=name,
            layers=trial.layers,
            threshold=trial.threshold,
            tolerance=self.tolerance,
            error=self.error,
            agreement=1.0 - float(losses.mean()),
            mean_layers=trial.mean_layers,
        )

    def _saturation(self, calibration: Calibration, grid: TokenStates, held: _Held) -> list[float]:
        pairs = zip(grid.states[1:], grid.states[:-1], strict=True)
        cosines = torch.stack([row_cosine(after, before) for after, before in pairs])
        return saturation_thresholds(
            cosines, grid.owner, held.similar(calibration), self.bound, self.thresholds
        )

    def _check(self) -> None:
        for name in ("tolerance", "error"):
            if not 0 < getattr(self, name) < 1:
                raise CalibrationError(f"exits: {name} must lie between 0 and 1")
        check_least(self, {"first": 0, "every": 1, "thresholds": 1, "tokens": 1})


@dataclass(frozen=True)
class _Trial:
    """Exits as tested: mean number of layers that a decode step ran."""

    layers: tuple[int, ...]
    threshold: float
    mean_layers: float


class _Held:
    """The prompts that thresholds are tested on, with full depth's tokens."""

    def __init__(self, calibration: Calibration, split: TrainSplit) -> None:
        self._model = calibration.model
        self._count = len(split.test)
        self._batches: list[tuple[list[int], SampleBatch, Tensor]] = []
        batches = list(calibration.model.batches(split.test))
        for places, batch in calibration.track(batches, "full depth's tokens", len(batches)):
            self._batches.append((places, batch, full_tokens(calibration.model, batch)))

    def trial(self, setting: ExitSetting) -> tuple[_Trial, Tensor]:
        """Share of each prompt's steps that differ, fp64, (prompts,)."""
        losses = torch.zeros(self._count, dtype=torch.float64)
        layers = steps = 0
        for places, batch, full in self._batches:
            found = left(self._model, batch, setting)
            owner = batch.owner[batch.decoded]
            counts = torch.bincount(owner, minlength=len(places))
            wrong = torch.bincount(owner[found.tokens != full], minlength=len(places))
            losses[places] = (wrong.double() / counts).cpu()
            layers += int(found.layers.sum())
            steps += len(full)
        return _Trial(setting.layers, setting.threshold, layers / steps), losses

    def similar(self, calibration: Calibration) -> SimilarTokens:
        """Cosines and agreement of all layers."""
        parts = [
            SimilarTokens.of(self._model, batch, full, places)
            for places, batch, full in calibration.track(
                self._batches, "saturation of layers", len(self._batches)
            )
        ]
        return SimilarTokens.joined(parts)


def _said(bound: RiskBound, safest: Candidate) -> str:
    """Why a method has no threshold."""
    return (
        f"none keeps the tokens of full depth but for a share of {bound.tolerance:g}, with error "
        f"{bound.error:g}; the safest, {safest.threshold:.4g} after layer {safest.layers[0]} or "
        f"later, was tried first"
    )


def _tensors(calibration: Calibration, method: str) -> Mapping[str, Tensor]:
    """Trained tensors of a method, without its prefix; none if it has none."""
    part = calibration.parts.get("heads")
    if part is None:
        return {}
    prefix, device = f"{method}.", calibration.model.device
    return {
        name.removeprefix(prefix): tensor.to(device)
        for name, tensor in part.heads.items()
        if name.startswith(prefix)
    }
