"""The audit log: one line of JSON per request with expert controls, served or forbidden.

It holds counts and names, never a prompt, an answer or a key.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from sluice.models.policy.axes import ATTENTION
from sluice.models.routing.errors import RoutingError
from sluice.models.telemetry.request_record import RoutingRecord
from sluice.server.access.capability import Caller
from sluice.server.admission import Admitted

LOGGER = "sluice.audit"

_logger = logging.getLogger(LOGGER)


def show_audit_log() -> None:
    """Write audit lines to standard error, unless the server's logging setup has a place for them.

    vLLM's setup covers its own loggers only.
    """
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s"))
        _logger.addHandler(handler)


def log_expert_routing(
    caller: Caller, admitted: Admitted, outcome: str, status: int, record: RoutingRecord | None
) -> None:
    """Log an admitted request that has ended; nothing if its policy leaves the experts alone.

    Args:
        caller: who sent it.
        admitted: the request.
        outcome: `ok`, `rejected` (by vLLM), `error` or `aborted`.
        status: HTTP status that was sent, 0 if none was.
        record: the worker's record, None if the request never reached the engine. Token counts are
            rows that ran: prompt tokens from the prefix cache are not among them.
    """
    policy = admitted.extra.policy
    if policy.experts.empty:
        return
    prompt, generated = _rows(record)
    _log(
        {
            "event": "expert_routing",
            "key": caller.id,
            "preset": admitted.preset,
            "policy": policy.digest,
            "outcome": outcome,
            "status": status,
            "prompt_tokens": prompt,
            "generated_tokens": generated,
            "masked": record.experts.masked if record and record.experts else None,
        }
    )


def log_refused(caller: Caller, error: RoutingError) -> None:
    """Log a request that its caller or this server may not run."""
    _log({"event": "refused", "key": caller.id, "param": error.param, "reason": error.reason})


def _rows(record: RoutingRecord | None) -> tuple[int | None, int | None]:
    """Prompt and generated token rows: layer 0 names every row once."""
    if record is None:
        return None, None
    prompt, generated = record.counts[:, 0, ATTENTION].sum(axis=1).tolist()
    return prompt, generated


def _log(event: dict[str, Any]) -> None:
    _logger.info("%s", json.dumps(event))
