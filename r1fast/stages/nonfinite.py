"""Steps whose loss or gradient was not finite: one is skipped and counted (learn/learner.py); several in a row mean
that the weights are lost or the data is bad, and the run stops, or goes on from the weights of its last snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from r1fast import snapshot
from r1fast.config import UserError
from r1fast.parallel import world
from r1fast.stages import saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from r1fast.stages.context import StageContext

ROLLED_BACK = ("model", "learner")  # parts of a stage's state; its data goes on, or the same steps would fail again
AT_MOST = 3  # times that a stage is rolled back before it stops all the same


class Nonfinite:
    """Counts skipped steps in a row and acts on too many, as the recipe's `watchdog` block says."""

    def __init__(self, ctx: StageContext, state: Mapping[str, Any], settle: Callable[[], None]) -> None:
        """settle: called before snapshots are read, so that none is on its way."""
        self._ctx, self._config, self._settle = ctx, ctx.recipe.watchdog, settle
        self._parts = {name: state[name] for name in ROLLED_BACK if name in state}
        self._learner = state.get("learner")
        self._seen = self._in_a_row = self._times = 0

    def look(self, step: int) -> bool:
        """After a step: whether it was finite, so that its state may be saved. UserError where it ends the run."""
        if self._learner is None:
            return True
        skipped, self._seen = self._learner.skipped - self._seen, self._learner.skipped
        if skipped <= 0:
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        ctx = self._ctx
        ctx.log.event(event="alarm", stage=ctx.name, name="nonfinite", step=step, text="loss or gradient not finite")
        if self._in_a_row == 1:
            ctx.progress.warn(f"{ctx.name}, step {step}: the loss or its gradient is not finite; the step is skipped")
        if self._in_a_row >= self._config.nonfinite_steps:
            self._act(step)
        return False

    def _act(self, step: int) -> None:
        ctx, found = self._ctx, None
        if self._config.on_nonfinite == "roll_back" and self._times < AT_MOST:
            self._settle()
            found = snapshot.newest(ctx.snapshots, lambda notes: True, ctx.progress.warn, world())
        if found is None:
            raise UserError(
                f"stage {ctx.name!r}: {self._in_a_row} steps in a row, up to step {step}, had a loss or gradient that "
                f"is not finite; lower the learning rate or look at samples.jsonl (watchdog.on_nonfinite=roll_back "
                f"goes on from the last snapshot, at most {AT_MOST} times)"
            )
        mesh = saved.mesh_of([part.state_dict() for part in self._parts.values()])
        state = saved.read(found.path, mesh, self._parts)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._seen, self._in_a_row, self._times = self._learner.skipped, 0, self._times + 1
        text = f"step {step}: back to the weights of step {found.step}, with the data that follows"
        ctx.log.event(event="alarm", stage=ctx.name, name="rolled_back", step=step, text=text)
        ctx.progress.warn(f"{ctx.name}, {text}")
