"""Every method by the name a request gives it."""

from __future__ import annotations

from sluice.models.depth.classifier import Classifier
from sluice.models.depth.confidence import Confidence
from sluice.models.depth.entropy import Entropy
from sluice.models.depth.first import First
from sluice.models.depth.lac import LAC
from sluice.models.depth.method import ExitMethod, PromptMethod
from sluice.models.depth.patience import Patience
from sluice.models.depth.q_exit import QExit
from sluice.models.depth.replay import Replay
from sluice.models.depth.saturation import Saturation
from sluice.models.depth.similarity import Similarity

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
