"""What `aepo doctor MODEL_DIR` says of memory is what training takes: the bytes of tensors that are really made."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_toys import random_samples, tiny_model
from transformers import LlamaConfig, PreTrainedConfig
from typer.testing import CliRunner

from aepo import cli
from aepo.config import load_config
from aepo.doctor import account
from aepo.doctor.account import Account, _Loss, count_micro_batch
from aepo.doctor.fit import asked_plan
from aepo.doctor.memory import Model, Place, Plan, Workload, largest_micro_batch, need, parameter_bytes, taken
from aepo.doctor.speed import Rates, update_seconds
from aepo.learning.attention import packed
from aepo.learning.forward import recomputed_layers, row_logits
from aepo.learning.learner import Learner
from aepo.learning.pack_paths import pack
from aepo.models.outline import number_of_parameters, outline
from aepo.parallel import OneProcess

LLAMA = LlamaConfig(
    vocab_size=500,
    hidden_size=48,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=96,
    tie_word_embeddings=False,
)
DTYPES = (torch.float32, torch.bfloat16)
HERE = Plan(torch.float32, False, False)


def directory(path: Path, config: PreTrainedConfig, **changes: object) -> str:
    config.save_pretrained(path)
    written = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(written))
    return str(path)


def run(*arguments: str):
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_parameter_costs_what_the_learner_has(dtype):
    learner = Learner(tiny_model(dtype), load_config(), str, OneProcess())
    batch = learner.pack_samples(random_samples(4), ["q"])
    for step in (1, 2):  # the copy has moments from the second on
        learner.update(step, batch)
    parameters = list(learner.model.parameters())
    count, each = sum(p.numel() for p in parameters), parameter_bytes(dtype)
    state = [value for p in parameters for key, value in learner.optimizer.state[p].items() if key != "step"]
    kept = learner._all_or_nothing.__self__._copies
    assert sum(p.nbytes for p in parameters) == each.weights * count
    assert all(p.grad is None for p in parameters), "the rollout has their memory"
    learner.backward(batch.minibatches[0], learner.entropy_stats(batch), batch.question_ids)
    assert sum(p.grad.nbytes for p in parameters) == each.gradients * count
    assert sum(value.nbytes for value in state) == (each.masters + each.moments) * count
    assert sum(copy.nbytes for name, copy in kept.items() if not name.endswith("|step")) == each.host_copy * count
    assert each.device == each.weights + each.gradients + each.masters + each.moments


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [LLAMA, tiny_model().config], ids=["llama", "qwen3, tied"])
def test_what_is_kept_for_the_backward_is_what_a_real_model_keeps(config, dtype, checkpointing):
    """On the CPU, by PyTorch's own account of what it saves."""
    tokens, trained = 40, 15
    model = type(outline(config, dtype))(config).to(dtype).eval()
    known, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    given = torch.zeros(1, tokens, dtype=torch.int64)
    rows = torch.zeros(trained, dtype=torch.int64)
    ours = {one.untyped_storage().data_ptr() for one in (given, rows)} | known

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), packed(model):
        inner = recomputed_layers(model) if checkpointing else torch.enable_grad()
        with inner:
            output = model(
                input_ids=given, position_ids=given, lengths=(tokens,), logits_to_keep=rows, use_cache=False
            ).logits
    found = count_micro_batch(config, dtype, tokens=tokens, trained=trained, checkpointing=checkpointing)
    assert found.logits == output.nbytes
    if checkpointing:  # what layers are given is kept by the checkpoint, which the hooks do not see
        layers = config.num_hidden_layers * tokens * config.hidden_size * dtype.itemsize
        assert layers <= found.activations < layers + 12 * tokens * config.hidden_size * 4
    else:
        assert found.activations == sum(size for place, size in saved.items() if place not in ours)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_three_layers_say_what_any_number_takes(dtype, checkpointing):
    few = count_micro_batch(LLAMA, dtype, tokens=64, trained=32, checkpointing=checkpointing)
    assert few == account._run(outline(LLAMA, dtype), 64, 32, checkpointing)
    assert few.peak >= few.activations + few.logits
    assert few.forward_flops < few.flops


def test_recomputed_layers_are_computed_once_more():
    kept, again = (
        count_micro_batch(LLAMA, torch.float32, tokens=64, trained=32, checkpointing=value) for value in (False, True)
    )
    head = 2 * 32 * LLAMA.vocab_size * LLAMA.hidden_size
    assert kept.forward_flops == again.forward_flops
    last = LLAMA.num_hidden_layers * 2 * 64 * 96 * 48  # of each layer, whose result no backward asks for
    assert again.flops - kept.flops == kept.forward_flops - head - last
    # The matrices of the layers: a product forward, two backward.
    each = 2 * 64 * (48 * 48 * 2 + 2 * 48 * 16 + 3 * 48 * 96)
    assert kept.flops == 3 * (LLAMA.num_hidden_layers * each + head)


def test_the_gradient_of_the_logits_is_not_copied():
    """The backward of an index would write it into zeros of the same size."""
    torch.manual_seed(0)
    model = tiny_model(torch.float32, vocab_size=5000)
    (batch,) = [pack(random_samples(40))]
    with Account([*model.parameters()]) as held:
        logits = row_logits(model, batch)
        size = logits.nbytes
        loss = _Loss.apply(logits)
        del logits
        before, held.peak = held.live, held.live
        loss.backward()
    beside = 3 * model.get_input_embeddings().weight.nbytes  # gradients of the head and of the embedding, and their sum
    assert size > 2e6
    assert held.peak - before < beside + 0.5 * size


@pytest.mark.parametrize("config", [LLAMA, tiny_model().config], ids=["two heads", "tied"])
def test_parameters_are_those_of_the_model(config):
    model = type(outline(config, torch.float32))(config)
    assert Model(config).parameters == sum(p.numel() for p in model.parameters()) == number_of_parameters(model)


def test_the_parts_add_up_and_the_settings_count():
    model, config = Model(LLAMA), load_config(overrides=["rollout.paths=4", "train.questions=2"])
    work = Workload.of(config, prompt=100)
    one = need(model, HERE, work, config)
    standing = 16 * model.parameters
    assert one.weights + one.gradients + one.state == standing
    assert (work.path, work.packed, work.trained(8192)) == (356, 2 * 4 * 356, 8192 * 256 // 356)
    per_token = 2 * 5 * 2 * 8 * 4  # keys and values, layers, heads, their size, float32
    assert one.cache == per_token * (8 * 356 + 2 * 100 + 8 * 256)
    assert one.device("cuda") == standing + one.activations + one.logits + one.backward
    assert one.cpu == one.device("cpu") + one.host
    with_reference = need(model, Plan(torch.float32, False, True), work, config)
    assert with_reference.device("cuda") - one.device("cuda") == 4 * model.parameters
    small = need(model, HERE, dataclasses.replace(work, tokens=1), config)
    assert small.rollout > small.gradients + small.step["cuda"] == 8 * model.parameters
    assert small.device("cuda") == standing - small.gradients + small.rollout
    short = need(model, HERE, dataclasses.replace(work, tokens=1, questions=1, paths=1, prompt=1, written=1), config)
    assert short.device("cuda") == standing + short.step["cuda"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", [0.3, 2.0, 8.0])
def test_the_largest_micro_batch_fits_and_a_much_larger_one_does_not(share, checkpointing):
    model, plan = Model(LLAMA), Plan(torch.float32, checkpointing, False)
    config = load_config(overrides=["train.questions=1", "rollout.paths=2"])  # their cache is small
    work = Workload.of(config, prompt=256)
    here = need(model, plan, work, config)
    inside = here.activations + here.logits + here.backward
    place = Place("", "cuda", here.device("cuda") - inside + max(share * inside, here.rollout + 1))
    found = largest_micro_batch(model, plan, work, config, place)
    assert taken(need(model, plan, work, config, found), model, plan, config, place) <= place.size
    more = need(model, plan, work, config, round(1.15 * found) + 64)
    assert taken(more, model, plan, config, place) > place.size
    nothing = Place("", "cuda", 16 * model.parameters)
    assert largest_micro_batch(model, plan, work, config, nothing) == 0


def test_vllm_takes_its_part_of_a_gpu_or_its_weights_and_cache_of_the_host():
    model = Model(LLAMA)
    config = load_config(overrides=["rollout.engine=vllm", "vllm.replicas=2", "vllm.dtype=bfloat16"])
    work = Workload.of(config, prompt=256)
    one = need(model, HERE, work, config)
    assert one.cache == 0
    gpu, host = Place("", "cuda", 24 * 2**30), Place("", "cpu", 24 * 2**30)
    assert taken(one, model, HERE, config, gpu) == 0.45 * gpu.size + one.device("cuda")
    engines = taken(one, model, HERE, config, host) - one.cpu
    assert 2 * (2**30 + 2 * model.parameters) < engines < 2 * (2**30 + 2 * model.parameters + 2**29)
    elsewhere = load_config(overrides=["rollout.engine=vllm", "vllm.endpoints=[http://a:8000]"])
    assert taken(one, model, HERE, elsewhere, host) == one.cpu


def test_seconds_follow_from_the_rates():
    model, work = Model(LLAMA), Workload.of(load_config(), prompt=256)

    def seconds(plan: Plan, products: float, copy: float, recomputed: bool = False) -> float:
        return update_seconds(model, plan, work, Rates({torch.float32: products}, copy), recomputed=recomputed)

    batches, endless = work.packed / work.tokens, 1e30
    batch = model.micro_batch(torch.float32, work.tokens, work.trained(work.tokens), False)
    attention = 2 * work.tokens * work.path * LLAMA.hidden_size * LLAMA.num_hidden_layers
    computing = seconds(HERE, 1e9, endless)
    assert computing == pytest.approx(batches * (batch.flops + 3.5 * attention) / 1e9)
    moving = seconds(HERE, endless, 1e9)
    assert moving == pytest.approx((batches * batch.moved + (18 * 4 + 12 + 8 + 24) * model.parameters) / 1e9)
    assert seconds(HERE, 1e9, 1e9) == pytest.approx(computing + moving)
    forward = batches * (batch.forward_flops + attention) / 1e9
    assert seconds(HERE, 1e9, endless, recomputed=True) == pytest.approx(computing + forward)
    assert seconds(Plan(torch.float32, False, True), 1e9, endless) == pytest.approx(computing + forward)


def test_the_settings_choose_the_row():
    assert asked_plan(load_config()) == Plan(torch.float32, False, False)
    changed = load_config(overrides=["model.dtype=bfloat16", "train.gradient_checkpointing=true", "policy.kl_coef=0.1"])
    assert asked_plan(changed) == Plan(torch.bfloat16, True, True)


def test_the_command_prints_numbers_for_people_and_machines(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    where = directory(tmp_path, LLAMA)
    (tmp_path / "my.yaml").write_text("model: {dtype: bfloat16}\ntrain: {tokens_per_microbatch: 512}\n")
    settings = ["--config", str(tmp_path / "my.yaml"), "train.gradient_checkpointing=true", "--prompt-tokens", "64"]
    done = run(where, *settings, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    model = Model(LLAMA)
    assert report["parameters"] == model.parameters
    assert len(report["plans"]) == 8
    (asked,) = [plan for plan in report["plans"] if plan["asked"]]
    assert (asked["model.dtype"], asked["train.gradient_checkpointing"], asked["reference"]) == (
        "bfloat16",
        True,
        False,
    )
    config = load_config(tmp_path / "my.yaml", ["train.gradient_checkpointing=true"])
    expected = need(model, Plan(torch.bfloat16, True, False), Workload.of(config, 64), config)
    assert asked["bytes"]["activations"] == expected.activations
    assert asked["places"]["24 GiB"] == {"bytes": expected.device("cuda"), "fits": True, "largest": 8192}
    assert asked["update_seconds"] > 0
    shown = run(where, *settings).stdout
    assert f"{model.parameters:,} parameters; micro-batches of 512 tokens" in shown
    assert shown.count("> recomputed") == 1
    assert shown.count("yes, 8,192") >= 4 * 8


def test_what_needs_a_model_says_so():
    assert "expected MODEL_DIR with them" in run("--prompt-tokens", "3").stderr
    program = "import sys; sys.modules['typer'] = None; from aepo.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "doctor", "models/x"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        'error: aepo doctor MODEL_DIR needs typer, which is not installed: pip install "aepo-kernels[train]"\n'
    )


@pytest.mark.slow
def test_a_real_update_takes_what_is_predicted():
    """The peak of the resident set of a process, 15% aside: a model of 14 million parameters, 512 tokens."""
    point = {"model": "14M", "dtype": "float32", "tokens": 512, "checkpointing": True}
    program = [sys.executable, "-m", "benchmarks.memory", "point", json.dumps(point)]
    found = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    assert found["predicted_bytes"] == pytest.approx(found["measured_bytes"], rel=0.15)
