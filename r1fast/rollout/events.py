"""What a session tells its driver, in the order in which it happens."""

from __future__ import annotations

from dataclasses import dataclass

from r1fast.types import Rollout, RolloutGroup


@dataclass(frozen=True, slots=True)
class Drew:
    """Tokens that a streamed request has drawn in this step; all of a sample's, joined, are its rollout's."""

    request: int
    sample: int
    tokens: list[int]
    logprobs: list[float]
    logprobs_full: list[float]


@dataclass(frozen=True, slots=True)
class SampleDone:
    """One sample is finished (after its last Drew)."""

    request: int
    sample: int
    rollout: Rollout


@dataclass(frozen=True, slots=True)
class GroupDone:
    """All samples of a request are finished, or as many as were asked for besides the spare ones. Its last event."""

    request: int
    group: RolloutGroup


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A request was cancelled before it was done. Its last event."""

    request: int


Event = Drew | SampleDone | GroupDone | Cancelled
