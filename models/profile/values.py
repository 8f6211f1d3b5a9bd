"""What every part of a profile is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Layers = tuple[int, ...]
PerLayer = tuple[float, ...]
"""One number a decoder layer."""


class Strict(BaseModel):
    """Unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Interval(Strict):
    """A measured value with its 95 % confidence interval."""

    value: float
    low: float
    high: float
