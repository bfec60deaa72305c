"""Whatever a config.json says, `aepo doctor MODEL_DIR` prints a table that holds, or one line that names the file."""

from pathlib import Path

import pytest
import torch
from test_doctor_fit import LLAMA, directory, run
from transformers import GPT2Config, MambaConfig, MistralConfig, Qwen3Config, RwkvConfig

from aepo.config import load_config
from aepo.doctor import account, speed
from aepo.doctor.fit import examine_fit
from aepo.doctor.memory import Model
from aepo.models import outline
from aepo.models.outline import read_model_config

QWEN = Qwen3Config(
    vocab_size=500,
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=96,
)
GPT2 = GPT2Config(n_layer=2, n_head=6, n_embd=48)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (None, {}, "expected a model directory, with a config.json"),
        (LLAMA, {"model_type": "nobody"}, "expected a config.json of transformers: ValueError: "),
        (
            LLAMA,
            {"model_type": "nobody", "auto_map": {"AutoConfig": "a.B"}},
            "expected a config.json of transformers: ",
        ),
        (LLAMA, {"model_type": "vit"}, "expected a causal language model, got model_type 'vit'"),
        (
            Qwen3Config(),
            {"layer_types": ["full_attention", "sliding_attention"] * 16},
            "['sliding_attention']; expected",
        ),
        (MistralConfig(num_hidden_layers=2), {}, "packed attention has no sliding_window, which this model asks for"),
        (MambaConfig(num_hidden_layers=2), {}, "layers of type ['linear_attention']; expected full"),
    ],
    ids=["no config.json", "unknown", "custom code", "no language model", "sliding layers", "sliding window", "mamba"],
)
def test_other_models_are_refused_in_one_line(tmp_path, config, changes, message):
    where = str(tmp_path) if config is None else directory(tmp_path, config, **changes)
    done = run(where)
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_adapters_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="got an adapter"):
        read_model_config(tmp_path)


def refusal(where: str) -> str:
    """What the command says, without where."""
    done = run(where)
    assert done.exit_code == 1, done.exception
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {where}"), line
    return line.removeprefix(f"error: {where}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "os.system"}, "KeyError: 'os.system'"),
        ({"hidden_act": "nobody", "_name_or_path": "someone/model"}, "KeyError: 'nobody'"),
        ({"rope_parameters": {"rope_type": "nobody", "rope_theta": 1e4}}, "KeyError: 'nobody'"),
        ({"pad_token_id": 10**9}, "AssertionError: Padding_idx must be within num_embeddings"),
        ({"vocab_size": 10**18}, "RuntimeError: Storage size calculation overflowed"),
        ({"hidden_size": 6 * 10**17}, "RuntimeError: "),
    ],
)
def test_what_transformers_cannot_make_is_one_line(tmp_path, changes, reason):
    said = refusal(directory(tmp_path, LLAMA, **changes))
    assert said.startswith(f"/config.json: transformers cannot make this model: {reason}")


@pytest.mark.parametrize("changes", [{"num_attention_heads": 0}, {"num_attention_heads": 5}, {"dtype": "nobody"}])
def test_what_transformers_refuses_itself_is_one_line(tmp_path, changes):
    assert refusal(directory(tmp_path, LLAMA, **changes)).startswith(": expected a config.json of transformers: ")


def test_what_cannot_be_run_is_one_line(tmp_path, monkeypatch):
    """Also where a model's code raises what PyTorch does not."""
    where = directory(tmp_path, LLAMA)
    monkeypatch.setattr(account._Attention, "__call__", lambda *_, **options: options["no such"])
    said = refusal(where)
    counted = "cannot be counted without weights, which does not say that it cannot be trained"
    assert said == f"/config.json: LlamaForCausalLM {counted}: KeyError: 'no such'"


def test_attention_that_is_never_asked_for_is_one_line(tmp_path, monkeypatch):
    class Uncounted(account._Attention):
        calls = property(lambda self: 0, lambda self, value: None)

    monkeypatch.setattr(account, "_Attention", Uncounted)
    said = refusal(directory(tmp_path, LLAMA))
    assert said.startswith(
        "/config.json: LlamaForCausalLM cannot be trained on packed trajectories: expected attention"
    )


def test_a_model_without_a_head_is_one_line(monkeypatch):
    made = outline.outline(LLAMA, torch.float32)
    made.lm_head = None
    monkeypatch.setattr("aepo.doctor.memory.outline", lambda config, dtype: made)
    with pytest.raises(
        ValueError, match=r"^LlamaConfig: expected a model with an embedding and a head: AttributeError"
    ):
        Model(LLAMA)


POSITIVE = "expected a whole number of at least 1"


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"num_hidden_layers": 0}, f"num_hidden_layers=0; {POSITIVE}"),
        (LLAMA, {"num_hidden_layers": 10_001}, "num_hidden_layers=10001; expected at most 10,000"),
        (QWEN, {"layer_types": None, "num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000; expected at most"),
        (GPT2, {"n_layer": 10**12}, "num_hidden_layers=1000000000000; expected at most 10,000"),
        (GPT2, {"n_head": 0}, f"n_head=0; {POSITIVE}"),
        (GPT2, {"n_head": 7}, "hidden_size=48; expected a multiple of num_attention_heads, 7, or a head_dim"),
        (LLAMA, {"text_config": {"num_hidden_layers": 10**12}}, "num_hidden_layers=1000000000000; expected at most"),
        (LLAMA, {"text_config": 5}, "text_config=5; expected a configuration"),
        (RwkvConfig(num_hidden_layers=2), {}, f"num_attention_heads=None; {POSITIVE}"),
        (LLAMA, {"hidden_size": 0}, f"hidden_size=0; {POSITIVE}"),
        (LLAMA, {"vocab_size": 0}, f"vocab_size=0; {POSITIVE}"),
        (LLAMA, {"vocab_size": -3}, f"vocab_size=-3; {POSITIVE}"),
        (QWEN, {"num_attention_heads": 0}, f"num_attention_heads=0; {POSITIVE}"),
        (LLAMA, {"num_key_value_heads": 0}, f"num_key_value_heads=0; {POSITIVE}"),
        (LLAMA, {"num_key_value_heads": 4}, "num_attention_heads=6; expected a multiple of num_key_value_heads, 4"),
        (LLAMA, {"head_dim": 0}, f"head_dim=0; {POSITIVE}"),
        (LLAMA, {"head_dim": -8}, f"head_dim=-8; {POSITIVE}"),
        (LLAMA, {"intermediate_size": 0}, f"intermediate_size=0; {POSITIVE}"),
        (LLAMA, {"max_position_embeddings": -5}, f"max_position_embeddings=-5; {POSITIVE}"),
    ],
)
def test_sizes_of_no_model_are_named(tmp_path, config, changes, message):
    assert refusal(directory(tmp_path, config, **changes)).startswith(f"/config.json: {message}")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_the_attention_of_another_machine_changes_nothing(tmp_path, key, name):
    where = Path(directory(tmp_path, LLAMA, **{key: name}))
    config = read_model_config(where)
    assert config._attn_implementation == name
    asked = {"tokens": 64, "trained": 32, "checkpointing": False}
    assert account.count_micro_batch(config, torch.float32, **asked) == account.count_micro_batch(
        LLAMA, torch.float32, **asked
    )
    assert config._attn_implementation == name


@pytest.mark.parametrize(
    ("found", "method"), [({"quant_method": "gptq", "bits": 4}, "'gptq'"), ({}, "None"), ("x", "'x'")]
)
def test_quantized_weights_have_no_table(tmp_path, found, method):
    said = refusal(directory(tmp_path, LLAMA, quantization_config=found))
    assert said.startswith(f"/config.json: quantization_config, of {method}; expected a model with whole weights")
    assert read_model_config(Path(directory(tmp_path, LLAMA, quantization_config=None))).vocab_size == 500


def test_a_model_that_is_too_large_for_this_machine_gets_its_table(tmp_path, monkeypatch):
    """Its largest layer alone would take 200 GB: no tensor of that size is made."""
    sizes, randn = [], torch.randn

    def noted(*shape: int, **options: object) -> torch.Tensor:
        sizes.append(shape)
        assert max(shape) <= speed.MOST
        return randn(*shape, **options)

    monkeypatch.setattr(torch, "randn", noted)
    where = Path(directory(tmp_path, LLAMA, intermediate_size=10**9))
    fit = examine_fit(where, load_config(overrides=["train.tokens_per_microbatch=64"]), 64)
    assert (speed.MOST, LLAMA.hidden_size) in sizes
    assert fit.model.parameters > 7e11
    assert not any(verdict.fits for row in fit.rows for verdict in row.verdicts.values())
    assert all(row.seconds > 0 for row in fit.rows)
