"""A run as one HTML page that needs nothing else: no scripts, no files beside it."""

from __future__ import annotations

import ipaddress
import math
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from sluice.loadtest.report.plots import charts
from sluice.loadtest.report.results import Results
from sluice.loadtest.report.summary import PERCENTILES, TIMES
from sluice.loadtest.report.verdict import overall_verdict, verdicts
from sluice.models.offline.report.template import page_template

_TEMPLATE = Path(__file__).with_suffix(".html")
_TIME_NAMES = {
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token, over requests",
    "itl_ms": "between tokens, over tokens",
    "e2el_ms": "end to end",
}


def report_page(results: Results) -> str:
    """The page, UTF-8 HTML; everything that came from outside is escaped."""
    policies = results.scenario.turns == "policies"
    ratios = results.ratios(lambda summary: summary.goodput if policies else summary.throughput)
    written = results.scenario.model_dump(mode="json", exclude_unset=True)
    return page_template(_TEMPLATE, {"number": _number}).render(
        results=results,
        scenario=results.scenario,
        written=yaml.safe_dump(written, sort_keys=False, allow_unicode=True),
        rows=results.rows(),
        verdicts=verdicts(results),
        overall=overall_verdict(results),
        local=is_loopback(results.url),
        date=None if results.date is None else _moment(results.date),
        charts=charts(results),
        ratios=ratios,
        compared="goodput" if policies else "throughput",
        percentiles=PERCENTILES,
        times={name: _TIME_NAMES[name] for name in TIMES},
        slope=results.memory_slope(),
        scrape_ms={rank: results.scrape_ms(rank) for rank in (50, 99)},
    )


def is_loopback(url: str) -> bool:
    """Whether a server's address is of the machine that asks it."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _moment(date: str) -> str:
    """An ISO 8601 moment, to the minute, UTC."""
    return f"{datetime.fromisoformat(date).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _number(value: float | None) -> str:
    """To three significant digits at least, without an exponent."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"
