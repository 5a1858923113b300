"""Rows of any length into micro-batches without padding, and the weights that make their losses add up.

Rows of one prompt may share it: it is then laid down once, its rows behind it, each seeing it and itself
(kernels/prefix_attention.py). Losses and gradients are those of laying it before each of them.

Every denominator of a step is computed here, once, over all its rows, before any row is dropped or put in a
micro-batch: after that micro-batches (and ranks) only add. Nothing here loops over tokens in Python.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from random import Random
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from r1fast.types import PackedBatch

if TYPE_CHECKING:
    from torch import Tensor

    from r1fast.types import RolloutGroup

Aggregate = Literal["sequence", "token", "constant"]


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to train on: prompt and completion, with what the algorithm says about the completion.

    The per-token streams have one entry per completion token, in nats.
    """

    tokens: Sequence[int]  # prompt, then completion
    prompt_length: int  # at least 1: the first completion token is predicted from the last prompt token
    advantage: float = 0.0
    old_logprobs: Sequence[float] | None = None  # of the policy that the ratio is taken to; at first the sampler's
    ref_logprobs: Sequence[float] | None = None
    correction: Sequence[float] | None = None  # truncated importance weight of each token, on the advantage
    group: int | None = None  # rows of one group have the same prompt, which they may share; None: its own

    @property
    def completion_length(self) -> int:
        return len(self.tokens) - self.prompt_length


def row_from_example(prompt_tokens: Sequence[int], completion_tokens: Sequence[int]) -> Row:
    """A supervised row: the loss is on the completion."""
    return Row([*prompt_tokens, *completion_tokens], len(prompt_tokens))


def rows_from_groups(groups: Sequence[RolloutGroup], advantages: Tensor, first: int = 0) -> list[Row]:
    """One row per rollout, in order. `advantages`: float32 [rollouts], as `advantages.advantages` gives them. `first`:
    the number of the first group."""
    values = iter(advantages.tolist())
    return [
        Row([*group.prompt.tokens, *r.tokens], len(group.prompt.tokens), next(values), r.logprobs, group=number)
        for number, group in enumerate(groups, first)
        for r in group.rollouts
    ]


def loss_weights(
    rows: Sequence[Row], aggregate: Aggregate, max_tokens: int | None = None, of: int | None = None
) -> np.ndarray:
    """The weight of each token of each row in the loss of an optimizer step, float64 [rows].

    sequence: 1 / (|o| R), the mean over a response's tokens, then over the R responses (DeepSeekMath eq. 3);
    token: 1 / (tokens of all responses) (DAPO eq. 8); constant: 1 / (max_tokens R) (Dr. GRPO, its constant being the
    most a response may have). Pass all rows of the step, also those that will not be trained on.

    of: R, where `rows` are a part of the step's and the others are not there yet. The tokens of all are then not known
    either: the weights of `token` are 1 / R, and the gradient is to be multiplied by `late_scale` when they are.
    """
    lengths = np.array([row.completion_length for row in rows], dtype=np.float64)
    count = len(rows) if of is None else of
    if aggregate == "sequence":
        return 1.0 / (np.maximum(lengths, 1.0) * count)
    if aggregate == "token":
        return np.full(len(rows), 1.0 / (max(lengths.sum(), 1.0) if of is None else count))
    if aggregate == "constant":
        if max_tokens is None:
            raise ValueError("aggregate 'constant' needs max_tokens, the longest response that the sampler may give")
        return np.full(len(rows), 1.0 / (max_tokens * count))
    raise ValueError(f"unknown aggregate {aggregate!r}; known are sequence, token, constant")


def late_scale(aggregate: Aggregate, rows: int, tokens: int) -> float:
    """What a gradient of `loss_weights(..., of=rows)` lacks, now that the step's tokens are known."""
    return rows / max(tokens, 1) if aggregate == "token" else 1.0


def plan(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Which rows go together: best-fit decreasing under a token budget. A row over the budget gets its own batch.

    Indices of a batch are in order of falling length, and the batches of falling total, so that the step that
    needs most memory is the first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, batch), ascending
    for i in order:
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            batches.append([i])
            left, batch = micro_batch_tokens - lengths[i], len(batches) - 1
        else:
            left, batch = room.pop(at)
            batches[batch].append(i)
            left -= lengths[i]
        insort(room, (left, batch))
    return sorted(batches, key=lambda batch: -sum(lengths[i] for i in batch))


def row_lengths(rows: Sequence[Row]) -> list[int]:
    """Tokens that each row forwards: its last one predicts nothing and is left out."""
    return [len(row.tokens) - 1 for row in rows]


def _by_group(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of the rows that may share a prompt, in order of first appearance."""
    found: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault((i,) if row.group is None else (-1, row.group), []).append(i)
    return list(found.values())


def shared_tokens(rows: Sequence[Row]) -> int:
    """Tokens that the rows forward when each group's prompt is laid down once."""
    return sum(rows[group[0]].prompt_length for group in _by_group(rows)) + sum(
        row.completion_length - 1 for row in rows
    )


def plan_rows(rows: Sequence[Row], micro_batch_tokens: int, shared: bool) -> list[list[int]]:
    """`plan` of rows, which are alone or, `shared`, stay with their group: a group over the budget is cut into pieces
    that fit, each with the prompt before it."""
    if not shared:
        return plan(row_lengths(rows), micro_batch_tokens)
    pieces: list[list[int]] = []
    costs: list[int] = []
    for group in _by_group(rows):
        prompt = rows[group[0]].prompt_length
        for part in plan([rows[i].completion_length - 1 for i in group], max(micro_batch_tokens - prompt, 1)):
            pieces.append([group[at] for at in part])
            costs.append(prompt + sum(rows[i].completion_length - 1 for i in pieces[-1]))
    return [[i for at in part for i in pieces[at]] for part in plan(costs, micro_batch_tokens)]


class Filling:
    """Micro-batches of rows that arrive group by group: each is given out as soon as it is full.

    When what has arrived is more than one micro-batch holds, `plan_rows` of it is given out, but for the emptiest one,
    whose rows wait for the next group. So the micro-batches depend on the order of arrival and on nothing else, and
    all that fits in one is one."""

    def __init__(self, rows: Sequence[Row], tokens: Callable[[], int], shares: Callable[[Sequence[Row]], bool]) -> None:
        """rows: where the rows of the indices that arrive are found. tokens: of a micro-batch at most, as of now.
        shares: whether such rows share their prompts."""
        self._rows, self._tokens, self._shares = rows, tokens, shares
        self._waiting: list[int] = []

    def add(self, ids: Sequence[int]) -> list[tuple[list[int], bool]]:
        """The micro-batches that are full with these: the indices of each one's rows, and whether they share."""
        self._waiting += ids
        rows = [self._rows[i] for i in self._waiting]
        if (shared_tokens(rows) if self._shares(rows) else sum(row_lengths(rows))) <= self._tokens():
            return []
        planned = self._plan(rows)
        if len(planned) > 1:
            self._waiting = planned.pop()[0]
            return planned
        return []

    def rest(self) -> list[tuple[list[int], bool]]:
        """All that still waited."""
        planned = self._plan([self._rows[i] for i in self._waiting])
        self._waiting = []
        return planned

    def _plan(self, rows: list[Row]) -> list[tuple[list[int], bool]]:
        shared = self._shares(rows)
        return [([self._waiting[at] for at in part], shared) for part in plan_rows(rows, self._tokens(), shared)]


def pack(
    rows: Sequence[Row],
    weights: np.ndarray | None,
    micro_batch_tokens: int,
    device: torch.device | str = "cpu",
    order: list[list[int]] | None = None,
    shared: bool = False,
) -> list[PackedBatch]:
    """Micro-batches of `rows`, in the order of `plan_rows` (or `order`, if the caller has made it already).

    `weights`: float [rows], of every token of a row, as `loss_weights` gives them; None: zeros (log-probs only).
    `shared`: rows of one group that follow each other in a micro-batch share their prompt.
    """
    if order is None:
        order = plan_rows(rows, micro_batch_tokens, shared)
    return [
        _pack_one([rows[i] for i in part], None if weights is None else weights[part], device, shared) for part in order
    ]


def layout(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where sequences of these lengths begin when laid end to end, [B+1], and each token's place in its own, [T]."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return starts, np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)


@dataclass(frozen=True, slots=True)
class _Laid:
    """Where the rows of a micro-batch lie among its T tokens."""

    sequences: list[Sequence[int]]  # end to end, the T tokens
    members: list[int] | None  # sequences of each group, a prompt and what is behind it; None: all are alone
    before: np.ndarray  # int64 [rows]: the place of each row's last prompt token
    after: np.ndarray  # int64 [rows]: the place of its first completion token


def _lay(rows: list[Row], shared: bool) -> _Laid:
    prompt = np.array([row.prompt_length for row in rows], dtype=np.int64)
    if not shared:
        sequences = [row.tokens[:-1] for row in rows]
        starts, _ = layout(np.array([len(tokens) for tokens in sequences], dtype=np.int64))
        return _Laid(sequences, None, starts[:-1] + prompt - 1, starts[:-1] + prompt)
    sequences, members, leads, own = [], [], [], []
    for i, row in enumerate(rows):
        if i == 0 or row.group is None or row.group != rows[i - 1].group:
            sequences.append(row.tokens[: row.prompt_length])
            members.append(1)
        leads.append(len(sequences) - members[-1])
        if row.completion_length > 1:
            own.append(len(sequences))
            sequences.append(row.tokens[row.prompt_length : -1])
            members[-1] += 1
        else:  # nothing of it is forwarded: the prompt's last token predicts all there is
            own.append(leads[-1])
    starts, _ = layout(np.array([len(tokens) for tokens in sequences], dtype=np.int64))
    return _Laid(sequences, members, starts[leads] + prompt - 1, starts[own])


def _positions(lengths: np.ndarray, members: list[int] | None) -> np.ndarray:
    """int64 [T]: each token's place in its row; what is behind a prompt counts on from it."""
    _, positions = layout(lengths)
    if members is None:
        return positions
    first = np.concatenate([[0], np.cumsum(members)[:-1]])
    offset = np.repeat(lengths[first], members)
    offset[first] = 0
    return positions + np.repeat(offset, lengths)


def _pack_one(rows: list[Row], weights: np.ndarray | None, device: torch.device | str, shared: bool) -> PackedBatch:
    answers = np.array([row.completion_length for row in rows], dtype=np.int64)
    if min(row.prompt_length for row in rows) < 1 or answers.min() < 1:
        raise ValueError("a row needs at least one prompt token and one completion token")
    laid = _lay(rows, shared)
    lengths = np.array([len(tokens) for tokens in laid.sequences], dtype=np.int64)
    starts, _ = layout(lengths)
    sequence = np.repeat(np.arange(len(rows)), answers)
    _, within = layout(answers)
    leading = np.where(within == 0, np.repeat(laid.before, answers), np.repeat(laid.after - 1, answers) + within)

    def put(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

    def flat(parts: Iterable[Iterable], count: int, dtype: type) -> np.ndarray:
        return np.fromiter(chain.from_iterable(parts), dtype=dtype, count=count)

    def stream(name: str) -> Tensor | None:
        if getattr(rows[0], name) is None:
            return None
        return put(flat((getattr(row, name) for row in rows), len(sequence), np.float64), torch.float32)

    targets = flat((row.tokens[row.prompt_length :] for row in rows), len(sequence), np.int64)
    advantage = put(np.repeat(np.array([row.advantage for row in rows]), answers), torch.float32)
    correction = stream("correction")
    return PackedBatch(
        tokens=put(flat(laid.sequences, int(starts[-1]), np.int64), torch.int64),
        positions=put(_positions(lengths, laid.members), torch.int64),
        cu_seqlens=put(starts, torch.int32),
        rows=put(leading, torch.int64),
        targets=put(targets, torch.int64),
        sequence=put(sequence, torch.int64),
        loss_weight=put(np.zeros(len(sequence)) if weights is None else np.repeat(weights, answers), torch.float32),
        advantage=advantage if correction is None else advantage * correction,
        old_logprob=stream("old_logprobs"),
        ref_logprob=stream("ref_logprobs"),
        max_seqlen=int(lengths.max()),
        cu_groups=None if laid.members is None else put(np.cumsum([0, *laid.members]), torch.int32),
    )


def unpack(values: Sequence[Tensor], batches: Sequence[PackedBatch], order: list[list[int]]) -> list[np.ndarray]:
    """Per-token values of packed batches back to their rows: float32 arrays, in the order of the packed rows.

    `values[b]`: float [N] of `batches[b]`; `order`: what `plan` returned for them.
    """
    found: list[np.ndarray] = [np.empty(0, np.float32)] * sum(map(len, order))
    for part, batch, value in zip(order, batches, values, strict=True):
        counts = np.bincount(batch.sequence.cpu().numpy(), minlength=len(part))
        for i, piece in zip(part, np.split(value.float().cpu().numpy(), np.cumsum(counts)[:-1]), strict=True):
            found[i] = piece
    return found


def supervised_steps(
    rows: Sequence[Row],
    *,
    steps: int,
    batch_examples: int,
    micro_batch_tokens: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    aggregate: Aggregate = "token",
    first: int = 0,
) -> Iterator[list[PackedBatch]]:
    """The micro-batches of each of `steps` optimizer steps: epochs of seeded shuffles, one running into the next.

    The order depends on `seed` alone, so that a resumed run skips the `first` steps that it has done and goes on the
    same.
    """
    for picks in islice(epochs_of(len(rows), steps, batch_examples, seed), first, None):
        part = [rows[i] for i in picks]
        yield pack(part, loss_weights(part, aggregate), micro_batch_tokens, device)


def epochs_of(count: int, steps: int, batch: int, seed: int) -> Iterator[list[int]]:
    """The indices below `count` of each of `steps` batches: seeded shuffles, one running into the next."""
    random, queue = Random(seed), []
    for _ in range(steps):
        while len(queue) < batch:
            epoch = list(range(count))
            random.shuffle(epoch)
            queue += epoch
        yield queue[:batch]
        del queue[:batch]
