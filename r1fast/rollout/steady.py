"""Several tokens a row before the sampler looks, on a CPU, for as long as no row ends.

Between two steps of decoding nothing happens most of the time; but the sampler's look at the rows, at the weights and
at who comes and goes costs 0.3 ms where a step of 64 small sequences takes seven (docs/log.md). So a step goes straight
on to the next until a row draws a stop token or its last one, or until the sampler has not looked for `LONGEST`
seconds: slow steps, whose tokens a person may be waiting for, come one by one.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from r1fast.model import native_forward
from r1fast.model.decoder import Decoder
from r1fast.model.paged import PagedStep
from r1fast.rollout.batch import Drawn
from r1fast.rollout.engine import StepEngine
from r1fast_kernels import sample_token
from r1fast_kernels.sample_token import SampledToken

LONGEST = 0.02
_PLAIN = Decoder.forward_paged, Decoder.logits


class SteadyEngine(StepEngine):
    """A StepEngine that draws up to `steps` tokens a row at once."""

    def __init__(self, model: Decoder, steps: int = 8):
        super().__init__(model)
        self.ahead = steps

    @torch.inference_mode()
    def decode(self, ahead: int) -> Drawn:
        batch, view = self._batch, self._batch.view
        steps = min(ahead, self.ahead, int((view["limit"] - view["drawn"]).min()))
        if steps < 2 or batch.waiting(0) is not None:
            return super().decode(1)
        step = batch.step()
        if self._plain() and native_forward.takes(self.model, step, self._kv):
            seed, key, _, *settings = batch.noise(0)
            noise, stops = (seed, key, *settings), torch.from_numpy(batch.stop_ids)
            drawn = native_forward.decode(self.model, step, self._kv, noise, stops, steps, LONGEST)
        else:
            drawn = SampledToken(*map(torch.stack, zip(*self._run(step, steps), strict=True)))
        counts = np.full(batch.size, len(drawn.token), np.int64)
        batch.advance(counts)
        return Drawn(*(field.T.numpy() for field in drawn), counts)

    def _plain(self) -> bool:
        """Whether a step is what Decoder makes of it: whoever puts another method in its place is asked at each."""
        found = (getattr(self.model, name) for name in ("forward_paged", "logits"))
        own = all(getattr(method, "__func__", None) is plain for method, plain in zip(found, _PLAIN, strict=True))
        return own and type(self).hidden is StepEngine.hidden and type(self).logits is StepEngine.logits

    def _run(self, step: PagedStep, steps: int) -> list[SampledToken]:
        """What up to `steps` steps drew, from this one on; the last is the first in which a row ends."""
        batch, tables, token = self._batch, step.block_tables, step.tokens
        position = step.positions + torch.arange(steps + 1)[:, None]
        block = tables.gather(1, (position[:-1] // batch.block_size).T).T.long()
        slot = block * batch.block_size + position[:-1] % batch.block_size
        context = position[1:].int()
        seed, key, _, temperature, top_k, top_p = batch.noise(0)
        drawn, end = [], time.perf_counter() + LONGEST
        for number in range(steps):
            hidden = self.hidden(PagedStep(token, position[number], slot[number], tables, context[number]))
            noise = (seed, key, position[number + 1], temperature, top_k, top_p)
            drawn.append(sample_token(self.logits(hidden), *noise))
            token = drawn[-1].token
            if (batch.stop_ids == token.numpy()[:, None]).any() or time.perf_counter() > end:
                break
        return drawn
