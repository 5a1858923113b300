"""The evaluation harness on our engine: on a random checkpoint, the scores of its own `hf` model."""

import json
import sys

import pytest
import torch
from scripted import byte_tokenizer, random_checkpoint

pytest.importorskip("accelerate", reason="the harness's own `hf` model needs it")
lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from r1fast.config import UserError  # noqa: E402
from r1fast.lm_eval import R1Fast, main, on_this_machine  # noqa: E402
from r1fast.model.scoring import score  # noqa: E402

POSITIONS = 160


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("model"), POSITIONS))


@pytest.fixture(scope="module")
def ours(checkpoint):
    return R1Fast(checkpoint, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return HFLM(pretrained=checkpoint, device="cpu", dtype="float32", batch_size=4)


def asked(kind, *arguments):
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


LONG = "The quick brown fox jumps over the lazy dog. " * 12
PAIRS = [
    ("Two and two is", " four"),
    ("Two and two is", " five"),
    ("Two and two is", " f"),
    ("Two and two is ", "seven"),  # the space belongs to the continuation
    ("", "no context"),
    (LONG, " at the end"),  # cut from the left
    ("Is it? Answer:", " A"),
    ("Is it? Answer:", " B"),
]


def test_log_likelihoods_are_those_of_hf(ours, theirs):
    requests = asked("loglikelihood", *PAIRS)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert len({round(value, 3) for value, _ in expected}) == len(PAIRS)
    for (value, greedy), (their_value, their_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(their_value, abs=2e-3) and greedy == their_greedy


def test_a_greedy_continuation_is_known_as_one(ours, theirs):
    (said,) = ours.generate_until(asked("generate_until", ("Two", {"until": [], "max_gen_toks": 3})))
    pairs = [("Two", said), ("Two", chr(ord(said[0]) ^ 1) + said[1:])]
    for model in (ours, theirs):
        assert [greedy for _, greedy in model.loglikelihood(asked("loglikelihood", *pairs))] == [True, False]


def test_rolling_log_likelihoods_are_those_of_hf(ours, theirs):
    texts = [("Short.",), (LONG,), ("x" * POSITIONS,), ("y" * (POSITIONS + 1),)]
    requests = asked("loglikelihood_rolling", *texts)
    found, expected = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
    assert found == pytest.approx(expected, rel=1e-5)


def test_generations_are_those_of_hf(ours, theirs):
    (said,) = ours.generate_until(asked("generate_until", ("Say", {"until": [], "max_gen_toks": 40})))
    assert len(said) > 20
    settings = [
        ("Say", {"until": [], "max_gen_toks": 40}),
        ("Say", {"until": [said[5:8]], "max_gen_toks": 40}),  # a stop string of several tokens
        ("Say", {"until": [said[9], said[4]], "max_gen_toks": 40, "do_sample": False}),
        (LONG, {"until": ["\n\n"], "max_gen_toks": 24, "temperature": 0.0}),
        ("Another prompt", {"until": "zzz", "max_gen_toks": 8}),
    ]
    found = ours.generate_until(asked("generate_until", *settings))
    expected = [theirs.generate_until(asked("generate_until", (c, dict(g))), disable_tqdm=True)[0] for c, g in settings]
    assert found == expected and found[1] == said[: said.find(said[5:8])]


def test_sampling_follows_its_settings(ours):
    warm = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 50}
    cold = {**warm, "temperature": 1e-4}
    greedy = {"until": [], "max_gen_toks": 20}
    a, b, c, d = ours.generate_until(asked("generate_until", ("Go", warm), ("Go", warm), ("Go", cold), ("Go", greedy)))
    assert a != b and c == d
    with pytest.raises(UserError, match="knows no num_beams"):
        ours.generate_until(asked("generate_until", ("Go", {**warm, "num_beams": 4})))
    with pytest.raises(UserError, match="wants 500 tokens"):
        ours.generate_until(asked("generate_until", ("Go", {"max_gen_toks": 500})))


def test_tokens_are_those_of_hf(ours, theirs):
    for text in ("plain", " spaced", "<|endoftext|>begun"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.max_length == theirs.max_length == POSITIONS
    talk = [{"role": "user", "content": "Hello?"}]
    assert ours.apply_chat_template(talk) == theirs.apply_chat_template(talk)


def test_without_a_gpu_the_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["--model", "r1fast", "--tasks", "x"]
    assert on_this_machine(command) == [*command, "--device", "cpu"]
    for other in (["ls", "tasks"], [*command, "--device=cuda"], [*command, "--config", "file.yaml"]):
        assert on_this_machine(other) == other
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert on_this_machine(command) == command


def write_tasks(folder):
    rows = [
        {"q": f"{a} + {b} =", "choices": [" 1", " 22", " nothing"], "gold": (a + b) % 3, "text": f"{a} and {b}. " * 9}
        for a in range(4)
        for b in range(3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\ntest_split: test\n"
    )
    (folder / "choice.yaml").write_text(
        "task: own_choice\noutput_type: multiple_choice\n" + data + 'doc_to_text: "{{q}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
    )
    (folder / "words.yaml").write_text(
        "task: own_words\noutput_type: loglikelihood_rolling\n" + data + 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: byte_perplexity\n  - metric: bits_per_byte\n"
    )
    (folder / "said.yaml").write_text(
        "task: own_said\noutput_type: generate_until\n" + data + 'doc_to_text: "{{q}}"\ndoc_to_target: "{{text}}"\n'
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n"
    )


def test_whole_tasks_score_the_same(tmp_path, monkeypatch, ours, theirs):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tasks(tmp_path)
    names = ["own_choice", "own_words", "own_said"]

    def run(model):
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        return lm_eval.simple_evaluate(model, tasks=names, task_manager=tasks, bootstrap_iters=0, batch_size=4)

    mine, hf = run(ours), run(theirs)
    for name in names:
        left, right = ({k: v for k, v in r["results"][name].items() if isinstance(v, float)} for r in (mine, hf))
        assert left and left == pytest.approx(right, rel=1e-4)
        if name == "own_said":
            said = [{s["doc_id"]: s["filtered_resps"] for s in r["samples"][name]} for r in (mine, hf)]
            assert said[0] == said[1] and len({str(text) for text in said[0].values()}) > 1
    assert 0 < mine["results"]["own_choice"]["acc,none"] < 1


def test_the_command_knows_the_model(tmp_path, checkpoint, monkeypatch, capsys):
    write_tasks(tmp_path)
    made = TaskManager.__init__  # its own tasks, thousands of files, take half a minute to list
    monkeypatch.setattr(TaskManager, "__init__", lambda *a, **k: made(*a, **{**k, "include_defaults": False}))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = ["r1fast.lm_eval", "--model", "r1fast", "--model_args", f"pretrained={checkpoint},dtype=float32"]
    command += ["--device", "cpu", "--tasks", "own_choice", "--limit", "3", "--include_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--output_path", str(tmp_path / "out.json")])
    assert main() == 0
    told = capsys.readouterr().out
    assert "own_choice" in told and "acc_norm" in told and list(tmp_path.glob("out*.json"))
    monkeypatch.setattr(sys, "argv", [*command[:4], f"pretrained={tmp_path / 'gone'}", *command[5:]])
    assert main() == 2 and "gone" in capsys.readouterr().err


def test_scores_do_not_depend_on_packing_and_tell_the_best(checkpoint, monkeypatch):
    import r1fast
    from r1fast.model import scoring

    model, _ = r1fast.load(checkpoint)
    encode, texts = byte_tokenizer(ascii_only=True).encode, ("abcdef", "hello there", "zy", "q")
    tokens = [encode(text, add_special_tokens=False) for text in texts]
    inputs, asked_of = [t[:-1] or [5] for t in tokens], [[t[1:]] if len(t) > 1 else [] for t in tokens]
    together = score(model, inputs, asked_of, top=3)
    monkeypatch.setattr(scoring, "PACKED", 7)
    monkeypatch.setattr(scoring, "LOGITS", 300)
    apart = score(model, inputs, asked_of, top=3)
    assert together[3] == apart[3] == []
    for one, other, given, targets in zip(together, apart, inputs, asked_of, strict=True):
        for left, right in zip(one, other, strict=True):
            assert left.logprobs == pytest.approx(right.logprobs, abs=1e-5) and left.greedy == right.greedy
            ends = torch.tensor([0, len(given)], dtype=torch.int32)
            dense = model.logits(model.forward_packed(torch.tensor(given), ends)).log_softmax(-1).detach()
            assert left.logprobs == pytest.approx(dense[range(len(given)), targets[0]].tolist(), abs=1e-4)
            for place, best in enumerate(left.top):
                values, ids = dense[place].topk(3)
                assert [token for token, _ in best] == ids.tolist()
                assert [value for _, value in best] == pytest.approx(values.tolist(), abs=1e-4)
