"""Every method by the name a request gives it."""

from __future__ import annotations

from sluice.models.depth.adaptive.first import First
from sluice.models.depth.adaptive.lac import LAC
from sluice.models.depth.adaptive.similarity import Similarity
from sluice.models.depth.exits.classifier import Classifier
from sluice.models.depth.exits.confidence import Confidence
from sluice.models.depth.exits.entropy import Entropy
from sluice.models.depth.exits.patience import Patience
from sluice.models.depth.exits.q_exit import QExit
from sluice.models.depth.exits.replay import Replay
from sluice.models.depth.exits.saturation import Saturation
from sluice.models.depth.method import ExitMethod, PromptMethod

EXIT_METHODS: dict[str, ExitMethod] = {
    method.name: method
    for method in (Confidence(), Entropy(), Saturation(), Patience(), QExit(), Classifier())
}

UNOFFERED_EXIT_METHODS: dict[str, ExitMethod] = {Replay.name: Replay()}
"""Methods that the worker knows and the HTTP edge does not offer."""

PROMPT_METHODS: dict[str, PromptMethod] = {
    method.name: method for method in (First(), LAC(), Similarity())
}


def exit_method(name: str) -> ExitMethod:
    """The exit method of a rule, offered or not."""
    return EXIT_METHODS.get(name) or UNOFFERED_EXIT_METHODS[name]
