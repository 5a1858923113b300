"""The nouns that flow through r1fast, in one place, so that every arrow between two parts has a type.

    Problem -> Prompt -> Rollout, RolloutGroup -> PackedBatch -> StepStats
    (a task)  (encoded)  (the sampler, rewards)   (packing)     (the learner)

All are frozen and slotted: a stage that wants to change one makes another (`dataclasses.replace`), and no field
is ever used for a second meaning. Shapes are in brackets: T tokens of a packed batch, B sequences in it, N rows
whose next token is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the plain-Python parts (scheduler, rewards, tasks) import this module; torch is slow to import
    from torch import Tensor

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A question as a task states it, before any tokenizer has seen it."""

    id: str  # unique within its task and split; stable across runs
    text: str  # what the user says, without any template
    answer: Any  # what the task's verifier compares with; None where nothing is right or wrong
    task: str  # name of the task in the recipe
    meta: Mapping[str, Any] = field(default_factory=dict)  # what rewards may need besides: language, category, ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem through the chat template: what the sampler is given."""

    id: str
    tokens: tuple[int, ...]  # template included, ends where the assistant begins to speak
    text: str  # the problem's text, without the template
    answer: Any
    task: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion of a prompt."""

    tokens: list[int]  # prompt not included; the stop token is included where finish == "stop"
    logprobs: list[float]  # nats; of the distribution each token was drawn from (temperature and truncation applied)
    finish: Finish
    text: str = ""  # decoded completion, special tokens dropped; filled by whoever holds the tokenizer
    rewards: Mapping[str, float] = field(default_factory=dict)  # by kind, before weights
    reward: float = 0.0  # the weighted sum, what the advantage is computed from
    errors: Mapping[str, str] = field(default_factory=dict)  # kind -> why its verifier failed; never scored as a zero
    logprobs_full: list[float] | None = None  # the same before top-k, top-p and min_tokens: the learner's at that
    # temperature (1 where it is 0), whatever was truncated; None where the rollout comes from no sampler


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All samples of one prompt: the unit over which GRPO normalises."""

    prompt: Prompt
    rollouts: list[Rollout]
    weights_version: int  # of the model that sampled; the learner's differs when it has stepped since


@dataclass(frozen=True, slots=True)
class Example:
    """A supervised row: what SFT and distillation train on, one line of a rows.jsonl."""

    prompt: str  # the user's words, without the template
    completion: str  # what the assistant should say, without the end-of-sequence token
    task: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preference:
    """A pair for the Bradley-Terry reward model."""

    prompt: str
    chosen: str
    rejected: str
    task: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch without padding: B sequences end to end, and the N rows of it that are trained on.

    Row n predicts `targets[n]` from the hidden state at `rows[n]`, so prompts cost no product with the head.
    The learner is blind to the algorithm: it computes a per-row loss from these streams and sums it times
    `loss_weight`, which already holds every denominator (1/|o|, 1/G, 1/prompts, or the global token count,
    as the algorithm chose), so that micro-batches and ranks only ever add.
    """

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from 0 in every sequence, or on from the prompt that it is behind
    cu_seqlens: Tensor  # int32 [B+1]
    rows: Tensor  # int64 [N], indices into T; a prompt's last token may lead several completions
    targets: Tensor  # int64 [N]
    sequence: Tensor  # int64 [N], which of the micro-batch's completions each row is in
    loss_weight: Tensor  # float32 [N]
    advantage: Tensor | None = None  # float32 [N]; None for supervised batches
    old_logprob: Tensor | None = None  # float32 [N], of the policy the rollouts are attributed to
    ref_logprob: Tensor | None = None  # float32 [N]; None when there is no KL term
    max_seqlen: int = 0  # longest sequence, in tokens
    cu_groups: Tensor | None = None  # int32 [G+1], of the B sequences: a group's first one is a prompt that the others
    # are behind (kernels/prefix_attention.py); None: every sequence holds its own prompt


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one optimizer step tells; the sums are over the whole step, not its last micro-batch."""

    loss: float
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # forwarded, prompts included
    kl: float = 0.0  # nats a token, mean over trained rows, to the reference
    entropy: float = 0.0  # nats a token, mean over trained rows
    clip_fraction: float = 0.0  # share of trained rows whose gradient the clip removed
    ratio_mean: float = 1.0
    ratio_max: float = 1.0
