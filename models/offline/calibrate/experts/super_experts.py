"""Step: super experts, and what each routed expert did."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sluice.models.offline.calibrate.experts.expert_outputs import measured
from sluice.models.offline.calibrate.step import Calibration, Step, option
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.policy.experts import ExpertId

CODE, PAPER = "code", "paper"


@dataclass(frozen=True)
class SuperExperts(Step):
    """Finds super experts (arXiv 2507.23279) on each prompt and full depth's own answer to it.

    a is the largest absolute element of an expert's output, biases of its down projection
    included, before its weight, over all tokens that were routed to it; 0 if there were none. An
    expert is super if its a is above a percentile and above a share of the largest of the a that
    are looked at, and its layer is one of those that count. What these are is the criterion:

    - `code`, that of the authors' code: layers l < round(depth * layers) count, and their a are
      looked at. It finds one in nearly any model: the largest a is above a percentile of few.
    - `paper`: all a are looked at, and the layers count in which massive activations form. How
      these are told is a choice made here: see
      `sluice.models.offline.calibrate.experts.expert_outputs`. A model without massive activations
      has no super experts.

    The share is the paper's; the authors' code rounds it down to an integer. Shared experts are
    none: no control can take them away, so they are neither in the list nor among the a, while the
    authors' code has them as expert -1.
    """

    name: ClassVar[str] = "super-experts"
    help: ClassVar[str] = "experts whose outputs make massive activations; load of each expert"
    needs_experts: ClassVar[bool] = True

    criterion: str = option(CODE, f"{CODE}, or {PAPER}: none where no massive activations form")
    percentile: float = option(99.5, "of the experts' largest outputs; super ones are above it")
    share: float = option(0.1, "of the largest output of all; super experts are above it")
    depth: float = option(0.75, f"share of the layers, from the first, that count with {CODE}")

    def run(self, calibration: Calibration) -> Part:
        """Run the samples, and look at every expert's outputs.

        Raises:
            CalibrationError: an option is out of range, the model has no experts, or an output is
                not finite.
        """
        self._check()
        outputs = measured(calibration)
        layers = calibration.model.layers
        if self.criterion == PAPER:
            supers = self.chosen(outputs.maxima, outputs.forming, outputs.maxima)
        else:
            early = frozenset(range(round(self.depth * layers)))
            looked_at = {layer: row for layer, row in outputs.maxima.items() if layer in early}
            supers = self.chosen(outputs.maxima, early, looked_at)
        expert_map = {
            "layers": list(outputs.maxima),
            "load": list(outputs.load.values()),
            "maxima": list(outputs.maxima.values()),
        }
        return Part({"super_experts": [list(each) for each in supers], "expert_map": expert_map})

    def chosen(
        self,
        maxima: Mapping[int, Sequence[float]],
        layers: Collection[int],
        looked_at: Mapping[int, Sequence[float]],
    ) -> tuple[ExpertId, ...]:
        """Super experts, ascending.

        Args:
            maxima: largest outputs of the experts by decoder layer.
            layers: that count.
            looked_at: the part of `maxima` that percentile and share are taken of.
        """
        if not looked_at:
            return ()
        entries = torch.tensor([value for row in looked_at.values() for value in row]).double()
        # Interpolated between entries, as numpy does.
        percentile = float(torch.quantile(entries, self.percentile / 100.0))
        least = max(percentile, self.share * float(entries.max()))
        return tuple(
            (layer, expert)
            for layer, row in sorted(maxima.items())
            for expert, value in enumerate(row)
            if layer in layers and value > least
        )

    def _check(self) -> None:
        if self.criterion not in (CODE, PAPER):
            raise CalibrationError(
                f"super-experts: criterion: must be {CODE} or {PAPER}, not {self.criterion!r}"
            )
        for name, top in (("percentile", 100.0), ("share", 1.0), ("depth", 1.0)):
            if not 0 <= getattr(self, name) <= top:
                raise CalibrationError(f"super-experts: {name}: must be in 0 to {top:g}")
