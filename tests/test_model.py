"""The decoder against transformers, its packed forward against its paged one, and the object around them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checkpoints import LAYOUTS, LENGTHS, ROPES, VOCAB, assert_equal, make, packed, their_logits

from r1fast.model.decoder import Decoder, DecoderConfig, PagedKV, PagedStep, packed_positions
from r1fast.model.reward_model import RewardModel
from r1fast.model.weights import clone, copy_weights, load, named_views


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    theirs = make(folder, *LAYOUTS["qwen3-gqa"])
    return theirs, folder


# -- against transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(tmp_path, layout):
    theirs = make(tmp_path, *LAYOUTS[layout])
    model, _ = load(tmp_path)
    tokens, cu_seqlens = packed()
    logits = model.logits(model.forward_packed(tokens, cu_seqlens))
    assert logits.dtype == torch.float32
    assert_equal(logits, their_logits(theirs, tokens))


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_scalings_equal_transformers(tmp_path, family, rope):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    theirs = make(tmp_path, family, sizes, ROPES[rope])
    model, _ = load(tmp_path)
    lengths = (64, 22, 3)
    tokens, cu_seqlens = packed(lengths)
    logits = model.logits(model.forward_packed(tokens, cu_seqlens))
    assert_equal(logits, their_logits(theirs, tokens, lengths))


@pytest.mark.parametrize("rope", ROPES)
def test_the_old_spelling_of_rope_is_read_too(tmp_path, rope):
    theirs = make(tmp_path, *LAYOUTS["qwen2-gqa"], ROPES[rope])
    file = tmp_path / "config.json"
    hf = json.loads(file.read_text())
    new = hf.pop("rope_parameters")
    hf["rope_theta"] = new.pop("rope_theta")
    new["type"] = new.pop("rope_type")
    hf["rope_scaling"] = None if rope == "default" else new
    file.write_text(json.dumps(hf))
    model, _ = load(tmp_path)
    tokens, cu_seqlens = packed()
    assert_equal(model.logits(model.forward_packed(tokens, cu_seqlens)), their_logits(theirs, tokens))


@pytest.mark.parametrize("layout", ["llama-gqa-biases", "qwen2-tied", "qwen3-gqa"])
def test_gradients_equal_transformers(tmp_path, layout):
    theirs = make(tmp_path, *LAYOUTS[layout])
    theirs.get_input_embeddings().padding_idx = None  # it would drop the pad's gradient; packed batches have no pads
    model, _ = load(tmp_path)
    tokens, cu_seqlens = packed()
    weights = torch.rand(sum(LENGTHS) - 1)
    targets = tokens.roll(-1)[:-1]

    def loss(logits):
        return (F.cross_entropy(logits[:-1], targets, reduction="none") * weights).mean()

    loss(model.logits(model.forward_packed(tokens, cu_seqlens))).backward()
    loss(torch.cat([theirs(part[None]).logits[0] for part in tokens.split(list(LENGTHS))])).backward()
    gradients = clone(model)
    with torch.no_grad():
        for holder, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            holder.copy_(parameter.grad)
    ours = named_views(gradients)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        assert_equal(ours[name], gradient)


def wrong_theta(model):
    model.config = replace(model.config, rope_theta=model.config.rope_theta * 1.5)


def wrong_scaling(model):
    model.config = replace(model.config, rope_scaling={"rope_type": "linear", "factor": 1.1})


def wrong_epsilon(model):
    for layer in model.layers:
        layer.eps = 1.0


def swapped_qk_norms(model):
    for layer in model.layers:
        layer.q_norm, layer.k_norm = layer.k_norm, layer.q_norm


def swapped_gate_and_up(model):
    for layer in model.layers:
        layer.gate_up_proj.data = layer.gate_up_proj.data.roll(40, dims=0)


def swapped_kv_heads(model):
    for layer in model.layers:
        layer.qkv_proj.data[64:96] = layer.qkv_proj.data[64:96].roll(16, dims=0)


@pytest.mark.parametrize(
    "mutate", [wrong_theta, wrong_scaling, wrong_epsilon, swapped_qk_norms, swapped_gate_and_up, swapped_kv_heads]
)
def test_the_comparison_sees_a_mistake(qwen3, mutate):
    theirs, folder = qwen3
    model, _ = load(folder)
    mutate(model)
    tokens, cu_seqlens = packed()
    with pytest.raises(AssertionError):
        assert_equal(model.logits(model.forward_packed(tokens, cu_seqlens)), their_logits(theirs, tokens))


# -- packed and paged -----------------------------------------------------------------------------------------


def test_packed_is_one_by_one(qwen3):
    model, _ = load(qwen3[1])
    tokens, cu_seqlens = packed()
    whole = model.forward_packed(tokens, cu_seqlens)
    for part, rows in zip(tokens.split(list(LENGTHS)), whole.split(list(LENGTHS)), strict=True):
        assert_equal(rows, model.forward_packed(part, torch.tensor([0, len(part)], dtype=torch.int32)))
    given = model.forward_packed(tokens, cu_seqlens, packed_positions(cu_seqlens, len(tokens)), max(LENGTHS))
    assert torch.equal(given, whole)


def test_packed_positions_start_anew_in_every_sequence():
    assert packed_positions(torch.tensor([0, 3, 3, 5], dtype=torch.int32), 5).tolist() == [0, 1, 2, 0, 1]


class Pages:
    """Block tables in scattered order, as a pool that has been in use for a while hands them out."""

    def __init__(self, model, lengths, block_size: int):
        width = -(-max(lengths) // block_size)
        self.kv = PagedKV.allocate(model.config, len(lengths) * width + 3, block_size, model.device, model.dtype)
        order = torch.randperm(self.kv.blocks, generator=torch.Generator().manual_seed(2)).tolist()
        self.tables = torch.full((len(lengths), width), -1, dtype=torch.int32)
        for row, length in enumerate(lengths):
            for column in range(-(-length // block_size)):
                self.tables[row, column] = order.pop()
        self.model = model

    def run(self, sequences, first, last, decode=False):
        """Positions first[s] to last[s] of each sequence; those with none are left out of the step."""
        rows = [row for row in range(len(sequences)) if last[row] > first[row]]
        size = self.kv.block_size
        positions = [torch.arange(first[row], last[row]) for row in rows]
        slots = [self.tables[row].long()[p // size] * size + p % size for row, p in zip(rows, positions, strict=True)]
        counts = torch.tensor([0, *(last[row] - first[row] for row in rows)], dtype=torch.int32)
        step = PagedStep(
            tokens=torch.cat([sequences[row][first[row] : last[row]] for row in rows]),
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            block_tables=self.tables[rows],
            context_lens=torch.tensor([last[row] for row in rows], dtype=torch.int32),
            cu_seqlens_q=None if decode else counts.cumsum(0, dtype=torch.int32),
        )
        hidden = self.model.forward_paged(step, self.kv)
        return dict(zip(rows, hidden.split([last[row] - first[row] for row in rows]), strict=True))


@pytest.mark.parametrize("layout", ["llama-mqa-tied-wide-heads", "qwen2-gqa", "qwen3-gqa"])
@pytest.mark.parametrize("chunk", [64, 5])
def test_paged_is_packed(tmp_path, layout, chunk):
    """Prefill (whole, or in chunks of 5 through blocks of 4) and then token by token, against one packed forward."""
    make(tmp_path, *LAYOUTS[layout])
    model, _ = load(tmp_path)
    tokens, cu_seqlens = packed()
    expected = model.forward_packed(tokens, cu_seqlens).detach().split(list(LENGTHS))
    sequences = tokens.split(list(LENGTHS))
    prompts = [length * 2 // 3 for length in LENGTHS]
    pages = Pages(model, LENGTHS, block_size=4)
    got = {row: [] for row in range(len(LENGTHS))}
    for start in range(0, max(prompts), chunk):
        step = pages.run(sequences, [start] * 4, [min(start + chunk, length) for length in prompts])
        for row, hidden in step.items():
            got[row].append(hidden)
    for offset in range(max(LENGTHS)):
        first = [min(p + offset, length) for p, length in zip(prompts, LENGTHS, strict=True)]
        last = [min(p + offset + 1, length) for p, length in zip(prompts, LENGTHS, strict=True)]
        if first == last:
            break
        for row, hidden in pages.run(sequences, first, last, decode=True).items():
            got[row].append(hidden)
    for row, hidden in got.items():
        assert_equal(torch.cat(hidden), expected[row])


def test_copied_blocks_hold_the_same_keys_and_values(qwen3):
    model, _ = load(qwen3[1])
    tokens, _ = packed()
    pages = Pages(model, LENGTHS, block_size=4)
    pages.run(tokens.split(list(LENGTHS)), [0] * 4, list(LENGTHS))
    source = pages.tables[2, :3].long()
    unused = sorted(set(range(pages.kv.blocks)) - set(pages.tables.flatten().tolist()))[:3]
    pages.kv.copy_blocks(source, torch.tensor(unused))
    assert pages.kv.keys[:, source].abs().min() > 0
    assert torch.equal(pages.kv.keys[:, unused], pages.kv.keys[:, source])
    assert torch.equal(pages.kv.values[:, unused], pages.kv.values[:, source])
    expected = 2 * model.config.layers * 4 * model.config.kv_heads * model.config.head_dim * 4
    assert PagedKV.bytes_per_block(model.config, 4, torch.float32) == expected == pages.kv.keys[:, :1].nbytes * 2


def test_training_after_sampling_made_the_tables(qwen3):
    """The sampler may be the first to ask for rope tables, in inference mode; autograd must be able to save them."""
    model, _ = load(qwen3[1])
    tokens, cu_seqlens = packed()
    with torch.inference_mode():
        Pages(model, LENGTHS, block_size=4).run(tokens.split(list(LENGTHS)), [0] * 4, list(LENGTHS))
    model.forward_packed(tokens, cu_seqlens).square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name != "head")


# -- the object -----------------------------------------------------------------------------------------------


def test_bfloat16_keeps_its_rope_tables_exact(qwen3):
    model, _ = load(qwen3[1])
    tokens, cu_seqlens = packed()
    expected = model.logits(model.forward_packed(tokens, cu_seqlens)).detach()
    table = model.rope_tables(64)[0].clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(model.rope_tables(64)[0], table)
    logits = model.logits(model.forward_packed(tokens, cu_seqlens))
    assert logits.dtype == torch.float32
    difference = (logits - expected).abs().max() / expected.abs().max()
    assert 1e-4 < difference < 5e-2  # bf16 keeps 8 bits: rounding shows, and no more than rounding


def test_initialize_is_seeded_and_starts_uniform():
    config = DecoderConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=160, layers=2, heads=4, kv_heads=2, head_dim=16
    )
    one, same, other = (Decoder(config).initialize(seed) for seed in (3, 3, 4))
    tokens, cu_seqlens = packed()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding, other.embedding)
    assert torch.equal(one.logits(one.forward_packed(tokens, cu_seqlens)), torch.zeros(sum(LENGTHS), VOCAB))
    assert one.embedding.std().item() == pytest.approx(0.5, rel=0.05)
    layer = one.layers[0]
    assert layer.qkv_proj.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert layer.o_proj.std().item() == pytest.approx(0.5 / 8, rel=0.05)
    assert layer.down_proj.std().item() == pytest.approx(0.5 * 160**-0.5, rel=0.05)
    tied = Decoder(replace(config, tie_embeddings=True)).initialize(3)
    assert tied.logits(tied.forward_packed(tokens, cu_seqlens)).std().item() == pytest.approx(1.0, rel=0.2)


def test_a_clone_is_its_own_and_frozen(qwen3):
    model, _ = load(qwen3[1])
    twin = clone(model)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    with torch.no_grad():
        model.embedding.add_(1.0)
    assert not torch.equal(model.embedding, twin.embedding)
    version = twin.weights_version
    copy_weights(model, twin)
    assert torch.equal(model.embedding, twin.embedding) and twin.weights_version == version + 1
    assert model.bump_version() == 1


def test_the_reward_model_scores_the_last_token(qwen3):
    model, _ = load(qwen3[1])
    reward_model = RewardModel.from_decoder(model, seed=5)
    tokens, cu_seqlens = packed()
    scores = reward_model(tokens, cu_seqlens)
    hidden = model.forward_packed(tokens, cu_seqlens)
    assert_equal(scores, torch.stack([hidden[end - 1] @ reward_model.score[0] for end in cu_seqlens[1:].tolist()]))
    scores.sum().backward()
    assert reward_model.score.grad is not None and model.norm.grad is None
    assert copy.deepcopy(reward_model.trunk).head is None
    with pytest.raises(RuntimeError, match="without an output head"):
        reward_model.trunk.logits(hidden)
