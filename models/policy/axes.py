"""The axes of every array about depth: phases, modules, outcomes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EXECUTED, SKIPPED, FILLED = 0, 1, 2
OUTCOMES = ("executed", "skipped", "filled")
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Float32Array = NDArray[np.float32]
FloatArray = NDArray[np.float64]
PREFILL, DECODE = 0, 1
ATTENTION, MLP = 0, 1
MODULES = ("attention", "mlp")
PHASES = ("prefill", "decode")
