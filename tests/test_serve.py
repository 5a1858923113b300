"""The server, asked by the real `openai` client over loopback, with a random checkpoint behind it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scripted import random_checkpoint

openai = pytest.importorskip("openai", reason="the extra `serve` is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx" if openai.__version__ < "3" else "httpx2")

import r1fast  # noqa: E402
from r1fast.model.tokenizer import apply_template, decode  # noqa: E402
from r1fast.serve import main, parser, service_of  # noqa: E402
from r1fast.serving.app import build  # noqa: E402

POSITIONS = 512
TALK = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("served") / "tiny-model", POSITIONS)


class Running:
    """A server in a thread, and clients for it."""

    def __init__(self, checkpoint, *options, key=None):
        self.service = service_of(parser().parse_args([str(checkpoint), "--device", "cpu", *options]))
        self.server = uvicorn.Server(uvicorn.Config(build(self.service, key), log_level="error", lifespan="off"))
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.service.engine.start()
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.socket]), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def client(self, key="none", **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def stop(self):
        self.service.engine.stop()
        self.server.should_exit = True
        self.thread.join(20)
        self.service.engine.join()


@pytest.fixture(scope="module")
def running(checkpoint):
    made = Running(checkpoint, "--max-requests", "24", "--max-body", "20000")
    yield made
    made.stop()


@pytest.fixture
def client(running):
    return running.client()


@pytest.fixture(scope="module")
def direct(checkpoint):
    """The same model without a server: what must come out."""
    model, tokenizer = r1fast.load(checkpoint)
    return r1fast.Sampler(model, tokenizer.eos_token_id, tokenizer=tokenizer), tokenizer


def sampled(direct, tokens, **params):
    sampler, _ = direct
    (group,) = sampler.sample([tokens], r1fast.SamplingParams(**params))
    return group.rollouts


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert model.id == "tiny-model" and client.models.retrieve("tiny-model").id == "tiny-model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here"):
        client.models.retrieve("gpt")


def test_a_chat_is_what_the_sampler_draws(client, direct):
    asked = {"model": "tiny-model", "messages": TALK, "max_tokens": 20, "seed": 7, "n": 3, "temperature": 0.8}
    answer = client.chat.completions.create(**asked, top_p=0.9)
    tokens = apply_template(direct[1], TALK[0]["content"])
    expected = sampled(direct, tokens, n=3, max_tokens=20, seed=7, temperature=0.8, top_p=0.9)
    assert [c.message.content for c in answer.choices] == [decode(direct[1], r.tokens) for r in expected]
    assert len({c.message.content for c in answer.choices}) == 3 and [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.finish_reason for c in answer.choices] == [r.finish for r in expected]
    assert answer.usage.prompt_tokens == len(tokens)
    assert answer.usage.completion_tokens == sum(len(r.tokens) for r in expected)
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"


def test_seeds_repeat_and_their_absence_does_not(client):
    def say(**more):
        asked = {"model": "tiny-model", "messages": TALK, "max_tokens": 24, **more}
        return client.chat.completions.create(**asked).choices[0].message.content

    assert say(seed=3) == say(seed=3) != say(seed=4) and say() != say()
    assert say(temperature=0) == say(temperature=0, seed=9)


def test_parts_and_roles_of_messages(client):
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "something."}]
    asked = {"model": "tiny-model", "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(messages=TALK, **asked).choices[0].message
    in_parts = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **asked)
    assert in_parts.choices[0].message.content == whole.content
    system = [{"role": "developer", "content": "Be brief."}, *TALK]
    assert client.chat.completions.create(messages=system, **asked).usage.prompt_tokens > len(TALK[0]["content"])


@pytest.mark.parametrize("stop", [None, "middle", "rare"])
def test_streamed_pieces_join_to_the_whole(client, stop):
    asked = {"model": "tiny-model", "messages": TALK, "max_tokens": 40, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**asked)
    if stop == "middle":
        asked["stop"] = whole.choices[0].message.content[10:13]
        whole = client.chat.completions.create(**asked)
        assert len(whole.choices[0].message.content) <= 10 and whole.choices[0].finish_reason == "stop"
        assert asked["stop"] not in whole.choices[0].message.content
    elif stop == "rare":
        asked["stop"] = ["~~~~", "never said at all"]
    texts, finish, roles, usage = {0: "", 1: ""}, {}, {}, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk" and chunk.model == "tiny-model"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles.setdefault(choice.index, choice.delta.role)
            finish[choice.index] = choice.finish_reason
    assert [texts[i] for i in (0, 1)] == [c.message.content for c in whole.choices]
    assert [finish[i] for i in (0, 1)] == [c.finish_reason for c in whole.choices]
    assert roles == {0: "assistant", 1: "assistant"} and usage == whole.usage


def test_completions_go_on_behind_their_prompts(client, direct):
    prompts = ["One two", "three"]
    asked = {"model": "tiny-model", "max_tokens": 12, "seed": 1, "n": 2}
    answer = client.completions.create(prompt=prompts, **asked)
    encoded = [direct[1].encode(text) for text in prompts]
    expected = [r for tokens in encoded for r in sampled(direct, tokens, n=2, max_tokens=12, seed=1)]
    special = direct[1].all_special_ids
    texts = [direct[1].decode([t for t in r.tokens if t not in special]) for r in expected]
    assert [c.text for c in answer.choices] == texts and [c.index for c in answer.choices] == [0, 1, 2, 3]
    by_tokens = client.completions.create(prompt=encoded, **asked)
    assert [c.text for c in by_tokens.choices] == texts
    echoed = client.completions.create(prompt=prompts[0], echo=True, **asked)
    assert [c.text for c in echoed.choices] == [prompts[0] + text for text in texts[:2]]
    streamed = {}
    for chunk in client.completions.create(prompt=prompts, stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[i] for i in range(4)] == texts


def dense(direct, tokens):
    model = direct[0].model
    ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
    return model.logits(model.forward_packed(torch.tensor(tokens), ends)).detach().log_softmax(-1)


@pytest.mark.parametrize("temperature", [0, 1, 0.5])
def test_log_probabilities_are_the_models_own(client, direct, temperature):
    asked = {"model": "tiny-model", "messages": TALK, "max_tokens": 9, "seed": 2, "temperature": temperature}
    prompt = list(apply_template(direct[1], TALK[0]["content"]))
    (rollout,) = sampled(direct, prompt, max_tokens=9, seed=2, temperature=temperature)
    expected = dense(direct, prompt + rollout.tokens)[len(prompt) - 1 : -1]
    for top in (None, 4):
        answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=top)
        content = answer.choices[0].logprobs.content
        values = expected[range(len(rollout.tokens)), rollout.tokens]
        assert [entry.logprob for entry in content] == pytest.approx(values.tolist(), abs=1e-3)
        said = "".join(entry.token for entry in content)  # with the token that ended it
        assert said.removesuffix(direct[1].eos_token) == answer.choices[0].message.content
        for entry, row in zip(content, expected, strict=True):
            assert len(entry.top_logprobs) == (top or 0)
            if top:
                best = [other.logprob for other in entry.top_logprobs]
                assert best == pytest.approx(row.topk(4).values.tolist(), abs=1e-3)
    if temperature != 0.5:
        pieces = [
            entry
            for chunk in client.chat.completions.create(**asked, logprobs=True, stream=True)
            for choice in chunk.choices
            if choice.logprobs
            for entry in choice.logprobs.content
        ]
        assert [entry.logprob for entry in pieces] == pytest.approx(values.tolist(), abs=1e-3)
    else:
        with pytest.raises(openai.BadRequestError, match="streamed logprobs"):
            client.chat.completions.create(**asked, logprobs=True, stream=True)


def test_a_prompt_is_scored_without_drawing(client, direct):
    """What the evaluation harness asks of a completions server."""
    text = "Two and two is four"
    answer = client.completions.create(model="tiny-model", prompt=text, max_tokens=0, echo=True, logprobs=2)
    tokens = direct[1].encode(text)
    told = answer.choices[0].logprobs
    expected = dense(direct, tokens)[:-1][range(len(tokens) - 1), tokens[1:]]
    assert told.token_logprobs[0] is None and told.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-3)
    assert told.tokens == list(text) and told.text_offset == list(range(len(text)))
    assert told.top_logprobs[0] is None and len(told.top_logprobs[5]) == 2
    assert answer.choices[0].text == text and answer.usage.completion_tokens == 0


def test_clients_share_a_batch_and_do_not_disturb_each_other(running):
    def say(number):
        with running.client() as client:
            asked = {"model": "tiny-model", "messages": TALK, "max_tokens": 30 + number, "seed": number}
            return client.chat.completions.create(**asked).choices[0].message.content

    alone = [say(number) for number in range(12)]
    sizes, batch = [], running.service.engine.sampler
    watching = threading.Event()

    def watch():
        while not watching.is_set():
            session = batch._session
            sizes.append(session.unfinished if session else 0)
            time.sleep(0.001)

    threading.Thread(target=watch, daemon=True).start()
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(say, range(12)))
    watching.set()
    assert together == alone and max(sizes) >= 4


def waited(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came about"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_leaves_the_batch(running, stream):
    engine = running.service.engine
    body = {"model": "tiny-model", "messages": TALK, "n": 64, "max_tokens": 400, "stream": stream, "seed": 1}
    connection = socket.create_connection(("127.0.0.1", running.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    waited(lambda: engine._session.unfinished == 1)
    began = time.monotonic()
    connection.close()
    waited(lambda: engine._session.unfinished == 0 and running.service.under_way == 0)
    assert time.monotonic() - began < 5
    with running.client() as client:  # and the server goes on
        assert client.chat.completions.create(model="tiny-model", messages=TALK, max_tokens=2).choices


def test_more_requests_than_the_limit_are_told_to_come_again(running):
    slow = {"model": "tiny-model", "messages": TALK, "max_tokens": 300, "n": 8}

    def say(_):
        with running.client() as client:
            try:
                return client.chat.completions.create(**slow).usage.completion_tokens
            except openai.RateLimitError as error:
                assert error.response.headers["retry-after"] == "1" and "24 requests are under way" in str(error)
                return None

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(say, range(40)))
    assert answers.count(None) >= 1 and sum(a is not None for a in answers) >= 24
    assert running.service.under_way == 0


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "no model 'gpt'"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "pope", "content": "x"}]}, openai.BadRequestError, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, openai.BadRequestError, "no room is left"),
        ({"messages": [{"role": "user", "content": "x" * 30000}]}, openai.APIStatusError, "larger than 20,000 bytes"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"n": 0}, openai.BadRequestError, "n:"),
        ({"n": 1000}, openai.BadRequestError, "n:"),
        ({"stop": ["a"] * 20}, openai.BadRequestError, "stop"),
        ({"stop": "a<|endoftext|>"}, openai.BadRequestError, "special token"),
        ({"top_logprobs": 3}, openai.BadRequestError, "only with logprobs"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools: is not known"),
        ({"extra_body": {"beam": 4}}, openai.BadRequestError, "beam: is not known here"),
        ({"seed": 1 << 70}, openai.BadRequestError, "seed"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
    ],
)
def test_what_is_wrong_is_said_in_openais_form(client, change, error, says):
    with pytest.raises(error) as told:
        client.chat.completions.create(**{"model": "tiny-model", "messages": TALK, "max_tokens": 4, **change})
    assert says in told.value.body["message"] and told.value.body["type"] == "invalid_request_error"


def test_bodies_that_are_no_request(running):
    with httpx.Client(base_url=running.url) as http:
        for body in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 15000, b'{"model": 3}'):
            answer = http.post("/v1/chat/completions", content=body)
            assert answer.status_code == 400 and answer.json()["error"]["message"], body
        assert http.post("/v1/completions", json={"model": "tiny-model", "prompt": []}).status_code == 400
        assert http.post("/v1/completions", json={"model": "tiny-model", "prompt": [99999]}).status_code == 400
        assert http.get("/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"
        assert http.get("/v1/completions").status_code == 405
        assert http.get("/health").json()["status"] == "ok"


def test_the_key_is_asked_for_where_there_is_one(checkpoint):
    guarded = Running(checkpoint, "--max-tokens", "5", key="secret")
    try:
        with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
            guarded.client("wrong").models.list()
        with httpx.Client(base_url=guarded.url) as http:
            assert http.post("/v1/completions", json={}).status_code == 401
            assert http.get("/health").status_code == 200
        client = guarded.client("secret")
        asked = {"model": "tiny-model", "messages": TALK}
        assert client.chat.completions.create(**asked).usage.completion_tokens <= 5
        with pytest.raises(openai.BadRequestError, match="at most 5"):
            client.chat.completions.create(**asked, max_tokens=6)
    finally:
        guarded.stop()


def test_a_failure_of_the_sampler_is_told_and_the_next_request_works(checkpoint, monkeypatch):
    broken = Running(checkpoint)
    try:
        client, engine = broken.client(), broken.service.engine.sampler.engine
        decode_step = engine.decode

        def failing(ahead):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine, "decode", failing)
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            client.chat.completions.create(model="tiny-model", messages=TALK, max_tokens=8)
        with pytest.raises(openai.APIError, match="out of memory"):
            list(client.chat.completions.create(model="tiny-model", messages=TALK, max_tokens=8, stream=True))
        monkeypatch.setattr(engine, "decode", decode_step)
        assert client.chat.completions.create(model="tiny-model", messages=TALK, max_tokens=8).choices
        assert broken.service.engine.failures == 2
    finally:
        broken.stop()


def test_going_down_ends_what_is_under_way(checkpoint):
    going = Running(checkpoint)
    client = going.client()
    stream = iter(client.chat.completions.create(model="tiny-model", messages=TALK, n=64, max_tokens=450, stream=True))
    next(stream)
    began = time.monotonic()
    threading.Thread(target=going.stop).start()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        for _ in stream:
            pass
    going.thread.join(20)
    assert time.monotonic() - began < 10 and not going.service.engine.alive


def test_the_asynchronous_client_works_too(running):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x") as client:
            asked = {"model": "tiny-model", "messages": TALK, "max_tokens": 6, "temperature": 0}
            return await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(4)))

    assert len({answer.choices[0].message.content for answer in asyncio.run(ask())}) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone"], "gone"),
        (["MODEL", "--port", "99999"], "--port is 99999"),
        (["MODEL", "--max-seqs", "0"], "--max-seqs is 0"),
        (["MODEL", "--host", "no.such.host.invalid"], "cannot listen on"),
        (["MODEL", "--prot", "1"], "--prot"),
        ([], "MODEL_DIR"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_code_2(checkpoint, capsys, arguments, says):
    assert main([str(checkpoint) if a == "MODEL" else a for a in arguments]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_a_taken_port_is_told_before_the_model_is_read(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["gone", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_cleanly_in_the_middle_of_an_answer(checkpoint):
    command = [sys.executable, "-m", "r1fast.serve", str(checkpoint), "--port", "0", "--device", "cpu"]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=Path("/"), **heard)
    try:
        line = process.stderr.readline()
        assert "tiny-model at http://127.0.0.1:" in line, line + process.stderr.read()
        client = openai.OpenAI(base_url=line.split(" at ")[1].split(";")[0], api_key="x", max_retries=0)
        talk = {"model": "tiny-model", "messages": TALK, "max_tokens": 400, "n": 32, "stream": True}
        stream = iter(client.chat.completions.create(**talk))
        next(stream)
        process.send_signal(signal.SIGINT)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            for _ in stream:
                pass
        assert process.wait(15) == 0
        told = process.stderr.read()
        assert told.strip().endswith("ended") and "Traceback" not in told, told
    finally:
        process.kill()
        process.wait()
