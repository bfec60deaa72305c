"""Configuration: file and overrides give one checked object; a wrong key or value is an error that helps."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aepo.config import (
    OBJECTIVE_KEYS,
    Config,
    OptimizerConfig,
    PolicyConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    all_keys,
    config_value,
    load_config,
    to_yaml,
    yaml_settings,
)
from aepo.config.learning_sections import NO_PRESETS
from aepo_kernels.objective import PolicyObjective, PresetName

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  steps: 7\n  questions: 3\noptimizer:\n  learning_rate: 2e-5\n")
    config = load_config(file, ["train.steps=9", "optimizer.betas=[0.8,0.99]", "policy.eps_high=0.28"])
    assert (config.train.steps, config.train.questions) == (9, 3)
    assert config.optimizer.learning_rate == 2e-5
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.policy.eps_high == 0.28
    assert config.policy.eps_low is None, "null: the preset's own value"


def test_one_key_of_a_setting_that_has_keys(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("format:\n  chat_template_kwargs: {enable_thinking: false}\n")
    name = "format.chat_template_kwargs"
    config = load_config(file, [f"{name}.date_string=2024-07-26", f"{name}.effort=null"])
    assert config.format.chat_template_kwargs == {"enable_thinking": False, "date_string": "2024-07-26", "effort": None}
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    replaced = load_config(file, [f"{name}={{a: 1}}", f"{name}.b=2"])
    assert replaced.format.chat_template_kwargs == {"a": 1, "b": 2}
    replaced = load_config(overrides=[f"{name}.a\\.b=1", f"{name}.c d-e.0=2"])
    assert replaced.format.chat_template_kwargs == {"a.b": 1, "c d-e": {"0": 2}}
    own = load_config(overrides=["task.name=mine:Task", "task.options.data.sums.size=3", "task.options.data.seed=1"])
    assert own.task.options == {"data": {"sums": {"size": 3}, "seed": 1}}


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config(overrides=["policy.preset=reinforce++", "run.dir=runs/a b", "policy.dual_clip=inf"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.step=3", "unknown key 'train.step': did you mean 'train.steps'?"),
        ("learning_rate=1", "did you mean 'optimizer.learning_rate'?"),
        ("policy.temperature=1", "did you mean 'rollout.temperature' or 'eval.temperature'?"),
        ("run=3", "unknown key 'run'"),
        ("policy.preset=aepoo", "policy.preset = 'aepoo': expected one of aepo, arpo, grpo"),
        ("policy.preset=aepoo", "gigpo, reinforce++: did you mean 'aepo'?"),
        ("policy.preset=gpro", "did you mean 'grpo'?"),
        ("policy.preset=AEPO", "did you mean 'aepo'?"),
        ("policy.preset=reinforce_plus_plus", "did you mean 'reinforce++'?"),
        ("policy.preset=ppo", "reinforce++. PPO's clipped loss is that of policy.preset=reinforce++"),
        ("policy.preset=Dr. GRPO", "Dr. GRPO's loss is policy.preset=grpo policy.aggregation=constant"),
        ("policy.preset=dr_grpo", "Dr. GRPO's loss is policy.preset=grpo policy.aggregation=constant"),
        ("policy.preset=sapo", "SAPO's loss is one of your own here: policy.loss"),
        ("policy.aggregation=token_mean", "did you mean 'token-mean'?"),
        ("rollout.engine=VLLM", "expected huggingface, vllm, or package.module:function: did you mean 'vllm'?"),
        ("rollout.branch_alpha=unifrom", "did you mean 'uniform'?"),
        ("run.device=gpu", "A GPU is run.device=cuda"),
        ("train.steps=1.5", "train.steps = 1.5: expected an integer >= 0"),
        ("train.steps=-1", "train.steps = -1: expected an integer >= 0"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate = 'fast': expected a number"),
        ("optimizer.betas=[0.9,2]", "expected a list of 2 numbers >= 0 and < 1"),
        ("optimizer.betas=[0.9,1]", "expected a list of 2 numbers >= 0 and < 1"),
        ("optimizer.betas=[0.9]", "expected a list of 2 numbers"),
        ("optimizer.betas=[0.9,0.95,0.99]", "optimizer.betas = [0.9, 0.95, 0.99]: expected a list of 2 numbers"),
        ("rollout.temperature=nan", "rollout.temperature = nan: expected a number >= 0, a finite one"),
        ("rollout.budget_beta=nan", "rollout.budget_beta = nan: expected a number, a finite one"),
        ("rollout.branch_alpha=-inf", "rollout.branch_alpha = -inf: expected a number or one of uniform, a finite one"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate = inf: expected a number >= 0, a finite one"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate = nan: expected a number >= 0, a finite one"),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate = '1e999': expected a number >= 0"),
        ("optimizer.learning_rate=True", "optimizer.learning_rate = True: expected a number >= 0"),
        ('optimizer.learning_rate="1"', "optimizer.learning_rate = '1': expected a number >= 0"),
        ("optimizer.betas=[0.9,nan]", "optimizer.betas = [0.9, nan]: expected a list of 2 numbers >= 0 and < 1"),
        ("optimizer.betas=[0.9,true]", "optimizer.betas = [0.9, True]: expected a list of 2 numbers"),
        ("optimizer.betas=0.9", "optimizer.betas = 0.9: expected a list of 2 numbers"),
        ("policy.dual_clip=nan", "policy.dual_clip = nan: expected a number or inf or null > 1"),
        ("policy.eps_high=inf", "policy.eps_high = inf: expected a number or null >= 0, a finite one"),
        ("task.success=nan", "task.success = nan: expected a number, a finite one"),
        ("train.steps=1e16", "train.steps = 1e+16: expected an integer >= 0"),
        ("train.steps=1e-400", "train.steps = '1e-400': expected an integer >= 0"),
        ("train.steps=0.99999999999999999999", "train.steps = '0.99999999999999999999': expected an integer >= 0"),
        ("train.steps=2.00000000000000000001", "train.steps = '2.00000000000000000001': expected an integer >= 0"),
        ("optimizer.weight_decay=-1e-999", "optimizer.weight_decay = '-1e-999': expected a number >= 0"),
        ("train.steps=inf", "train.steps = 'inf': expected an integer >= 0"),
        ("train.steps=true", "train.steps = True: expected an integer >= 0"),
        ("train.steps=010", "train.steps = '010': expected an integer >= 0"),
        ("train.steps=\u0661\u0662", "train.steps = '\u0661\u0662': expected an integer >= 0"),
        ("train.steps=1:30", "train.steps = '1:30': expected an integer >= 0"),
        ("train.steps=9223372036854775808", "train.steps = 9223372036854775808: expected an integer >= 0, of 64 bits"),
        ("train.steps=" + 5000 * "9", "9.. (5002 letters): expected an integer >= 0"),
        ("train.steps=3 # a few", "'# a few' is a comment in YAML, expected quotes around a text with ' #'"),
        ("task.options.path=runs/exp #2", "'#2' is a comment in YAML"),
        ("log.tensorboard=1", "log.tensorboard = 1: expected true or false"),
        ("run.dir=", "run.dir = '': expected a text, not an empty one"),
        ("task.tools=[python,'']", "task.tools = ['python', '']: expected a list, each a text"),
        ("eval.pass_at=[1,true]", "eval.pass_at = [1, True]: expected a list, each an integer >= 1"),
        ("rollout.fresh_paths=None", "rollout.fresh_paths = 'None': expected an integer or null"),
        ("rollout.temperature=0", "expected > 0 in training"),
        ("policy.drop_equal_groups=maybe", "expected true or false or null"),
        ("train.minibatches=9", "train.minibatches = 9: expected <= train.questions (8)"),
        ("policy.importance_cap=2", "expected policy.old_logprobs = recompute"),
        ("vllm.endpoints=a:8000", "vllm.endpoints = ['a:8000']: expected different URLs such as http://host:8000"),
        ("vllm.endpoints=[a:8000]", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=[http://a,http://a]", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=[http://x,http://x/]", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=[http://x,http://X:80]", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=[http://h:99999]", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=[http://h:0]", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=[http://h:x]", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=['http://[::1']", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=['http://[::z]']", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=[http://]", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=['http://a b:1']", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=[http://:80]", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=['http://a?b']", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=['http://a/#b']", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=['http://a\\b']", "expected different URLs such as http://host:8000"),
        ("vllm.endpoints=[http://user:pw@host]", "vllm.endpoints = ['http://..@host']: expected no user or password"),
        ("vllm.dtype=float64", "expected one of float32, bfloat16, float16 or null"),
        ("train.steps", "expected section.key=value"),
        (
            "train.steps=[1",
            "override 'train.steps=[1': cannot be read as YAML: expected ',' or ']', but got '<stream end>'",
        ),
        ("format.enable_thinking=false", ": did you mean 'format.chat_template_kwargs.enable_thinking'?"),
        ("format.chat_template_kwarg.a=1", "unknown key 'format.chat_template_kwarg.a': did you mean 'format.chat_te"),
        ("format.chat_template_kwargs=false", "format.chat_template_kwargs = False: expected keys with values"),
        ("task.options.a=${nowhere}", "task.options: expected texts without '${', got '${nowhere}'; nothing is looked"),
        (
            "train.steps=${run.seed}",
            "train.steps: expected texts without '${', got '${run.seed}'; nothing is looked up",
        ),
        ("run.dir=${oc.env:HOME}", "run.dir: expected texts without '${', got '${oc.env:HOME}'; nothing is looked up"),
        ("format.chat_template_kwargs={a: [{b: 'x ${x}'}]}", "expected texts without '${', got 'x ${x}'; nothing is"),
        ("task.options={a: ${x}}", "but got '{'; nothing is looked up in settings"),
        ("task.options={'${x}': 1}", "task.options: expected texts without '${', got '${x}'"),
        *(
            (f"task.options.{keys}=1", "expected names between dots behind task.options, without brackets and quotes")
            for keys in ("a[0]", "a[b]", '"a.b"', "'a'", "", ".a", "a.", "a..b", " a", "a ")
        ),
    ],
)
def test_a_wrong_override_says_what_is_right(override: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011, the text is compared below
        load_config(overrides=[override])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["task.columns={prompt: [q]}", "task.columns.prompt.x=1", "task.columns=q"])
def test_a_column_that_is_no_name(override: str) -> None:
    with pytest.raises(ValueError, match=r"^task\.columns = .*: expected keys with texts$"):
        load_config(overrides=["task.name=files", override])


def test_what_the_hints_say_to_set_can_be_set() -> None:
    for name, text in NO_PRESETS.items():
        settings = re.findall(r"[a-z_]+\.[a-z_]+=[\w+-]+", text)
        load_config(overrides=settings)
        assert settings or "not in this trainer" in text or "policy.loss" in text, name


def test_the_policy_has_the_choices_of_the_kernels() -> None:
    """Written twice, because this configuration is read without torch; a rule need not be offered here."""
    fields, settings = typing.get_type_hints(PolicyObjective), typing.get_type_hints(PolicyConfig)
    assert settings["preset"] == PresetName
    for name in OBJECTIVE_KEYS:
        kind, none = typing.get_args(settings[name])
        assert none is type(None)
        if typing.get_origin(kind) is typing.Literal:
            assert set(typing.get_args(kind)) <= set(typing.get_args(fields[name])), name
        else:
            assert fields[name] in (kind, kind | None), name


def test_old_log_probs_follow_the_engine() -> None:
    """The trainer's own model samples with the log-probs that it trains with; vLLM's are close to them."""
    assert not load_config().recomputes_old_logprobs
    assert load_config(overrides=["policy.old_logprobs=recompute"]).recomputes_old_logprobs
    vllm = ["rollout.engine=vllm", "vllm.endpoints=[http://a:8000,http://b:8000]"]
    config = load_config(overrides=[*vllm, "policy.importance_cap=2"])
    assert config.recomputes_old_logprobs
    assert config.vllm.endpoints == ("http://a:8000", "http://b:8000")
    assert not load_config(overrides=[*vllm, "policy.old_logprobs=engine"]).recomputes_old_logprobs
    with pytest.raises(ValueError, match=r"policy\.importance_cap"):
        load_config(overrides=[*vllm, "policy.old_logprobs=engine", "policy.importance_cap=2"])
    with pytest.raises(ValueError, match=r"vllm\.dtype = null"):
        load_config(overrides=[*vllm, "model.dtype=float64"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian:\n  steps: 1\n", "unknown section 'trian' (in"),
        ("trian:\n  steps: 1\n", ": did you mean 'train'?"),
        ("chat_template_kwargs: {a: 1}\n", ": did you mean 'format.chat_template_kwargs'?"),
        ("enable_thinking: false\n", ": did you mean 'format.chat_template_kwargs.enable_thinking'?"),
        ("format: {enable_thinking: false}\n", ": did you mean 'format.chat_template_kwargs.enable_thinking'?"),
        ("train.steps: 3\n", "unknown section 'train.steps' (in"),
        ("train.steps: 3\n", ": expected 'steps' below 'train'"),
        ("train: 3\n", "section 'train'"),
        ("train:\n  stepz: 3\n", "did you mean 'train.steps'"),
        ("- 1\n", "expected sections with keys"),
        ("3\n", "expected sections with keys"),
        ("", "wrong.yaml: expected sections with keys, got nothing"),
        ("# all of it\n", "wrong.yaml: expected sections with keys, got nothing"),
        ("null\n", "wrong.yaml: expected sections with keys, got None"),
        ("train:\n", "section 'train' (in"),
        ("train: [1\n", "wrong.yaml, line 2: cannot be read as YAML: expected ',' or ']', but got '<stream end>'"),
        ("train:\n\tsteps: 3\n", "wrong.yaml, line 2: cannot be read as YAML: found character '\\t' that cannot start"),
        ("train:\n  steps: 3\n\tquestions: 3\n", "wrong.yaml, line 3: cannot be read as YAML: found character '\\t'"),
        ("train: {}\n\ntrain: {}\n", "wrong.yaml, line 3: key 'train' is given twice, first in line 1"),
        ("train:\n  steps: 1\n  'steps': 1\n", "wrong.yaml, line 3: key 'steps' is given twice, first in line 2"),
        ("task:\n  options:\n    a: [{b: 1,\n b: 2}]\n", "wrong.yaml, line 4: key 'b' is given twice, first in line 3"),
        ("task: {options: {a: {16: 1, 0x10: 2}}}\n", "wrong.yaml, line 1: key '0x10' is given twice"),
        ("task: {options: {a: {[b]: 1}}}\n", "wrong.yaml, line 1: expected a name as a key, got a list or keys"),
        ("run:\n  dir: ${HOME}/x\n", "run.dir: expected texts without '${', got '${HOME}/x'; nothing is looked up"),
        ("run:\n  dir: ${HOME}/x\n", "wrong.yaml, line 2)"),
        (
            "run:\n  {dir: ${HOME}/x}\n",
            "wrong.yaml, line 2: cannot be read as YAML: expected ',' or '}', but got '{'; no",
        ),
        ("train: {null: 3}\n", "unknown key 'train.null' (in"),
        ("train:\n  steps: !!timestamp x\n", "wrong.yaml, line 2: expected no tag !!timestamp"),
        ("run: {dir: !!python/name:os.system x}\n", "wrong.yaml, line 1: expected no tag !!python/name:os.system"),
        ("train: \0\n", "wrong.yaml, line 1: cannot be read as YAML: unacceptable character #x0000"),
        ("run: {}\ntrain: {steps: \udcff}\n", "wrong.yaml, line 2: cannot be read as YAML: 'utf-8' codec can't decode"),
        ("train: {}\n---\ntrain: {}\n", "wrong.yaml, line 2: cannot be read as YAML: but found another document"),
        ("run: {dir: *a}\n", "wrong.yaml, line 1: cannot be read as YAML: found undefined alias 'a'"),
        (
            "task:\n  options: &a\n    a: *a\n",
            "wrong.yaml, line 3: cannot be read as YAML: *a stands for a list or for",
        ),
        ("task:\n  options: {a: &a {b: 1},\n    b: {<<: *a}}\n", "wrong.yaml, line 3: cannot be read as YAML: *a stan"),
        (
            "task: {options: {a: " + 2000 * "[" + "\n",
            "wrong.yaml, line 1: cannot be read as YAML: it is nested too deeply",
        ),
        ("run:\n  dir: [x]\n", "run.dir = ['x']: expected a text (in"),
        ("run:\n  dir: runs/exp #2\n", "run.dir: '#2' behind 'runs/exp' is a comment in YAML: expected quotes around"),
        ("task:\n  tools: [\n   a #2\n  ]\n", "task.tools: '#2' behind 'a' is a comment in YAML"),
        ("task:\n  tools: my_tools:look_up #2\n", "task.tools: '#2' behind 'my_tools:look_up' is a comment in YAML"),
        ("vllm:\n  endpoints: http://a:8000 #2\n", "vllm.endpoints: '#2' behind 'http://a:8000' is a comment in"),
        ("task:\n  rewards: a:b #2\n", "task.rewards: '#2' behind 'a:b' is a comment in YAML"),
        ("task:\n  rewards:\n  - a:b #2\n", "task.rewards: '#2' behind 'a:b' is a comment in YAML"),
        ("task:\n  rewards:\n    a:b: 1 #2\n", "task.rewards: '#2' behind '1' is a comment in YAML"),
        ("task:\n  options:\n    x: runs/exp #2\n", "task.options: '#2' behind 'runs/exp' is a comment in YAML"),
        ("task:\n  options:\n    x: [{y: a #2\n    }]\n", "task.options: '#2' behind 'a' is a comment in YAML"),
        ("format:\n  chat_template_kwargs:\n    a: x #y\n", "format.chat_template_kwargs: '#y' behind 'x' is a"),
        ("task:\n  train: rows #2\n", "task.train: '#2' behind 'rows' is a comment in YAML"),
        ("run:\n  dir: {x: 1}\n", "run.dir = {'x': 1}: expected a text (in"),
        ("run:\n  dir: a: b\n", "wrong.yaml, line 2: cannot be read as YAML: mapping values are not allowed here"),
        ("run:\n  dir: @x\n", "wrong.yaml, line 2: cannot be read as YAML: found character '@' that cannot start"),
        ("run:\n  dir:\n", "run.dir = '': expected a text, not an empty one (in"),
        ("train:\n  steps: 3\n  questions: -1\n", "train.questions = -1: expected an integer >= 1 (in"),
        ("train:\n  steps: 3\n  questions: -1\n", "wrong.yaml, line 3)"),
        ("train:\n  minibatches: 9\n", "expected <= train.questions (8) (in"),
        ("train:\n  minibatches: 9\n", "wrong.yaml, line 2)"),
        ("task: {tools: null}\n", "task.tools = None: expected a list, each a text (in"),
        ("task: {tools: [a, [b]]}\n", "task.tools = ['a', ['b']]: expected a list, each a text (in"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:  # noqa: PT011, the text is compared below
        load_config(file)
    assert expected in str(error.value)
    assert "wrong.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_ranges_hold_for_python_callers_too() -> None:
    with pytest.raises(ValueError, match=r"train\.questions = 0: expected an integer >= 1"):
        TrainConfig(questions=0)
    with pytest.raises(ValueError, match=r"policy\.eps_low = 1\.5"):
        PolicyConfig(eps_low=1.5)


def test_every_key_has_help_and_a_default_in_its_own_range() -> None:
    Config()
    for entry in all_keys():
        assert entry.help, entry.name
        assert entry.expected, entry.name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_committed_configurations_load(path: Path) -> None:
    load_config(path)


def test_importing_the_configuration_imports_no_torch() -> None:
    code = "import sys, aepo.config, aepo.types; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_task_of_an_almost_right_name_is_said_before_its_data() -> None:
    with pytest.raises(ValueError, match=r"^task.name = 'file': expected facts, .*: did you mean 'files'\?$"):
        load_config(overrides=["task.name=file", "task.train=rows.jsonl"])


def test_a_whole_number_where_a_number_or_a_word_may_stand() -> None:
    alpha = load_config(overrides=["rollout.branch_alpha=1"]).rollout.branch_alpha
    assert (alpha, type(alpha)) == (1.0, float)
    assert load_config(overrides=["rollout.branch_alpha=uniform"]).rollout.branch_alpha == "uniform"


TEXTS = (
    "2026_11_26", "007", "12:30", "1.10", "runs/exp #2", "on", "yes", "true", "None", "none", "1e5", "0x10", "1_000",
    "a: b", "x]", "{x}", "*a", "&a", "!t", "@x", "%x", "- x", "-", "---", "...", "?", "=", "<<", "#x", "|", ">",
    "`", " before", "behind ", "ü 漢字 😀", "it's", 'a "b" c', "'", "'a' and 'b'", "a\tb", "a\nb\n", "a\\nb", ".inf",
    "nan", "inf", "0b1", "1:30", "???", "\x7f", "\x85", "\u2028", "\ufeff", "a\rb", "\udcff", "2024-07-26", "a b " * 99,
)  # fmt: skip


@pytest.mark.parametrize("text", [*TEXTS, "null", "~", "Null"])
def test_a_text_is_that_text_whatever_it_looks_like(tmp_path: Path, text: str) -> None:
    """From the command line, from a file that a program wrote, and from the run's own config.yaml. `null` is a text
    where a setting cannot be null."""
    given = load_config(overrides=["task.name=files", f"model.name={text}", f"task.columns.prompt={text}"])
    assert (given.model.name, given.task.columns) == (text, {"prompt": text})
    if text in TEXTS:
        system = load_config(overrides=[f"task.system={text}", f"task.tools={text}"])
        assert (system.task.system, system.task.tools) == (text, (text,))
    file = tmp_path / "config.yaml"
    file.write_bytes(to_yaml(given).encode())
    assert load_config(file) == given
    file.write_bytes(json.dumps({"model": {"name": text}, "task": {"system": text, "tools": [text]}}).encode())
    read = load_config(file)
    assert (read.model.name, read.task.system, read.task.tools) == (text, text, (text,))


@pytest.mark.parametrize(
    "text",
    ["2026_11_26", "007", "12:30", "1.10", "on", "yes", "null", "~", "1e5", "0x10", "x#2", "None", "a:b", ".inf"],
)
def test_a_text_without_quotes_in_a_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    listed = [text, "b"] if text != "null" else ["b"]
    file.write_text(
        f"model:\n  name: {text}  # a comment\nlog: {{wandb: '{text}'}}\n"
        f"task:\n  name: files\n  columns: {{prompt: {text}}}\n  tools: [{', '.join(listed)}]\n  train: {text}x\n"
    )
    config = load_config(file)
    assert (config.model.name, config.log.wandb, config.task.columns) == (text, text, {"prompt": text})
    assert (config.task.tools, config.task.train) == (tuple(listed), f"{text}x")


def test_null_is_null_where_a_setting_may_be_null(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for word in ("null", "~", "NULL", ""):
        file.write_text(f"task:\n  system: {word}\nrollout:\n  fresh_paths: {word}\n")
        config = load_config(file)
        assert (config.task.system, config.rollout.fresh_paths) == (None, None)
        config = load_config(overrides=["task.system=a", f"task.system={word}", f"rollout.fresh_paths={word}"])
        assert (config.task.system, config.rollout.fresh_paths) == (None, None)
        assert load_config(overrides=[f"task.system='{word}'"]).task.system == word
        assert load_config(overrides=[f'task.system="{word}"']).task.system == word


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=1e3", 1000),
        ("train.steps=2.0", 2),
        ("train.steps=1_000", 1000),
        ("train.steps=0x10", 16),
        ("optimizer.learning_rate=1", 1.0),
        ("optimizer.learning_rate=1e-5", 1e-5),
        ("optimizer.learning_rate=1E-5", 1e-5),
        ("optimizer.learning_rate=.5", 0.5),
        ("optimizer.betas=[0, 1e-1]", (0.0, 0.1)),
        ("rollout.branch_alpha=1", 1.0),
        ("policy.eps_low=0", 0.0),
        ("policy.dual_clip=inf", math.inf),
        ("policy.dual_clip=.inf", math.inf),
        ("policy.importance_cap=null", None),
        ("optimizer.max_grad_norm=inf", math.inf),
        ("eval.pass_at=1", (1,)),
        ("task.tools='a, [b]'", ("a, [b]",)),
        ("task.tools=[on, 1.10, 007, 'a, b']", ("on", "1.10", "007", "a, b")),
        ("log.tensorboard=off", False),
        ("log.tensorboard=False", False),
    ],
)
def test_values_have_the_type_of_their_setting(tmp_path: Path, override: str, value: object) -> None:
    name, _, text = override.partition("=")
    section, _, setting = name.partition(".")
    (tmp_path / "run.yaml").write_text(f"{section}:\n  {setting}: {text}\n")
    for config in (load_config(overrides=[override]), load_config(tmp_path / "run.yaml")):
        found = config_value(config, name)
        assert (found, type(found)) == (value, type(value))


def test_python_callers_get_the_same_types() -> None:
    assert repr(OptimizerConfig(learning_rate=1, betas=[0, 0]).betas) == "(0.0, 0.0)"
    assert type(TrainConfig(steps=np.int64(3)).steps) is int
    assert type(OptimizerConfig(learning_rate=np.float32(0.5)).learning_rate) is float
    for wrong in (True, "1", None, math.nan, [1.0]):
        with pytest.raises(ValueError, match=r"^optimizer\.learning_rate = .*: expected a number >= 0"):
            OptimizerConfig(learning_rate=wrong)
    for wrong in (Path("x"), None, 3, ""):
        with pytest.raises(ValueError, match=r"^run\.dir = .*: expected a text"):
            RunConfig(dir=wrong)
    for wrong in (object(), {1.5: 0}, {True: 0}, {"1": 0, 1: 0}, {(1,): 0}, math.nan, 2**63):
        with pytest.raises(ValueError, match=r"^task\.options = .*: expected keys with values"):
            TaskConfig(name="mine:Task", options={"a": wrong})


def test_values_of_any_type_are_as_yaml_has_them(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "task:\n  name: mine:Task\n  options: {a: 3, b: 1e-5, c: yes, d: ~, e: 2024-07-26, f: '3', g: 007, h: 12:30,\n"
        "    on: 1, i: {0: x, on: y}, j: [1, inf, .inf], k: &k 0.5, l: *k, m: !!str 3}\n"
    )
    assert load_config(file).task.options == {
        "a": 3, "b": 1e-5, "c": True, "d": None, "e": "2024-07-26", "f": "3", "g": "007", "h": "12:30",
        "on": 1, "i": {0: "x", "on": "y"}, "j": [1, "inf", math.inf], "k": 0.5, "l": 0.5, "m": "3",
    }  # fmt: skip
    changed = load_config(file, ["task.options.i.0=z"]).task.options
    assert changed["i"] == {0: "z", "on": "y"}, "a key of the file, not one more"


@pytest.mark.parametrize("text", ["inf", "nan", "0.5", "1_0", "null", ".inf"])
def test_a_text_where_a_number_may_stand_as_well(tmp_path: Path, text: str) -> None:
    config = dataclasses.replace(Config(), task=TaskConfig(name="files", heldout=text))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_the_last_override_counts() -> None:
    assert load_config(overrides=["train.steps=3", "train.steps=4"]).train.steps == 4


@pytest.mark.parametrize("path", ["nowhere.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match=r": cannot be read: .*; expected a YAML file with settings$"):
        load_config(tmp_path / path)


texts = st.text(st.characters(exclude_categories=[]), min_size=1).filter(
    lambda text: not re.search(r"\$\{|[\ud800-\udbff][\udc00-\udfff]", text)
)
numbers = st.integers(-(2**63), 2**63 - 1)
scalars = st.none() | st.booleans() | numbers | st.floats(allow_nan=False) | texts
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(texts, inner, max_size=3)
        | st.dictionaries(numbers, inner, max_size=3)
    ),
    max_leaves=8,
)


def values_of(hint: object) -> st.SearchStrategy:
    """Values of a setting's type, some of them out of its range."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        one = values_of(arguments[0])
        return st.lists(one, max_size=3).map(tuple) if ... in arguments else st.tuples(*map(values_of, arguments))
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(texts, values_of(arguments[1]), max_size=3)
    if arguments:
        return st.one_of(*map(values_of, arguments))
    floats = st.floats(0, 1) | st.floats(allow_nan=False)
    simple = {str: texts, bool: st.booleans(), int: st.integers(0, 99) | numbers, float: floats, type(None): st.none()}
    return anything if hint is typing.Any else simple[hint]


ENTRIES = {entry.name: entry for entry in all_keys()}


def test_values_that_are_there_twice_are_written_out() -> None:
    """An alias, which YAML writes for the same list, is refused when the run is resumed."""
    shared = [1, [2]]
    text = yaml_settings.dump({"task": {"options": {"a": shared, "b": shared}}})
    assert yaml.safe_load(text) == {"task": {"options": {"a": shared, "b": shared}}}
    assert "&" not in text


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_is_written_is_what_is_read(data: st.DataObject) -> None:
    """Every setting, any value that it takes."""
    name = data.draw(st.sampled_from([*ENTRIES]))
    section, _, setting = name.partition(".")
    kind = typing.get_type_hints(Config)[section]
    needed = {"task": {"name": "files" if setting in ("train", "heldout", "columns") else "mine:Task"}}
    try:
        made = kind(**{**needed.get(section, {}), setting: data.draw(values_of(ENTRIES[name].type))})
        config = dataclasses.replace(Config(), **{section: made})
    except ValueError:
        return  # out of its range
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(to_yaml(config).encode())
        assert repr(load_config(file.name)) == repr(config)
        assert yaml.safe_load(to_yaml(config)).keys() == dataclasses.asdict(config).keys()


def test_a_text_that_a_file_would_look_up() -> None:
    """Also from Python: the run's own config.yaml could not be read again."""
    with pytest.raises(ValueError, match=re.escape("task.system: expected texts without '${', got 'Use ${HOME}'")):
        TaskConfig(system="Use ${HOME}")
    with pytest.raises(ValueError, match=re.escape("task.options: expected texts without '${', got '${x}'")):
        TaskConfig(name="mine:Task", options={"a": [{"b": "${x}"}]})
    assert TaskConfig(system="Costs $5 {each}").system == "Costs $5 {each}"


def test_a_bound_belongs_to_the_range_unless_values_must_be_above_it() -> None:
    seen = set()
    for section, kind in typing.get_type_hints(Config).items():
        for item in dataclasses.fields(kind):
            for name, bound in ((name, item.metadata[name]) for name in ("low", "high", "above", "below")):
                if bound is None:
                    continue
                seen.add(name)
                value = (bound,) * len(item.default) if isinstance(item.default, tuple) else bound
                if sign := {"above": ">", "below": "<"}.get(name):
                    with pytest.raises(ValueError, match=rf"{section}\.{item.name} = .*: expected .*{sign} {bound}"):
                        kind(**{item.name: value})
                else:
                    assert getattr(kind(**{item.name: value}), item.name) == value
    assert seen == {"low", "high", "above", "below"}


def test_an_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train:\n  steps: 5\n")
    with pytest.raises(ValueError, match=r"train\.steps = -1") as error:
        load_config(tmp_path / "run.yaml", ["train.steps=-1"])
    assert "run.yaml" not in str(error.value)


def test_a_comment_without_a_space_is_one_where_no_text_may_stand(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "train:\n  steps: 4 #few\neval:\n  pass_at: 1 #one\n  every: 0.0e-999 #none\nrun:\n  device: cpu #2\n"
    )
    config = load_config(file)
    assert (config.train.steps, config.eval.pass_at, config.eval.every, config.run.device) == (4, (1,), 0, "cpu")


def test_a_number_that_is_rounded_is_that_number() -> None:
    settings = ["optimizer.learning_rate=0.99999999999999999999", "optimizer.weight_decay=5e-324", "train.steps=2.00"]
    config = load_config(overrides=[*settings, "task.options={a: 0.99999999999999999999, b: 1e-999}", "task.name=a:b"])
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.train.steps) == (1.0, 5e-324, 2)
    assert config.task.options == {"a": 1.0, "b": "1e-999"}
