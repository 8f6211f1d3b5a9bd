"""A grammar holds for tokens of every depth, also where an exit test has computed the logits."""

from __future__ import annotations

from support.engine import engine

from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.models.policy.policy import ExitRule, MissingKV, RoutingPolicy

TEXTS = ("sort 3 1 2", "hello", "copy ab")
EARLY = RoutingPolicy(exit=ExitRule("confidence", (1, 2), threshold=0.2, kv=MissingKV.PROPAGATE))
POLICIES = [EARLY, None, EARLY]


def test_answers_follow_the_grammar(overlapping: bool) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    with engine(DEMO_MODEL_DIR, skip_tokenizer_init=False) as running:
        tokenizer = running.llm.get_tokenizer()
        prompts = [tokenizer.encode(text) for text in TEXTS]
        requests, params = running._requests(prompts, POLICIES, 8, ["a", "b", "c"], {})
        for each in params:
            each.ignore_eos = False
            each.structured_outputs = StructuredOutputsParams(regex="(yes|no|maybe)")
        outputs = running.llm.generate(requests, params, use_tqdm=False)
        answers = [tokenizer.decode(output.outputs[0].token_ids, True) for output in outputs]
        assert set(answers) <= {"yes", "no", "maybe"}, answers
        assert running.take_record("a").exits[:-1].any()
