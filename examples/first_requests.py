"""First requests: one question at full depth and under three policies, with a report of what ran.

Shows the official OpenAI client with a `routing` object in `extra_body`: layers left out by number,
tokens that leave early once the model is sure, and fewer experts per token. Each answer is printed
with the share of full depth's compute that it took.

    .venv/bin/python examples/first_requests.py [--url http://127.0.0.1:8000]
"""

from __future__ import annotations

import openai
from serving import server, url_argument

QUESTION = "sort 5 2 9 1 4"
POLICIES = {
    "full depth": {},
    "without blocks 6 and 7": {"depth": {"skip": {"blocks": [6, 7]}}},
    "leave once sure": {
        "depth": {"exit": {"method": "confidence", "threshold": 0.9, "layers": [1, 2, 3]}}
    },
    "two experts a token": {"experts": {"top_k": 2}},
}


def main() -> None:
    """Ask under each policy and print a line for each."""
    with server(url_argument(__doc__)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        for name, policy in POLICIES.items():
            answer = client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": QUESTION}],
                temperature=0,
                extra_body={"routing": {**policy, "report": True}},
            )
            report = answer.model_extra["routing"]
            text, share = answer.choices[0].message.content, report["compute_fraction"]
            print(f"{name:24} {text:12} {share:6.1%} of full depth's compute")


if __name__ == "__main__":
    main()
