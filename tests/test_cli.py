"""`python -m r1fast.train` as a user meets it: mistakes are one sentence and exit code 2 before any work; --help and
--dry-run change nothing; Ctrl-C says how to go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from r1fast.config import presets
from r1fast.model.decoder import Decoder
from r1fast.model.decoder_config import DecoderConfig
from r1fast.model.tokenizer import build_word_tokenizer
from r1fast.model.weights import save
from r1fast.train import main

ROWS = [
    {"question": f"what is {a} plus {b} ?", "answer": f"{a} + {b}\n#### {a + b}"} for a in range(12) for b in range(9)
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with GSM8K-like rows and a random checkpoint of a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = sorted({word for row in ROWS for word in (row["question"] + " " + row["answer"]).split()})
    tokenizer = build_word_tokenizer(words)
    config = DecoderConfig(
        len(tokenizer), 16, 32, 1, 2, 1, 8, max_positions=1024, eos_token_ids=(tokenizer.eos_token_id,)
    )
    save(Decoder(config, "cpu", torch.float32), tokenizer, folder / "model")
    return folder


@pytest.fixture
def here(shared, tmp_path, monkeypatch):
    """An empty current directory with copies of the shared files."""
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def left_behind(here: Path) -> set[str]:
    return {path.name for path in here.iterdir()} - {"rows.jsonl", "model"}


GSM8K = ["gsm8k", "model.path=model", "model.template=words", "data=rows.jsonl"]
# What the user typed, and what the one sentence must say: what is wrong, and where or what to do.
BAD = {
    "unknown recipe": (["tinny"], ["no recipe 'tinny'", "did you mean 'tiny'"]),
    "unknown key": (["tiny", "stages.zero.lr=1"], ["unknown key 'lr' in stages.zero", "known are"]),
    "wrong type": (["seed=many"], ["seed must be a whole number", '"many"']),
    "two recipes": (["tiny", "gsm8k"], ["two recipes", "'tiny' and 'gsm8k'"]),
    "unknown option": (["--ouput", "x"], ["--ouput", "--help"]),
    "impossible directory": (["--out", "rows.jsonl/run"], ["rows.jsonl/run cannot be made a run directory"]),
    "resume and fresh": (["--resume", "--fresh"], ["not allowed with argument"]),
    "missing file": ([*GSM8K, "data=gone.jsonl"], ["tasks.gsm8k.path", "no such file: gone.jsonl"]),
    "missing rows file": (["stages.sft.data.0={path: gone.jsonl}"], ["stages.sft.data.0.path", "no file gone.jsonl"]),
    "no data": (["gsm8k", "model.path=model"], ["tasks.gsm8k.path", "give its path here or as `data`"]),
    "no model": (["gsm8k", "data=rows.jsonl"], ["'start' starts from `model`", "model.path=DIR"]),
    "missing model": ([*GSM8K, "model.path=gone"], ["gone: no such checkpoint folder"]),
    "from no stage": (["stages.zero.from=bose"], ["stages.zero.from is 'bose'", "did you mean 'base'"]),
    "circle": (["stages.zero.from=all_rl"], ["circle", "zero reads all_rl"]),
    "removed stage": (["stages.zero=null"], ["stages.cold_data.from is 'zero', which is no stage"]),
    "unknown task": (["stages.zero.mix.0.task=totes"], ["the task 'totes'", "did you mean 'totals'"]),
    "unknown kind of task": (["tasks.chat.kind=generel"], ["tasks.chat.kind", "did you mean 'general'"]),
    "unknown option of a task": (["tasks.totals.options.total_mx=9"], ["total_mx", "did you mean 'total_max'"]),
    "unknown reward": (["stages.zero.mix.0.rewards.acuracy=1"], ["no reward 'acuracy'", "did you mean 'accuracy'"]),
    "unknown requirement": (["stages.rejection.require=[formats]"], ["stages.rejection.require", "'format'"]),
    "no right answers": (["stages.zero.mix.0.task=chat"], ["accuracy needs right answers", "'chat'"]),
    "no reward model": (["stages.all_rl.reward_model=null"], ["'preference' asks a reward model"]),
    "no preferences": (["stages.preference.task=totals"], ["'totals' has no preference pairs", "that have: chat"]),
    "evaluated without answers": (["evaluation.task=chat"], ["evaluated on the task 'chat'"]),
    "no measures": (["evaluation.general=totals"], ["'totals' has no measures of its own"]),
    "open text": (["tasks.more={kind: jsonl, path: rows.jsonl}"], ["'more' has open text", "from: model"]),
    "two sources": (["stages.sft.data.0.task=totals"], ["exactly one of stage, task and path", "stage and task"]),
    "no sources": (["stages.sft.data=[]"], ["stages.sft.data is empty"]),
    "all late": (["stages.zero.mix.0.start=0.5"], ["stages.zero.mix", "starts late"]),
    "bad name": (["stages.a/b={kind: evaluate, from: base}"], ["stages.a/b: not a usable name"]),
    "no room": (["stages.zero.sampling.max_tokens=160"], ["stages.zero.sampling.max_tokens is 160", "no room"]),
    "long prompts": ([*GSM8K, "model.max_length=516"], ["prompt 'row-", "task 'gsm8k'", "leaves 4"]),
    "long prompts in words": (["model.max_length=110"], ["prompt", "task 'totals'", "leaves 14"]),
    "longer than the model": ([*GSM8K, "model.max_length=4096"], ["model.max_length is 4096", "1024 positions"]),
    "longer than the shape": (["model.max_length=512"], ["stages.base.shape.max_positions is 256"]),
    "its own teacher": (["distill", *GSM8K[1:], "tasks.math.kind=gsm8k", "model.max_length=1024",
                         "stages.distill_data.sampling.max_tokens=512", "evaluation.sampling.max_tokens=512"],
                        ["teacher and student are both 'model'", "stages.distill.from=DIR"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(here, capsys, name):
    arguments, says = BAD[name]
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and told.out == ""
    for words in says:
        assert words in told.err
    assert not left_behind(here)


def bad_row(here):
    lines = (here / "rows.jsonl").read_text().splitlines()
    (here / "rows.jsonl").write_text("\n".join([*lines[:6], "{not json", *lines[6:]]))


def no_answer(here):
    with (here / "rows.jsonl").open("a") as file:
        file.write('{"question": "why ?", "answer": "because"}\n')


def empty_rows(here):
    (here / "rows.jsonl").write_text("\n\n")


def other_architecture(here):
    edit_json(here / "model" / "config.json", model_type="mamba")


def no_weights(here):
    for file in (here / "model").glob("*.safetensors"):
        file.unlink()


def no_tokenizer(here):
    for file in (here / "model").glob("tokenizer*"):
        file.unlink()


def malformed_recipe(here):
    (here / "mine.yaml").write_text("name: mine\nstages: {a: [}\n")


def bad_supervised_row(here):
    (here / "sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')


FILES = {
    bad_row: (GSM8K, ["rows.jsonl:7: not JSON"]),
    no_answer: (GSM8K, ["rows.jsonl:109", "#### N"]),
    empty_rows: (GSM8K, ["rows.jsonl holds no rows"]),
    other_architecture: (GSM8K, ["model: config.json: model_type 'mamba' is not supported", "Qwen3"]),
    no_weights: (GSM8K, ["model: no *.safetensors file in it"]),
    no_tokenizer: (GSM8K, ["model: no tokenizer in it"]),
    malformed_recipe: (["mine.yaml"], ["mine.yaml:2: malformed YAML"]),
    bad_supervised_row: (["stages.sft.data.0={path: sft.jsonl}"], ["sft.jsonl:2", "completion"]),
}


@pytest.mark.parametrize("damage", FILES, ids=lambda f: f.__name__)
def test_bad_files_are_named_by_path_and_line(here, capsys, damage):
    damage(here)
    arguments, says = FILES[damage]
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1
    for words in says:
        assert words in told.err
    assert not (here / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(here, capsys):
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(here, capsys):
    (here / "runs" / "tiny").mkdir(parents=True)
    (here / "runs" / "tiny" / "config.yaml").write_text("name: tiny\n")
    assert main([]) == 2
    told = capsys.readouterr().err
    assert "runs/tiny already holds a run" in told and "--resume" in told and "--fresh" in told
    assert [path.name for path in (here / "runs" / "tiny").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("name", sorted(presets()))
def test_dry_run_prints_the_plan_of_every_preset_and_writes_nothing(here, capsys, name):
    assert main([name, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert f"plan of {name}" in told.out and told.err == ""
    assert ("give model.path=DIR" in told.out) == (not name.startswith("tiny"))
    assert not left_behind(here)


def test_dry_run_of_a_checkpoint_estimates_its_memory(here, capsys):
    assert main([*GSM8K, "--dry-run", "--out", "other"]) == 0
    told = capsys.readouterr().out
    assert "in other" in told and "?" not in told and "KB" in told
    assert not left_behind(here)


def test_dry_run_of_shares_says_what_is_gathered(here, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # as torchrun does
    assert main([*GSM8K, "--dry-run", "parallel.shard=all"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "each of the 8 ranks that hold shares" in told and "whole weights, gathered once a step to sample" in told


def test_help_names_the_presets_and_loads_no_torch():
    code = (
        "import sys; from r1fast.train import main\ntry: main(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    for name, description in presets().items():
        assert name in done.stdout and description in done.stdout


def test_a_mistake_at_the_real_command_line(tmp_path):
    command = [sys.executable, "-m", "r1fast.train", "tiny", "stages.zero.stepps=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr == (
        "error: override 'stages.zero.stepps=1': unknown key 'stepps' in stages.zero (did you mean 'steps'?)\n"
    )


def test_ctrl_c_says_what_is_done_and_how_to_go_on(tmp_path):
    """A real run, stopped by a real signal in its first stage; the words it prints start it again."""
    command = [sys.executable, "-m", "r1fast.train", "tiny", "threads=1", "--out", "a run", "--fresh"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A shell starts background jobs with the signal ignored, and children inherit that.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes, **heard)
    log, waited = tmp_path / "a run" / "metrics.jsonl", time.monotonic() + 240
    while not (log.is_file() and '"step"' in log.read_text()):
        assert process.poll() is None and time.monotonic() < waited, "the run never took a step"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 0, told
    assert "finished stages: none" in told and "Traceback" not in told
    assert "python -m r1fast.train tiny threads=1 --out 'a run' --resume" in told
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["stage"], last["status"]) == ("base", "interrupted")
