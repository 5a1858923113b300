"""What has been drawn, in OpenAI's words: texts, log-probabilities, usage, whole or piece by piece.

Log-probabilities are the model's own (temperature 1, nothing cut off), whatever the token was drawn with: as drawn
where that is the same (temperature 0 and 1), and by one forward pass over the finished text where it is not, or where
the most likely other tokens are asked for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from r1fast.model.tokenizer import decode, silent_tokens
from r1fast.rollout.events import Drew
from r1fast.rollout.text import TextStream, shown_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1fast.model.scoring import Scored
    from r1fast.types import Rollout


@dataclass(frozen=True, slots=True)
class Form:
    """The envelope that all objects of one answer share."""

    kind: str  # "chat.completion" or "text_completion"
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> bool:
        return self.kind.startswith("chat")

    def whole(self, choices: list[dict], usage: dict) -> dict[str, Any]:
        return {**self._head(self.kind), "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict], **more: Any) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk" if self.chat else self.kind), "choices": choices, **more}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def choice(self, index: int, text: str, finish: str, logprobs: dict | None) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def piece(self, index: int, text: str, finish: str | None, logprobs: dict | None, first: bool) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            said = {"delta": {**role, **({"content": text} if text or first else {})}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Texts:
    """Tokens to text for one kind of answer. A chat's text begins without the boundary's space; a completion goes on
    behind its prompt, spaces and all."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
        self.tokenizer, self.chat = tokenizer, chat

    def of(self, tokens: Sequence[int]) -> str:
        if self.chat:
            return decode(self.tokenizer, tokens)
        silent = silent_tokens(self.tokenizer)
        return self.tokenizer.decode([token for token in tokens if token not in silent], skip_special_tokens=False)

    def shown(self, rollout: Rollout, stop: Sequence[str], min_tokens: int) -> str:
        if not stop:  # token by token it would take as long as drawing them
            return self.of(rollout.tokens)
        return shown_text(rollout.tokens, self.of, stop, min_tokens)

    def token(self, token: int) -> str:
        """One token as log-probabilities name it."""
        return self.tokenizer.decode([token], skip_special_tokens=False)


class Streamed:
    """One sample that is sent as it is drawn."""

    def __init__(self, texts: Texts, stop: Sequence[str], min_tokens: int, logprobs: bool) -> None:
        self._stream = TextStream(texts.of, stop, min_tokens)
        self._texts, self._wanted = texts, logprobs
        self._told: list[tuple[int, float]] = []
        self.tokens = 0
        self.began = False

    def push(self, event: Drew) -> str:
        """The text that can be shown since the last."""
        self.tokens += len(event.tokens)
        if self._wanted:
            self._told += zip(event.tokens, event.logprobs_full, strict=True)
        for token in event.tokens:
            if self._stream.push(token):
                break
        return self._stream.take()

    def end(self) -> str:
        return self._stream.end()

    def logprobs(self, form: Form) -> dict | None:
        """Of the tokens since the last."""
        told, self._told = self._told, []
        if not self._wanted or not told:
            return None
        tokens, values = zip(*told, strict=True)
        return logprobs(form, self._texts.token, tokens, values, [[] for _ in tokens])


def logprobs(
    form: Form,
    text_of: Callable[[int], str],
    tokens: Sequence[int],
    values: Sequence[float | None],
    top: Sequence[Sequence[tuple[int, float]]],
) -> dict[str, Any]:
    """Log-probabilities in the form of the answer; the first token of an echoed prompt has none."""
    if form.chat:

        def entry(token: int, value: float | None) -> dict[str, Any]:
            text = text_of(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        each = zip(tokens, values, top, strict=True)
        content = [{**entry(t, v), "top_logprobs": [entry(*one) for one in best]} for t, v, best in each]
        return {"content": content, "refusal": None}
    texts = [text_of(token) for token in tokens]
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    best = [{text_of(token): value for token, value in one} or None for one in top]
    return {
        "tokens": texts,
        "token_logprobs": list(values),
        "top_logprobs": best if any(best) else None,
        "text_offset": offsets,
    }


def of_scored(
    form: Form, texts: Texts, tokens: Sequence[int], scored: Scored | None, drawn: Sequence[float] = ()
) -> dict[str, Any]:
    """Of a whole answer. scored: of all tokens but a first one that nothing stands before; None: `drawn` is it."""
    if scored is None:
        return logprobs(form, texts.token, tokens, drawn, [[] for _ in tokens])
    missing = len(tokens) - len(scored.logprobs)
    values, best = [*([None] * missing), *scored.logprobs], [*([[]] * missing), *scored.top]
    return logprobs(form, texts.token, tokens, values, best)
