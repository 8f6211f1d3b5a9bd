"""What policies take: the work of a set of requests, from their reports or their records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from sluice.models.policy.axes import ATTENTION, DECODE, EXECUTED, MODULES
from sluice.models.telemetry.request_record import RoutingRecord


class NothingCountedError(ValueError):
    """A report counted nothing: the engine lost the request's record."""


class _Sums(NamedTuple):
    """Of one request: token rows, and those generated, each with what it ran.

    `compute` and `generated_compute` are in units of a row at full depth. `layers` are those of the
    generated rows, attention and MLP each counting as half a layer.
    """

    rows: int
    compute: float
    generated: int
    layers: float
    generated_compute: float


@dataclass(frozen=True)
class Work:
    """What an engine ran for a set of requests.

    Attributes:
        generated_tokens: generated tokens that went through the model; the last token of a request
            never does.
        mean_layers: layers per such token, or None if there was none; half a layer is an attention
            or an MLP alone.
        generated_compute_fraction: share of full depth's compute that they took, or None.
        compute_fraction: the same of all tokens, prompts included; of several requests the mean,
            each weighing as many rows as it ran.
        exit_layers: under an exit rule, of each request the layer after which each of its
            generated tokens left. Reports have them.
    """

    generated_tokens: int
    mean_layers: float | None
    generated_compute_fraction: float | None
    compute_fraction: float
    exit_layers: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of_reports(cls, reports: Iterable[Mapping[str, Any]]) -> Self:
        """Sum the `routing` objects of answers; each weighs as many tokens as it counts.

        Raises:
            NothingCountedError: a report counted nothing, or there is none.
        """
        reports = list(reports)
        exits = [tuple(report["exit_layers"]) for report in reports if "exit_layers" in report]
        return cls._of_sums([_sums_of_report(report) for report in reports], tuple(exits))

    @classmethod
    def of_records(cls, records: Iterable[RoutingRecord]) -> Self:
        """Sum a worker's records; each weighs as many tokens as it counts.

        Raises:
            NothingCountedError: there is no record.
        """
        return cls._of_sums([_sums_of_record(record) for record in records])

    @classmethod
    def _of_sums(
        cls, requests: Sequence[_Sums], exit_layers: tuple[tuple[int, ...], ...] = ()
    ) -> Self:
        if not any(request.rows for request in requests):
            raise NothingCountedError("no report counts a token")
        total = _Sums(*map(sum, zip(*requests, strict=True)))
        return cls(
            total.generated,
            total.layers / total.generated if total.generated else None,
            total.generated_compute / total.generated if total.generated else None,
            total.compute / total.rows,
            exit_layers,
        )


def _sums_of_report(report: Mapping[str, Any]) -> _Sums:
    if "layers" not in report:
        raise NothingCountedError(f"a report counted nothing: {'; '.join(report['warnings'])}")
    rows = sum(report["layers"][0]["attention"].values())
    generated = report["generated"]
    tokens = generated["tokens"]
    return _Sums(
        rows,
        report["compute_fraction"] * rows,
        tokens,
        generated["mean_layers"] * tokens if tokens else 0.0,
        generated["compute_fraction"] * tokens if tokens else 0.0,
    )


def _sums_of_record(record: RoutingRecord) -> _Sums:
    # Layer 0 names every row once.
    rows = int(record.counts[:, 0, ATTENTION].sum())
    generated = int(record.counts[DECODE, 0, ATTENTION].sum())
    return _Sums(
        rows,
        record.compute_fraction * rows,
        generated,
        int(record.counts[DECODE, ..., EXECUTED].sum()) / len(MODULES),
        record.generated_compute_fraction * generated,
    )
