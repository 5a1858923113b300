"""Which of a stage's snapshots was the best so far, so that it is kept beside the newest ones.

By pass@1 on validation problems where the stage measures it as it goes (`evaluate_every`): each new best is saved at
once, with the weights that were measured. Else by the mean reward of the step's own samples, over windows of a
twentieth of the stage, because single steps are too noisy to compare and a snapshot for each new best of them would be
one every few steps; those weights were sampled from one to a window's steps before. No clock decides: a run that was
interrupted keeps the same one.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Literal

from r1fast.model.lora import merged
from r1fast.model.weights import save
from r1fast.parallel import world

if TYPE_CHECKING:
    from r1fast.model.decoder import Decoder
    from r1fast.schema import GRPOStage
    from r1fast.stages.context import StageContext
    from r1fast.stages.steps import Steps

WINDOWS = 20  # of a stage, over which rewards are averaged
FOLDER = "best"  # of a finished stage whose best weights were not its last

Metric = Literal["pass@1", "reward", "none"]


class Best:
    """The best score so far and its step; part of a stage's state."""

    def __init__(self, metric: Metric, steps: int) -> None:
        """steps: of the stage."""
        self.metric, self._window = metric, -(-steps // WINDOWS)
        self.score: float | None = None
        self.step = 0  # whose snapshot holds the best weights; 0: none yet
        self._sum = 0.0
        self._offered: tuple[int, float] | None = None

    @classmethod
    def of(cls, ctx: StageContext) -> Best:
        """As the recipe asks for it, of an RL stage."""
        stage: GRPOStage = ctx.stage
        asked = ctx.recipe.checkpoint.best
        measured = "pass@1" if stage.evaluate_every else "reward"
        return cls(measured if asked == "auto" else asked, stage.steps)

    def measured(self, step: int, pass_at_1: float) -> None:
        """pass@1 of the weights after `step`."""
        if self.metric == "pass@1":
            self._offered = (step, pass_at_1)

    def rewarded(self, step: int, reward: float) -> None:
        """The mean reward of the samples of `step`; of every step, in their order."""
        if self.metric != "reward":
            return
        self._sum += reward
        if step % self._window == 0:
            self._offered = (step, self._sum / self._window)
            self._sum = 0.0

    def due(self, step: int) -> bool:
        """Whether the weights after `step` are the best so far, and so worth a snapshot."""
        return self._offered is not None and self._offered[0] == step and self._is_better(self._offered[1])

    def saved(self, step: int) -> None:
        """A snapshot of `step` is being taken."""
        if self.due(step):
            self.step, self.score = self._offered

    def _is_better(self, score: float) -> bool:
        return self.score is None or score > self.score

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "score": self.score, "sum": self._sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.score, self._sum = state["step"], state["score"], state["sum"]


def keep_best(ctx: StageContext, loop: Steps, model: Decoder, tokenizer: Any) -> dict[str, Any]:
    """After the last step, before adapters are folded: writes the best weights to `best/` of the stage, unless they
    are the last ones, which `checkpoint/` holds. The model is left as it was. Returns what the record says of it."""
    best, folder = loop.best, ctx.directory / FOLDER
    if best is None or not best.step:
        return {}
    if best.step != loop.done:
        with loop.as_of(best.step, ("model",)) as found:
            if not found:
                return {}
            with merged(model):
                save(model, tokenizer, folder)
    elif world().first:
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted try, whose last step was another
    return {"best": {"metric": best.metric, "score": best.score, "step": best.step}}
