"""Which keys and values (K/V) of a request other requests may take from the prefix cache.

Equal tokens of two requests have equal K/V only where both ran the same layers for them. So what
changes a prompt's K/V goes into the request's cache salt, and what makes generated tokens differ
from prompt tokens keeps their blocks out of the cache (`sluice.models.vllm_adapter.patches`).
"""

from __future__ import annotations

import hashlib
import hmac

from sluice.models.depth.method import PromptEffects
from sluice.models.depth.registry import adaptive_method
from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.policy.policy import MissingKV, Phase, RoutingPolicy, canonical_json

SALT_PREFIX = "sluice-"
"""What every salt and block key of ours begins with; no client may send one."""

_SALT_CHARS = 32

_NO_EFFECTS = PromptEffects(False, False, False, False, False)


def prompt_effects(policy: RoutingPolicy) -> PromptEffects:
    """What the policy's adaptive rule does to the prompt; nothing without one."""
    rule = policy.adaptive
    return _NO_EFFECTS if rule is None else adaptive_method(rule).effects(rule)


def cache_salt(extra: RoutingExtraArgs, client_salt: str | None, secret: str = "") -> str | None:
    """Prefix-cache salt of a request: its policy's part joined with the client's own.

    Args:
        extra: the policy and the request's key.
        client_salt: of the client, or None.
        secret: of the server. Nobody who does not know it can name the salt of a policy, and so
            read or write K/V under it.
    """
    digest = prompt_kv_digest(extra.policy)
    if digest is None:
        return client_salt
    # Samples of one request have one prompt and one record: they may share.
    private = prompt_effects(extra.policy).private_prompt_kv
    parts = canonical_json([digest, extra.request_key if private else None, client_salt])
    named = hmac.new(secret.encode(), parts.encode(), hashlib.sha256).hexdigest()
    return f"{SALT_PREFIX}{named[:_SALT_CHARS]}"


def prompt_kv_digest(policy: RoutingPolicy) -> str | None:
    """Digest of a policy that changes K/V of prompt tokens; None if prompts stay stock."""
    skips = not policy.skip.empty and policy.skip.phase is not Phase.DECODE
    changed = skips or prompt_effects(policy).changes_prompt_kv or policy.experts.changes_prompt
    return policy.digest if changed else None


def private_generated(policy: RoutingPolicy) -> bool:
    """A generated token leaves other K/V than a prompt token would at its position.

    With a phase split, exits or decided masks, blocks with generated tokens must never serve
    as somebody's prompt. Exits that recompute leave full depth's K/V by the time a block is
    published.
    """
    skip = policy.skip
    splits = not skip.empty and (skip.phase is not Phase.BOTH or skip.elastic)
    exits = policy.exit is not None and policy.exit.kv is MissingKV.PROPAGATE
    adapts = prompt_effects(policy).changes_generated_kv
    return splits or exits or adapts or policy.experts.changes_generated


def private_last_prompt(policy: RoutingPolicy) -> bool:
    """The last prompt token leaves other K/V than it would as an earlier one of a prompt."""
    return policy.experts.remix is not None


def reads_whole_prompt(policy: RoutingPolicy) -> bool:
    """Every prompt token must run, so none may come from the prefix cache.

    A pooled mask needs their hidden states, and a contrast's weak pass has K/V of its own.
    """
    return prompt_effects(policy).reads_whole_prompt or policy.experts.contrast is not None
