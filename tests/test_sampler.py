"""The sampler against transformers, against a dense forward, against exact probabilities, and against itself:
whatever else is in the batch, however small the pool or the chunks, a request's tokens stay the same."""

import itertools
import random
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from checkpoints import LAYOUTS, VOCAB, make
from sampling import (
    VOCABULARY,
    assert_logprobs_close,
    assert_pool_empty,
    dense_logits,
    make_prompts,
    tiny_model,
    tokens_of,
)

from r1fast.config import UserError
from r1fast.model.decoder import PagedStep
from r1fast.model.weights import load
from r1fast.rollout.batch import Drawn
from r1fast.rollout.engine import StepEngine
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.types import Prompt
from r1fast_kernels import sample_token, use_backend


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# -- against transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["llama-gqa-biases", "qwen2-tied", "qwen3-gqa"])
def test_greedy_is_generate_token_by_token(layout, tmp_path):
    reference = make(tmp_path, *LAYOUTS[layout])
    reference.generation_config.eos_token_id = None
    model, _ = load(tmp_path)
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 2, 15, 16, 17, 31, 33, 40)]

    def generate(prompt, eos):
        out = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=24, eos_token_id=eos, pad_token_id=0,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    free = [generate(prompt, None) for prompt in prompts]
    holders = [sum(token in answer for answer in free) for token in range(VOCAB)]
    eos = [max((token for token in range(VOCAB) if 0 < holders[token] < len(free)), key=holders.__getitem__)]
    expected = [generate(prompt, eos) for prompt in prompts]
    params = SamplingParams(max_tokens=24, temperature=0)
    for ids, answers in ((None, free), (eos, expected)):
        groups = Sampler(model, eos_token_id=ids, max_seqs=5, block_size=16).sample(prompts, params)
        assert tokens_of(groups) == [[answer] for answer in answers]
        for group, answer in zip(groups, answers, strict=True):
            stops = ids is not None and answer[-1] in ids
            assert group.rollouts[0].finish == ("stop" if stops else "length")
    lengths = [len(answer) for answer in expected]
    assert min(lengths) < 24 == max(lengths)


# -- log-probabilities and distributions ---------------------------------------------------------------------------


def test_logprobs_are_those_of_a_dense_forward(model):
    prompts = make_prompts(9)
    params = SamplingParams(n=3, max_tokens=30, temperature=0.7, seed=5)
    groups = Sampler(model, eos_token_id=4, block_size=8).sample(prompts, params)
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        assert len({tuple(rollout.tokens) for rollout in group.rollouts}) > 1
        for rollout in group.rollouts:
            logp = torch.log_softmax(dense_logits(model, prompt, rollout.tokens) / 0.7, -1)
            expected = logp.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
            assert len(rollout.logprobs) == len(rollout.tokens)
            worst = max(worst, (expected - torch.tensor(rollout.logprobs)).abs().max().item())
            assert rollout.finish == ("stop" if rollout.tokens[-1] == 4 else "length")
            assert 4 not in rollout.tokens[:-1]
    assert worst < 1e-4


def test_greedy_logprobs_are_untempered(model):
    (group,) = Sampler(model).sample([[1, 2, 3]], SamplingParams(max_tokens=5, temperature=0))
    (rollout,) = group.rollouts
    logp = torch.log_softmax(dense_logits(model, [1, 2, 3], rollout.tokens), -1)
    torch.testing.assert_close(torch.tensor(rollout.logprobs), logp.max(-1).values, rtol=0, atol=1e-4)
    assert rollout.tokens == logp.argmax(-1).tolist()


COMBINATIONS = [
    dict(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature, top_k, top_p in itertools.product((0.6, 1.0, 1.5), (0, 9), (1.0, 0.9))
]


@pytest.fixture(scope="module")
def drawn(model):
    """12,000 samples of two tokens for every combination, all in one batch."""
    params = [SamplingParams(n=12_000, max_tokens=2, seed=11, **settings) for settings in COMBINATIONS]
    groups = Sampler(model, max_seqs=4096).sample([[7, 3, 9, 9, 1]] * len(params), params)
    return dict(zip(map(str, COMBINATIONS), groups, strict=True))


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_draws_follow_the_exact_distribution(model, drawn, settings):
    """Chi-square of first and second tokens (given the likeliest first), and their log-probs."""
    params, group = SamplingParams(**settings), drawn[str(settings)]
    firsts = torch.tensor([rollout.tokens[0] for rollout in group.rollouts])
    common = int(firsts.bincount().argmax())
    logits = dense_logits(model, [7, 3, 9, 9, 1], [common, 0])
    for step in (0, 1):
        rollouts = [r for r in group.rollouts if step == 0 or r.tokens[0] == common]
        exact = exact_distribution(logits[step].double(), params)
        drawn_here = torch.tensor([rollout.tokens[step] for rollout in rollouts])
        count = drawn_here.bincount(minlength=VOCABULARY).double()
        assert (count[exact == 0] == 0).all()
        expected = exact * len(rollouts)
        big = expected >= 5
        statistic = ((count - expected) ** 2 / expected)[big].sum() + (
            (count[~big].sum() - expected[~big].sum()) ** 2 / expected[~big].sum().clamp(min=1)
        )
        freedom = int(big.sum())
        assert freedom >= 2
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8  # about one in 10^5 for a right sampler
        logprobs = torch.tensor([rollout.logprobs[step] for rollout in rollouts]).double()
        torch.testing.assert_close(logprobs, exact[drawn_here].log(), rtol=0, atol=1e-4)
        full = torch.tensor([rollout.logprobs_full[step] for rollout in rollouts]).double()
        untruncated = torch.log_softmax(logits[step].double() / params.temperature, -1)
        torch.testing.assert_close(full, untruncated[drawn_here], rtol=0, atol=1e-4)


def exact_distribution(logits, params):
    p = torch.softmax(logits / params.temperature, -1)
    order = p.argsort(descending=True)
    ranked = p[order]
    if params.top_k:
        ranked[params.top_k :] = 0
    if params.top_p < 1:
        ranked = ranked / ranked.sum()
        ranked[ranked.cumsum(0) - ranked >= params.top_p] = 0
    return torch.zeros_like(p).scatter(0, order, ranked / ranked.sum())


# -- the same tokens whatever happens around them -------------------------------------------------------------------


def test_alone_or_in_a_crowd(model):
    prompts = make_prompts(24, seed=2)
    params = [SamplingParams(n=1 + i % 4, max_tokens=5 + i, temperature=0.5 + i / 20, seed=i) for i in range(24)]
    crowd = Sampler(model, eos_token_id=[4, 6], max_seqs=13, block_size=4).sample(prompts, params)
    alone = [Sampler(model, eos_token_id=[4, 6]).sample([p], q)[0] for p, q in zip(prompts, params, strict=True)]
    assert tokens_of(crowd) == tokens_of(alone)
    assert_logprobs_close(crowd, alone)
    assert [len(group.rollouts) for group in crowd] == [one.n for one in params]


def test_preempted_or_not(model):
    prompts = make_prompts(12, seed=4, longest=20)
    params = SamplingParams(n=3, max_tokens=40, seed=1)
    roomy, tight = Sampler(model, block_size=4), Sampler(model, block_size=4, kv_blocks=40)
    expected, groups = roomy.sample(prompts, params), tight.sample(prompts, params)
    assert roomy.preemptions == 0 < tight.preemptions
    assert tokens_of(groups) == tokens_of(expected)
    assert_logprobs_close(groups, expected)
    assert_pool_empty(tight)


@pytest.mark.parametrize("prefill_tokens", [1, 7, 64])
def test_chunked_or_whole(model, prefill_tokens):
    prompts = make_prompts(7, seed=5, shortest=20, longest=60)
    params = SamplingParams(n=2, max_tokens=9, seed=2)
    expected = Sampler(model).sample(prompts, params)
    groups = Sampler(model, prefill_tokens=prefill_tokens).sample(prompts, params)
    assert tokens_of(groups) == tokens_of(expected)
    assert_logprobs_close(groups, expected)


def test_shared_or_unshared_prompt(model):
    """A group's samples are those of the same prompt decoded with nothing shared; its prompt is forwarded once."""
    prompt = make_prompts(1, seed=6, shortest=21, longest=21)[0]
    forwarded = []
    original = model.forward_paged

    def counting(step, kv):
        forwarded.append(len(step.tokens))
        return original(step, kv)

    params = SamplingParams(n=6, max_tokens=12, seed=3)
    model.forward_paged = counting
    try:
        (group,) = Sampler(model, block_size=8).sample([prompt], params)
        shared, forwarded[:] = forwarded.copy(), []
        (single,) = Sampler(model, block_size=64, max_seqs=1).sample([prompt], params)  # no block is ever full
    finally:
        del model.forward_paged
    assert shared == [21] + [6] * 11
    assert forwarded == ([21] + [1] * 11) * 6
    assert tokens_of([group]) == tokens_of([single])
    assert len({tuple(rollout.tokens) for rollout in group.rollouts}) == 6
    assert_logprobs_close([group], [single])


def test_equal_prompts_draw_differently_and_seeds_matter(model):
    sampler, params = Sampler(model), SamplingParams(n=2, max_tokens=12)
    groups = sampler.sample([[1, 2, 3]] * 3, params)
    drawn = {tuple(rollout.tokens) for group in groups for rollout in group.rollouts}
    assert len(drawn) == 6
    assert tokens_of(groups) == tokens_of(sampler.sample([[1, 2, 3]] * 3, params))
    assert tokens_of(groups) != tokens_of(sampler.sample([[1, 2, 3]] * 3, replace(params, seed=1)))


class LookAhead(StepEngine):
    """Up to five tokens a row before the sampler looks; rows end in between, at stop tokens and limits."""

    ahead = 5

    @torch.inference_mode()
    def decode(self, ahead):
        batch, seen = self._batch, []
        view, rows = batch.view, np.arange(batch.size)
        alive, token, counts = np.ones(batch.size, bool), view["token"].copy(), np.zeros(batch.size, np.int64)
        for _ in range(ahead):
            place = view["length"] + counts
            slots = batch._table[rows, np.minimum(place // batch.block_size, batch.width - 1)].astype(np.int64)
            slots = slots * batch.block_size + place % batch.block_size
            # a row that has ended goes on without leaving a trace: it draws its last token again
            step = PagedStep(
                *map(torch.from_numpy, (token, place, slots)), batch.table, torch.from_numpy(place + 1).int()
            )
            some = torch.from_numpy(alive.nonzero()[0])
            fields = (n for n in step.__slots__ if n not in ("cu_seqlens_q", "groups"))
            step = replace(step, **{n: getattr(step, n)[some] for n in fields})
            logits = self.model.logits(self.model.forward_paged(step, self._kv))
            seed, key, _, *rest = (x[some] for x in batch.noise(0))
            drawn = [x.numpy() for x in sample_token(logits, seed, key, step.positions + 1, *rest)]
            column = [np.zeros(batch.size, x.dtype) for x in drawn]
            for whole, part in zip(column, drawn, strict=True):
                whole[alive] = part
            seen.append(column)
            token, counts = np.where(alive, column[0], token), counts + alive
            alive = alive & ~(batch.stop_ids == token[:, None]).any(1) & (view["drawn"] + counts < view["limit"])
            if not alive.any():
                break
        batch.advance(counts)
        return Drawn(*(np.stack(columns, 1) for columns in zip(*seen, strict=True)), counts)


@pytest.mark.parametrize("kv_blocks", [None, 40])
def test_an_engine_that_draws_several_tokens_a_step_changes_nothing(model, kv_blocks):
    prompts = make_prompts(12, seed=4, longest=20)
    params = [SamplingParams(n=3, max_tokens=20 + i, seed=1, top_k=i % 3 * 9) for i in range(12)]
    plain = Sampler(model, eos_token_id=[4, 6], block_size=4, max_seqs=20)
    expected = plain.sample(prompts, params)
    engine = LookAhead(model)
    ahead = Sampler(model, eos_token_id=[4, 6], block_size=4, max_seqs=20, kv_blocks=kv_blocks, engine=engine)
    groups = ahead.sample(prompts, params)
    assert (ahead.preemptions > 0) == (kv_blocks is not None)
    assert tokens_of(groups) == tokens_of(expected)
    assert {rollout.finish for group in groups for rollout in group.rollouts} == {"stop", "length"}
    for a, b in zip(groups, expected, strict=True):
        assert [r.finish for r in a.rollouts] == [r.finish for r in b.rollouts]
    assert_logprobs_close(groups, expected)
    assert_pool_empty(ahead)


# -- what the calls promise -------------------------------------------------------------------------------------------


def test_groups_come_out_as_they_finish_and_go_back_in_order(model):
    prompts, params = [[1, 2], [3, 4], [5, 6]], [SamplingParams(max_tokens=n) for n in (20, 3, 9)]
    sampler, seen = Sampler(model), []
    groups = sampler.sample(prompts, params, on_group=lambda index, group: seen.append((index, group)))
    assert [index for index, _ in seen] == [1, 2, 0]
    assert [groups[index] for index, _ in seen] == [group for _, group in seen]
    assert [len(group.rollouts[0].tokens) for group in groups] == [20, 3, 9]
    assert [list(group.prompt.tokens) for group in groups] == prompts
    steps = [index for index, _ in sampler.stream(prompts, params)]
    assert steps == [1, 2, 0]


def test_prompt_objects_and_weights_version_are_kept(model):
    prompt = Prompt("gsm-1", (1, 2, 3), "what?", 7, "gsm8k", {"language": "en"})
    sampler = Sampler(model)
    (before,) = sampler.sample([prompt], SamplingParams(max_tokens=6, temperature=0))
    assert before.prompt is prompt
    weights = model.head.detach().clone()
    try:
        with torch.no_grad():
            model.head.copy_(weights.roll(1, 0))
        model.bump_version()
        (after,) = sampler.sample([prompt], SamplingParams(max_tokens=6, temperature=0))
    finally:
        with torch.no_grad():
            model.head.copy_(weights)
    assert after.weights_version == before.weights_version + 1
    assert after.rollouts[0].tokens != before.rollouts[0].tokens
    assert after.rollouts[0].tokens[0] == (before.rollouts[0].tokens[0] + 1) % VOCABULARY


def test_weights_must_not_change_in_the_middle(model):
    sampler = Sampler(model)
    stream = sampler.stream([[1], [2]], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=9)])
    next(stream)
    model.bump_version()
    with pytest.raises(RuntimeError, match="weights changed"):
        next(stream)
    assert_pool_empty(sampler)


def test_min_tokens_take_the_stop_tokens_from_the_distribution(model):
    """Log-probs too: drawn from what is left, and the model's own beside it."""
    prompts = make_prompts(20, seed=8)
    base = SamplingParams(n=4, max_tokens=12, temperature=0.9, top_k=20, seed=6)
    params = [replace(base, min_tokens=4 + i % 5) for i in range(20)]
    sampler = Sampler(model, eos_token_id=range(0, 40, 2), max_seqs=50)
    early = 0
    for prompt, one, group in zip(prompts, params, sampler.sample(prompts, params), strict=True):
        for rollout in group.rollouts:
            at = [i for i, token in enumerate(rollout.tokens) if token in sampler.eos_token_ids]
            assert at == [len(rollout.tokens) - 1] * (rollout.finish == "stop") and (not at or at[0] >= one.min_tokens)
            early += bool(at) and at[0] < 11
            logits = dense_logits(model, prompt, rollout.tokens) / 0.9
            tokens = torch.tensor(rollout.tokens)[:, None]
            full = torch.log_softmax(logits, -1).gather(1, tokens)[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logprobs_full), full, rtol=0, atol=1e-4)
            logits[: one.min_tokens, list(sampler.eos_token_ids)] = -torch.inf
            kept = torch.stack([exact_distribution(row.double(), replace(base, temperature=1)) for row in logits])
            drawn = kept.log().float().gather(1, tokens)[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), drawn, rtol=0, atol=1e-4)
    assert early > 20  # they do stop once they may
    greedy = replace(base, n=1, temperature=0, max_tokens=3, min_tokens=3)
    (group,) = sampler.sample(prompts[:1], greedy)
    logits = dense_logits(model, prompts[0], group.rollouts[0].tokens)
    full = torch.log_softmax(logits, -1).gather(1, torch.tensor(group.rollouts[0].tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(group.rollouts[0].logprobs_full), full, rtol=0, atol=1e-4)
    logits[:, list(sampler.eos_token_ids)] = -torch.inf
    assert group.rollouts[0].tokens == logits.argmax(-1).tolist()


# -- stop strings ---------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are bytes of a text in which characters take one to four of them."""

    added_tokens_decoder: ClassVar = {}
    alphabet = (*b"abcdefgh ", *"é你\U0001f600".encode())

    def __len__(self):
        return VOCABULARY

    def decode(self, tokens, skip_special_tokens):
        return bytes(self.alphabet[token % len(self.alphabet)] for token in tokens).decode(errors="replace")


def test_stop_strings_keep_the_tokens_up_to_the_one_that_completes_them(model):
    prompts = make_prompts(12, seed=3)
    base = SamplingParams(n=3, max_tokens=40, seed=2)
    letters = Letters()
    free = Sampler(model, tokenizer=letters).sample(prompts, base)
    stops = ("ab", "é", " c", "gf", "h你")
    params = [replace(base, stop=stops, min_tokens=5 * (i % 2)) if i % 3 else base for i in range(12)]
    groups = Sampler(model, tokenizer=letters, max_seqs=10, block_size=4, kv_blocks=60).sample(prompts, params)
    stopped = 0
    for one, group, whole in zip(params, groups, free, strict=True):
        for rollout, other in zip(group.rollouts, whole.rollouts, strict=True):
            count = next(
                (n for n in range(1, 41) if n >= one.min_tokens and ends_in_stop(letters, other.tokens, n, one.stop)),
                None,
            )
            assert rollout.tokens == other.tokens[:count]
            assert rollout.finish == ("length" if count is None else "stop")
            assert len(rollout.logprobs) == len(rollout.logprobs_full) == len(rollout.tokens)
            stopped += count is not None
    assert stopped > 6


def ends_in_stop(letters, tokens, count, stops):
    before, after = (letters.decode(tokens[:n], False).rstrip("\ufffd") for n in (count - 1, count))
    return any(after.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in stops)


def test_stop_strings_with_an_engine_that_looks_later(model):
    params = SamplingParams(n=3, max_tokens=40, seed=2, stop=("ab", "é", " c", "gf", "h你"))
    prompts = make_prompts(12, seed=3)
    groups = Sampler(model, tokenizer=Letters(), block_size=4, engine=LookAhead(model)).sample(prompts, params)
    expected = Sampler(model, tokenizer=Letters()).sample(prompts, params)
    assert tokens_of(groups) == tokens_of(expected)
    assert_logprobs_close(groups, expected)


def test_the_context_ends_a_completion(model):
    sampler = Sampler(model)
    prompt = make_prompts(1, shortest=120, longest=120)[0]
    (group,) = sampler.sample([prompt], SamplingParams(n=2, max_tokens=50))
    assert [(len(r.tokens), r.finish) for r in group.rollouts] == [(8, "length")] * 2


def test_stop_tokens_of_one_request_leave_the_others_alone(model):
    base = SamplingParams(max_tokens=12, seed=4)
    sampler = Sampler(model)
    first, other = sampler.sample([[1, 2], [3]], base)
    free = first.rollouts[0]
    stop = free.tokens[4]
    stopped, same = sampler.sample([[1, 2], [3]], [replace(base, stop_token_ids=(stop,)), base])
    assert stopped.rollouts[0].tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.rollouts[0].finish == "stop"
    assert tokens_of([same]) == tokens_of([other])
    assert_logprobs_close([same], [other])


def test_tokens_stream_as_they_are_drawn(model):
    sampler, params = Sampler(model), SamplingParams(max_tokens=20, seed=9)
    (group,) = sampler.sample([[1, 2, 3]], params)
    assert len(group.rollouts[0].tokens) == 20
    stream = sampler.stream_tokens([1, 2, 3], params)
    first = next(stream)
    assert sampler._batch.output(0)[0] == [first]  # nothing more has been drawn yet
    assert [first, *stream] == group.rollouts[0].tokens
    with pytest.raises(UserError, match="n=1"):
        sampler.stream_tokens([1], SamplingParams(n=2))


def test_an_interrupt_leaves_the_pool_clean_and_the_sampler_usable(model):
    sampler, params = Sampler(model, block_size=4), SamplingParams(n=3, max_tokens=12)
    expected = sampler.sample([[1, 2, 3], [4]], params)
    original, calls = model.forward_paged, []

    def interrupted(step, kv):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(step, kv)

    model.forward_paged = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            sampler.sample([[1, 2, 3], [4]], params)
    finally:
        del model.forward_paged
    assert_pool_empty(sampler)
    assert tokens_of(sampler.sample([[1, 2, 3], [4]], params)) == tokens_of(expected)


def test_one_call_at_a_time(model):
    sampler = Sampler(model)
    stream = sampler.stream([[1], [2]], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=9)])
    next(stream)
    with pytest.raises(RuntimeError, match="middle of another call"):
        sampler.sample([[1]], SamplingParams(max_tokens=1))
    stream.close()
    assert_pool_empty(sampler)
    sampler.sample([[1]], SamplingParams(max_tokens=1))


def test_buffers_are_kept_between_calls(model):
    sampler = Sampler(model)
    sampler.sample(make_prompts(4), SamplingParams(n=4, max_tokens=30))
    keys, batch = sampler.memory.kv.keys.data_ptr(), sampler._batch
    sampler.sample(make_prompts(3, seed=1), SamplingParams(n=2, max_tokens=10))
    assert sampler.memory.kv.keys.data_ptr() == keys and sampler._batch is batch


def test_weights_that_are_not_finite_are_named_and_leave_nothing_behind(model):
    sampler, params = Sampler(model), SamplingParams(max_tokens=4, temperature=0)
    expected = sampler.sample([[1, 2]], params)
    weights = model.embedding.detach().clone()
    try:
        with torch.no_grad():
            model.embedding.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="not finite"):
            sampler.sample([[1] * 12], params)  # longer: its block would keep places that the next call does not write
    finally:
        with torch.no_grad():
            model.embedding.copy_(weights)
    with use_backend("reference"):
        assert tokens_of(sampler.sample([[1, 2]], params)) == tokens_of(expected)


def test_a_settled_sampler_touches_no_fresh_memory():
    """Page faults of calls that need what the calls before them freed; without the setting they are 7,000 a call."""
    code = """
import resource, sys, torch
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.heap import keep_freed_memory
from r1fast.rollout.sampler import Sampler, SamplingParams
torch.set_num_threads(1)
model = Decoder(DecoderConfig(250, 64, 160, layers=2, heads=4, kv_heads=2, head_dim=16)).initialize(0)
sampler = Sampler(model)
def call(seed):
    sampler.sample([[5] * 20] * 32, SamplingParams(n=8, max_tokens=10, seed=seed))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
settled = [call(seed) for seed in range(6)][-1]
faults = (call(6) - settled, call(7) - settled, call(8) - settled)
sys.exit(f"{faults} page faults" if keep_freed_memory() and faults[-1] > 3000 else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- bad input -----------------------------------------------------------------------------------------------------

GOOD = SamplingParams(max_tokens=4)
BAD = [
    ([[1], []], GOOD, "prompt 1: it has no tokens"),
    ([[1], [2, 53]], GOOD, "prompt 1: token 53 is outside the vocabulary of 53"),
    ([[-1]], GOOD, "prompt 0: token -1 is outside"),
    ([[1], [1] * 128], GOOD, "prompt 1: its 128 tokens leave no room .* context of 128"),
    (
        [[1], [1] * 100],
        replace(GOOD, max_tokens=28),
        "prompt 1: 100 tokens and 28 to draw need 8 blocks .* kv_blocks=7",
    ),
    ([[1], ["a"]], GOOD, r"prompt 1: \['a'\] is no list of token ids"),
    ([[1]], replace(GOOD, min_tokens=5), "prompt 0: min_tokens is 5, it must be from 0 to max_tokens, 4"),
    ([[1]], replace(GOOD, spare=-1), "prompt 0: n is 1 and spare -1"),
    ([[1]], replace(GOOD, stop=("",)), "prompt 0: stop is .* none of them empty"),
    ([[1]], replace(GOOD, stop="end"), "prompt 0: stop is 'end'; give a tuple"),
    ([[1]], replace(GOOD, stop=("end",)), "prompt 0: stop strings need text; give the sampler a tokenizer"),
    (
        [[1]],
        replace(GOOD, stop_token_ids=tuple(range(53)), min_tokens=1),
        "prompt 0: every token is a stop token",
    ),
    ([[1]], replace(GOOD, max_tokens=0), "prompt 0: max_tokens is 0, it must be at least 1"),
    ([[1]], replace(GOOD, n=0), "prompt 0: n is 0 and spare 0; n must be at least 1"),
    ([[1]], replace(GOOD, top_p=0.0), "prompt 0: top_p is 0.0, it must be above 0"),
    ([[1]], replace(GOOD, top_p=1.01), "prompt 0: top_p is 1.01"),
    ([[1]], replace(GOOD, temperature=-0.5), "prompt 0: temperature is -0.5"),
    ([[1]], replace(GOOD, temperature=float("nan")), "prompt 0: temperature is nan"),
    ([[1]], replace(GOOD, top_k=-1), "prompt 0: top_k is -1"),
    ([[1]], replace(GOOD, seed=1 << 63), "prompt 0: seed 9223372036854775808 does not fit"),
    ([[1], [2]], [GOOD, replace(GOOD, stop_token_ids=(99,))], "prompt 1: stop_token_ids: token 99 is outside"),
    ([], GOOD, "list of prompts is empty"),
    ([[1], [2]], [GOOD], "1 sampling params for 2 prompts"),
]


@pytest.mark.parametrize(("prompts", "params", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_requests_are_refused_by_name_before_any_work(model, prompts, params, message):
    sampler = Sampler(model, kv_blocks=7, block_size=16)
    with pytest.raises(UserError, match=message):
        sampler.sample(prompts, params)
    with pytest.raises(UserError, match=message):
        sampler.stream(prompts, params)  # already when it is asked for, not at the first group
    assert sampler.memory.pool is None
    sampler.sample([[1]], GOOD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(eos_token_id=53), "eos_token_id: token 53 is outside"),
        (dict(max_seqs=0), "max_seqs is 0"),
        (dict(kv_blocks=0), "kv_blocks is 0"),
        (dict(block_size=0), "block_size is 0"),
        (dict(prefill_tokens=0), "prefill_tokens is 0"),
    ],
)
def test_bad_samplers_are_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        Sampler(model, **options)


def test_the_page_names_every_parameter():
    page = (Path(__file__).parent.parent / "docs" / "sampling.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| `SamplingParams` \|.*?\n\n", page, re.MULTILINE | re.DOTALL)
    named = {name for line in table.strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == {field.name for field in fields(SamplingParams)}
