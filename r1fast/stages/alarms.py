"""What a person watching the curves of an RL run would call out: told once when it begins, in the terminal and the log.

An alarm changes nothing and stops nothing. Each looks at the numbers of a step event (stages/grpo.py) and at the few
before it; the thresholds are wide enough that the three committed runs of `tiny` raise none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IN_A_ROW = 3  # steps that a state must last before it is called out
WINDOW = 20  # steps that a trend is measured over, against as many before them
FIRST = 5  # steps whose mean length and entropy later ones are compared with
SILENT = 100  # steps before the same alarm is told again
FEW_GROUPS, MANY_TRUNCATED, FAILED = 0.05, 0.5, 0.05  # shares
LONGER, ENTROPY_LEFT, TREND = 2.0, 0.05, 0.1

_KEPT = ("reward", "entropy", "response_length", "format", "accuracy")


@dataclass(frozen=True, slots=True)
class Alarm:
    name: str
    text: str


class Alarms:
    """Looks at each step in turn; a Stateful, so that a resumed run says the same as one that was not stopped."""

    def __init__(self, logprob_bound: float) -> None:
        self._bound = logprob_bound
        self._steps = 0
        self._first: dict[str, list[float]] = {name: [] for name in _KEPT}
        self._recent: dict[str, list[float]] = {name: [] for name in _KEPT}
        self._lasted: dict[str, int] = {}  # alarm -> steps in a row that its state holds
        self._told: dict[str, int] = {}  # alarm -> step that it was last told at

    def look(self, step: Mapping[str, Any]) -> list[Alarm]:
        """The alarms of one step event: those whose state has lasted long enough and was not told lately."""
        self._steps += 1
        self._remember(step)
        found = []
        for name, text in self._states(step).items():
            self._lasted[name] = self._lasted.get(name, 0) + 1 if text else 0
            due = self._steps - self._told.get(name, -SILENT) >= SILENT
            if text and due and self._lasted[name] >= (1 if name == "reward_hacking" else IN_A_ROW):
                self._told[name] = self._steps
                found.append(Alarm(name, text))
        return found

    def _remember(self, step: Mapping[str, Any]) -> None:
        for name in _KEPT:
            value = step["rewards"].get(name) if name in ("format", "accuracy") else step.get(name)
            if value is None:
                continue
            if len(self._first[name]) < FIRST:
                self._first[name].append(float(value))
            self._recent[name] = [*self._recent[name], float(value)][-2 * WINDOW :]

    def _states(self, step: Mapping[str, Any]) -> dict[str, str]:
        """alarm -> what is wrong now, or "" where nothing is."""
        rollouts = step["rollouts"]
        trained, groups = step["groups_trained"], step["groups_sampled"]
        truncated, difference = step["truncated"], step.get("logprob_difference_mean")
        start, now = self._start("response_length"), step["response_length"]
        entropy, first = step.get("entropy"), self._start("entropy")
        return {
            "no_reward": "every reward is zero: the task is too hard for this model, or no answer can be read"
            if step["reward"] == 0 and not any(step["rewards"].values())
            else "",
            "no_variance": f"{groups - trained} of {groups} groups have rewards that are all equal and teach nothing"
            if trained < FEW_GROUPS * groups
            else "",
            "length": f"responses have grown from {start:.0f} to {now:.0f} tokens and {truncated:.0%} are cut off: "
            f"raise sampling.max_tokens, or shape overlong ones"
            if start and now > LONGER * start and truncated > MANY_TRUNCATED
            else "",
            "entropy": f"entropy has collapsed from {first:.3f} to {entropy:.4f} nats a token: raise "
            f"objective.clip_high"
            if first and entropy is not None and entropy < ENTROPY_LEFT * first
            else "",
            "sampler_difference": f"sampler and learner differ by {difference:.2g} nats a token, the bound is "
            f"{self._bound:g}"
            if difference is not None and difference > self._bound
            else "",
            "verifier": f"the verifier failed on {step['errors']} of {rollouts} rollouts"
            if step["errors"] > FAILED * rollouts
            else "",
            "reward_hacking": self._hacking(),
        }

    def _start(self, name: str) -> float | None:
        first = self._first[name]
        return sum(first) / FIRST if len(first) == FIRST and self._steps > FIRST else None

    def _hacking(self) -> str:
        form, right = self._trend("format"), self._trend("accuracy")
        if form is None or right is None or form < TREND or right > -TREND:
            return ""
        return (
            f"over {WINDOW} steps the format reward rose by {form:.2f} while accuracy fell by {-right:.2f}: the model "
            f"may be learning the form instead of the answer"
        )

    def _trend(self, name: str) -> float | None:
        recent = self._recent[name]
        if len(recent) < 2 * WINDOW:
            return None
        return (sum(recent[WINDOW:]) - sum(recent[:WINDOW])) / WINDOW

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "first": {name: list(values) for name, values in self._first.items()},
            "recent": {name: list(values) for name, values in self._recent.items()},
            "lasted": dict(self._lasted),
            "told": dict(self._told),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._first, self._recent = state["steps"], dict(state["first"]), dict(state["recent"])
        self._lasted, self._told = dict(state["lasted"]), dict(state["told"])
