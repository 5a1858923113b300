"""Requests that come and go while others decode; calls that end early; the memory behind them."""

import logging
import random
import resource
import threading
from dataclasses import replace

import pytest
import torch
from sampling import VOCABULARY, assert_logprobs_close, assert_pool_empty, make_prompts, tiny_model, tokens_of

from r1fast.config import UserError
from r1fast.model.tokenizer import build_word_tokenizer
from r1fast.rollout.events import Cancelled, Drew, GroupDone, SampleDone
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.types import Prompt


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def drain(session):
    events = []
    while session.unfinished:
        events += session.step()
    return events


def groups_of(events):
    return {event.request: event.group for event in events if isinstance(event, GroupDone)}


# -- arriving and leaving -------------------------------------------------------------------------------------------


def test_requests_that_arrive_while_others_decode_draw_what_they_draw_alone(model):
    prompts = make_prompts(10, seed=1)
    params = [SamplingParams(n=1 + i % 3, max_tokens=6 + 2 * i, seed=i) for i in range(10)]
    sampler, events = Sampler(model, eos_token_id=4, max_seqs=8, block_size=4), []
    with sampler.session() as session:
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            assert session.submit(prompt, one, stream=number % 2 == 0) == number
            for _ in range(3):
                events += session.step()
        events += drain(session)
        assert session.step() == [] and session.unfinished == 0
    alone = [Sampler(model, eos_token_id=4).sample([p], q)[0] for p, q in zip(prompts, params, strict=True)]
    groups = groups_of(events)
    assert tokens_of([groups[i] for i in range(10)]) == tokens_of(alone)
    assert_logprobs_close([groups[i] for i in range(10)], alone)
    streamed = {}
    for event in events:
        if isinstance(event, Drew):
            for kept, new in zip(
                streamed.setdefault((event.request, event.sample), ([], [], [])),
                (event.tokens, event.logprobs, event.logprobs_full), strict=True,
            ):  # fmt: skip
                kept += new
    assert streamed == {
        (request, sample): (rollout.tokens, rollout.logprobs, rollout.logprobs_full)
        for request, group in groups.items() if request % 2 == 0
        for sample, rollout in enumerate(group.rollouts)
    }  # fmt: skip
    done = [(event.request, event.sample) for event in events if isinstance(event, SampleDone)]
    assert sorted(done) == [(i, sample) for i in range(10) for sample in range(params[i].n)]
    assert_pool_empty(sampler)


def test_equal_requests_draw_equally_unless_told_otherwise(model):
    with Sampler(model).session() as session:
        for earlier in (0, 0, 1):
            session.submit([1, 2, 3], SamplingParams(max_tokens=12), earlier=earlier)
        first, second, third = (tokens_of([group]) for _, group in sorted(groups_of(drain(session)).items()))
    assert first == second != third
    assert first + third == tokens_of(Sampler(model).sample([[1, 2, 3]] * 2, SamplingParams(max_tokens=12)))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_cancelled_request_leaves_wherever_it_is(model, steps):
    """Before it is seen, in the middle of its prompt, and while it decodes."""
    sampler = Sampler(model, block_size=4, prefill_tokens=16)
    params = SamplingParams(n=3, max_tokens=20)
    prompts = make_prompts(2, seed=9, shortest=25, longest=30)
    with sampler.session() as session:
        numbers = [session.submit(prompt, params) for prompt in prompts]
        events = [event for _ in range(steps) for event in session.step()]
        assert session.cancel(numbers[0])
        events += session.step()
        assert Cancelled(numbers[0]) in events
        sampler.memory.pool.check(session._scheduler.tables())
        assert not session.cancel(numbers[0]) and not session.cancel(99)
        events += drain(session)
    assert [event.request for event in events if isinstance(event, GroupDone)] == [numbers[1]]
    assert tokens_of([groups_of(events)[1]]) == tokens_of(Sampler(model).sample(prompts[1:], params))
    assert_pool_empty(sampler)


def test_who_reads_blocks_of_a_cancelled_prefill_computes_them_anew(model):
    """The second prompt begins with the first's blocks, which were never computed."""
    prompts = [[*range(30), 1], [*range(30), 2], [*range(30), 3]]
    params = SamplingParams(n=2, max_tokens=8)
    sampler = Sampler(model, block_size=4, prefill_tokens=10)
    with sampler.session() as session:
        for prompt in prompts:
            session.submit(prompt, params)
        session.step()
        assert [len(prefill.table) for prefill in session._scheduler._prefilling] == [8, 8, 8]
        session.cancel(0)
        groups = groups_of(drain(session))
    assert tokens_of([groups[1], groups[2]]) == tokens_of(Sampler(model).sample(prompts[1:], params))
    assert sampler.memory.pool.free == sampler.memory.pool.blocks


def test_a_bad_request_harms_nobody(model):
    sampler = Sampler(model, kv_blocks=7)
    with sampler.session() as session:
        session.submit([1, 2], SamplingParams(max_tokens=9))
        session.step()
        for prompt, params, message in (
            ([], SamplingParams(), "request 1: it has no tokens"),
            ([1], SamplingParams(max_tokens=120), "request 2: .* pool has kv_blocks=7"),
            ([1], SamplingParams(max_tokens=4, stop_token_ids=(99,)), "request 3: stop_token_ids: token 99 is outside"),
        ):
            with pytest.raises(UserError, match=message):
                session.submit(prompt, params)
        groups = groups_of(drain(session))
    assert tokens_of([groups[0]]) == tokens_of(Sampler(model).sample([[1, 2]], SamplingParams(max_tokens=9)))


def test_threads_submit_and_cancel_while_one_drives(model):
    sampler, asked, wrong = Sampler(model, max_seqs=6, block_size=4), {}, []
    prompts, lock = make_prompts(24, seed=11, longest=20), threading.Lock()
    session = sampler.session()

    def client(number):
        try:
            for i in range(number, 24, 4):
                params = SamplingParams(n=2, max_tokens=5 + i, seed=i)
                mine = session.submit(prompts[i], params, stream=bool(i % 2))
                with lock:
                    asked[mine] = (prompts[i], params, i % 6 == 5 and session.cancel(mine))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    events = []
    while session.wait(timeout=0.5) or any(thread.is_alive() for thread in threads):
        events += session.step()
    session.close()
    assert not wrong and len(asked) == 24
    groups, over = groups_of(events), {event.request for event in events if isinstance(event, Cancelled)}
    assert set(groups) | over == set(asked) and over == {number for number, (*_, gone) in asked.items() if gone}
    for number, group in groups.items():
        prompt, params, _ = asked[number]
        assert tokens_of([group]) == tokens_of(Sampler(model).sample([prompt], params))
    assert_pool_empty(sampler)


def test_what_a_session_refuses(model):
    sampler = Sampler(model)
    session = sampler.session()
    with pytest.raises(RuntimeError, match="middle of another call"):
        sampler.sample([[1]], SamplingParams(max_tokens=1))
    with pytest.raises(RuntimeError, match="middle of another call"):
        sampler.release()
    assert session.wait(timeout=0.01) is False
    session.submit([1], SamplingParams(max_tokens=3))
    assert session.wait(timeout=0.01) is True
    held, raised = threading.Event(), []
    original = sampler.engine.prefill

    def slow(work):
        def other():
            try:
                session.step()
            except RuntimeError as error:
                raised.append(str(error))
            held.set()

        threading.Thread(target=other).start()
        held.wait(5)
        return original(work)

    sampler.engine.prefill = slow
    session.step()
    assert raised == ["step() is running in another thread; a session has one driver"]
    session.close()
    session.close()
    for call in (session.step, lambda: session.submit([1], SamplingParams())):
        with pytest.raises(RuntimeError, match="session is closed"):
            call()
    assert session.wait(timeout=0.01) is False
    assert_pool_empty(sampler)


# -- calls that end early ---------------------------------------------------------------------------------------------


def test_spare_samples_the_first_to_finish_are_kept(model):
    prompts = make_prompts(6, seed=2)
    base = SamplingParams(n=6, max_tokens=30, seed=3)
    every = Sampler(model, eos_token_id=[4, 5, 6]).sample(prompts, base)
    sampler = Sampler(model, eos_token_id=[4, 5, 6], block_size=4)
    groups = sampler.sample(prompts, replace(base, n=3, spare=3))
    for group, whole in zip(groups, every, strict=True):
        assert len(group.rollouts) == 3
        lengths = sorted(len(rollout.tokens) for rollout in whole.rollouts)
        assert sorted(len(rollout.tokens) for rollout in group.rollouts) == lengths[:3]
        assert {tuple(r.tokens) for r in group.rollouts} <= {tuple(r.tokens) for r in whole.rollouts}
    assert_pool_empty(sampler)


def test_enough_groups_end_the_call(model):
    prompts, params = [[1, 2], [3, 4], [5, 6]], [SamplingParams(max_tokens=n) for n in (20, 3, 9)]
    sampler = Sampler(model)
    expected = sampler.sample(prompts, params)
    groups = sampler.sample(prompts, params, enough=2)
    assert groups[0] is None and tokens_of(groups[1:]) == tokens_of(expected[1:])
    assert_pool_empty(sampler)
    with pytest.raises(UserError, match="enough is 0"):
        sampler.sample(prompts, params, enough=0)


def test_a_call_is_cancelled_from_another_thread(model):
    prompts, params = [[1, 2], [3, 4]], [SamplingParams(max_tokens=3), SamplingParams(max_tokens=100)]
    sampler = Sampler(model)
    sampler.cancel()  # none is running: nothing happens

    def cancel(index, group):
        thread = threading.Thread(target=sampler.cancel)
        thread.start()
        thread.join()

    groups = sampler.sample(prompts, params, on_group=cancel)
    assert groups[1] is None and len(groups[0].rollouts[0].tokens) == 3
    assert_pool_empty(sampler)
    assert None not in sampler.sample(prompts, params)


def test_errors_may_be_reported_instead_of_raised(model):
    sampler, wrong = Sampler(model), {}
    prompts = [[1, 2], [], [3], [99]]
    groups = sampler.sample(prompts, SamplingParams(max_tokens=4), on_error=wrong.__setitem__)
    assert [group is None for group in groups] == [False, True, False, True]
    assert str(wrong[1]) == "prompt 1: it has no tokens; give at least one" and "token 99" in str(wrong[3])
    expected = sampler.sample([[1, 2], [3]], SamplingParams(max_tokens=4))
    assert tokens_of([groups[0], groups[2]]) == tokens_of(expected)
    assert sampler.sample([[]], SamplingParams(), on_error=wrong.__setitem__) == [None]


def test_a_stop_string_must_have_text(model):
    tokenizer = build_word_tokenizer(["a"])
    with pytest.raises(UserError, match=r"holds the special token '<eos>', .* stop_token_ids=\(1,\)"):
        Sampler(model, tokenizer=tokenizer).sample([[1]], SamplingParams(stop=("a <eos>",)))


# -- prompts that return -------------------------------------------------------------------------------------------


def test_a_prompt_that_returns_is_found_and_draws_the_same(model):
    prompts = make_prompts(5, seed=12, shortest=17, longest=40)
    params = SamplingParams(n=2, max_tokens=10, seed=1)
    sampler = Sampler(model, block_size=4)
    first = sampler.sample(prompts, params)
    assert sampler.found_tokens == 0
    again = sampler.sample(prompts, params)
    assert sampler.found_tokens == sum((len(prompt) - 1) // 4 * 4 for prompt in prompts)
    assert tokens_of(first) == tokens_of(again)
    assert_logprobs_close(first, again)
    longer = [[*prompts[0], 1, 2, 3], [*prompts[0][:9], 5]]
    groups = sampler.sample(longer, params)
    assert sampler.found_tokens == len(prompts[0]) // 4 * 4 + 8
    assert tokens_of(groups) == tokens_of(Sampler(model).sample(longer, params))


def test_prompts_of_one_call_share_their_beginning(model):
    template = make_prompts(1, seed=13, shortest=20, longest=20)[0]
    prompts = [[*template, *rest] for rest in make_prompts(6, seed=14, longest=5)]
    params = SamplingParams(n=2, max_tokens=10, seed=1)
    for chunk in (8192, 7):  # in one step, every reader's first rows are beside the writer's; in chunks they are not
        sampler = Sampler(model, block_size=4, prefill_tokens=chunk)
        groups = sampler.sample(prompts, params)
        assert sampler.found_tokens >= 5 * 20
        alone = [Sampler(model, block_size=64).sample([prompt], params)[0] for prompt in prompts]
        assert tokens_of(groups) == tokens_of(alone)
        assert_logprobs_close(groups, alone)


def bump(model):
    with torch.no_grad():
        model.head.copy_(model.head.roll(1, 0))
    model.bump_version()


def in_place(model):
    with torch.no_grad():
        model.layers[0].qkv_proj.mul_(-1.25)


def behind_torch(model):
    model.layers[1].down_proj.data.mul_(1.5)


def replaced(model):
    model.layers[0].o_proj = torch.nn.Parameter(model.layers[0].o_proj.detach() * -1)


def from_numpy(model):
    model.embedding.detach().numpy()[:] *= 0.75


@pytest.mark.parametrize("change", [bump, in_place, behind_torch, replaced, from_numpy])
def test_blocks_of_other_weights_are_never_read(change):
    """However the weights change between two calls, announced or not, the next one draws what a new sampler draws."""
    model = tiny_model()
    sampler, params = Sampler(model, block_size=4), SamplingParams(n=2, max_tokens=8, seed=5)
    prompts = make_prompts(3, seed=15, shortest=17, longest=30)
    before = sampler.sample(prompts, params)
    sampler.sample(prompts, params)
    assert sampler.found_tokens > 0
    change(model)
    after = sampler.sample(prompts, params)
    assert sampler.found_tokens == 0
    fresh = Sampler(model, block_size=4).sample(prompts, params)
    assert tokens_of(after) == tokens_of(fresh) != tokens_of(before)
    for a, b in zip(after, fresh, strict=True):
        assert [r.logprobs for r in a.rollouts] == [r.logprobs for r in b.rollouts]  # every bit: nothing was reused
    sampler.sample(prompts, params)
    assert sampler.found_tokens > 0


def test_weights_may_change_while_a_session_is_idle_and_not_while_it_works():
    model = tiny_model()
    sampler, params, prompt = Sampler(model, block_size=4), SamplingParams(max_tokens=9), list(range(20))
    with sampler.session() as session:
        session.submit(prompt, params)
        before = groups_of(drain(session))[0]
        in_place(model)
        model.bump_version()
        session.submit(prompt, params)
        after = groups_of(drain(session))[1]
        assert session.found_tokens == 0 and after.weights_version == before.weights_version + 1
        assert tokens_of([after]) == tokens_of(Sampler(model).sample([prompt], params)) != tokens_of([before])
        session.submit(prompt, params)
        session.step()
        in_place(model)  # not announced
        with pytest.raises(RuntimeError, match="weights changed while it was sampling"):
            session.step()
    assert_pool_empty(sampler)
    again = sampler.sample([prompt], params)
    assert tokens_of(again) == tokens_of(Sampler(model).sample([prompt], params))


def test_an_interrupted_call_leaves_no_block_to_be_found(model):
    """Blocks get their names before they are computed; an interrupt in between must not leave them."""
    sampler, params = Sampler(model, block_size=4), SamplingParams(n=2, max_tokens=8)
    prompts = make_prompts(3, seed=16, shortest=20, longest=30)
    original = model.forward_paged

    def interrupted(step, kv):
        raise KeyboardInterrupt

    model.forward_paged = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            sampler.sample(prompts, params)
    finally:
        model.forward_paged = original
        del model.forward_paged
    assert tokens_of(sampler.sample(prompts, params)) == tokens_of(Sampler(model).sample(prompts, params))
    assert sampler.found_tokens == 0


# -- memory ----------------------------------------------------------------------------------------------------------


def test_the_pool_is_stated_kept_and_given_back(model, caplog):
    caplog.set_level(logging.INFO, "r1fast.rollout")
    sampler, params = Sampler(model, block_size=4), SamplingParams(n=4, max_tokens=30)
    expected = sampler.sample(make_prompts(4), params)
    (line,) = caplog.messages
    blocks = sampler.memory.pool.blocks
    assert line.startswith(f"KV cache on cpu: {blocks * 4:,} tokens in {blocks:,} blocks, ") and "MiB free" in line
    assert sampler.memory.bytes == blocks * 4 * 2 * 2 * 2 * 8 * 4
    sampler.sample(make_prompts(2, seed=1), params)
    assert len(caplog.messages) == 1 and sampler.memory.pool.blocks == blocks
    sampler.release()
    assert sampler.memory.kv is None and sampler.memory.bytes == 0 and sampler._batch is None
    assert tokens_of(sampler.sample(make_prompts(4), params)) == tokens_of(expected)
    assert sampler.found_tokens == 0 and len(caplog.messages) == 2


@pytest.mark.parametrize(("free", "blocks"), [(10**6, 60), (512 * 40, 20), (0, 15)])
def test_the_pool_is_what_is_needed_or_half_of_what_is_free(model, monkeypatch, free, blocks):
    """A block of 4 tokens takes 1,024 bytes; four sequences of 60 tokens need 60 blocks, and one of them 15."""
    monkeypatch.setattr("r1fast.rollout.memory.free_memory", lambda device: free * 2)
    sampler = Sampler(model, block_size=4)
    groups = sampler.sample([[1] * 20], SamplingParams(n=4, max_tokens=40))
    assert sampler.memory.pool.blocks == blocks
    assert (sampler.preemptions > 0) == (blocks < 60)
    assert tokens_of(groups) == tokens_of(Sampler(model).sample([[1] * 20], SamplingParams(n=4, max_tokens=40)))


def test_a_large_pool_takes_no_memory_before_it_is_used(model):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    sampler = Sampler(model, kv_blocks=1 << 16)
    before = resident()
    sampler.sample([[1] * 40], SamplingParams(max_tokens=9))
    assert sampler.memory.bytes == 1 << 28 and resident() - before < 1 << 26


def test_a_session_serves_any_length_from_a_pool_that_does_not_grow(model):
    sampler = Sampler(model, block_size=4, max_seqs=3)
    with sampler.session() as session:
        pool, data = sampler.memory.pool.blocks, sampler.memory.kv.keys.data_ptr()
        assert pool == 3 * 32
        prompts = [[1], [2] * 70, [3] * 5]
        params = [SamplingParams(max_tokens=n) for n in (2, 58, 120)]
        events = []
        for prompt, one in zip(prompts, params, strict=True):
            session.submit(Prompt("p", tuple(prompt), "", None, ""), one)
            events += session.step()
        groups = groups_of(events + drain(session))
        assert (sampler.memory.pool.blocks, sampler.memory.kv.keys.data_ptr()) == (pool, data)
    expected = [Sampler(model).sample([p], q)[0] for p, q in zip(prompts, params, strict=True)]
    assert tokens_of([groups[i] for i in range(3)]) == tokens_of(expected)


def test_random_calls_with_random_weights_against_new_samplers():
    """Everything at once: templates, weights that change in between, pools that are short, calls that end early."""
    model, rng = tiny_model(), random.Random(3)
    sampler = Sampler(model, eos_token_id=4, max_seqs=10, block_size=4, kv_blocks=60, prefill_tokens=24)
    templates, found = make_prompts(3, seed=17, shortest=20, longest=24), 0
    for _ in range(12):
        if rng.random() < 0.4:
            rng.choice([bump, in_place, behind_torch])(model)
        prompts = [
            [
                *rng.choice(templates)[: rng.randint(0, 24)],
                *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 4))),
            ]
            for _ in range(8)
        ]
        params = SamplingParams(n=rng.randint(1, 3), max_tokens=rng.randint(1, 20), seed=rng.randrange(9))
        groups = sampler.sample(prompts, params, enough=rng.choice([None, 3]))
        found += sampler.found_tokens
        fresh = Sampler(model, eos_token_id=4, block_size=64).sample(prompts, params)
        pairs = [(a, b) for a, b in zip(groups, fresh, strict=True) if a is not None]
        assert tokens_of([a for a, _ in pairs]) == tokens_of([b for _, b in pairs])
        assert_pool_empty(sampler)
    assert found > 100
