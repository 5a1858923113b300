"""Thousands of random requests through one sampler, with random cancels, and every result checked.

    python tests/soak.py --requests 10000 [--seed 0]

The sampler, the session, the scheduler, the batch and the pool are the real ones. The engine is a model of integers: a
token is a hash of everything that the sequence's blocks hold, so a wrong block, a missed copy, a lost token or a block
found under a wrong name changes what is drawn and all that follows. Weights change between sessions: they are in the
hash too. The run ends with the pool's own check: every block is free.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.rollout.batch import Drawn
from r1fast.rollout.events import Cancelled, Drew, GroupDone
from r1fast.rollout.sampler import Sampler, SamplingParams

VOCABULARY, CONTEXT, STOP = 23, 96, 4


def mixed(tokens, positions):
    """uint64, elementwise: the share of each token at its place in the hash of a sequence (splitmix64's finish)."""
    with np.errstate(over="ignore"):
        x = np.asarray(tokens, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.asarray(positions, np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(27))


def draw(hashes, keys, seeds, forbidden=False):
    """The token behind a sequence with this hash."""
    words = mixed(hashes ^ np.asarray(keys, np.int64).astype(np.uint64), np.asarray(seeds, np.int64).astype(np.uint64))
    tokens = (words >> np.uint64(33)).astype(np.int64) % VOCABULARY
    return np.where(forbidden & (tokens == STOP), STOP + 1, tokens)


class IntegerEngine:
    """See the module. The cache holds `mixed` of every token, and of the weights' version at position 0."""

    ahead = 1

    def __init__(self, model, generator: random.Random, most_ahead: int = 3):
        self.model, self.random, self.most_ahead = model, generator, most_ahead
        self.prefilled = 0

    def begin(self, kv, batch):
        slots = kv.blocks * kv.block_size
        if getattr(self, "memory", None) is None or len(self.memory) != slots:
            self.memory = np.zeros(slots, np.uint64)
        self.batch, self.size = batch, kv.block_size

    def release(self):
        self.memory = None

    def write(self, slots, tokens, positions):
        salted = np.where(positions == 0, tokens + 1000 * self.model.weights_version, tokens)
        self.memory[slots] = mixed(salted, positions)

    def hashes(self, tables, contexts):
        place = np.arange(int(contexts.max()))
        slots = tables[:, place // self.size].astype(np.int64) * self.size + place % self.size
        return np.where(place < contexts[:, None], self.memory[slots], 0).sum(1, dtype=np.uint64)

    def prefill(self, work):
        step = work.step
        self.write(*(x.numpy() for x in (step.slots, step.tokens, step.positions)))
        self.prefilled += len(step.tokens)
        blocks = self.memory.reshape(-1, self.size)
        for source, target in work.copies:
            blocks[target] = blocks[source]
        if not work.last_rows:
            return None
        view = {name: array[work.first :] for name, array in self.batch.view.items()}
        table = self.batch.table.numpy()[work.first :]
        forbidden = view["drawn"] < view["min_tokens"]
        return self.drawn([draw(self.hashes(table, view["length"]), view["key"], view["seed"], forbidden)])

    def decode(self, ahead):
        view, table, rows = self.batch.view, self.batch.table.numpy(), np.arange(self.batch.size)
        token, counts, alive, seen = view["token"].copy(), rows * 0, rows >= 0, []
        for number in range(ahead):
            place = (view["length"] + counts)[alive]
            block = table[rows[alive], place // self.size].astype(np.int64)
            slots = block * self.size + place % self.size
            assert number or (slots == view["slot"]).all()  # what the batch keeps for engines of one token a step
            self.write(slots, token[alive], place)
            forbidden = (view["drawn"] + counts < view["min_tokens"])[alive]
            token[alive] = draw(
                self.hashes(table[alive], place + 1), view["key"][alive], view["seed"][alive], forbidden
            )
            seen.append(token.copy())
            counts = counts + alive
            alive &= ~(self.batch.stop_ids == token[:, None]).any(1) & (view["drawn"] + counts < view["limit"])
            if not alive.any():
                break
        self.batch.advance(counts)
        self.ahead = self.random.randint(1, self.most_ahead)
        return self.drawn(seen, counts)

    def drawn(self, columns, counts=None):
        tokens = np.stack(columns, 1)
        values = tokens.astype(np.float32)
        return Drawn(tokens, -values, -values - 1, np.ones(len(tokens), np.int64) if counts is None else counts)


def expected(prompt, params, key, version):
    """The tokens of one sample, directly."""
    share = [int(mixed(token + 1000 * version * (p == 0), p)) for p, token in enumerate(prompt)]
    total, tokens = sum(share) % 2**64, []
    limit = min(params.max_tokens, CONTEXT - len(prompt))
    while len(tokens) < limit and (not tokens or tokens[-1] not in (STOP, *params.stop_token_ids)):
        forbidden = len(tokens) < params.min_tokens
        token = int(draw(np.uint64(total), key, params.seed, forbidden))
        total = (total + int(mixed(token, len(prompt) + len(tokens)))) % 2**64
        tokens.append(token)
    return tokens


def random_request(rng, templates):
    prompt = rng.choice(templates)[: rng.randint(0, 30)] + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))]
    if rng.random() < 0.2:  # the later blocks are those of another template, and yet others
        prompt = rng.choice(templates)[: rng.randint(1, 8)] + prompt[8:]
    longest = rng.randint(1, 40)
    params = SamplingParams(
        n=rng.randint(1, 4), max_tokens=longest, seed=rng.randrange(-3, 3), spare=rng.choice([0, 0, 0, 2]),
        min_tokens=rng.choice([0, 0, rng.randint(0, longest)]), stop_token_ids=rng.choice([(), (), (7,)]),
    )  # fmt: skip
    return prompt, replace(params, stop_token_ids=() if params.min_tokens else params.stop_token_ids)


def check_group(sampler, prompt, params, group, version, tokens_seen):
    assert group.weights_version == version and len(group.rollouts) == params.n
    request = sampler._reader.request("", 0, tuple(prompt), params, 0, None)
    possible = [expected(prompt, params, request.draws.key + s, version) for s in range(params.n + params.spare)]
    found = [rollout.tokens for rollout in group.rollouts]
    assert found == possible if not params.spare else not Counter(map(tuple, found)) - Counter(map(tuple, possible))
    for rollout in group.rollouts:
        assert rollout.logprobs == [-float(token) for token in rollout.tokens]
        assert rollout.finish == ("stop" if rollout.tokens[-1] in (STOP, *params.stop_token_ids) else "length")
    if tokens_seen is not None:
        streamed = Counter(tuple(tokens) for tokens in tokens_seen.values())
        assert not Counter(map(tuple, found)) - streamed


def soak(requests: int, seed: int = 0, sessions: int = 8) -> Counter:
    """Raises AssertionError when anything is wrong; what happened."""
    rng = random.Random(seed)
    model = Decoder(DecoderConfig(VOCABULARY, 4, 4, layers=1, heads=1, kv_heads=1, head_dim=4, max_positions=CONTEXT))
    engine = IntegerEngine(model, rng)
    sampler = Sampler(model, STOP, max_seqs=24, kv_blocks=90, block_size=4, prefill_tokens=20, engine=engine)
    templates = [[rng.randrange(VOCABULARY) for _ in range(30)] for _ in range(5)]
    told = Counter()
    for _ in range(sessions):
        with sampler.session() as session:
            _soak_session(rng, sampler, session, requests // sessions, templates, told)
            told["preemptions"] += session.preemptions
            told["found tokens"] += session.found_tokens
        pool = sampler.memory.pool
        pool.check([])
        assert pool.free == pool.blocks
        if rng.random() < 0.5:
            model.bump_version()
    told["prefilled tokens"] = engine.prefilled
    return told


def _soak_session(rng, sampler, session, requests, templates, told):
    asked, streamed, over, version = {}, {}, set(), sampler.model.weights_version
    while len(asked) < requests or session.unfinished:
        for _ in range(rng.choice([0, 0, 1, 2, 12])):
            if len(asked) < requests:
                prompt, params = random_request(rng, templates)
                stream = rng.random() < 0.3
                number = session.submit(prompt, params, stream=stream)
                asked[number] = (prompt, params)
                if stream:
                    streamed[number] = {}
        if asked and rng.random() < 0.15:
            halfway = [prefill.request.index for prefill in session._scheduler._prefilling]
            number = rng.choice(halfway[:1] or [*asked][-30:])
            assert session.cancel(number) == (number not in over)
        for event in session.step():
            assert event.request not in over
            if isinstance(event, Drew):
                streamed[event.request].setdefault(event.sample, []).extend(event.tokens)
            elif isinstance(event, GroupDone):
                over.add(event.request)
                prompt, params = asked[event.request]
                check_group(sampler, prompt, params, event.group, version, streamed.get(event.request))
                told["groups"] += 1
            elif isinstance(event, Cancelled):
                over.add(event.request)
                told["cancelled"] += 1
        sampler.memory.pool.check(session._scheduler.tables())
    assert over == set(asked)
    scheduler, pool = session._scheduler, sampler.memory.pool
    assert scheduler.available == pool.free == pool.blocks
    assert scheduler._growth == scheduler._waiting_samples == scheduler._prefilling_samples == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    print(dict(soak(options.requests, options.seed)), f"{time.perf_counter() - began:.1f} s")
