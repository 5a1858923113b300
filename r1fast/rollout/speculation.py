"""Drafts without a draft model: what the prompt and its samples have said before, verified exactly.

At the end of a call few sequences are left, and a step that draws one token for each of them costs almost what a step
for many would: it reads all weights either way. The siblings of a sample answer the same prompt, and answers repeat
themselves, each other and the prompt. So the next tokens of a row are guessed from the n-grams of its prompt's samples
and forwarded together (DAS does it with suffix trees of earlier rollouts, prompt lookup with the prompt alone).

Exact. A draw is a function of the logits, the seed, the sequence and the position alone. So the token at each guessed
place is drawn from the verified logits as it would have been without a guess, and what was guessed is kept only while
it is what was drawn. The tokens are those of a call without drafts, greedy or not, whatever the guesses.

When. A step may be filled up to `rows` rows (the step of a CPU computes eight at once at the price of one, a GPU reads
the weights once for all), so drafts are made while at most half as many sequences run. `Trust` stops them where too few
are right, and tries again later; it looks at tokens only, never at a clock, so that a call is reproducible.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from r1fast.model.decoder import Decoder
from r1fast.model.paged import PagedKV
from r1fast.rollout.batch import Drawn, RunningBatch
from r1fast.rollout.engine import Engine, PrefillWork, StepEngine
from r1fast.rollout.graphs import GraphEngine
from r1fast.rollout.scheduler import Sequence as Running
from r1fast.rollout.steady import SteadyEngine

ORDERS = (4, 2)  # n-grams that are looked up, the longest first
DEPTH = 7  # most tokens guessed for a row
MOST_STEPS_KEPT = 4096  # of what was drawn before drafts begin


class Corpus:
    """What the samples of one prompt have said: after which n-gram came which token, how often."""

    def __init__(self, prompt: tuple[int, ...]):
        self._prompt = list(prompt)
        self._texts: dict[int, list[int]] = {}  # sample -> its prompt and tokens
        self._next: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self._add(self._prompt, 1)

    def _add(self, text: list[int], start: int) -> None:
        for place in range(start, len(text)):
            for order in ORDERS:
                if order <= place:
                    self._next[tuple(text[place - order : place])][text[place]] += 1

    def extend(self, sample: int, tokens: list[int]) -> None:
        text = self._texts.setdefault(sample, self._prompt.copy())
        start = len(text)
        text += tokens
        self._add(text, start)

    def guess(self, sample: int, depth: int) -> list[int]:
        """The likeliest next tokens of a sample, up to `depth`; none where its last two were never seen before."""
        tail = self._texts.get(sample, self._prompt)[-max(ORDERS) :]
        guessed: list[int] = []
        while len(guessed) < depth:
            found = (self._next.get(tuple(tail[-order:])) for order in ORDERS if order <= len(tail))
            counts = next((counts for counts in found if counts), None)
            if counts is None:
                break
            guessed.append(max(counts, key=counts.get))
            tail.append(guessed[-1])
        return guessed


@dataclass(slots=True)
class Trust:
    """Whether guessing pays, from how many guesses a step were right; a moving average over about `MEMORY` steps.

    A guessed row costs attention, the draw and the host's part: about a sixth of a step for a full draft, here taken
    as `WORTH` tokens. After `REST` steps without drafts the average is given the benefit of the doubt again.
    """

    WORTH = 0.3
    MEMORY = 8
    REST = 32

    right: float = 1.0  # accepted tokens of a step with drafts, for each row that had one
    resting: int = 0  # steps left without drafts

    def allows(self) -> bool:
        if self.resting:
            self.resting -= 1
            if not self.resting:
                self.right = 2 * self.WORTH
            return False
        return True

    def learn(self, rows: int, accepted: int) -> None:
        self.right += (accepted / rows - self.right) / self.MEMORY
        if self.right < self.WORTH:
            self.resting = self.REST


@dataclass(slots=True)
class Acceptance:
    """Tokens guessed and right, and forward passes with and without drafts, since the last `begin`."""

    drafted: int = 0
    accepted: int = 0
    steps: int = 0  # with drafts
    plain_steps: int = 0

    @property
    def rate(self) -> float:
        """Share of the guesses that were right; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(slots=True)
class _Said:
    """What was drawn while nobody needed it as a corpus yet: for each step its rows' sequences and its tokens."""

    steps: list[tuple[list[Running], NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)

    def add(self, sequences: list[Running], drawn: Drawn) -> None:
        self.steps.append((sequences, drawn.tokens, drawn.counts))
        if len(self.steps) > MOST_STEPS_KEPT:  # a long session; what is lost is only a source of guesses
            del self.steps[: MOST_STEPS_KEPT // 2]

    def pour(self, corpora: dict[int, Corpus]) -> None:
        """Into the corpora of the requests that are there; the rest is over and forgotten."""
        for sequences, tokens, counts in self.steps:
            rows = zip(sequences, tokens.tolist(), counts.tolist(), strict=True)
            for sequence, row, count in rows:
                corpus = corpora.get(sequence.request.index)
                if corpus is not None:
                    corpus.extend(sequence.sample, row[:count])
        self.steps.clear()


class Speculation:
    """An engine around another one, which verifies guesses while few rows run. `acceptance` says how it goes."""

    def __init__(self, inner: StepEngine, rows: int = 8, depth: int = DEPTH):
        """rows: that a step computes at little more than the price of one."""
        self.inner, self.rows, self.depth = inner, rows, depth
        self.acceptance = Acceptance()
        self._forget()

    @property
    def model(self) -> Decoder:
        return self.inner.model

    def _forget(self) -> None:
        self._said, self._trust = _Said(), Trust()
        self._corpora: dict[int, Corpus] = {}
        self._seen, self._sequences = -1, []

    @property
    def ahead(self) -> int:
        size = self._batch.size
        return 1 + self._share() if 0 < 2 * size <= self.rows else self.inner.ahead

    def _share(self) -> int:
        """Tokens to guess for each row."""
        return min(self.depth, self.rows // self._batch.size - 1)

    def begin(self, kv: PagedKV, batch: RunningBatch) -> None:
        self._batch = batch
        self.acceptance = Acceptance()
        self._forget()
        self.inner.begin(kv, batch)

    def release(self) -> None:
        self._batch = None
        self._forget()
        self.inner.release()

    def prefill(self, work: PrefillWork) -> Drawn | None:
        drawn = self.inner.prefill(work)
        if drawn is not None:
            self._said.add(self._batch.sequences[work.first :], drawn)
        return drawn

    def decode(self, ahead: int) -> Drawn:
        batch = self._batch
        if self._seen != batch.changes:  # the list itself moves on with the batch
            self._sequences, self._seen = batch.sequences.copy(), batch.changes
        guesses = self._guesses(ahead)
        if guesses is None:
            self.acceptance.plain_steps += 1
            drawn = self.inner.decode(min(ahead, self.inner.ahead))
        else:
            drawn = self._verified(guesses)
        self._said.add(self._sequences, drawn)
        return drawn

    def _guesses(self, ahead: int) -> list[list[int]] | None:
        """Up to ahead - 1 tokens for each row, within its limit; None: draw without."""
        batch = self._batch
        few = 2 * batch.size <= self.rows and ahead > 1 and batch.waiting(0) is None
        if not few or not self._trust.allows():
            return None
        running = {sequence.request.index: sequence.request for sequence in batch.sequences}
        self._corpora = {i: self._corpora.get(i) or Corpus(request.prompt) for i, request in running.items()}
        self._said.pour(self._corpora)
        left = np.minimum(batch.view["limit"] - batch.view["drawn"], ahead) - 1
        depths = np.minimum(left, self._share()).tolist()
        rows = zip(self._sequences, depths, strict=True)
        guesses = [self._corpora[s.request.index].guess(s.sample, depth) for s, depth in rows]
        return guesses if any(guesses) else None

    def _verified(self, guesses: list[list[int]]) -> Drawn:
        """Forward each row's last token and the guesses behind it; keep what was drawn up to the first wrong guess."""
        batch = self._batch
        lengths = np.array([len(guess) for guess in guesses])
        row = np.repeat(np.arange(batch.size), lengths + 1)
        start = np.cumsum(lengths + 1) - lengths - 1
        offset = np.arange(len(row)) - start[row]
        tokens = np.zeros((batch.size, lengths.max() + 1), np.int64)
        tokens[:, 0] = batch.view["token"]
        for one, guess in zip(tokens, guesses, strict=True):
            one[1 : 1 + len(guess)] = guess
        drawn = self.inner.draw_at(row, offset, tokens[row, offset])
        found = np.zeros_like(tokens)
        found[row, offset] = drawn.tokens[:, 0]
        logprobs, full = (np.zeros(tokens.shape, np.float32) for _ in range(2))
        logprobs[row, offset], full[row, offset] = drawn.logprobs[:, 0], drawn.logprobs_full[:, 0]
        counts = 1 + accepted(found, tokens, lengths, batch.stop_ids)
        batch.advance(counts)
        guessed = lengths > 0
        self._count(int(guessed.sum()), int(lengths.sum()), int((counts - 1).sum()))
        return Drawn(found, logprobs, full, counts)

    def _count(self, rows: int, drafted: int, right: int) -> None:
        self._trust.learn(rows, right)
        self.acceptance.steps += 1
        self.acceptance.drafted += drafted
        self.acceptance.accepted += right


def accepted(
    drawn: NDArray[np.int64], given: NDArray[np.int64], lengths: NDArray[np.int64], stop_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many guesses of each row are kept, int64 [rows].

    drawn [rows, K]: drawn[:, i] from the logits behind given[:, i]. given [rows, K]: the last token, then lengths
    [rows] guesses. A guess stands while all before it do and nothing drawn so far ends the row (stop_ids [rows, S]).
    """
    place = np.arange(1, drawn.shape[1])
    stopped = (drawn[:, :-1, None] == stop_ids[:, None, :]).any(2)
    stands = (drawn[:, :-1] == given[:, 1:]) & (place <= lengths[:, None]) & ~stopped
    return np.logical_and.accumulate(stands, 1).sum(1)


def engine_for(model: Decoder) -> Engine:
    """What decodes fastest on the model's device.

    On a CPU without drafts: torch's products of eight rows take twice as long as those of one, and guesses of short
    answers are not right often enough to pay for that (docs/log.md).
    """
    return Speculation(GraphEngine(model), rows=64) if model.device.type == "cuda" else SteadyEngine(model)
