"""Requests in OpenAI's form, checked: every field either has its effect or is refused by name.

A server that ignores what it does not know answers another question; so an unknown field is an error, and so is one of
OpenAI's that changes what is drawn and is not built here. What only concerns bookkeeping is accepted.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 128
MOST_STOPS = 16
MOST_TOP = 20  # of top_logprobs, as OpenAI's


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)  # not OpenAI's; 0 or -1: off
    min_tokens: int = Field(0, ge=0)  # not OpenAI's
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Bookkeeping: without effect on what is drawn.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    # Of OpenAI's interface, and not built here: only the value that changes nothing is taken.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_defaults(cls, data: Any) -> Any:
        """OpenAI takes null for "not given" everywhere."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> _Request:
        if len(self.stops) > MOST_STOPS or not all(self.stops):
            raise ValueError(f"stop: give at most {MOST_STOPS} strings, none of them empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # bookkeeping


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """For a chat template, which knows no parts; `developer` is OpenAI's new word for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP)
    response_format: PlainFormat | None = None
    chat_template_kwargs: dict[str, Any] = {}  # not OpenAI's: variables of the template, as enable_thinking

    @property
    def limit(self) -> int | None:
        """Tokens to draw at most; None: as many as the context has room for."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        return self


class PlainFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=0)  # 0: nothing is drawn, for `echo` alone
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @property
    def limit(self) -> int:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        given = self.prompt
        return given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]

    @model_validator(mode="after")
    def _sensible(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: not built here; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 draws nothing; only with echo=true")
        if not self.prompt:
            raise ValueError("prompt: it is empty; give at least one token of text")
        return self


_Request.model_rebuild()
ChatRequest.model_rebuild()
CompletionRequest.model_rebuild()
