"""The Pareto set, the presets chosen from it, and what is not shown of them; no model in sight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from sluice.models.offline.intervals import SIGNIFICANCE
from sluice.models.profile.frontier_fields import FrontierPoint, TokenMeasures

ALLOWED_LOSS = {"quality": 0.005, "balanced": 0.01, "fast": 0.03}
"""Presets, and how far the share of tasks that each answers right may lie under full depth's, as
measured. Half a point is no loss: it is one item of two hundred."""

ALLOWED_TOKENS = {"quality": 0.02, "balanced": 0.05, "fast": 0.1}
"""Presets, and how far the agreement of tokens may lie under that of full depth with itself."""

_ROUNDING = 1e-9


def on_frontier(measured: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which points no other beats: at least as good in everything, and better in one thing.

    Args:
        measured: of each point. Of the last, compute, less is better, and of all others more.
    """
    return [not any(_beats(other, own) for other in measured) for own in measured]


@dataclass(frozen=True)
class Allowance:
    """What presets may lose.

    Attributes:
        full: full depth as measured.
        noise: full depth against itself, or None.
        on_tasks: quality is a share of tasks, and not the agreement of tokens.
    """

    full: FrontierPoint
    noise: TokenMeasures | None
    on_tasks: bool = True

    @classmethod
    def of(cls, points: Sequence[FrontierPoint], noise: TokenMeasures | None, measure: str) -> Self:
        """Of a frontier; see `FrontierFields`."""
        return cls(points[0], noise, measure != "token agreement")

    @property
    def floor(self) -> float:
        """Agreement of tokens that full depth itself comes to."""
        known = [each.agreement.value for each in (self.noise, self.full.tokens) if each]
        return min(known, default=1.0)

    def keeps_tasks(self, preset: str, quality: float) -> bool:
        """Whether a preset may lose so much of the tasks; always without tasks."""
        least = self.full.quality.value - ALLOWED_LOSS[preset] - _ROUNDING
        return not self.on_tasks or quality >= least

    def keeps_tokens(self, preset: str, tokens: TokenMeasures | None) -> bool:
        """Whether a preset may agree so little; always where tokens were not measured."""
        least = self.floor - ALLOWED_TOKENS[preset] - _ROUNDING
        return tokens is None or tokens.agreement.value >= least

    def allows(self, preset: str, point: FrontierPoint) -> bool:
        """Whether a point loses no more than a preset may."""
        kept = self.keeps_tasks(preset, point.quality.value)
        return kept and self.keeps_tokens(preset, point.tokens)

    def __str__(self) -> str:
        """What presets are chosen by."""
        said = ["shown to be faster than full depth"]
        if self.on_tasks:
            said.append(f"{_points(ALLOWED_LOSS)} fewer of the tasks right, as measured")
        if self.full.tokens is not None:
            said.append(
                f"{_points(ALLOWED_TOKENS)} less agreement with full depth's tokens than full "
                f"depth's own with itself ({100 * self.floor:.1f} %)"
            )
        return "; ".join(said)


def choose(points: Sequence[FrontierPoint], allowance: Allowance) -> dict[str, str]:
    """The cheapest point that each preset allows, by preset; there may be fewer presets, or none.

    Allowed are points of the frontier that lose no more than `Allowance` says, and that are shown
    to be faster than full depth (`FrontierPoint.faster`). The cheapest is the fastest of them.
    Those whose own speed lies within the fastest's interval tie with it: of those `quality` takes
    the best, and the others take the one with the least compute on all tokens, then the best.
    Where nothing is allowed there is no such preset, and where a preset would be the point of one
    that may lose less, that one has it.

    Args:
        points: full depth first.
        allowance: what presets may lose.
    """
    measured = [measures_of(point) for point in points]
    best = [p for p, kept in zip(points, on_frontier(measured), strict=True) if kept]
    chosen: dict[str, str] = {}
    for preset in ALLOWED_LOSS:
        able = [p for p in best if allowance.allows(preset, p) and _shown_faster(p)]
        if not able:
            continue
        ties = _fastest(able)
        if preset == "quality":
            cheapest = min(ties, key=lambda p: (_loss(p), p.compute_fraction, -p.speed.value))
        else:
            cheapest = min(ties, key=lambda p: (p.compute_fraction, _loss(p), -p.speed.value))
        name = cheapest.name
        if name not in chosen.values():
            chosen[preset] = name
    return chosen


def shortfalls(
    points: Sequence[FrontierPoint], presets: Mapping[str, str], allowance: Allowance
) -> Iterator[str]:
    """What measurements do not show of the presets that were chosen, in words.

    Args:
        points: full depth first.
        presets: names of points by preset.
        allowance: that they were chosen by.
    """
    full = points[0]
    by_name = {point.name: point for point in points}
    if not any(map(_shown_faster, points)):
        yield "no setting is shown to be faster than full depth, and there are no presets"
    elif not presets:
        yield "every setting that is shown to be faster loses too much, and there are no presets"
    if not allowance.on_tasks:
        return
    for preset, name in presets.items():
        loss = ALLOWED_LOSS[preset]
        at_most = full.quality.value - by_name[name].quality.low
        if at_most > loss:
            yield (
                f"preset {preset!r} loses at most {100 * loss:g} points of quality as measured; "
                f"the items leave it open to lose {100 * at_most:.1f}"
            )


def _points(allowed: Mapping[str, float]) -> str:
    by_preset = ", ".join(f"{100 * loss:g} ({preset})" for preset, loss in allowed.items())
    return f"at most {by_preset} points"


def measures_of(point: FrontierPoint) -> tuple[float, ...]:
    """What `on_frontier` compares points by."""
    agreement = 0.0 if point.tokens is None else point.tokens.agreement.value
    return point.quality.value, agreement, point.speed.value, point.compute_fraction


def _loss(point: FrontierPoint) -> tuple[float, float]:
    """What orders points from the best on."""
    quality, agreement, *_ = measures_of(point)
    return -quality, -agreement


def _shown_faster(point: FrontierPoint) -> bool:
    return point.faster is not None and point.faster <= SIGNIFICANCE


def _fastest(allowed: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The fastest, and those that tie with it."""
    fastest = max(allowed, key=lambda point: point.speed.value)
    return [point for point in allowed if point.speed.value >= fastest.speed.low]


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    better = all(a >= b for a, b in zip(one[:-1], other[:-1], strict=True))
    return better and one[-1] <= other[-1] and one != other
