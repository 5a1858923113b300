"""A whole GRPO step by r1fast and by TRL: one checkpoint, the same prompts and reward, timed by phase.

The processes that benchmarks.vs_trl and the GPU's script start live here. A contender is a function
`(Shape, checkpoint folder, settings, wait, told)`: it gets ready, then takes a step whenever `wait()` allows one more
and says of it, through `told`, its seconds, those of its phases, and the tokens drawn. (TRL's trainer owns its loop, so
both are asked this way.) Peak memory is told beside what the process held when its imports were done, and when it was
ready: hundreds of megabytes of libraries are in every figure of a whole process, on both sides.

The checkpoint never draws the end of a sequence, so that every completion has its full length on both sides: dimension
0 of all embeddings is the same positive number, which no layer writes to and which moves no distribution, and that of
<eos> is far below it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from random import Random

import torch

from r1fast import rewards
from r1fast.metrics import PhaseTimer, RunLog
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.tokenizer import build_word_tokenizer
from r1fast.model.weights import save
from r1fast.progress import PlainProgress
from r1fast.schema import RecipeConfig
from r1fast.stages.context import StageContext
from r1fast.tasks import Task, build, register
from r1fast.types import Problem

SPECIALS = ("<pad>", "<eos>", "<unk>")
LEARNING_RATE, KL = 1e-6, 0.04


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and what a step of it samples. Qwen3's architecture, tied embeddings."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    inner: int = 640
    vocabulary: int = 512
    prompts: int = 8
    group: int = 8
    prompt: tuple[int, int] = (24, 42)  # shortest and longest prompt, in tokens
    completion: int = 128
    kl: bool = True
    device: str = "cpu"
    dtype: str = "float32"

    def config(self) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_positions=max(512, 2 * (self.prompt[1] + self.completion)),
            tie_embeddings=True,
            eos_token_ids=(1,),
            pad_token_id=0,
        )

    @property
    def parameters(self) -> int:
        """Of one token's products: the layers' and the head's."""
        mixed = self.heads * 2 + self.kv_heads * 2
        layer = self.hidden * (mixed * self.head_dim + 3 * self.inner)
        return self.layers * layer + self.vocabulary * self.hidden

    @property
    def mean_prompt(self) -> float:
        return sum(self.prompt) / 2

    def flops(self, shared: bool) -> dict[str, float]:
        """Useful floating point operations of a step's products and attention, by phase: two for each parameter and
        token in a forward pass, four more in a backward one; the head on completions only. `shared`: each prompt is
        forwarded once a group (the sampler always does)."""
        samples, done = self.prompts * self.group, self.completion
        head = self.vocabulary * self.hidden
        body, width = self.parameters - head, self.layers * self.heads * self.head_dim

        def forward(prompts: float) -> float:
            """`prompts` forwarded in full and every completion behind one of them."""
            products = 2 * body * (prompts * self.mean_prompt + samples * done) + 2 * head * samples * done
            pairs = prompts * self.mean_prompt**2 / 2 + samples * done * (self.mean_prompt + done / 2)
            return products + 4 * width * pairs

        sample, learn = forward(self.prompts), forward(self.prompts if shared else samples)
        return {"sample": sample, "logprob": learn if self.kl else 0.0, "learn": 3 * learn}


def texts(shape: Shape, count: int, seed: int = 0) -> list[str]:
    """Prompts of random words, their lengths spread evenly over shape.prompt."""
    random, (low, high) = Random(seed), shape.prompt
    words = range(shape.vocabulary - len(SPECIALS))
    return [" ".join(f"w{w}" for w in random.choices(words, k=random.randint(low, high))) for _ in range(count)]


@rewards.register("low_words")
class LowWords(rewards.Reward):
    """The share of words in the lower half of the vocabulary: cheap, and never the same within a group."""

    def judge(self, completion, reference):
        words = completion.split()
        return sum(int(word[1:]) < reference for word in words if word[0] == "w") / max(1, len(words))


@register("random_words")
class RandomWords(Task):
    """Prompts of random words; of `shape` in the module that made the task."""

    verifier = "low_words"
    shape = Shape()

    def problems(self, split, count=None, seed=0):
        made = texts(self.shape, min(count or 256, 256), seed)
        return [Problem(f"{split}{i}", text, self.shape.vocabulary // 2, self.name) for i, text in enumerate(made)]


def make_checkpoint(shape: Shape, folder: Path) -> None:
    """Random weights whose logits have a standard deviation of about 1.5."""
    model = Decoder(shape.config(), dtype=getattr(torch, shape.dtype)).initialize(0)
    with torch.no_grad():
        model.embedding *= 1.5
        model.embedding[:, 0] = 1.0
        model.embedding[1, 0] = -1000.0
        for layer in model.layers:
            layer.o_proj[0] = layer.down_proj[0] = 0.0
    tokenizer = build_word_tokenizer([f"w{i}" for i in range(shape.vocabulary - len(SPECIALS))], SPECIALS)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    save(model, tokenizer, folder)


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


Wait, Told = Callable[[], bool], Callable[..., None]


def r1fast_steps(shape: Shape, checkpoint: Path, settings: dict, wait: Wait, told: Told) -> None:
    """The stage that `python -m r1fast.train` runs, log and all. settings: of the stage's block of the recipe."""
    from r1fast.heap import keep_freed_memory
    from r1fast.stages.grpo import GRPOStageRun

    keep_freed_memory()
    RandomWords.shape = shape
    stage = {
        "kind": "grpo",
        "mix": [{"task": "words", "rewards": {"accuracy": 1.0}}],
        "steps": 1000,
        "prompts_per_step": shape.prompts,
        "group_size": shape.group,
        "sampling": {"max_tokens": shape.completion},
        "objective": {"kl_coef": KL if shape.kl else 0.0},
        "optimizer": {"learning_rate": LEARNING_RATE},
    } | settings
    longest = shape.prompt[1] + shape.completion
    recipe = RecipeConfig.model_validate(
        {
            "name": "whole_step",
            "model": {"path": str(checkpoint), "template": "checkpoint", "max_length": longest},
            "tasks": {"words": {"kind": "random_words"}},
            "stages": {"rl": stage},
        }
    )
    with tempfile.TemporaryDirectory() as scratch, RunLog(Path(scratch)) as log:
        context = StageContext(
            name="rl",
            stage=recipe.stages["rl"],
            recipe=recipe,
            directory=Path(scratch),
            seed=0,
            device=shape.device,
            dtype=shape.dtype,
            tasks={"words": build("words", recipe.tasks["words"])},
            log=log,
            progress=PlainProgress(file=sys.stderr),
            artifacts={},
        )
        loop, step = GRPOStageRun(context), 0
        context.progress.stage("rl", "grpo", 1000)
        while wait():
            start = time.perf_counter()
            loop.timer.take()
            step += 1
            event = loop.step(step)
            assert event["tokens"] == shape.prompts * shape.group * shape.completion, "a completion ended early"
            told(time.perf_counter() - start, event["phase_seconds"], event["tokens"])


def trl_steps(shape: Shape, checkpoint: Path, settings: dict, wait: Wait, told: Told) -> None:
    """TRL's GRPOTrainer. settings: micro_batch, attention, and whatever else GRPOConfig takes."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    settings = dict(settings)
    samples, micro = shape.prompts * shape.group, settings.pop("micro_batch")
    attention = settings.pop("attention", "sdpa")
    reward, timer = rewards.get("low_words"), PhaseTimer()

    def judge(completions, **_):
        return [reward.judge(text, shape.vocabulary // 2) for text in completions]

    class Done(Exception):
        pass

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not wait():
                raise Done
            timer.take()
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, *_, **__):
            timer("learn").__enter__()

        def on_optimizer_step(self, *_, **__):
            timer.__exit__()

        def on_step_end(self, *_, **__):
            told(time.perf_counter() - self.start, timer.take(other=True), samples * shape.completion)

    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=samples // micro,
            num_generations=shape.group,
            max_completion_length=shape.completion,
            max_steps=1000,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=KL if shape.kl else 0.0,
            loss_type="grpo",
            temperature=1.0,
            max_grad_norm=1.0,
            model_init_kwargs={"dtype": shape.dtype, "attn_implementation": attention},
            bf16=shape.dtype == "bfloat16",
            use_cpu=shape.device == "cpu",
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = GRPOTrainer(
            str(checkpoint),
            reward_funcs=judge,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts(shape, 256)}),
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            callbacks=[Turns()],
        )

        def timed(owner, name: str, phase: Callable[[], str]) -> None:
            inner = getattr(owner, name)

            def outer(*args, **kwargs):
                with timer(phase()):
                    return inner(*args, **kwargs)

            setattr(owner, name, outer)

        timed(trainer, "training_step", lambda: "learn")
        timed(trainer, "_prepare_inputs", lambda: "other")
        timed(trainer, "_generate_single_turn", lambda: "sample")
        timed(trainer, "_calculate_rewards", lambda: "score")
        timed(trainer.accelerator, "clip_grad_norm_", lambda: "learn")
        timed(
            trainer,
            "_get_per_token_logps_and_entropies",
            lambda: "learn" if torch.is_grad_enabled() else "logprob",
        )
        with suppress(Done):
            trainer.train()


CONTENDERS = {"r1fast": r1fast_steps, "TRL": trl_steps}
IMPORTS = {  # what each side's code needs, told apart from what its models and steps take
    "r1fast": {
        "r1fast.heap": "keep_freed_memory",
        "r1fast.stages.grpo": "GRPOStageRun",
        "transformers": "AutoTokenizer",
    },
    "TRL": {"datasets": "Dataset", "transformers": "AutoTokenizer", "trl": "GRPOTrainer"},
}


def serve() -> None:
    """A child process: one JSON line of what to be on standard input, then a line for every step asked for."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print
    asked = json.loads(sys.stdin.readline())
    shape = Shape(**asked["shape"] | {"prompt": tuple(asked["shape"]["prompt"])})
    for module, name in IMPORTS[asked["who"]].items():
        getattr(import_module(module), name)  # what is imported lazily, too
    imports, before = peak_bytes("cpu"), None

    def wait() -> bool:
        nonlocal before
        if before is None:
            before = peak_bytes(shape.device)
            print(json.dumps({"ready": True}), file=out, flush=True)
        return bool(sys.stdin.readline().strip())

    def told(seconds: float, phases: dict[str, float], tokens: int) -> None:
        line = {"seconds": seconds, "phases": phases, "tokens": tokens}
        line |= {"peak": peak_bytes(shape.device), "before": before, "imports": imports}
        print(json.dumps(line), file=out, flush=True)

    CONTENDERS[asked["who"]](shape, Path(asked["checkpoint"]), asked["settings"], wait, told)
    out.flush()
    os._exit(0)


def ask(who: str, shape: Shape, checkpoint: Path, settings: dict) -> str:
    """What `serve` reads first."""
    asked = {"who": who, "shape": asdict(shape), "checkpoint": str(checkpoint), "settings": settings}
    return json.dumps(asked) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description="a child process of benchmarks.vs_trl").parse_args()
    serve()
