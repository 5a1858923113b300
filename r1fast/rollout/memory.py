"""The sampler's memory: how large the cache is, what is in it, and that nothing of other weights is ever read from it.

Size. `kv_blocks` blocks, or, where that is None, enough for all that may run together without any sharing, but at most
half of the memory that is free when the cache is made (and never less than the longest request needs). It is made when
a call needs it, stated in the log (logger `r1fast.rollout`, level INFO), and does not change before that call ends; a
later call that needs more gets a larger one. `release` gives it back, for training on the same device.

Weights. What a block holds depends on the weights, so its name does (kv_cache.block_names): the root of all names is a
stamp of the model, read anew whenever work begins. A block computed with other weights has another name and cannot be
found. The stamp sees an update that is announced (`Decoder.bump_version`), an update in place (the tensors' version
counters), other tensors in place of the old ones (their addresses), and, for writes that torch does not count
(`parameter.data`, native code), a few elements of every tensor.
"""

from __future__ import annotations

import hashlib
import logging

import torch

from r1fast.device import free_memory
from r1fast.model.decoder import Decoder
from r1fast.model.paged import PagedKV
from r1fast.rollout.kv_cache import BlockPool

log = logging.getLogger("r1fast.rollout")
_PROBED = 8  # elements of each tensor that the stamp reads


class KVMemory:
    """The cache's tensors and the pool that counts their blocks; none of either before the first call."""

    def __init__(self, model: Decoder, block_size: int, kv_blocks: int | None):
        self.model, self.block_size, self.kv_blocks = model, block_size, kv_blocks
        self.kv: PagedKV | None = None
        self.pool: BlockPool | None = None
        self.stamp = b""

    def prepare(self, longest: int, rows: int) -> None:
        """Room for a call whose sequences have up to `longest` blocks, of which `rows` run together."""
        config, device, dtype = self.model.local_config, self.model.device, self.model.dtype
        blocks = self.kv_blocks
        per_block = PagedKV.bytes_per_block(config, self.block_size, dtype)
        free = None
        if blocks is None:
            held = 0 if self.kv is None else self.kv.blocks
            blocks = held
            if held < longest * rows:
                free = free_memory(device) + held * per_block
                if self.model.tensor is not None:  # ranks that hold a model together decode the same rows
                    free = self.model.tensor.least(free)
                blocks = max(longest, min(longest * rows, free // per_block // 2), held)
        kv = self.kv
        if kv is None or kv.blocks != blocks or kv.keys.device != device or kv.keys.dtype != dtype:
            self.release()  # the old one goes before the new one comes
            self.kv = PagedKV.allocate(config, blocks, self.block_size, device, dtype)
            self.pool = BlockPool(blocks, self.block_size)
            of = "as kv_blocks asks" if free is None else f"of {free / 2**20:,.0f} MiB free"
            log.info("KV cache on %s: %s %s", device, self.stated, of)

    def restamp(self) -> None:
        """Look at the weights anew; blocks of others are free. To be called when no sequence is in the pool."""
        stamp = weights_stamp(self.model)
        if stamp != self.stamp:
            self.pool.flush()
            self.stamp = stamp

    def release(self) -> None:
        """Give the memory back; on a GPU to the device, so that others can have it."""
        device = None if self.kv is None else self.kv.keys.device
        self.kv = self.pool = None
        if device is not None and device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def stated(self) -> str:
        """How large the cache is, for people."""
        blocks = 0 if self.pool is None else self.pool.blocks
        return f"{blocks * self.block_size:,} tokens in {blocks:,} blocks, {self.bytes / 2**20:,.1f} MiB"

    @property
    def bytes(self) -> int:
        """Of the blocks that sequences can have."""
        return 0 if self.kv is None else 2 * self.kv.keys[:, : self.kv.blocks].nbytes


class WeightsWatch:
    """Whether a model's weights are still those of when this was made, as far as torch or the learner says so.

    Cheap enough for every step: 40 tensors take 3 us.
    """

    def __init__(self, model: Decoder):
        self._model = model
        self._counted = [p for p in model.parameters() if not p.is_inference()]  # the others have no version
        self._first = self.version()

    def version(self) -> tuple[int, int]:
        return self._model.weights_version, sum([p._version for p in self._counted])

    def changed(self) -> bool:
        return self.version() != self._first


@torch.inference_mode()
def weights_stamp(model: Decoder) -> bytes:
    """16 bytes that differ after any update of the weights; see the module for what it sees."""
    parameters = list(model.parameters())
    probes = [p.reshape(-1)[:: max(1, p.numel() // _PROBED)][:_PROBED] for p in parameters]
    content = torch.cat(probes).float().cpu().numpy().tobytes()
    seen = (WeightsWatch(model).version(), [p.data_ptr() for p in parameters])
    return hashlib.blake2b(repr(seen).encode() + content, digest_size=16).digest()
