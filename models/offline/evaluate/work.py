"""What policies take: the work that a server's reports count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class NothingCountedError(ValueError):
    """A report counted nothing: the engine lost the request's record."""


@dataclass(frozen=True)
class Work:
    """What the server ran for a set of requests, from their reports.

    Attributes:
        generated_tokens: generated tokens that went through the model.
        mean_layers: layers per such token, or None if there was none; half a layer is an attention
            or an MLP alone.
        generated_compute_fraction: share of full depth's compute that they took, or None.
        compute_fraction: the same of all tokens, prompts included.
        exit_layers: under an exit rule, of each request the layer after which each of its
            generated tokens left.
    """

    generated_tokens: int
    mean_layers: float | None
    generated_compute_fraction: float | None
    compute_fraction: float
    exit_layers: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, reports: Iterable[Mapping[str, Any]]) -> Work:
        """Sum reports; each weighs as many tokens as it counts.

        Raises:
            NothingCountedError: a report counted nothing, or there is none.
        """
        tokens = rows = 0
        exits = []
        layers = generated = compute = 0.0
        for report in reports:
            if "layers" not in report:
                warnings = "; ".join(report["warnings"])
                raise NothingCountedError(f"a report counted nothing: {warnings}")
            if "exit_layers" in report:
                exits.append(tuple(report["exit_layers"]))
            part = report["generated"]
            if part["tokens"]:
                tokens += part["tokens"]
                layers += part["mean_layers"] * part["tokens"]
                generated += part["compute_fraction"] * part["tokens"]
            ran = sum(report["layers"][0]["attention"].values())
            rows += ran
            compute += report["compute_fraction"] * ran
        if not rows:
            raise NothingCountedError("no report counts a token")
        return cls(
            tokens,
            layers / tokens if tokens else None,
            generated / tokens if tokens else None,
            compute / rows,
            tuple(exits),
        )
