"""Hostile and broken input: every reader answers with what it read or with one sentence, whatever the bytes are.

hypothesis draws the cases; R1FAST_FUZZ=N asks for N of each instead of a few (docs/reliability.md has the long run).
"""

import json
import os
import random
import string

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from r1fast import snapshot
from r1fast.config import PRESETS, UserError, load_recipe
from r1fast.evaluate import kind_of_rows
from r1fast.model.weights import load, read_config
from r1fast.report import write_report
from r1fast.schema import TaskConfig
from r1fast.stages.inputs import read_rows
from r1fast.tasks import build
from r1fast.tasks.rows import read_jsonl

EXAMPLES = int(os.environ.get("R1FAST_FUZZ", "25"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="R1FAST_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 1e308]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


def one_sentence(error: UserError) -> None:
    """What a person is shown: not empty, and short enough to be read."""
    assert 10 < len(str(error)) < 4000


def attempt(read, *args):
    """What `read` gives, or None where it refuses in a sentence; anything else it raises is a defect."""
    try:
        return read(*args)
    except UserError as error:
        one_sentence(error)
        return None


@st.composite
def mutated(draw, original: bytes) -> bytes:
    """`original` with a few pieces cut, doubled, moved or replaced."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
        piece = draw(st.one_of(st.binary(max_size=6), st.sampled_from([b"\x00", b"{", b"[" * 50, b"]", b'"', b": ", b"\n", b"&a *a", b"!!python/object:os.system x", b"1e999", b"-"])))  # fmt: skip  # noqa: E501
        data[at : at + length] = piece
    return bytes(data)


# -- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "r1"])
@fuzz
@given(data=st.data())
def test_a_recipe_of_any_bytes(tmp_path, preset, data):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data.draw(mutated((PRESETS / f"{preset}.yaml").read_bytes())))
    attempt(load_recipe, str(path))


@fuzz
@given(content=values)
def test_a_recipe_of_any_content(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    attempt(load_recipe, str(path))


@fuzz
@given(
    key=st.one_of(
        st.text(max_size=20),
        st.sampled_from(["stages.zero.steps", "stages.zero.mix.0.rewards", "tasks.totals.options", "model", "seed"]),
    ),
    value=st.one_of(st.text(max_size=20), values.map(json.dumps)),
)
def test_any_override(key, value):
    attempt(load_recipe, "tiny", [f"{key}={value}"])


def test_yaml_that_asks_for_code_runs_none(tmp_path):
    flag, path = tmp_path / "flag", tmp_path / "recipe.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {flag}']\n")
    assert attempt(load_recipe, str(path)) is None and not flag.exists()


# -- rows -----------------------------------------------------------------------------------------------------------

FIELDS = ("question", "answer", "problem", "solution", "prompt", "completion", "task", "meta", "level", "type")
row = st.dictionaries(st.sampled_from(FIELDS), values, max_size=5)
good = {"question": "1 + 1?", "answer": "it is 2\n#### 2", "problem": "1+1", "solution": "\\boxed{2}"}
rows = st.lists(st.one_of(row, row.map(lambda r: {**good, **r}), values), max_size=4)


def lines(content) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in content).encode("utf-8", "surrogatepass")


@fuzz
@given(content=st.one_of(rows.map(lines), st.binary(max_size=60), mutated(lines([good] * 3))))
def test_any_file_of_rows(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    attempt(lambda: list(read_jsonl(path)))
    attempt(read_rows, path)
    attempt(kind_of_rows, path)
    for kind in ("gsm8k", "math", "jsonl"):
        task = attempt(build, "t", TaskConfig(kind=kind, path=str(path)), None)
        if task is not None:
            assert all(isinstance(p.text, str) and p.text for p in task.problems("train"))


# -- checkpoints ----------------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
changes = st.dictionaries(
    st.sampled_from([*CONFIG, "rope_scaling", "rope_parameters", "rope_theta", "eos_token_id", "layer_types",
                     "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "pad_token_id",
                     "max_window_layers", "use_sliding_window", "quantization_config", "bos_token_id"]),
    st.one_of(values, st.sampled_from(["llama", "qwen2", {"rope_type": "yarn"}, {"rope_type": "llama3", "factor": 8}])),
    max_size=3,
)  # fmt: skip


def weights() -> dict[str, torch.Tensor]:
    layer = {
        "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (6, 8), "mlp.up_proj": (6, 8), "mlp.down_proj": (8, 6), "input_layernorm": (8,),
        "post_attention_layernorm": (8,), "self_attn.q_norm": (4,), "self_attn.k_norm": (4,),
    }  # fmt: skip
    shapes = {"embed_tokens": (12, 8), "norm": (8,), **{f"layers.0.{name}": shape for name, shape in layer.items()}}
    return {"lm_head.weight": torch.ones(12, 8), **{f"model.{k}.weight": torch.ones(v) for k, v in shapes.items()}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(weights(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert load(folder)[0].config.vocab_size == 12
    return folder


@fuzz
@given(change=changes)
def test_any_config_beside_good_weights(checkpoint, tmp_path, change):
    """Sizes that are not those of the files are refused before memory is asked for: 10**12 rows must not be tried."""
    for file in checkpoint.iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    attempt(read_config, tmp_path)
    attempt(load, tmp_path)


@fuzz
@given(data=st.data())
def test_any_bytes_of_weights(checkpoint, tmp_path, data):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    original = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data.draw(mutated(original)))
    attempt(load, tmp_path)


@fuzz
@given(content=st.one_of(values.map(json.dumps), st.text(max_size=30), mutated(json.dumps(CONFIG).encode())))
def test_any_config_at_all(tmp_path, content):
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (tmp_path / "config.json").write_bytes(data)
    attempt(read_config, tmp_path)


def test_a_tokenizer_that_brings_code_runs_none(checkpoint, tmp_path):
    """`auto_map` names a class in a file beside the weights; only trust_remote_code would import it."""
    flag = tmp_path / "flag"
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(flag)!r}, 'w')\nclass Evil: pass\n")
    told = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    assert attempt(load, tmp_path) is None
    assert not flag.exists()


def test_a_pickle_in_place_of_weights_is_not_opened(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="convert them to safetensors"):
        load(tmp_path)


# -- what a run leaves ----------------------------------------------------------------------------------------------


@fuzz
@given(data=st.data())
def test_any_manifest_of_a_snapshot(tmp_path, data):
    folder = tmp_path / "".join(random.choices(string.ascii_letters, k=12))
    made = snapshot.write(folder, 3, {"a": lambda f: f.write_bytes(b"abc")}, {"lines": {}})
    manifest = made.file(snapshot.MANIFEST)
    manifest.write_bytes(data.draw(mutated(manifest.read_bytes())))
    told = []
    found = snapshot.newest(folder, lambda notes: True, told.append)
    assert (found is None) == bool(told)


@fuzz
@given(data=st.data())
def test_a_report_of_any_log(tmp_path, data):
    (tmp_path / "config.yaml").write_text((PRESETS / "tiny.yaml").read_text())
    event = {"event": "step", "stage": "zero", "kind": "grpo", "step": 1, "steps": 2, "reward": 0.5, "time": 1.0}
    log = data.draw(st.one_of(mutated(lines([event] * 3)), rows.map(lines), row.map(lambda r: lines([{**event, **r}]))))
    (tmp_path / "metrics.jsonl").write_bytes(log)
    attempt(write_report, tmp_path)


# -- what an hour of the above found (R1FAST_FUZZ=20000, 64 minutes) ------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    ["{{0.7647}}: 1\n", "name: x\nstages: {? [a, b] : 1}\n", "{[1]: 2}\n", "name: !!map ab\n", "name: !!set [a]\n"],
    ids=["a mapping as key", "a list as key", "a list as key of all", "text as mapping", "a list as set"],
)
def test_found_recipes(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(UserError) as raised:
        load_recipe(str(path))
    one_sentence(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": "llama", "max_window_layers": None},
        {"use_sliding_window": True, "max_window_layers": "3"},
        {"use_sliding_window": True, "sliding_window": [1], "max_window_layers": {}},
    ],
    ids=str,
)
def test_found_configs(checkpoint, tmp_path, change):
    (tmp_path / "model.safetensors").hardlink_to(checkpoint / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    for read in (read_config, load):
        with pytest.raises(UserError) as raised:
            read(tmp_path)
        one_sentence(raised.value)


@pytest.mark.parametrize("size", ["1e313", "-1e400", "[3]", "null", "3.5"])
def test_found_manifests(tmp_path, size):
    made = snapshot.write(tmp_path, 3, {"a": lambda f: f.write_bytes(b"abc")}, {"lines": {}})
    manifest = made.file(snapshot.MANIFEST)
    content = json.loads(manifest.read_text())
    content["files"]["a"]["bytes"] = "SIZE"
    manifest.write_text(json.dumps(content).replace('"SIZE"', size))
    told = []
    assert snapshot.newest(tmp_path, lambda notes: True, told.append) is None and len(told) == 1


def test_found_logs(tmp_path):
    (tmp_path / "config.yaml").write_text((PRESETS / "tiny.yaml").read_text())
    event = {"event": "step", "stage": "zero", "kind": "grpo", "steps": 2, "reward": 0.5, "time": 1.0}
    (tmp_path / "metrics.jsonl").write_bytes(lines([{**event, "tep": 1}, {**event, "step": 1}]))
    with pytest.raises(UserError, match="line 1: an event without the number of its step"):
        write_report(tmp_path)
