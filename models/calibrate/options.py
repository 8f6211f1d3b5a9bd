"""Options that make no sense."""

from __future__ import annotations

from collections.abc import Mapping

from sluice.models.calibrate.examples import CalibrationError
from sluice.models.calibrate.step import Step


def check_least(step: Step, least: Mapping[str, int]) -> None:
    """Refuse options that are too small.

    Args:
        step: whose options they are.
        least: by name.

    Raises:
        CalibrationError: names the step and the option.
    """
    for name, low in least.items():
        if getattr(step, name) < low:
            raise CalibrationError(f"{step.name}: {name} must be at least {low}")
