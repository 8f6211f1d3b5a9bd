"""Asks tasks of an OpenAI-compatible server, through OpenAI's own client."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from sluice.models.offline.evaluate.choices import choice_tokens, likeliest
from sluice.models.offline.evaluate.evaluation import EvaluationError, PolicyRefusedError, Reply
from sluice.models.offline.hf_model.examples import Example

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI

CONCURRENCY = 32
_ROUTING = "routing"
_API_ROOT = "/v1"

Ask = Callable[["AsyncOpenAI", Example], Awaitable[Reply]]


def failure(error: APIError, base_url: str, model: str, where: str = "") -> EvaluationError:
    """The error of a request, as ours.

    Args:
        error: of OpenAI's client.
        base_url: address that was asked.
        model: id that was asked for; a preset may be part of it.
        where: file and line of the example that was asked, if it was one.
    """
    from openai import APIConnectionError, APIStatusError, APITimeoutError, AuthenticationError

    if isinstance(error, APITimeoutError):
        return EvaluationError(f"{base_url}: no answer in time")
    if isinstance(error, APIConnectionError):
        return EvaluationError(f"{base_url}: no server answers: {error.__cause__ or error}")
    if isinstance(error, AuthenticationError):
        return EvaluationError(f"{base_url}: the server wants another --api-key")
    message, param = _message_and_param(error)
    if param is not None and (
        param.split(".")[0] == _ROUTING or (param == "model" and "@" in model)
    ):
        return PolicyRefusedError(message, param)
    if isinstance(error, APIStatusError) and error.status_code < 500 and where:
        return EvaluationError(f"{where}: {message}")
    status = f" answers {error.status_code}" if isinstance(error, APIStatusError) else ""
    return EvaluationError(f"{base_url}{status}: {message}")


def _message_and_param(error: APIError) -> tuple[str, str | None]:
    """Message and param of an OpenAI-shaped error, or its text."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message), body.get("param")


def _ignore() -> None:
    """Takes no notice of an answer."""


@dataclass(frozen=True)
class HttpBackend:
    """A model on a server.

    Attributes:
        base_url: address up to and including ``/v1``.
        model: model id to ask for.
        api_key: bearer key.
        concurrency: requests in flight at a time.
        reports: whether the server has our routing, so that reports can be asked for.
        template: whether the model has a chat template; without one, prompts are read as they are.
        answered: called after every answer.
    """

    base_url: str
    model: str
    api_key: str = "EMPTY"
    concurrency: int = CONCURRENCY
    reports: bool = True
    template: bool = True
    answered: Callable[[], None] = field(default=_ignore, compare=False)

    @classmethod
    def connect(cls, base_url: str, model: str | None, api_key: str, concurrency: int) -> Self:
        """Ask a server for its models, for our routing and for a chat template.

        Args:
            base_url: address up to and including ``/v1``.
            model: id to ask for; None is the one base model that it has.
            api_key: bearer key.
            concurrency: requests in flight at a time.

        Raises:
            EvaluationError: the address does not end in ``/v1``, no server answers there, it wants
                another key, or it does not have the model.
        """
        if not base_url.rstrip("/").endswith(_API_ROOT):
            raise EvaluationError(f"{base_url}: give the address up to and including {_API_ROOT}")
        backend = cls(base_url.rstrip("/"), model or "", api_key, concurrency)
        return asyncio.run(backend._inspected())

    def answers(
        self,
        examples: Sequence[Example],
        routing: Mapping[str, Any] | None,
        max_tokens: int,
    ) -> list[Reply]:
        """Greedy answers, in order.

        Args:
            examples: what to ask.
            routing: `routing` object, sent with every request when given.
            max_tokens: of each answer.

        Raises:
            PolicyRefusedError: the server refuses the routing.
            EvaluationError: it fails, is not there, or refuses an example, which is named.
        """
        salt = uuid.uuid4().hex

        async def ask(client: AsyncOpenAI, example: Example) -> Reply:
            return await self._answer(client, example, routing, max_tokens, salt)

        return asyncio.run(self._all(examples, ask))

    def choices(
        self,
        examples: Sequence[Example],
        routing: Mapping[str, Any] | None,
        per_token: bool = False,
    ) -> list[Reply]:
        """The likeliest choice of each example, in order; see
        `sluice.models.offline.evaluate.choices`.

        Args:
            examples: all with choices.
            routing: `routing` object, sent with every request when given.
            per_token: see `likeliest`.

        Raises:
            PolicyRefusedError: the server refuses the routing.
            EvaluationError: it fails, is not there, does not tokenize, gives no log probabilities
                of prompts, or refuses an example, which is named.
        """
        salt = uuid.uuid4().hex

        async def ask(client: AsyncOpenAI, example: Example) -> Reply:
            return await self._choice(client, example, routing, per_token, salt)

        return asyncio.run(self._all(examples, ask))

    async def _all(self, examples: Sequence[Example], ask: Ask) -> list[Reply]:
        from openai import APIError

        in_flight = asyncio.Semaphore(self.concurrency)

        async with self._client() as client:

            async def ask_one(example: Example) -> Reply:
                async with in_flight:
                    try:
                        reply = await ask(client, example)
                    except APIError as error:
                        raise failure(error, self.base_url, self.model, example.where) from None
                self.answered()
                return reply

            return list(await asyncio.gather(*map(ask_one, examples)))

    async def _answer(
        self,
        client: AsyncOpenAI,
        example: Example,
        routing: Mapping[str, Any] | None,
        max_tokens: int,
        salt: str,
    ) -> Reply:
        text = self._plain(example)
        common: dict[str, Any] = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": max_tokens,
            "extra_body": self._extra_body(routing, salt),
        }
        began = time.perf_counter()
        if text is not None:
            completion = await client.completions.create(prompt=text, **common)
            answer, given = completion.choices[0].text, completion
        else:
            messages: Any = example.conversation
            chat = await client.chat.completions.create(messages=messages, **common)
            answer, given = chat.choices[0].message.content or "", chat
        seconds = time.perf_counter() - began
        cut = given.choices[0].finish_reason == "length"
        tokens = 0 if given.usage is None else given.usage.completion_tokens
        return Reply(answer, cut, _reports([given.model_extra]), seconds, tokens)

    async def _choice(
        self,
        client: AsyncOpenAI,
        example: Example,
        routing: Mapping[str, Any] | None,
        per_token: bool,
        salt: str,
    ) -> Reply:
        assert example.choices is not None
        text = self._plain(example)
        body = {"messages": example.conversation} if text is None else {"prompt": text}
        prompt = await self._tokens(client, body)
        choice_logprobs: list[list[float]] = []
        extras = []
        seconds = 0.0
        for choice in example.choices:
            tokens = await self._tokens(client, {"prompt": choice, "add_special_tokens": False})
            if text is not None:
                joined = await self._tokens(client, {"prompt": text + choice})
                tokens = choice_tokens(prompt, joined, tokens)
            if not tokens:
                raise EvaluationError(f"{example.where}: choice {choice!r} has no tokens")
            began = time.perf_counter()
            completion = await client.completions.create(
                model=self.model,
                prompt=[*prompt, *tokens],
                max_tokens=0,
                echo=True,
                logprobs=0,
                temperature=0,
                extra_body=self._extra_body(routing, salt),
            )
            seconds += time.perf_counter() - began
            logprobs = completion.choices[0].logprobs
            read = None if logprobs is None else logprobs.token_logprobs
            if read is None or len(read) != len(prompt) + len(tokens):
                raise EvaluationError(
                    f"{self.base_url} gives no log probabilities of prompts, which choices need"
                )
            choice_logprobs.append([float(each) for each in read[len(prompt) :]])
            extras.append(completion.model_extra)
        chosen = example.choices[likeliest(choice_logprobs, per_token)]
        return Reply(chosen, reports=_reports(extras), seconds=seconds)

    def _plain(self, example: Example) -> str | None:
        """What the model reads without a chat template, or None where it gets one."""
        if example.text is not None:
            return example.text
        if self.template:
            return None
        if example.prompt is None:
            raise EvaluationError(
                f"{example.where}: messages need a chat template, and {self.model} has none: "
                "give `text`, or start the server with --chat-template"
            )
        return example.prompt

    async def _tokens(self, client: AsyncOpenAI, body: Mapping[str, Any]) -> list[int]:
        """Token ids by the server's own tokenizer, a route of vLLM's beside ``/v1``."""
        from openai import NotFoundError

        address = self.base_url.removesuffix(_API_ROOT) + "/tokenize"
        try:
            answer: Any = await client.post(address, cast_to=object, body=dict(body))
        except NotFoundError:
            raise EvaluationError(f"{address} is not there, and choices need it") from None
        tokens: list[int] = answer["tokens"]
        return tokens

    async def _inspected(self) -> Self:
        from openai import APIError, BadRequestError, NotFoundError

        async with self._client() as client:
            try:
                listed = (await client.models.list()).data
            except APIError as error:
                raise failure(error, self.base_url, self.model) from None
            try:
                capabilities: Any = await client.get("/routing/capabilities", cast_to=object)
            except NotFoundError:
                capabilities = {"supported": False}
            except APIError as error:
                raise failure(error, self.base_url, self.model) from None
            template = True
            try:
                await self._tokens(client, {"messages": [{"role": "user", "content": "?"}]})
            except BadRequestError as error:
                template = "chat template" not in str(error)
            except (APIError, EvaluationError):
                pass  # No such route: the server is not vLLM's, and choices will say so.
        ids = [card.id for card in listed]
        bases = [card.id for card in listed if (card.model_extra or {}).get("parent") is None]
        if self.model and self.model not in ids:
            raise EvaluationError(f"{self.base_url} serves {', '.join(ids)}, not {self.model}")
        if not self.model and len(bases) != 1:
            raise EvaluationError(f"{self.base_url} serves {', '.join(ids)}: choose by --model")
        return replace(
            self,
            model=self.model or bases[0],
            reports=bool(capabilities["supported"]),
            template=template,
        )

    def _extra_body(self, routing: Mapping[str, Any] | None, salt: str) -> dict[str, Any] | None:
        """What goes beside OpenAI's fields, to a server that is ours.

        Args:
            routing: the policy, or None.
            salt: keeps what other policies left in the prefix cache out: it would save one of two
                policies the prompts, and so the time.
        """
        if not self.reports:
            return None
        return {"cache_salt": salt, **({} if routing is None else {_ROUTING: dict(routing)})}

    def _client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.base_url, api_key=self.api_key)


def _reports(extras: Sequence[Mapping[str, Any] | None]) -> tuple[Mapping[str, Any], ...]:
    """Reports that answers carry beside what OpenAI's do."""
    return tuple(extra["routing"] for extra in extras if extra and "routing" in extra)
