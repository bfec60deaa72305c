"""Every setting of a run: frozen dataclasses, one per section, with defaults, units, ranges and help texts.

A configuration is the defaults below, changed by one YAML file, changed by `section.key=value` overrides. Unknown keys
are errors that suggest the right one. This module imports no torch. `aepo keys` prints the whole list.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from aepo.setting_types import Key, Section, key, keys_of, suggestion
from aepo.user_paths import expanded


@dataclass(frozen=True)
class RunConfig(Section):
    section: ClassVar[str] = "run"
    dir: str = key("runs/default", "where this run's files go")
    seed: int = key(0, "all random numbers are functions of (seed, step, index)", low=0, high=2**31 - 1)
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto", "auto: cuda where there is one, else cpu", instead={"gpu": "A GPU is run.device=cuda"}
    )
    threads: int = key(0, "CPU threads for torch; 0: leave torch's own choice", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dir", expanded("run.dir", self.dir))


TASKS = ("facts", "files", "reasoning_gym")


@dataclass(frozen=True)
class TaskConfig(Section):
    """What is trained on (docs/own_agent.md). Names of the user's own code are package.module:name."""

    section: ClassVar[str] = "task"
    name: str = key("facts", "facts (the demo), files (your own data), reasoning_gym, or package.module:Class")
    seed: int = key(0, "of the division into training and held-out questions", low=0)
    options: dict[str, Any] = key({}, "arguments of the task's class, by name")
    train: str | list[str] | None = key(
        None, "files: questions", expected="a .jsonl or .parquet file, a `datasets` directory, or a list"
    )
    heldout: float | str | list[str] | None = key(
        None,
        "files: questions for evaluation; null: a tenth of task.train",
        expected="as task.train, or a share of it in (0, 1)",
    )
    columns: dict[str, str] = key(
        {}, "files: which columns are prompt, answer, id, kind; those not named are guessed", empty=True
    )
    system: str | None = key(
        None, "the system message, as text or as the path of a text file; null: the task's own", empty=True
    )
    tools: tuple[str, ...] = key(
        (),
        "python, search:CORPUS.jsonl, package.module:function or :Class, mcp:COMMAND, mcp+http://.., http://../retrieve",
    )
    tool_timeout: float = key(30.0, "seconds a call of your own tools may take", above=0)
    environment: str | None = key(None, "package.module:Class, a state that calls change (docs/environments.md)")
    rewards: Any = key(
        None,
        "reward functions, weighted; null: the task's own",
        expected="a list of package.module:function or built-in names, or {name: weight}",
    )
    long_prompts: Literal["refuse", "drop"] = key(
        "refuse", "questions whose prompt fills the model's context: end the start and name them, or leave them out"
    )
    success: float = key(1.0, "a path succeeds where the first reward that applies (docs/rewards.md) is at least this")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in TASKS and ":" not in self.name:
            hint = suggestion(self.name, TASKS)
            raise ValueError(f"task.name = {self.name!r}: expected {', '.join(TASKS)}, or package.module:Class{hint}")
        for setting in ("train", "heldout", "columns"):
            value = getattr(self, setting)
            if value not in (None, {}) and self.name != "files":
                raise ValueError(f"task.{setting} = {value!r}: expected task.name = files with it, got {self.name!r}")
        if self.options and self.name in ("facts", "files"):
            raise ValueError(f"task.options = {self.options!r}: expected none with task.name = {self.name}")


@dataclass(frozen=True)
class FormatConfig(Section):
    """How dialogues become tokens, and how calls and answers are written (docs/formats.md)."""

    section: ClassVar[str] = "format"
    name: str = key(
        "auto",
        "chat: the model's own template; tags: <tool>..</tool>, for any model; package.module:Class; auto: chat where "
        "the template shows tools, else tags",
    )
    calls: str = key(
        "auto",
        "chat: how calls are written: hermes, qwen3_coder, llama3_json, glm45, or package.module:Class; auto: by a "
        "round trip",
    )
    answer: Literal["auto", "tag", "boxed", "turn"] = key(
        "auto", "the answer is in <answer>, in \\boxed{}, or the last turn; auto: the first of these that is there"
    )
    chat_template_kwargs: dict[str, Any] = key(
        {}, "chat: arguments of the template's own, such as {enable_thinking: false}"
    )


@dataclass(frozen=True)
class ModelConfig(Section):
    section: ClassVar[str] = "model"
    name: str = key("tiny", "tiny (trained here from scratch), smollm2-135m-instruct, or a model directory")
    dtype: Literal["float32", "bfloat16", "float64"] = key("float32", "of the weights and activations")
    cache_dir: str = key("~/.cache/aepo", "where models are kept that were trained or converted here")


@dataclass(frozen=True)
class WarmStartConfig(Section):
    """Supervised training of the tiny model on generated demonstrations, before AEPO (docs/task.md)."""

    section: ClassVar[str] = "warm_start"
    steps: int = key(800, "optimiser steps; 0: none, the weights are random", low=0)
    batch_tokens: int = key(1024, "tokens per step, padding included", low=128)
    peak_rate: float = key(2e-3, "highest learning rate of AdamW", above=0)
    careful_share: float = key(0.7, "part of the steps with a demonstrator who makes no mistakes", low=0, high=1)
    seed: int = key(0, "of the initial weights and the demonstrations", low=0)


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How the k trajectories of a question come about (docs/rollout.md).

    AEPO: these defaults. ARPO: a fixed `fresh_paths` and `branch_penalty=0`. GRPO: `fresh_paths` equal to `paths`.
    """

    section: ClassVar[str] = "rollout"
    engine: Literal["huggingface", "vllm"] = key(
        "huggingface", "what generates: the trainer's own model, or vLLM with a copy of its weights (section vllm)"
    )
    paths: int = key(8, "k: trajectories per question", low=1)
    fresh_paths: int | None = key(
        None, "m: how many of them start from the question, the others branch; null: entropy pre-monitoring", low=1
    )
    budget_beta: float = key(1.0, "pre-monitoring: m = k sigmoid(beta (H_root - mean H_tool)), entropies in nats")
    entropy_window: int = key(20, "first tokens of a segment whose mean entropy is looked at", low=1)
    branch_alpha: float | Literal["uniform"] = key(
        "uniform", "base chance of a branch: a constant, or drawn from [0, 1) for every decision"
    )
    branch_gamma: float = key(0.2, "weight of the entropy change since the start of the path, in units of log V")
    branch_penalty: float = key(0.05, "every branch in a row on a path lowers the chance by this part", low=0)
    branch_threshold: float = key(0.5, "tau: a path branches where its chance is above this")
    branch_rule: str | None = key(
        None, "package.module:function, a chance of your own in place of that of the paper (docs/rollout.md)"
    )
    temperature: float = key(1.0, "softmax temperature of sampling and of the loss; 0: greedy (evaluation)", low=0)
    max_tokens: int = key(256, "generated and read tokens of one path after the prompt", low=1)
    max_segment_tokens: int = key(128, "generated tokens between two tool results", low=1)
    max_tool_calls: int = key(6, "tool results of one path; it ends where it calls once more", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fresh_paths is not None and self.fresh_paths > self.paths:
            raise ValueError(f"rollout.fresh_paths = {self.fresh_paths}: expected <= rollout.paths ({self.paths})")


@dataclass(frozen=True)
class VLLMConfig(Section):
    """vLLM as the rollout engine (docs/vllm.md)."""

    section: ClassVar[str] = "vllm"
    endpoints: tuple[str, ...] = key((), "base URLs of running `vllm serve`; none: engines are started on this machine")
    replicas: int = key(1, "engines on this machine; more than one only without GPUs", low=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = key(None, "of the engine's weights; null: model.dtype")
    max_model_len: int | None = key(None, "longest sequence, prompt included; null: what the model can do", low=2)
    max_num_seqs: int = key(256, "sequences that are decoded at the same time", low=1)
    enforce_eager: bool = key(False, "no CUDA graphs and no compilation: starts sooner, decodes slower")
    gpu_memory_utilization: float = key(
        0.45, "part of a GPU's memory for the engine; the trainer needs room", above=0, high=1
    )
    kv_cache_gib: float = key(1.0, "memory for keys and values where there is no GPU", above=0)
    weights_dir: str | None = key(
        None,
        "where new weights are handed over, seen by trainer and engines; null: shared memory or temporary files, for "
        "vllm.endpoints the directory that the server names",
    )
    request_timeout: float = key(
        3600.0, "seconds that a server may take for one segment, then it counts as gone", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights_dir is not None:
            object.__setattr__(self, "weights_dir", expanded("vllm.weights_dir", self.weights_dir))
        shown = [re.sub(r"//.*@", "//..@", url, flags=re.DOTALL) for url in self.endpoints]  # never a password
        servers = [server_of(url) for url in self.endpoints]
        if shown != list(self.endpoints):
            raise ValueError(f"vllm.endpoints = {shown}: expected no user or password; the key is VLLM_API_KEY")
        if None in servers or len(set(servers)) < len(servers):
            raise ValueError(f"vllm.endpoints = {shown}: expected different URLs such as http://host:8000")


def server_of(url: str) -> tuple[str, str, int, str] | None:
    """Scheme, host, port and path of a base URL; None: it is none."""
    if not url.isprintable() or set(url) & set(" \\?#"):
        return None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if host is None or parts.scheme not in ("http", "https") or port == 0:
            return None
        if ":" in host:
            IPv6Address(host)
        elif not re.fullmatch(r"[\w.-]+", host):
            return None
    except ValueError:
        return None
    return parts.scheme, host, port or {"http": 80, "https": 443}[parts.scheme], parts.path.rstrip("/")


NO_PRESETS = {
    "ppo": "PPO's clipped loss is that of policy.preset=reinforce++, with the batch's mean in place of a value model; "
    "policy.advantage=group takes the question's",
    "drgrpo": "Dr. GRPO's loss is policy.preset=grpo policy.aggregation=constant; its advantage, without std, is a "
    "function of one line for policy.advantage: aepo_kernels.advantages.group_advantages with scale=False",
    "rloo": "RLOO's leave-one-out advantage is policy.advantage=aepo_kernels.advantages:leave_one_out_advantages",
    "reinforce": "policy.preset=reinforce++ is REINFORCE, with the batch's mean as its baseline, where train.epochs=1 "
    "train.minibatches=1 leave every ratio at 1",
    **{
        name: f"{name.upper()}'s loss is one of your own here: policy.loss (docs/own_loss.md)"
        for name in ("sapo", "dppo", "gmpo", "trpo", "dpo")
    },
}
OBJECTIVE_KEYS = (
    "clip",
    "eps_low",
    "eps_high",
    "dual_clip",
    "ratio_level",
    "entropy_advantage",
    "clamp_entropy_factor",
    "entropy_bonus",
    "kl_coef",
    "kl_estimator",
    "aggregation",
    "importance_cap",
)
"""The settings of section policy that override the preset's objective."""


@dataclass(frozen=True)
class PolicyConfig(Section):
    """Which policy loss and which advantage; the numbers of the presets are in aepo_kernels.objective.PRESETS and
    aepo.advantages.PRESETS."""

    section: ClassVar[str] = "policy"
    preset: Literal["aepo", "arpo", "grpo", "dapo", "cispo", "gppo", "gspo", "gigpo", "reinforce++"] = key(
        "aepo",
        "the algorithm: its loss and its advantage; every field below overrides one part of it",
        instead=NO_PRESETS,
    )
    loss: str | None = key(
        None, "package.module:function, a loss of your own in place of the preset's (docs/own_loss.md); null: none"
    )
    reference: bool = key(False, "policy.loss also gets the log-probs of the frozen starting weights")
    clip: Literal["ppo", "aepo", "gppo", "cispo"] | None = key(None, "gradient of clipped tokens; null: the preset's")
    eps_low: float | None = key(None, "ratios below 1 - eps_low are clipped; null: the preset's", low=0, high=1)
    eps_high: float | None = key(None, "ratios above 1 + eps_high are clipped; null: the preset's", low=0)
    dual_clip: float | None = key(
        None, "bound on the ratio where A < 0, inf: none; null: the preset's", above=1, infinite=True
    )
    ratio_level: Literal["token", "sequence"] | None = key(None, "what a ratio is taken over; null: the preset's")
    entropy_advantage: float | None = key(None, "a in A (1 + a (H - mean H) / std H); null: the preset's", low=0)
    clamp_entropy_factor: bool | None = key(None, "keep that factor >= 0; null: the preset's")
    entropy_stats: Literal["batch", "micro_batch"] = key(
        "batch", "mean and std of H: rollout batch under the old policy, or each micro-batch as in the published code"
    )
    entropy_bonus: float | None = key(None, "coefficient of H in the objective; null: the preset's", low=0)
    kl_coef: float | None = key(None, "KL penalty to the frozen starting weights; null: the preset's", low=0)
    kl_estimator: Literal["k1", "k2", "k3"] | None = key(None, "of that KL; null: the preset's")
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"] | None = key(
        None, "from token losses to one number; constant divides by paths x rollout.max_tokens; null: the preset's"
    )
    importance_cap: float | None = key(
        None,
        "cap of the weight for an engine that differs from the trainer; null: no such weight",
        above=0,
        infinite=True,
    )
    old_logprobs: Literal["auto", "engine", "recompute"] = key(
        "auto",
        "old log-probs: as sampled, or by the trainer; auto: recompute where the engine is not the trainer's model",
    )
    advantage: str | None = key(
        None, "how rewards are normalised: group, batch, gigpo, or package.module:function; null: the preset's"
    )
    drop_equal_groups: bool | None = key(None, "leave questions with equal rewards out; null: the preset's")
    overlong_buffer: int | None = key(
        None, "rewards fall by up to 1 over the last so many of rollout.max_tokens; null: the preset's", low=0
    )
    step_weight: float = key(1.0, "GiGPO: weight of the step advantage", low=0)
    step_discount: float = key(0.95, "GiGPO: discount per step of the return", above=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss is None:
            if self.reference:
                raise ValueError(
                    "policy.reference = true: expected policy.loss, which gets it (a preset has policy.kl_coef)"
                )
            return
        given = [name for name in OBJECTIVE_KEYS if getattr(self, name) is not None]
        given += ["entropy_stats"] if self.entropy_stats != "batch" else []
        if given:
            raise ValueError(
                f"policy.{given[0]} = {getattr(self, given[0])!r}: expected not to be set with policy.loss, which "
                f"would not see it{''.join(f', nor policy.{name}' for name in given[1:])}"
            )


@dataclass(frozen=True)
class OptimizerConfig(Section):
    section: ClassVar[str] = "optimizer"
    learning_rate: float = key(1e-6, "peak learning rate of AdamW", low=0)
    betas: tuple[float, float] = key((0.9, 0.95), "AdamW", low=0, below=1)
    weight_decay: float = key(0.0, "AdamW, on matrices only", low=0)
    warmup_steps: int = key(0, "optimiser steps of linear warmup", low=0)
    schedule: Literal["constant", "linear"] = key("constant", "after warmup; linear falls to 0 at the last step")
    max_grad_norm: float = key(1.0, "gradients are scaled down to this norm; inf: never", above=0, infinite=True)


@dataclass(frozen=True)
class TrainConfig(Section):
    section: ClassVar[str] = "train"
    steps: int = key(40, "rollout batches", low=0)
    questions: int = key(8, "questions per rollout batch", low=1)
    epochs: int = key(1, "passes over each rollout batch", low=1)
    minibatches: int = key(1, "optimiser steps per pass; questions are divided among them", low=1)
    tokens_per_microbatch: int = key(8192, "packed tokens per forward and backward", low=1)


@dataclass(frozen=True)
class EvalConfig(Section):
    section: ClassVar[str] = "eval"
    every: int = key(10, "steps between held-out evaluations; 0: only at the start and the end", low=0)
    questions: int = key(64, "held-out questions per evaluation", low=1)
    temperature: float = key(0.0, "0: greedy", low=0)
    samples: int = key(1, "answers to each question", low=1)
    pass_at: tuple[int, ...] = key((1,), "k of pass@k, each at most eval.samples", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"eval.samples = {self.samples}: expected 1 with eval.temperature = 0, greedy answers are all equal; "
                "eval.temperature=1 samples them as training does"
            )
        if max(self.pass_at, default=0) > self.samples:
            raise ValueError(f"eval.pass_at = {self.pass_at}: expected each at most eval.samples ({self.samples})")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    section: ClassVar[str] = "checkpoint"
    every: int = key(10, "steps between checkpoints; 0: only at the end", low=0)
    keep: int = key(2, "newest checkpoints kept, next to the one with the best held-out success", low=1)


@dataclass(frozen=True)
class LogConfig(Section):
    section: ClassVar[str] = "log"
    tensorboard: bool = key(True, "write TensorBoard event files next to metrics.jsonl")
    wandb: str | None = key(None, "also log to this project of Weights & Biases (WANDB_MODE=offline: to files)")
    trees_every: int = key(10, "steps between saved rollout trees; 0: none", low=0)
    trees: int = key(2, "questions per saved step", low=1)


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.train.minibatches > self.train.questions:
            raise ValueError(
                f"train.minibatches = {self.train.minibatches}: expected <= train.questions ({self.train.questions})"
            )
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature = 0: expected > 0 in training (eval.temperature may be 0)")
        if self.policy.importance_cap is not None and not self.recomputes_old_logprobs:
            raise ValueError(
                "policy.importance_cap weighs the trainer's log-probs against the engine's: "
                "expected policy.old_logprobs = recompute, or rollout.engine = vllm"
            )
        if self.rollout.engine == "vllm" and self.model.dtype == "float64" and self.vllm.dtype is None:
            raise ValueError(
                "vllm.dtype = null: expected float32, bfloat16 or float16, vLLM has no model.dtype = float64"
            )

    @property
    def recomputes_old_logprobs(self) -> bool:
        """Whether the trainer computes the log-probs of the old policy itself."""
        choice = self.policy.old_logprobs
        return choice == "recompute" or (choice == "auto" and self.rollout.engine != "huggingface")


def all_keys() -> list[Key]:
    """Every dotted key, in the order of this file."""
    return keys_of(Config)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file at `path`, then `section.key=value` overrides, of which the last one counts; of a
    setting that has keys, `section.setting.key=value` changes one.

    ValueError, in one line that names the setting, the file and its line: what cannot be read, a key that does not
    exist (the nearest right one is named), or a value of the wrong type or range.
    """
    from aepo.settings_reading import read_settings  # which imports YAML

    return read_settings(Config, path, overrides)


def to_yaml(config: Config) -> str:
    """The whole configuration; `load_config` reads it back to an equal one."""
    from aepo.yaml_settings import dump

    return dump(dataclasses.asdict(config))


def changed_settings(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """By its dotted name each setting that differs: what it was, and what it is."""
    names = [entry.name for entry in all_keys()]
    values = {name: (config_value(before, name), config_value(now, name)) for name in names}
    return {name: (was, value) for name, (was, value) in values.items() if was != value}


def config_value(config: Config, name: str) -> Any:
    section, _, setting = name.partition(".")
    return getattr(getattr(config, section), setting)


def named_files(config: Config) -> Iterator[tuple[str, Path]]:
    """The files and directories that are there of those that settings name, each with its setting."""
    task = config.task
    settings = {
        "model.name": config.model.name,
        "task.train": task.train,
        "task.heldout": task.heldout,
        "task.system": task.system,
        "task.tools": [tool.removeprefix("search:") for tool in task.tools if tool.startswith("search:")],
    }
    for setting, value in settings.items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or "\0" in text:
                continue
            path = os.path.expanduser(text)
            patterns = setting in ("task.train", "task.heldout") and not os.path.lexists(path)
            found = glob.glob(path, recursive=True) if patterns else [path] if os.path.lexists(path) else []
            yield from ((setting, Path(one)) for one in found)


def named_settings(overrides: Sequence[str]) -> set[str]:
    """Those that `section.key=value` overrides give, also where it is one key of a setting."""
    return {".".join(override.partition("=")[0].split(".")[:2]) for override in overrides}
