"""What a caller may ask of the sampler, and what is wrong with it in one sentence before any work.

Semantics of mistakes. `Sampler.sample` and `stream` read all requests first and raise for the first bad one, so nothing
is drawn; with `on_error` they report each bad request and draw the others. `Session.submit` raises for its one request
and leaves those that run alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from r1fast.config import UserError
from r1fast.rollout.scheduler import Request
from r1fast.rollout.text import StopStrings
from r1fast.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE_BITS = 20  # of the 63-bit sequence key; the rest names the prompt
MOST_SAMPLES = (1 << _SAMPLE_BITS) - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw completions of one prompt."""

    n: int = 1  # samples
    max_tokens: int = 128  # for each sample; also ended by the model's context
    temperature: float = 1.0  # 0: greedy, with log-probabilities of the untempered softmax
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # besides the sampler's eos
    stop: tuple[str, ...] = ()  # strings that end a sample (text.py says exactly how); the sampler needs a tokenizer
    min_tokens: int = 0  # no stop token is drawn, and no stop string counts, before this many tokens are there
    spare: int = 0  # samples drawn besides: the first n to finish are kept, which favours short ones


class Draws(NamedTuple):
    """What a request tells its rows in the batch; the key is that of its first sample, the next ones follow it."""

    seed: int
    key: int
    temperature: float
    top_k: int
    top_p: float
    min_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reader:
    """Turns prompts and params into requests, or into the sentence that says what is wrong."""

    vocabulary: int
    context: int  # positions of the model
    block_size: int
    eos: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase | None

    def request(
        self, name: str, number: int, tokens: tuple[int, ...], params: SamplingParams, earlier: int, blocks: int | None
    ) -> Request:
        """name: of the request, for errors. earlier: equal prompts before it that must draw differently. blocks: of the
        pool, None where it will be made to fit. UserError: what is wrong."""
        wrong = _wrong_prompt(tokens, self.vocabulary, self.context) or _wrong_params(params)
        if wrong:
            raise UserError(f"{name}: {wrong}")
        limit = min(params.max_tokens, self.context - len(tokens))
        need = -(-(len(tokens) + limit) // self.block_size)
        if blocks is not None and need > blocks:
            raise UserError(
                f"{name}: {len(tokens)} tokens and {limit} to draw need {need} blocks of {self.block_size}, but the "
                f"pool has kv_blocks={blocks}; raise kv_blocks or lower max_tokens"
            )
        own = stop_tokens(params.stop_token_ids, self.vocabulary, f"{name}: stop_token_ids")
        stops = tuple(sorted({*self.eos, *own}))
        if params.min_tokens and len(stops) >= self.vocabulary:
            raise UserError(f"{name}: every token is a stop token, so none is left to draw min_tokens from")
        self._check_strings(name, params.stop)
        key = _key(tokens, earlier)
        draws = Draws(
            params.seed, key, params.temperature, params.top_k, params.top_p, min(params.min_tokens, limit), stops
        )
        return Request(number, tokens, params.n + params.spare, limit, draws=draws)

    def _check_strings(self, name: str, stop: tuple[str, ...]) -> None:
        if not stop:
            return
        if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
            raise UserError(f"{name}: stop is {stop!r}; give a tuple of strings, none of them empty")
        if self.tokenizer is None:
            raise UserError(f"{name}: stop strings need text; give the sampler a tokenizer, or use stop_token_ids")
        from r1fast.model.tokenizer import silent_tokens

        for one in stop:
            for token, text in silent_tokens(self.tokenizer).items():
                if text in one:
                    raise UserError(
                        f"{name}: the stop string {one!r} holds the special token {text!r}, which has no text; "
                        f"stop at it with stop_token_ids=({token},)"
                    )

    def stop_strings(self, params: SamplingParams) -> StopStrings | None:
        """What watches over the samples of a request; None where it has no stop strings."""
        return StopStrings(self.text_of, params.stop, params.min_tokens) if params.stop else None

    @property
    def text_of(self) -> Callable[[list[int]], str]:
        from r1fast.model.tokenizer import decode

        return lambda tokens: decode(self.tokenizer, tokens)


def as_prompts(prompts: Sequence) -> list[Prompt]:
    """Prompt objects as they are, token ids as prompts named by their place. UserError for an empty list."""
    if not len(prompts):
        raise UserError("the list of prompts is empty; give at least one")
    return [as_prompt(prompt, str(place)) for place, prompt in enumerate(prompts)]


def as_prompt(prompt: Prompt | Sequence[int], name: str) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    try:
        return Prompt(name, tuple(map(index, prompt)), "", None, "")
    except TypeError:
        raise UserError(f"prompt {name}: {prompt!r:.60} is no list of token ids") from None


def as_params(prompts: Sequence, params: SamplingParams | Sequence[SamplingParams]) -> list[SamplingParams]:
    """One for each prompt."""
    if isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if len(params) != len(prompts):
        raise UserError(f"{len(params)} sampling params for {len(prompts)} prompts; give one for all, or one for each")
    return list(params)


def stop_tokens(ids: Iterable[int], vocabulary: int, where: str) -> tuple[int, ...]:
    ids = tuple(ids)
    for token in ids:
        if not 0 <= token < vocabulary:
            raise UserError(f"{where}: token {token} is outside the vocabulary of {vocabulary}")
    return ids


def _wrong_prompt(tokens: tuple[int, ...], vocabulary: int, context: int) -> str | None:
    if not tokens:
        return "it has no tokens; give at least one"
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        bad = next(token for token in tokens if not 0 <= token < vocabulary)
        return f"token {bad} is outside the vocabulary of {vocabulary}"
    if len(tokens) >= context:
        return f"its {len(tokens)} tokens leave no room to answer in the model's context of {context}; shorten it"
    return None


def _wrong_params(params: SamplingParams) -> str | None:
    """The first thing that is wrong."""
    if params.n < 1 or params.spare < 0 or params.n + params.spare > MOST_SAMPLES:
        return f"n is {params.n} and spare {params.spare}; n must be at least 1, both together at most {MOST_SAMPLES}"
    if params.max_tokens < 1:
        return f"max_tokens is {params.max_tokens}, it must be at least 1"
    if not 0 <= params.min_tokens <= params.max_tokens:
        return f"min_tokens is {params.min_tokens}, it must be from 0 to max_tokens, {params.max_tokens}"
    if not 0 <= params.temperature < float("inf"):
        return f"temperature is {params.temperature}, it must be a number from 0 (greedy) up"
    if not 0 < params.top_p <= 1:
        return f"top_p is {params.top_p}, it must be above 0 and at most 1 (off)"
    if not 0 <= params.top_k < 1 << 31:
        return f"top_k is {params.top_k}, it must be 0 (off) or more"
    if not -(1 << 63) <= params.seed < 1 << 63:
        return f"seed {params.seed} does not fit 64 bits"
    return None


def _key(tokens: tuple[int, ...], earlier: int) -> int:
    """What names a prompt to the noise: its content, and how many equal ones of its seed came before it in the call."""
    content = np.array([earlier, *tokens], np.int64).tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (1 + _SAMPLE_BITS) << _SAMPLE_BITS
