"""Choosing an answer by log likelihood, and which controls that can show.

The tokens of a choice are read behind those of the prompt, as a part of it: nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sluice.models.depth.prefix_sharing import prompt_effects
from sluice.models.offline.hf_model.examples import CalibrationError, Example
from sluice.models.policy.policy import Phase, RoutingPolicy

if TYPE_CHECKING:
    # It loads torch, which `sluice --version` does not need.
    from sluice.models.offline.hf_model.model import HFModel


def choice_tokens(prompt: Sequence[int], joined: Sequence[int], alone: Sequence[int]) -> list[int]:
    """Tokens of a choice that follows a text.

    A tokenizer may write a word at the start of a text in another way than one in its middle, so
    the choice's tokens are taken from the joined text. If a token spans the text and the choice,
    those of the choice alone are taken.

    Args:
        prompt: token ids of the text.
        joined: of the text followed by the choice.
        alone: of the choice alone, without special tokens.
    """
    length = len(prompt)
    if len(joined) > length and list(joined[:length]) == list(prompt):
        return list(joined[length:])
    return list(alone)


def encoded_choices(model: HFModel, example: Example, prompt: Sequence[int]) -> list[list[int]]:
    """Token ids of each choice of an example, as they follow its prompt.

    Raises:
        CalibrationError: a choice has none.
    """
    tokenizer = model.tokenizer
    text = example.text
    if text is None and example.messages is None and tokenizer.chat_template is None:
        text = example.prompt
    choices = []
    for choice in example.choices or ():
        tokens = list(tokenizer(choice, add_special_tokens=False)["input_ids"])
        if text is not None:
            tokens = choice_tokens(prompt, tokenizer(text + choice)["input_ids"], tokens)
        if not tokens:
            raise CalibrationError(f"{example.where}: choice {choice!r} has no tokens")
        choices.append(tokens)
    return choices


def likeliest(log_probabilities: Sequence[Sequence[float]], per_token: bool) -> int:
    """Index of the choice with the largest sum, the first of equals.

    Args:
        log_probabilities: of the tokens of each choice; none is empty.
        per_token: compare means over a choice's tokens, so that long choices lose nothing by it.
    """
    sums = [sum(each) / (len(each) if per_token else 1) for each in log_probabilities]
    return max(range(len(sums)), key=sums.__getitem__)


def idle_controls(policy: dict[str, Any]) -> tuple[str, ...]:
    """Controls of an effective policy that act on generated tokens only, by their names.

    They change no log probability of a choice. A re-mix of the last prompt token is among them: its
    logits are those of the token behind the choice.

    Args:
        policy: as `RoutingPolicy.to_dict` gives it, and a report under `policy`.
    """
    asked = RoutingPolicy.from_dict(policy)
    experts, on_prompt = asked.experts, prompt_effects(asked).acts_on_prompt
    idle = {
        "depth.skip": not asked.skip.empty and asked.skip.phase is Phase.DECODE,
        "depth.exit": asked.exit is not None,
        "depth.adaptive": asked.adaptive is not None and not on_prompt,
        "experts.budget": experts.budget is not None,
        "experts.remix": experts.remix is not None,
        "experts.contrast": experts.contrast is not None,
    }
    return tuple(name for name, found in idle.items() if found)
