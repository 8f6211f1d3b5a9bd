"""What a setting makes of full depth's own tokens, each after full depth's tokens before it.

After a first difference two free answers have read different texts, and that ends any comparison;
here nothing ends it. The first token of an answer comes from the prompt, and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sluice.models.offline.forced import Reading, Text
from sluice.models.offline.intervals import token_share
from sluice.models.profile.frontier_fields import TokenMeasures


def token_measures(texts: Sequence[Text], read: Sequence[Reading]) -> TokenMeasures:
    """Measure.

    Args:
        texts: prompts with full depth's answers, of two tokens or more.
        read: what the setting makes of each.
    """
    agreed, compared = [], []
    lost, surprise = 0.0, 0.0
    for text, own in zip(texts, read, strict=True):
        expected = text.tokens[1:]
        agreed.append(
            sum(a == b for a, b in zip(own.likeliest[1:].tolist(), expected, strict=True))
        )
        compared.append(len(expected))
        lost += float(own.divergence[1:].double().sum())
        surprise -= float(own.log_probs[1:].double().sum())
    count = sum(compared)
    return TokenMeasures(
        agreement=token_share(agreed, compared),
        divergence=lost / count,
        perplexity=math.exp(min(surprise / count, 700.0)),
    )
