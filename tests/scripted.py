"""A model that says what a test wants it to: a byte tokenizer, a sampler whose completions are scripted, and a random
checkpoint of a shape that costs nothing. What is real around them is all the rest of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from r1fast.model.tokenizer import set_template
from r1fast.types import Prompt, Rollout, RolloutGroup

EOS, PAD = "<|endoftext|>", "<|pad|>"
ASCII = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # what a byte tokenizer calls the printable bytes, space and line end


@cache
def byte_tokenizer(template: str = "paper", ascii_only: bool = False):
    """Every byte a token, so that any text is encoded and decodes to itself. `ascii_only`: any tokens are then a text
    that encodes to them, as those of a random model."""
    alphabet = ASCII if ascii_only else sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([EOS, PAD, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    set_template(fast, template)
    return fast


def random_checkpoint(folder: Path, positions: int = 4096) -> Path:
    """A random Qwen2 that says ASCII, in Hugging Face format, written by transformers."""
    tokenizer = byte_tokenizer(ascii_only=True)
    config = transformers.Qwen2Config(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": positions},
        **{"eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": False, "initializer_range": 0.2},
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class ScriptedSampler:
    """Stands for the sampler in an evaluation: `say(prompt, sample)` is what is drawn, or None for one that ran into
    its limit. Notes the ids of the prompts that it was asked for, and of those that it finished."""

    def __init__(self, say: Callable[[Prompt, int], str | None], tokenizer=None):
        self.say, self.tokenizer = say, tokenizer or byte_tokenizer()
        self.asked: list[str] = []
        self.done: list[str] = []

    def stream(self, prompts, params):
        self.asked += [prompt.id for prompt in prompts]
        for index, prompt in enumerate(prompts):
            rollouts = []
            for sample in range(params.n):
                text = self.say(prompt, sample)
                tokens = self.tokenizer.encode("..." if text is None else text, add_special_tokens=False)
                rollouts.append(Rollout(tokens, [0.0] * len(tokens), "length" if text is None else "stop"))
            self.done.append(prompt.id)
            yield index, RolloutGroup(prompt, rollouts, 0)
