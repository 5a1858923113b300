"""How supervised stages (pretrain, sft, distill, reward model) report: a smoothed line every few steps, because a step
of theirs can take two milliseconds and a line for each would cost more than the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1fast.metrics import PhaseTimer
    from r1fast.stages.context import StageContext
    from r1fast.types import StepStats


class SupervisedLog:
    """Means of the steps since the last line, written every `every` steps and on the last."""

    def __init__(self, ctx: StageContext, steps: int, every: int = 1):
        self._ctx, self._steps, self._every = ctx, steps, every
        self._losses: list[float] = []
        self._tokens = 0
        self.recent_loss = float("nan")

    def state_dict(self) -> dict:
        return {"losses": list(self._losses), "tokens": self._tokens, "recent_loss": self.recent_loss}

    def load_state_dict(self, state: dict) -> None:
        self._losses, self._tokens, self.recent_loss = state["losses"], state["tokens"], state["recent_loss"]

    def step(self, step: int, stats: StepStats, timer: PhaseTimer, **more: float) -> None:
        self._losses.append(stats.loss)
        self._tokens += stats.tokens
        if step % self._every and step != self._steps:
            return
        phases = timer.take()
        self.recent_loss = sum(self._losses) / len(self._losses)
        self._ctx.log.event(
            event="step",
            stage=self._ctx.name,
            kind=self._ctx.stage.kind,
            step=step,
            steps=self._steps,
            loss=self.recent_loss,
            learning_rate=stats.learning_rate,
            grad_norm=stats.grad_norm,
            tokens=self._tokens,
            tokens_per_second=self._tokens / max(sum(phases.values()), 1e-9),
            phase_seconds=phases,
            **more,
        )
        self._ctx.progress.update(step, loss=self.recent_loss, **more, learning_rate=stats.learning_rate)
        self._losses, self._tokens = [], 0
