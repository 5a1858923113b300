"""Checkpoints in Hugging Face format, in and out: what every stage reads and writes.

Loading copies into the views of the model's weights that names.py has under the names of the files, saving from them.
Writing is atomic: a folder appears whole under its name or not at all.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from r1fast.config import UserError
from r1fast.model.decoder import Decoder
from r1fast.model.decoder_config import ARCHITECTURES, DecoderConfig, token_ids
from r1fast.model.names import named_views, split_dim, whole_rows, whole_views
from r1fast.model.reward_model import RewardModel
from r1fast.model.sharding import used_in, whole
from r1fast.parallel import world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1fast.model.tensor_parallel import TensorParallel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD_BYTES = 5 * 10**9  # Hugging Face's own shard size
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_IGNORED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry; they follow from the configuration


# -- reading --------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "float32",
    tensor: TensorParallel | None = None,
) -> tuple[Decoder, PreTrainedTokenizerBase | None]:
    """A Llama, Qwen2/2.5 or Qwen3 checkpoint folder -> (Decoder, its tokenizer; None where the folder has none).

    dtype: "float32", "bfloat16", "float16" or "auto" (float32 on a CPU, bfloat16 elsewhere); weights are converted.
    tensor: the ranks that hold it together; each reads its part alone.
    The ids that end generation are those of config.json and generation_config.json together.
    Raises UserError: no such folder, unsupported architecture, a tensor missing, left over or of the wrong shape.
    """
    folder = Path(path)
    config = read_config(folder)
    _check_sizes(config, folder)
    model = Decoder(config, device, resolve_dtype(dtype, device), tensor=tensor)
    _fill(model, named_views(model), folder, spare=("lm_head.weight",) if config.tie_embeddings else ())
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, its embedding only {config.vocab_size}")
    return model, tokenizer


def load_reward_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "float32",
    tensor: TensorParallel | None = None,
) -> tuple[RewardModel, PreTrainedTokenizerBase | None]:
    """What `save_reward_model` wrote (or a one-label `...ForSequenceClassification` of transformers)."""
    folder = Path(path)
    config = read_config(folder)
    _check_sizes(config, folder)
    trunk = Decoder(config, device, resolve_dtype(dtype, device), head=False, tensor=tensor)
    model = RewardModel(trunk)
    _fill(model, {**named_views(trunk), "score.weight": model.score}, folder, spare=("lm_head.weight",))
    return model, load_tokenizer(folder)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, with its chat template; None where the folder has none."""
    folder = Path(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds of import; a run from scratch needs none

    try:
        # By its own tokenizer.json where that is what was saved. AutoTokenizer takes a Qwen2 model's for Qwen2's own,
        # whatever it is (transformers 5.24), and then every word is unknown.
        if _saved_as(folder) in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be read: {error}") from error


def _saved_as(folder: Path) -> str | None:
    """The class that a tokenizer's configuration names."""
    if not (folder / "tokenizer.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        return None
    saved = _read_json(folder / "tokenizer_config.json")
    return saved.get("tokenizer_class") if isinstance(saved, dict) else None


def read_config(folder: Path) -> DecoderConfig:
    """The config.json of a checkpoint, with the end-of-sequence ids of its generation_config.json added."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder; give one in Hugging Face format, already downloaded")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it, so it is no checkpoint in Hugging Face format")
    hf = _read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        more = _read_json(folder / "generation_config.json")
        if isinstance(hf, dict) and isinstance(more, dict):
            try:
                ends = (*token_ids(hf.get("eos_token_id")), *token_ids(more.get("eos_token_id")))
                hf["eos_token_id"] = list(dict.fromkeys(ends))
            except TypeError:
                raise UserError(f"{folder}: eos_token_id must be a token id or a list of them") from None
    try:
        return DecoderConfig.from_hf(hf)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def resolve_dtype(dtype: torch.dtype | str, device: torch.device | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; give auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _fill(model: torch.nn.Module, views: dict[str, Tensor], folder: Path, spare: tuple[str, ...]) -> None:
    """Copy every tensor of the files into its view; all must be there and, but for `spare`, no others. Of a model on
    several ranks, only this one's part is read."""
    left, tensor, rows = dict(views), model.tensor, whole_rows(model.config)
    with torch.no_grad():
        for name, file in _tensors(folder):
            if name in spare or name.endswith(_IGNORED):
                continue
            view = left.pop(name, None)
            if view is None:
                why = "twice" if name in views else "which this architecture does not have"
                raise UserError(f"{folder}: tensor {name!r} is in the files {why}")
            dim = None if tensor is None else split_dim(name)
            found, expected, part = list(file.get_slice(name).get_shape()), [*view.shape], [slice(None)] * view.dim()
            if dim is not None:
                expected[dim] = rows[name.split(".")[-2]]
                own = tensor.stretch(expected[dim])
                part[dim] = slice(own.start, own.stop)
            if found != expected:
                raise UserError(f"{folder}: tensor {name!r} is {found}, config.json says {expected}")
            view.copy_(file.get_tensor(name) if dim is None else file.get_slice(name)[tuple(part)])
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise UserError(f"{folder}: tensor {next(iter(left))!r} is missing from the files{more}")


def _check_sizes(config: DecoderConfig, folder: Path) -> None:
    """UserError where config.json asks for more memory than the files can fill: before any is taken."""
    shapes = {name: tensor for file in _files(folder) for name, tensor in _shapes(file)}
    layers = 1 + max((int(m[1]) for name in shapes if (m := _LAYER.match(name))), default=-1)
    if layers != config.layers:
        raise UserError(f"{folder}: the files hold {layers} layers, config.json says {config.layers}")
    first, hidden = "model.layers.0", config.hidden_size
    expected = {
        "model.embed_tokens.weight": [config.vocab_size, hidden],
        f"{first}.self_attn.q_proj.weight": [config.heads * config.head_dim, hidden],
        f"{first}.self_attn.k_proj.weight": [config.kv_heads * config.head_dim, hidden],
        f"{first}.mlp.gate_proj.weight": [config.intermediate_size, hidden],
    }
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            raise UserError(f"{folder}: tensor {name!r} is {shapes[name]}, config.json says {shape}")
        if name not in shapes:
            raise UserError(f"{folder}: tensor {name!r} is missing from the files")


def _shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping: it has keys() and no iterator)
            yield name, list(tensors.get_slice(name).get_shape())


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, the open file that holds it) of every tensor."""
    for file in _files(folder):
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                yield key, tensors


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}") from error


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, which lie in its folder and nowhere else."""
    names = [_SINGLE]
    if (folder / _INDEX).is_file():
        index = _read_json(folder / _INDEX)
        table = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise UserError(f"{folder / _INDEX}: it has no weight_map of file names")
        names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{folder / _INDEX}: {name!r} is not a file of this folder")
        if not (folder / name).is_file():
            binary = " (it has .bin files: convert them to safetensors)" if any(folder.glob("*.bin")) else ""
            raise UserError(f"{folder}: {name} is missing{binary}")
    return [folder / name for name in names]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error


# -- writing --------------------------------------------------------------------------------------------------


def save(model: Decoder, tokenizer: PreTrainedTokenizerBase | None, path: str | Path) -> None:
    """Write a folder that `load` and `AutoModelForCausalLM.from_pretrained` read; AutoTokenizer where one is given.

    Atomic, and an existing folder of that name is replaced (see `_replace`). Safetensors in the model's dtype.
    """
    _write(model.config, whole_views(model), tokenizer, Path(path), {})


def save_reward_model(model: RewardModel, tokenizer: PreTrainedTokenizerBase | None, path: str | Path) -> None:
    """Write a folder that `load_reward_model` and `AutoModelForSequenceClassification.from_pretrained` read.

    transformers finds the last token by the pad's id, so config.json must have one: the configuration's, else the
    tokenizer's, else the end-of-sequence token. UserError where there is none of them.
    """
    config = model.config
    pad = next((i for i in (config.pad_token_id, getattr(tokenizer, "pad_token_id", None)) if i is not None), None)
    if pad is None and not config.eos_token_ids:
        raise UserError(f"{path}: a reward model needs a pad token id, and neither its model nor its tokenizer has one")
    changes = {
        "architectures": [f"{ARCHITECTURES[config.architecture]}ForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": config.eos_token_ids[0] if pad is None else pad,
    }
    score = whole(model.score.detach()).to(used_in(model))
    views = {**whole_views(model.trunk, model), "score.weight": score}
    _write(config, views, tokenizer, Path(path), changes)


def clone(model: Decoder, trainable: bool = False) -> Decoder:
    """A deep copy of the weights, frozen unless `trainable`: the reference policy, or a student to train on."""
    return copy.deepcopy(model).requires_grad_(trainable)  # (gradients are not copied along)


@torch.no_grad()
def copy_weights(source: Decoder, target: Decoder) -> None:
    """Refresh a reference in place: no new memory, and the target's dtype and device stay."""
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        ours.copy_(theirs)
    target.bump_version()


def _write(
    config: DecoderConfig,
    views: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path,
    changes: dict[str, Any],
) -> None:
    if not world().first:  # every rank holds the same weights
        return
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        dtype = str(next(iter(views.values())).dtype).removeprefix("torch.")
        hf = {**config.to_hf(), "dtype": dtype, **changes}
        for key in _TOKEN_IDS:  # a model that was built here knows none of them yet; its tokenizer does
            hf[key] = getattr(tokenizer, key, None) if hf[key] is None else hf[key]
        _write_json(temporary / "config.json", hf)
        ends = {key: hf[key] for key in _TOKEN_IDS if hf[key] is not None}
        _write_json(temporary / "generation_config.json", {"_from_model_config": True, **ends})
        _write_tensors(temporary, views)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tensors(folder: Path, views: dict[str, Tensor]) -> None:
    """One file, or numbered shards with an index once the weights pass Hugging Face's shard size."""
    shards: list[dict[str, Tensor]] = [{}]
    room = _SHARD_BYTES
    for name, view in views.items():
        if view.nbytes > room and shards[-1]:
            shards.append({})
            room = _SHARD_BYTES
        shards[-1][name] = view
        room -= view.nbytes
    count = len(shards)
    where = {}
    for index, shard in enumerate(shards):
        file = _SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        # clone: safetensors refuses tensors that share memory, and the views of a fused parameter do
        tensors = {
            name: view.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, view in shard.items()
        }
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # its word for an OSError
            raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error), str(file)) from error
        where |= dict.fromkeys(shard, file)
    if count > 1:
        size = sum(view.nbytes for view in views.values())
        _write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(temporary: Path, path: Path) -> None:
    """Sync every file of `temporary` to disk, then give it the name `path`.

    A folder cannot be renamed over a full one, so an existing one is first moved aside and removed last: a reader
    finds the old folder, none, or the new one, and never a mixture; a crash in between leaves the old one beside it.
    """
    for file in temporary.rglob("*"):
        _sync(file)
    _sync(temporary)
    aside = path.parent / f".{path.name}.replaced-{os.getpid()}"
    if path.exists():
        os.rename(path, aside)
    os.rename(temporary, path)
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
