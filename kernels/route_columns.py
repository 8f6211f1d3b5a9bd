"""Names of the columns and bits in the arrays of the routing operations."""

from __future__ import annotations

K, RANK, CHANGES = range(3)
"""Columns of `PolicyTable.limits`."""

RATIO, TOP_P = range(2)
"""Columns of `PolicyTable.cuts`."""

DROPPED, FORCED, PROTECTED = 1, 2, 4
"""Bits of `PolicyTable.marks`."""

EXTRA = 2
ROWS, MASKED = -2, -1
"""Columns of a histogram after the experts': rows routed, selections that a policy took away."""

ACTIVE, TAKEN, ROUTED = range(3)
"""Columns of what tokens ran: experts, selections that the policy took away, layers routed."""
