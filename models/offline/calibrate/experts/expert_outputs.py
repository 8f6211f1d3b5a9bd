"""What the routed experts of a model put out on the samples, and where the stream grows massive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.moe import MoeLayer, Routed, moe_layers, recorded

MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
"""Massive activations are above the first, and above as many times their token's median magnitude
(arXiv 2402.17762)."""


@dataclass(frozen=True)
class ExpertOutputs:
    """By decoder layer with routed experts, ascending; one number an expert.

    Attributes:
        maxima: largest absolute element of its outputs, before its weight; 0 if it had no token.
        load: share of the tokens that it served.
        forming: decoder layers in which massive activations form: the stream after the layer has
            one, and its largest element is larger than that of the stream before.
    """

    maxima: dict[int, list[float]]
    load: dict[int, list[float]]
    forming: frozenset[int]


def measured(calibration: Calibration) -> ExpertOutputs:
    """Run the samples, and look at every expert's outputs and at the stream.

    Raises:
        CalibrationError: the model has no experts, or an output is not finite.
    """
    model = calibration.model
    layers = moe_layers(model.causal_lm)
    maxima = {
        layer.layer: torch.zeros(layer.count, device=model.device, dtype=torch.float32)
        for layer in layers
    }
    served = {layer: torch.zeros_like(row, dtype=torch.long) for layer, row in maxima.items()}
    # Of each layer: largest element before it and after it, and whether one is massive.
    stream = torch.zeros(model.layers, 3, device=model.device)
    batches = list(model.batches(calibration.samples))
    tokens = 0
    with torch.no_grad():
        for _, batch in calibration.track(batches, "outputs of experts", len(batches)):
            used = batch.used
            tokens += int(used.sum())

            def record(layer: MoeLayer, routed: Routed, used: Tensor = used) -> None:
                mine = used.flatten()
                ids = routed.ids[mine]
                outputs = layer.outputs(routed.states[mine], ids)
                for column, output in zip(ids.unbind(-1), outputs, strict=True):
                    largest = output.float().abs().amax(-1)
                    maxima[layer.layer].scatter_reduce_(0, column, largest, "amax")
                served[layer.layer] += torch.bincount(ids.flatten(), minlength=layer.count)

            def watch(layer: int, *states: Tensor, used: Tensor = used) -> None:
                before, _, after = (state[used].float().abs() for state in states)
                largest, median = after.amax(-1), after.median(-1).values
                massive = (largest > MASSIVE) & (largest > MASSIVE_RATIO * median)
                found = torch.stack((before.max(), after.max(), massive.any().float()))
                stream[layer] = torch.maximum(stream[layer], found)

            with recorded(layers, record):
                final_states(model, batch, watch)
    _check_finite(maxima)
    forming = (stream[:, 1] > stream[:, 0]) & stream[:, 2].bool()
    return ExpertOutputs(
        {layer: row.tolist() for layer, row in maxima.items()},
        {layer: (row.double() / tokens).tolist() for layer, row in served.items()},
        frozenset(forming.nonzero().flatten().tolist()),
    )


def _check_finite(maxima: dict[int, Tensor]) -> None:
    for layer, row in maxima.items():
        if not bool(row.isfinite().all()):
            raise CalibrationError(
                f"super-experts: layer {layer}: an expert's output is not finite; "
                "a wider type of the weights may help"
            )
