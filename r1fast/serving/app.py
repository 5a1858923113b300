"""The routes: requests in, answers out, limits kept, errors in OpenAI's form.

A request's life: its body is bounded, its key compared, its fields checked (protocol.py), its text encoded; then it
joins the batch (engine.py) unless too many are there already; and when its client leaves, it leaves the batch.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from r1fast.config import UserError
from r1fast.rollout.events import Drew, SampleDone
from r1fast.rollout.sampler import SamplingParams
from r1fast.serving.answers import Form, Streamed, Texts, of_scored, usage
from r1fast.serving.engine import EngineError, EngineThread, Ticket
from r1fast.serving.protocol import ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1fast.model.decoder import Decoder

Asked = ChatRequest | CompletionRequest
CLIENT_LEFT = 499  # nobody reads it: for the log


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request, and all together, may take."""

    body: int = 1 << 20  # bytes
    tokens: int | None = None  # of one completion; None: what the context has room for
    requests: int = 64  # under way at once; the next ones are told to come again


class Refused(Exception):
    """An answer that is an error: a status and OpenAI's fields."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, {"Retry-After": "1"} if self.status == 429 else None)


def _unknown(name: str, served: str) -> Refused:
    return Refused(404, f"there is no model {name!r} here; it is {served!r}", "model_not_found", "model")


class Service:
    """Answers of one model."""

    def __init__(
        self, model: Decoder, tokenizer: PreTrainedTokenizerBase, engine: EngineThread, name: str, limits: Limits
    ) -> None:
        self.model, self.tokenizer, self.engine, self.name, self.limits = model, tokenizer, engine, name, limits
        self.under_way = 0

    # -- what is asked -----------------------------------------------------------------------------------------------

    def prompts(self, asked: Asked) -> list[list[int]]:
        if asked.model != self.name:
            raise _unknown(asked.model, self.name)
        if isinstance(asked, CompletionRequest):
            found = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in asked.prompts]
        else:
            found = [self._chat(asked)]
        room, vocabulary = self.model.config.max_positions, self.model.config.vocab_size
        for tokens in found:
            if not tokens or not 0 <= min(tokens) <= max(tokens) < vocabulary:
                why = f"a prompt has no tokens, or tokens outside the vocabulary of {vocabulary}"
                raise Refused(400, why, None, "prompt")
            if len(tokens) >= room:
                raise Refused(
                    400, f"the prompt has {len(tokens)} tokens, the context is of {room}: no room is left to answer",
                    "context_length_exceeded", "messages" if isinstance(asked, ChatRequest) else "prompt",
                )  # fmt: skip
        return found

    def _chat(self, asked: ChatRequest) -> list[int]:
        if not self.tokenizer.chat_template:
            raise Refused(400, "this model's tokenizer has no chat template; use /v1/completions", None, "messages")
        talk = [message.plain() for message in asked.messages]
        options = {**asked.chat_template_kwargs, "add_generation_prompt": True, "tokenize": False}
        try:
            text = self.tokenizer.apply_chat_template(talk, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise Refused(400, f"the chat template refuses these messages: {error}", None, "messages") from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def params(self, asked: Asked, prompt: Sequence[int]) -> SamplingParams:
        room = self.model.config.max_positions - len(prompt)
        most = min(room, self.limits.tokens or room)
        if asked.limit is not None and self.limits.tokens is not None and asked.limit > self.limits.tokens:
            why = f"max_tokens is {asked.limit}, this server draws at most {self.limits.tokens}"
            raise Refused(400, why, None, "max_tokens")
        limit = min(most, asked.limit) if asked.limit is not None else most
        return SamplingParams(
            n=asked.n,
            max_tokens=max(1, limit),
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=max(0, asked.top_k),
            seed=secrets.randbits(62) if asked.seed is None else asked.seed,
            stop=asked.stops,
            min_tokens=min(asked.min_tokens, max(1, limit)),
        )

    # -- answers -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _submitted(self, asked: Asked, prompts: list[list[int]]) -> AsyncIterator[list[Ticket]]:
        """The tickets of all prompts; whatever ends the block, nothing of them stays in the batch."""
        if self.under_way >= self.limits.requests:
            why = f"{self.under_way} requests are under way, which is the limit; try again"
            raise Refused(429, why, "rate_limit_exceeded")
        tickets: list[Ticket] = []
        self.under_way += 1
        try:
            for prompt in prompts:
                tickets.append(self.engine.submit(prompt, self.params(asked, prompt), asked.stream))
            yield tickets
        except UserError as error:
            raise Refused(400, str(error).split(": ", 1)[-1]) from error
        except EngineError as error:
            raise Refused(503, str(error), "engine_error") from error
        finally:
            self.under_way -= 1
            for ticket in tickets:
                self.engine.cancel(ticket)

    async def whole(self, asked: Asked) -> dict[str, Any]:
        prompts = self.prompts(asked)
        form, texts = self._form(asked)
        if isinstance(asked, CompletionRequest) and asked.max_tokens == 0:
            return await self._echoed(asked, prompts, form, texts)
        choices, drawn = [], 0
        async with self._submitted(asked, prompts) as tickets:
            for place, (ticket, prompt) in enumerate(zip(tickets, prompts, strict=True)):
                for sample, rollout in sorted((await _rollouts(ticket, asked.n)).items()):
                    drawn += len(rollout.tokens)
                    text = texts.shown(rollout, asked.stops, asked.min_tokens)
                    told = await self._logprobs(asked, form, texts, prompt, rollout)
                    if isinstance(asked, CompletionRequest) and asked.echo:
                        text = texts.of(prompt) + text
                    choices.append(form.choice(place * asked.n + sample, text, rollout.finish, told))
        return form.whole(choices, usage(sum(map(len, prompts)), drawn))

    async def _echoed(self, asked: CompletionRequest, prompts: list[list[int]], form: Form, texts: Texts) -> dict:
        """Nothing is drawn: the prompts, and how likely they are."""
        choices = []
        for place, prompt in enumerate(prompts):
            told = await self._score(form, texts, prompt, 1, asked.logprobs) if asked.logprobs is not None else None
            choices += [form.choice(place * asked.n + i, texts.of(prompt), "length", told) for i in range(asked.n)]
        return form.whole(choices, usage(sum(map(len, prompts)), 0))

    async def _logprobs(self, asked: Asked, form: Form, texts: Texts, prompt: list[int], rollout) -> dict | None:
        top = asked.top_logprobs if isinstance(asked, ChatRequest) else asked.logprobs
        if not asked.logprobs and not (isinstance(asked, CompletionRequest) and asked.logprobs == 0):
            return None
        echo = isinstance(asked, CompletionRequest) and asked.echo
        if not top and not echo and asked.temperature in (0, 1):
            return of_scored(form, texts, rollout.tokens, None, rollout.logprobs_full)
        return await self._score(form, texts, [*prompt, *rollout.tokens], 1 if echo else len(prompt), top)

    async def _score(self, form: Form, texts: Texts, tokens: list[int], start: int, top: int) -> dict:
        from r1fast.model.scoring import score

        targets = tokens[start:]
        ((scored,),) = await self.engine.call(lambda: score(self.model, [tokens[:-1] or tokens], [[targets]], top))
        return of_scored(form, texts, tokens if start == 1 else targets, scored)

    async def pieces(self, asked: Asked, prompts: list[list[int]], tickets: list[Ticket]) -> AsyncIterator[str]:
        """The answer as server-sent events, in the order in which it is drawn."""
        form, texts = self._form(asked)
        merged: asyncio.Queue = asyncio.Queue()
        readers = [asyncio.create_task(_forward(place, ticket, merged)) for place, ticket in enumerate(tickets)]
        wanted = asked.logprobs is not None and asked.logprobs is not False
        try:
            streams = {
                (place, sample): Streamed(texts, asked.stops, asked.min_tokens, wanted)
                for place in range(len(prompts))
                for sample in range(asked.n)
            }
            left = len(streams)
            while left:
                place, events = await merged.get()
                if isinstance(events, EngineError):
                    yield _event(Refused(503, str(events), "engine_error").body)
                    return
                said = []
                for event in events:
                    if not isinstance(event, Drew | SampleDone):
                        continue
                    stream, index = streams[place, event.sample], place * asked.n + event.sample
                    finish = event.rollout.finish if isinstance(event, SampleDone) else None
                    text = stream.end() if finish else stream.push(event)
                    left -= finish is not None
                    told = stream.logprobs(form)
                    if text or finish or told or not stream.began:
                        said.append(_event(form.chunk([form.piece(index, text, finish, told, not stream.began)])))
                        stream.began = True
                if said:
                    yield "".join(said)  # of one step: sending costs more than all the rest
            if asked.usage_in_stream:
                drawn = sum(stream.tokens for stream in streams.values())
                yield _event(form.chunk([], usage=usage(sum(map(len, prompts)), drawn)))
            yield "data: [DONE]\n\n"
        finally:
            for reader in readers:
                reader.cancel()

    async def streamed(self, asked: Asked) -> StreamingResponse:
        """Everything that can be refused is refused before the first piece."""
        prompts = self.prompts(asked)
        top = asked.top_logprobs if isinstance(asked, ChatRequest) else asked.logprobs
        if asked.logprobs is not None and asked.logprobs is not False and (top or asked.temperature not in (0, 1)):
            why = "streamed logprobs are those of the drawn tokens alone, at temperature 0 or 1"
            raise Refused(400, why, None, "logprobs")
        if isinstance(asked, CompletionRequest) and asked.echo:
            raise Refused(400, "echo is not streamed; leave out stream", None, "echo")
        block = self._submitted(asked, prompts)
        tickets = await block.__aenter__()

        async def body() -> AsyncIterator[str]:
            try:
                async for piece in self.pieces(asked, prompts, tickets):
                    yield piece
            finally:  # the client has left, or all is said
                await block.__aexit__(None, None, None)

        return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def _form(self, asked: Asked) -> tuple[Form, Texts]:
        chat = isinstance(asked, ChatRequest)
        return Form("chat.completion" if chat else "text_completion", self.name), Texts(self.tokenizer, chat)


async def _rollouts(ticket: Ticket, n: int) -> dict[int, Any]:
    found: dict[int, Any] = {}
    while len(found) < n:
        found.update({e.sample: e.rollout for e in await ticket.events() if isinstance(e, SampleDone)})
    return found


async def _forward(place: int, ticket: Ticket, merged: asyncio.Queue) -> None:
    while True:
        try:
            merged.put_nowait((place, await ticket.events()))
        except EngineError as error:
            merged.put_nowait((place, error))
            return


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


# -- the application --------------------------------------------------------------------------------------------------


def build(service: Service, key: str | None = None) -> FastAPI:
    """The application. key: what clients must send as `Authorization: Bearer KEY`; None: nothing."""

    async def guard(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if key is not None and request.url.path != "/health" and not hmac.compare_digest(given, key.encode()):
            raise Refused(401, "the API key is missing or wrong", "invalid_api_key")

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(guard)])

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        return Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.get("/health")
    async def health() -> JSONResponse:
        alive, failures = service.engine.alive, service.engine.failures
        told = {"status": "ok" if alive else "down", "requests": service.under_way, "engine_failures": failures}
        return JSONResponse(told, 200 if alive else 503)

    card = {"id": service.name, "object": "model", "created": 0, "owned_by": "r1fast",
            "max_model_len": service.model.config.max_positions}  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise _unknown(name, service.name)
        return card

    async def answer(request: Request, kind: type[Asked]) -> Any:
        asked = await _read(request, kind, service.limits.body)
        if asked.stream:
            return await service.streamed(asked)
        return await _unless_gone(request, service.whole(asked))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        return await answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await answer(request, CompletionRequest)

    return app


async def _read(request: Request, kind: type[Asked], most: int) -> Asked:
    """The body, as far as it is within the limit, as a checked request."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise Refused(413, f"the body is larger than {most:,} bytes", "body_too_large")
    try:
        data = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explained(error.errors()) from None


def _explained(errors: Sequence[Any]) -> Refused:
    """The first thing that is wrong, by its field."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    what = "is not known here" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return Refused(400, f"{place}: {what}" if place else what, None, place or None)


async def _unless_gone(request: Request, answer: Any) -> Any:
    """The answer; when the client leaves before it is there, it is given up."""
    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return JSONResponse(None, CLIENT_LEFT)
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
