"""What test_sharding.py has each of its ranks do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import learning
import torch

from r1fast import snapshot
from r1fast.learn.learner import Learner
from r1fast.learn.preference import pack_pairs, pairwise_loss, preference_step, score
from r1fast.model import native_forward
from r1fast.model.decoder import Decoder, DecoderConfig, Layer, PagedKV, PagedStep
from r1fast.model.lora import fold, merged, save_adapter
from r1fast.model.reward_model import RewardModel
from r1fast.model.sharding import gathered, is_share, own, shard, whole
from r1fast.model.weights import copy_weights, named_views, save, save_reward_model
from r1fast.parallel import World
from r1fast.schema import LoRAConfig, OptimizerConfig

KL = {"kl_coef": 0.05, "aggregate": "token"}
LORA = LoRAConfig(rank=2, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
CASES: dict[str, dict[str, Any]] = {
    "masters": {"dtype": torch.bfloat16},
    "half states": {"dtype": torch.bfloat16, "states": "bfloat16", "recompute": True},
    "adapters": {"lora": LORA, "recompute": True},
    "half adapters": {"dtype": torch.bfloat16, "lora": LORA, "states": "bfloat16"},
}

FROM_ONE = ("half states", "adapters")  # cases gone on with from what one process saved


def ended(case: str, **more: Any) -> dict[str, Any]:
    """A run of `learning.train`: its losses, what the optimizer moved, the weights, and the bytes that are held."""
    losses, weights, _ = learning.train(KL, **CASES[case], **more)
    learner, models = learning.LAST["learner"], learning.LAST["models"]
    held = {id(p): p for p in (*learner.parameters, *(p for model in models for p in model.parameters()))}
    states = [v for values in learner.optimizer.state.values() for v in values.values() if v.dim()]
    return {
        "losses": losses,
        "moved": [p.detach().clone() for p in whole(learner.parameters)],
        "weights": weights,
        "moments": [m.float().clone() for m in whole(states)],
        "held": sum(own(p).nbytes for p in held.values()),
        "states held": sum(own(s).nbytes for s in states),
    }


def all_of(place: World, folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Every case, on shares; gone on with from what these ranks saved, and from what one process saved."""
    found: dict[str, Any] = {}
    for case in CASES:
        with counted_whole() as most:
            found[case] = ended(case, sharded=True, written=folder / case)
        found[case]["gathered at once"] = dict(most)
        if case == "adapters":
            found["kept"] = kept(learning.LAST["models"][0], folder / "kept")
        place.barrier()
        step = snapshot.newest(folder / case, lambda notes: True, print)
        found[case]["resumed"] = ended(case, sharded=True, found=step.path)
        if case in FROM_ONE:
            found[case]["from one"] = ended(case, sharded=True, saved=saved[case])
        if case == "half states":
            copy_weights(*learning.LAST["models"])
            found["refreshed"] = [p.clone() for p in whole(list(learning.LAST["models"][1].parameters()))]
    return {**found, "native": native(place), "scorer": scorer(folder / "scorer", sharded=True)}


def kept(model: Decoder, folder: Path) -> dict[str, Any]:
    """Merged, left, folded and saved: what the sampler read, and whether the shares stayed."""
    before = [own(p).clone() for p in model.parameters()]
    with merged(model):
        sampled = {name: view.clone() for name, view in named_views(model).items()}
    after = [own(p) for p in model.parameters()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    save_adapter(model, LORA, "base", folder / "adapter")
    fold(model)
    save(model, None, folder / "checkpoint")
    return {"sampled": sampled, "same": same}


@contextmanager
def counted_whole() -> Iterator[dict[str, int]]:
    """The most weights that are whole at once on this rank, of all models together, in passes through the layers."""
    most = {"forward": 0, "backward": 0}
    plain = Layer._block

    def look(when: str) -> None:
        weights = [p for model in learning.LAST["models"] for p in model.parameters()]
        most[when] = max(most[when], sum(p.numel() for p in weights if not is_share(p)))

    def block(self: Layer, index: int, x: Any, residual: torch.Tensor, attend: Callable, **more: Any) -> Any:
        look("forward")
        if residual.requires_grad:
            residual.register_hook(lambda _: look("backward"))
        return plain(self, index, x, residual, attend, **more)

    Layer._block = block
    try:
        yield most
    finally:
        Layer._block = plain


PAIRS = [([1 + i, 5, 7, 2][: 2 + i % 3], [3, 1 + i, 4][: 1 + i % 3]) for i in range(7)]


def scorer(folder: Path, sharded: bool = False) -> dict[str, Any]:
    """Three steps of a reward model over three micro-batches, an odd number, its scores, and what it is saved as."""
    config = DecoderConfig(head_dim=4, pad_token_id=0, **learning.SIZES)
    model = RewardModel.from_decoder(Decoder(config, dtype=torch.float64).initialize(3), 5)
    if sharded:
        shard(model)
    learner = Learner(model, OptimizerConfig(learning_rate=1e-2), 3)
    batches = pack_pairs(PAIRS, 16)
    told = [preference_step(learner, batches, pairwise_loss) for _ in range(3)]
    scores = score(model, [side for pair in PAIRS for side in pair], 16)
    held = sum(own(p).numel() for p in model.parameters())
    save_reward_model(model, None, folder)
    stats = [(step.loss, step.grad_norm, right) for step, right in told]
    return {"batches": len(batches), "stats": stats, "scores": scores, "held": held}


def native(place: World) -> dict[str, Any]:
    """The native step of generation on shares, and on gathered weights beside a model that has all of them."""
    config = DecoderConfig(head_dim=8, **{**learning.SIZES, "vocab_size": 40})
    model, full = (Decoder(config).initialize(3) for _ in range(2))
    shard(model)
    tokens, ends = torch.arange(7), torch.tensor([0, 3, 7], dtype=torch.int32)
    positions, tables = torch.tensor([0, 1, 2, 0, 1, 2, 3]), torch.tensor([[0], [1]], dtype=torch.int32)
    slots = positions + torch.tensor([0] * 3 + [4] * 4)
    step = PagedStep(tokens, positions, slots, tables, torch.tensor([3, 4], dtype=torch.int32), ends)
    caches = [PagedKV.allocate(config, 2, 4, "cpu", torch.float32) for _ in range(2)]
    told: dict[str, Any] = {"refusal": native_forward.refusal(model, step, caches[0])}
    try:
        model.forward_paged(step, caches[0])
    except RuntimeError as error:
        told["error"] = str(error)
    with gathered(model):
        told["gathered"] = native_forward.refusal(model, step, caches[0])
        told["same"] = torch.equal(model.forward_paged(step, caches[0]), full.forward_paged(step, caches[1]))
        with torch.no_grad():  # a packed pass within leaves them gathered
            told["packed"] = torch.equal(model.forward_packed(tokens, ends), full.forward_packed(tokens, ends))
        told["still"] = native_forward.refusal(model, step, caches[0])
    told["after"] = native_forward.refusal(model, step, caches[0])
    return told
