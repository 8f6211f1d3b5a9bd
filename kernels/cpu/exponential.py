"""The exponential function in fp32, of which a loop over an array becomes vector code.

Cephes' expf: exp(x) = 2^n exp(y) with y = x - n log 2, taken off in two parts, and a polynomial of
y. numba's own is a call into a library for each number.
"""

from __future__ import annotations

import numpy as np

from sluice.kernels.cpu.jit import compiled

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_HIGHEST = np.float32(89.0)
"""From it on fp32 has infinity for the exponential."""
_LOWEST = np.float32(-104.0)
"""Below it fp32 has 0."""
_LOWEST_NORMAL = np.float32(-87.0)
"""Below it the result may be a subnormal number."""
_LOG2_E = np.float32(1.44269504088896341)
_LOG_2 = tuple(np.float32(part) for part in (0.693359375, -2.12194440e-4))
_TERMS = tuple(
    np.float32(term)
    for term in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
_ROUNDER = np.float32(1.5 * 2**23)
"""What is added to it is rounded to an integer, which its last bits then hold."""
_ROUNDER_BITS = _ROUNDER.view(np.int32)
_ONE_BIT, _BIAS, _MANTISSA = (np.int32(value) for value in (1, 127, 23))


@compiled
def exponential(x: np.float32) -> np.float32:
    """To 1e-7 of it, down to the smallest number that is not 0; NaN stays NaN.

    Equal numbers have results of equal bits, wherever in a vector they are.
    """
    bounded = _HIGHEST if x > _HIGHEST else x
    # Not the bound itself: arithmetic on subnormal numbers is slow.
    value, n = _parts(_ZERO if x < _LOWEST else bounded)
    # In two halves, as 2^n may be beyond what a float holds.
    half = np.int32(n >> _ONE_BIT)
    value = value * _power(half) * _power(n - half)
    return _ZERO if x < _LOWEST else value


@compiled
def share_of_largest(x: np.float32) -> np.float32:
    """The same for no more than 0, and faster: 0 for whatever is nothing beside 1."""
    value, n = _parts(_LOWEST_NORMAL if x < _LOWEST_NORMAL else x)
    return value * _power(n) if x > _LOWEST_NORMAL else _ZERO


@compiled
def _parts(x: np.float32) -> tuple[np.float32, np.int32]:
    """The exponential as a number next to 1 and the power of 2 that is its factor."""
    rounded = x * _LOG2_E + _ROUNDER
    n = rounded - _ROUNDER
    y = x - n * _LOG_2[0] - n * _LOG_2[1]
    value = _TERMS[0] * y + _TERMS[1]
    value = value * y + _TERMS[2]
    value = value * y + _TERMS[3]
    value = value * y + _TERMS[4]
    value = value * y + _TERMS[5]
    value = value * y * y + y + _ONE
    return value, np.float32(rounded).view(np.int32) - _ROUNDER_BITS


@compiled
def _power(n: np.int32) -> np.float32:
    """2^n, of which the bits are those of n, biased, above 23 of the mantissa."""
    return np.int32((n + _BIAS) << _MANTISSA).view(np.float32)
