"""Log-probabilities of given tokens, for whoever asks how likely a text is: the evaluation harness, a server's `echo`.

Sequences are packed end to end, so there is no padding, and only the rows that are asked for meet the head, a bounded
number at a time. Training does not come here: its losses never store logits at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from r1fast.model.decoder import Decoder

PACKED = 8192  # tokens forwarded together, at least one sequence
LOGITS = 1 << 26  # numbers of logits held together: 256 MiB


@dataclass(frozen=True, slots=True)
class Scored:
    """What the model says of the tokens that follow a context."""

    logprobs: list[float]  # nats, of the untempered softmax in fp32
    greedy: list[bool]  # whether the token is the most likely one
    top: list[list[tuple[int, float]]]  # the most likely tokens and their log-probabilities; none unless asked for


@torch.inference_mode()
def score(
    model: Decoder, inputs: Sequence[Sequence[int]], asked: Sequence[Sequence[Sequence[int]]], top: int = 0
) -> list[list[Scored]]:
    """Log-probabilities of targets under inputs, each input forwarded once whatever is asked of it.

    inputs: token ids, each at most the context's length. asked[i]: lists of targets of input i; the n tokens of a list
    are predicted by the last n positions of the input, so its end holds all of them but the last. top: how many of the
    most likely tokens are told for each position."""
    result: list[list[Scored]] = []
    for begin, end in _packs([len(tokens) for tokens in inputs]):
        part = inputs[begin:end]
        tokens = torch.tensor([token for given in part for token in given], device=model.device)
        ends = torch.tensor([0, *map(len, part)]).cumsum(0)
        hidden = model.forward_packed(tokens, ends.to(model.device, torch.int32))
        each = zip(ends[1:].tolist(), asked[begin:end], strict=True)
        lists = [(stop, targets) for stop, ones in each for targets in ones]
        rows = torch.tensor([row for stop, targets in lists for row in range(stop - len(targets), stop)])
        wanted = torch.tensor([token for _, targets in lists for token in targets], device=model.device)
        flat = _rows(model, hidden[rows.to(model.device)], wanted, top) if len(rows) else iter(())
        for ones in asked[begin:end]:
            told = [[next(flat) for _ in targets] for targets in ones]
            result.append([Scored(*map(list, zip(*one, strict=True))) if one else Scored([], [], []) for one in told])
    return result


def _packs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin = held = 0
    for index, length in enumerate(lengths):
        if held and held + length > PACKED:
            yield begin, index
            begin, held = index, 0
        held += length
    if lengths:
        yield begin, len(lengths)


def _rows(
    model: Decoder, hidden: torch.Tensor, targets: torch.Tensor, top: int
) -> Iterator[tuple[float, bool, list[tuple[int, float]]]]:
    """(log-probability, whether it is the largest, the `top` best) of each target [N] given hidden [N, H]."""
    step = max(1, LOGITS // model.config.vocab_size)
    for part, wanted in zip(hidden.split(step), targets.split(step), strict=True):
        logprobs = model.logits(part).log_softmax(-1)
        chosen = logprobs.gather(1, wanted[:, None])[:, 0].tolist()
        greedy = (logprobs.argmax(-1) == wanted).tolist()
        best = [[] for _ in chosen]
        if top:
            values, ids = logprobs.topk(min(top, logprobs.shape[1]))
            best = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
        yield from zip(chosen, greedy, best, strict=True)
