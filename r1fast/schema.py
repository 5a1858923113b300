"""What a recipe may say: one typed, frozen class for every block of the YAML, each key with its default and meaning.

There is one source per value and no free-form keys: an unknown key is an error (config.py names the nearest known
one). Everything downstream is handed these objects, and the same objects are written to RUN_DIR/config.yaml.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


# -- models ---------------------------------------------------------------------------------------------------


class ShapeConfig(Strict):
    """A decoder to be built from scratch (the tiny presets have no checkpoint to start from)."""

    architecture: Literal["llama", "qwen2", "qwen3"] = "qwen3"
    hidden_size: PositiveInt = 64
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    head_dim: PositiveInt = 16
    intermediate_size: PositiveInt = 160
    rope_theta: PositiveFloat = 1000.0
    max_positions: PositiveInt = 512
    tie_embeddings: bool = False


class ModelConfig(Strict):
    """The checkpoint that `from: model` means, and how every model of the run is held."""

    path: str | None = None  # a Hugging Face folder: Llama, Qwen2/2.5 or Qwen3
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on a CPU, bfloat16 on a GPU
    template: Literal["paper", "checkpoint", "words"] = "paper"  # the R1 paper's, the checkpoint's own, or tiny's
    max_length: PositiveInt = 512  # prompt and completion together, in tokens


class TaskConfig(Strict):
    """Where prompts come from and what says that an answer is right; r1fast/tasks/ has one file a kind."""

    kind: str
    path: str | None = None  # a JSONL file or a `datasets` name, for kinds that read one; default: the recipe's `data`
    options: dict[str, Any] = {}  # of this kind; checked by the task itself


class JudgeConfig(Strict):
    """The language model that the reward `judge` asks."""

    url: str  # an OpenAI-compatible endpoint, as http://127.0.0.1:8000/v1
    model: str
    key: str = "OPENAI_API_KEY"  # the environment variable that holds the key, where one is wanted
    cache: str = "judge.sqlite"  # replies by question; the budget counts this file's requests
    budget: PositiveInt | None = None  # requests that may be sent in all; None: any number
    tries: int = Field(4, ge=1, le=10)  # of one request
    timeout: PositiveFloat = 120.0  # seconds for one try
    max_tokens: PositiveInt = 4096  # of a reply

    # A recipe is written to RUN_DIR/config.yaml and shown in reports: it must hold no secret.

    @field_validator("key")
    @classmethod
    def _names_a_variable(cls, key: str) -> str:
        if not re.fullmatch(r"[A-Z][A-Z_]*[A-Z0-9_]{0,8}", key):
            raise ValueError(
                "names the environment variable that holds the key (capitals and _, as OPENAI_API_KEY); the key itself "
                "belongs in no file and no command"
            )
        return key

    @field_validator("url")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query:
            raise ValueError(
                "is an address without user, password or query; put the key into the environment variable that "
                "rewards.judge.key names"
            )
        return url


class OverlongReward(Strict):
    """DAPO eq. 13 as a reward that a mix weighs; a stage's own `overlong` is the same with weight 1."""

    max_tokens: PositiveInt
    window: PositiveInt


class RewardsConfig(Strict):
    """How verifiers are run, whatever they verify."""

    sandbox: Literal["bubblewrap", "rlimits"] = "bubblewrap"  # rlimits isolates far less (r1fast/rewards/sandbox.py)
    workers: int = Field(0, ge=0)  # processes; 0: one a core, at most 8
    deadline: PositiveFloat = 5.0  # seconds for one completion, but for rewards that set their own (code, judge)
    judge: JudgeConfig | None = None
    repetition_ngram: PositiveInt = 4  # words in a sequence that `repetition` counts
    overlong: OverlongReward | None = None  # what the reward `overlong` needs to know
    max_failures: float = Field(0.2, ge=0, le=1)  # share of a step's scores that may fail before the run stops


# -- what stages share ----------------------------------------------------------------------------------------


class OptimizerConfig(Strict):
    """AdamW with warm-up, then constant, linear or cosine decay to `final` times the rate."""

    learning_rate: PositiveFloat = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    flat: float = Field(0.0, ge=0, le=1)  # share of the steps held at the full rate before the decay begins
    final: float = Field(0.1, ge=0, le=1)  # last rate over the full one; ignored by `constant`
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    implementation: Literal["torch", "apex"] = "torch"  # apex: its FusedAdam, where it is installed, on a GPU
    states: Literal["auto", "float32", "bfloat16"] = "auto"  # of the two moments; auto: bfloat16 when memory is short


class LoRAConfig(Strict):
    """Adapters on a frozen model (r1fast/model/lora.py): what is trained instead of all its weights."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0  # the product is scaled by alpha / rank
    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )


class SamplingConfig(Strict):
    max_tokens: PositiveInt = 256
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0: off


class ObjectiveConfig(Strict):
    """GRPO (DeepSeekMath eq. 3) and its variants; the default is R1's, except for the clip range (see clip_high)."""

    aggregate: Literal["sequence", "token", "constant"] = "sequence"  # R1 | DAPO | Dr. GRPO
    normalize_std: bool = True  # off in Dr. GRPO
    importance: Literal["token", "sequence"] = "token"  # sequence: GSPO
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2  # R1 prints eps = 10, for both bounds, in RL stage 1
    kl_coef: float = Field(0.001, ge=0)
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    truncated_is: PositiveFloat | None = None  # cap C of min(pi_train / pi_sampler, C); None: off


class OverlongConfig(Strict):
    """DAPO eq. 13: reward falls linearly to -1 over the last `window` tokens before `max_tokens`."""

    window: PositiveInt


class MixEntry(Strict):
    """One source of prompts in an RL stage."""

    task: str
    share: PositiveFloat = 1.0  # of the step's prompts, relative to the other entries that are active
    rewards: dict[str, float] = {"accuracy": 1.0, "format": 1.0}  # kind -> weight; accuracy: the task's own verifier
    start: float = Field(0.0, ge=0, lt=1)  # share of the steps after which it joins (R1: the last 400 of 1,700)


class DataSource(Strict):
    """Supervised rows: of a stage that writes them, of a task's own written solutions, or of a file."""

    stage: str | None = None
    task: str | None = None
    path: str | None = None
    limit: PositiveInt | None = None


# -- stages ---------------------------------------------------------------------------------------------------


class StageBase(Strict):
    evaluate: bool = True  # run the recipe's evaluation on the checkpoint when the stage is done


class PretrainStage(StageBase):
    kind: Literal["pretrain"]
    task: str  # must give a corpus
    shape: ShapeConfig = ShapeConfig()
    steps: PositiveInt = 1000
    batch_tokens: PositiveInt = 256
    curriculum: float = Field(0.3, ge=0, lt=1)  # share of the steps on the task's easy documents
    optimizer: OptimizerConfig = OptimizerConfig()


class SFTStage(StageBase):
    kind: Literal["sft"]
    from_: str = Field("model", alias="from")
    data: list[DataSource]
    epochs: PositiveFloat = 2
    batch_examples: PositiveInt = 128
    micro_batch_tokens: PositiveInt | None = None
    recompute: bool | None = None
    adapters: LoRAConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-5, schedule="cosine", final=0.1)


class DistillStage(SFTStage):
    """The teacher's kept samples into a smaller model: SFT only, as in the paper (B.4.3)."""

    kind: Literal["distill"]
    teacher: str | None = None  # the stage that made the rows' teacher; stated in the report


class GRPOStage(StageBase):
    kind: Literal["grpo"]
    from_: str = Field("model", alias="from")
    mix: list[MixEntry]
    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 32
    group_size: PositiveInt = 16
    sampling: SamplingConfig = SamplingConfig()
    mini_batches: PositiveInt = 1  # optimizer steps per epoch over one set of rollouts (R1: 16)
    epochs: PositiveInt = 1
    micro_batch_tokens: PositiveInt | None = None  # None: what the memory plan finds (r1fast/learn/memory.py)
    recompute: bool | None = None  # activations, in the backward pass; None: where memory asks for it
    adapters: LoRAConfig | None = None  # train adapters only; the reference is then the base, and cannot be refreshed
    share_prompts: Literal["auto", "always", "never"] = "auto"  # forward a group's prompt once: where it saves enough
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-6)
    reference_refresh: PositiveInt | None = None  # steps between copies of the policy into the reference (R1: 400)
    dynamic_sampling: bool = False  # DAPO: draw prompts until the step is full of groups whose rewards differ
    dynamic_rounds: PositiveInt = 4  # at most so many draws a step
    overlong: OverlongConfig | None = None
    old_logprobs: Literal["auto", "sampler", "recompute"] = "auto"  # auto: the sampler's while within the bound
    logprob_bound: PositiveFloat = 1e-3  # mean |sampler - learner| in nats under which the sampler's are used
    reward_model: str | None = None  # the stage that trained what the reward `preference` asks
    safety_model: str | None = None  # the stage (pointwise) that trained what the reward `safety` asks
    overlap: Literal["auto", "always", "never"] = "auto"  # of drawing and learning (docs/learning.md); changes no bit
    evaluate_every: int = Field(0, ge=0)  # steps between points of the pass@1 curve; 0: only at the end


class RejectStage(StageBase):
    """Sample, score, keep what is right and readable, de-duplicate, balance, write rows.jsonl (B.3.3)."""

    kind: Literal["reject"]
    from_: str = Field("model", alias="from")
    task: str
    prompts: PositiveInt = 600
    samples: PositiveInt = 4
    keep_per_prompt: PositiveInt = 4
    sampling: SamplingConfig = SamplingConfig()
    require: list[str] = ["accuracy", "format", "language"]  # rewards that must be 1 (language: above `readable`)
    readable: float = Field(1.0, ge=0, le=1)  # least share of the target language
    max_paragraph: PositiveInt = 2000  # characters; longer ones are dropped, as are code blocks in the reasoning
    at_least: int = Field(1, ge=0)  # fewer kept samples than this stop the run: what follows would learn nothing
    general: list[DataSource] = []  # non-reasoning rows added as they are
    evaluate: bool = False


class RewardModelStage(StageBase):
    """Bradley-Terry on pairs (helpfulness) and logistic on single answers (safety)."""

    kind: Literal["reward_model"]
    from_: str = Field("model", alias="from")
    task: str  # must give preferences
    objective: Literal["pairwise", "pointwise"] = "pairwise"
    scores: Literal["answer", "response"] = "answer"  # helpfulness reads the final answer, safety the whole response
    pairs: PositiveInt = 1500
    epochs: PositiveFloat = 1
    batch_pairs: PositiveInt = 64
    micro_batch_tokens: PositiveInt | None = None
    recompute: bool | None = None
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=6e-6)
    evaluate: bool = False


class EvaluateStage(StageBase):
    """An evaluation as a node of its own, with its own protocol."""

    kind: Literal["evaluate"]
    from_: str = Field("model", alias="from")
    protocol: EvaluationConfig | None = None  # default: the recipe's
    evaluate: bool = False


class EvaluationConfig(Strict):
    """What is measured after every stage, on the task's test split: the paper's protocol (T 0.6, top-p 0.95)."""

    task: str | None = None  # default: the recipe's first task
    general: str | None = None  # a second task whose answers have no right or wrong: its own measures are reported
    limit: PositiveInt = 256  # problems
    samples: PositiveInt = 16  # k of pass@1 (the mean over k) and cons@k
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
    at_one: int = Field(0, ge=0)  # samples at temperature 1 as well, where RL trains; 0: none
    greedy: bool = True
    curve_limit: PositiveInt = 64  # validation problems for each point of the RL curves
    curve_samples: PositiveInt = 16


Stage = Annotated[
    PretrainStage | SFTStage | DistillStage | GRPOStage | RejectStage | RewardModelStage | EvaluateStage,
    Field(discriminator="kind"),
]


class CheckpointConfig(Strict):
    """When a running stage is saved, so that a killed run goes on from there (stages/steps.py). Changes no result."""

    minutes: float = Field(10.0, ge=0)  # since the last one; 0: not by time
    steps: int = Field(0, ge=0)  # since the last one; 0: not by steps
    keep: PositiveInt = 2  # newest ones; the others are removed, but for...
    best: Literal["auto", "pass@1", "reward", "none"] = "auto"  # ... an RL stage's best by this; auto: pass@1 where
    # it is measured (evaluate_every), else the reward (stages/best.py)
    # Written while the next steps run, from a copy; auto: where the state is large enough to pay (stages/saving.py).
    background: Literal["auto", "always", "never"] = "auto"
    rollout_seconds: float = Field(5.0, ge=0)  # a draw that took longer is kept on disk until the next snapshot


class WatchdogConfig(Strict):
    """When a phase of a step is taken for hung (watchdog.py), and what to do with numbers that are none."""

    enabled: bool = True
    factor: PositiveFloat = 10.0  # times the longest that the phase took in this stage so far
    least_seconds: PositiveFloat = 600.0
    first_seconds: PositiveFloat = 7200.0  # for a phase that has not ended once
    nonfinite_steps: PositiveInt = 5  # steps in a row without a finite loss or gradient, after which...
    on_nonfinite: Literal["stop", "roll_back"] = "stop"  # ... the run ends, or goes on from its last snapshot's weights


class ParallelConfig(Strict):
    """How a run under torchrun is split; changes no result but for rounding."""

    # Weights, gradients and optimizer state over all ranks (FSDP2), or over those of each machine (HSDP).
    shard: Literal["none", "all", "node"] = "none"
    # Consecutive ranks that hold each model together, a part of every layer each: for one that no card can hold.
    tensor: PositiveInt = 1

    @model_validator(mode="after")
    def _one_way(self) -> ParallelConfig:
        if self.tensor > 1 and self.shard != "none":
            raise ValueError("tensor above 1 and shard other than none cannot be had together; leave one of them out")
        return self


class RecipeConfig(Strict):
    name: str
    description: str = ""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0)  # CPU threads; 0: torch's own choice
    profile: bool = False  # record two steps of every stage (r1fast/stages/profiling.py)
    data: str | None = None  # the file or dataset name that tasks without a path of their own read
    model: ModelConfig = ModelConfig()
    tasks: dict[str, TaskConfig]
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    parallel: ParallelConfig = ParallelConfig()
    rewards: RewardsConfig = RewardsConfig()
    plugins: list[str] = []  # Python files with rewards and tasks of one's own (r1fast/plugins.py)
    stages: dict[str, Stage]


EvaluateStage.model_rebuild()
