"""Claims about AEPOConfig: every setting of GRPOConfig is honoured, refused by name, or none of the loss; TRL's names
override the preset; bad values and pairs that contradict each other are named; it is read from a command line, a YAML
file and its own dict."""

import dataclasses

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import GRPOConfig, TrlParser
from trl_recorder import made_up
from trl_toys import make_trainer

from aepo.integrations.trl import AEPOConfig, AEPOTrainer
from aepo.integrations.trl.objective import policy_objective
from aepo_kernels import PolicyObjective
from aepo_kernels.objective import PRESETS

PLAIN = {"output_dir": "nowhere", "report_to": "none", "bf16": False, "use_cpu": True}


def configure(**changed):
    return AEPOConfig(**PLAIN | changed)


# All of GRPOConfig's own settings

HONOURED = {
    # by the objective
    "beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "loss_type", "temperature",
    "max_completion_length",
    # by advantages: TRL computes them
    "reward_weights", "multi_objective_aggregation", "scale_rewards", "num_generations", "num_generations_eval",
    # by masks and factors: TRL computes them
    "mask_truncated_completions", "top_entropy_quantile", "off_policy_mask_threshold", "use_vllm",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap", "max_tool_calling_iterations",
    # by the order of steps, the reference and the model's own loss
    "num_iterations", "generation_batch_size", "steps_per_generation", "sync_ref_model", "ref_model_mixup_alpha",
    "ref_model_sync_steps", "router_aux_loss_coef", "disable_dropout", "learning_rate", "pad_to_multiple_of",
}  # fmt: skip
REFUSED = {
    "sapo_temperature_pos": 1.1, "sapo_temperature_neg": 1.1, "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0, "entropy_coef": 0.1, "use_adaptive_entropy": True,
    "entropy_coef_min": 0.1, "entropy_coef_max": 0.5, "entropy_coef_delta": 0.1, "entropy_target": 0.5,
}  # fmt: skip
REFUSED_WITH = {"use_bias_correction_kl": {"beta": 0.1}}
NOT_OF_THE_LOSS = ("vllm_", "log_", "transformers_", "use_transformers_")
NONE_OF_THE_LOSS = {
    "model_init_kwargs", "trust_remote_code", "remove_unused_columns", "shuffle_dataset", "top_p", "top_k", "min_p",
    "generation_kwargs", "chat_template_kwargs", "repetition_penalty", "cache_implementation",
    "num_completions_to_print", "ds3_gather_for_generation", "cast_lm_head_to_fp32",
}  # fmt: skip


def own_fields():
    """Those that GRPOConfig adds to TrainingArguments."""
    of_grpo, of_all = ({one.name for one in dataclasses.fields(x)} for x in (GRPOConfig, TrainingArguments))
    return of_grpo - of_all


def test_every_setting_of_grpo_is_honoured_refused_or_none_of_the_loss():
    known = {*HONOURED, *REFUSED, *REFUSED_WITH, *NONE_OF_THE_LOSS}
    unknown = {name for name in own_fields() - known if not name.startswith(NOT_OF_THE_LOSS)}
    assert unknown == set(), "new in TRL? it needs a place here, and a look at what it does to the loss"


@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_what_would_be_ignored_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value!r} would be ignored: "):
        configure(**{name: value})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("use_bias_correction_kl", {"use_bias_correction_kl": True, "beta": 0.1}),
        ("step_weight", {"step_weight": 0.5}),
        ("step_discount", {"step_discount": 0.5, "preset": "grpo"}),
        ("scale_rewards", {"scale_rewards": "none", "preset": "reinforce++"}),
        ("scale_rewards", {"scale_rewards": False, "advantage": "batch"}),
        ("multi_objective_aggregation", {"multi_objective_aggregation": "normalize_then_sum", "advantage": "a:b"}),
        ("entropy_window", {"entropy_window": 5, "branched_rollouts": False}),
        ("fresh_paths", {"fresh_paths": 2, "preset": "grpo"}),
        ("branch_alpha", {"branch_alpha": 0.3, "preset": "dapo"}),
        *(
            (name, {name: value, "loss": "examples.own_losses:sapo"})
            for name, value in {
                "loss_type": "dapo",
                "epsilon": 0.1,
                "epsilon_high": 0.3,
                "delta": 2.0,
                "importance_sampling_level": "sequence",
                "objective": {"clip": "ppo"},
            }.items()
        ),
    ],
)
def test_what_would_be_ignored_beside_others_is_refused(name, settings):
    with pytest.raises(ValueError, match=f"^{name}=.* would be ignored"):
        configure(**settings)


@pytest.mark.parametrize("loss_type", ["bnpo", "sapo", "vespo", "ppo"])
def test_other_loss_types_are_refused(loss_type):
    with pytest.raises(ValueError, match=f"loss_type.*{loss_type}"):
        configure(loss_type=loss_type)


def test_a_loss_function_of_the_trainer_refuses_the_same(tmp_path):
    def loss_fn(logprobs, entropy, batch):
        return -(logprobs * batch.advantages).sum() / batch.tokens

    for changed in ({"epsilon": 0.1}, {"loss_type": "grpo"}, {"objective": {"dual_clip": None}}):
        with pytest.raises(ValueError, match=f"^{next(iter(changed))}=.* would be ignored"):
            make_trainer(AEPOTrainer, AEPOConfig, tmp_path, loss_fn=loss_fn, **changed)
    with pytest.raises(ValueError, match=r"loss_fn and args.loss='examples.own_losses:sapo' are both given"):
        make_trainer(AEPOTrainer, AEPOConfig, tmp_path, loss_fn=loss_fn, loss="examples.own_losses:sapo")
    with pytest.raises(
        ValueError, match=r"^loss_fn: expected a function \(logprobs, entropy, batch\); it is of type int"
    ):
        make_trainer(AEPOTrainer, AEPOConfig, tmp_path, loss_fn=3)
    with pytest.raises(ValueError, match=r"^loss_fn: expected a function \(logprobs, entropy, batch\); it is .*lambda"):
        make_trainer(AEPOTrainer, AEPOConfig, tmp_path, loss_fn=lambda logprobs, entropy: logprobs.sum())
    with pytest.raises(ValueError, match=r"loss = 'examples.own_losses:nothing'"):
        make_trainer(AEPOTrainer, AEPOConfig, tmp_path, loss="examples.own_losses:nothing")
    with pytest.raises(TypeError, match=r"args must be an AEPOConfig.*got GRPOConfig"):
        make_trainer(AEPOTrainer, GRPOConfig, tmp_path, rollout_func=made_up)


# Names and values


def test_a_preset_alone_is_the_preset():
    for preset in PRESETS:
        assert policy_objective(configure(preset=preset)) == PolicyObjective.preset(preset)


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"epsilon": 0.1}, {"eps_low": 0.1, "eps_high": 0.1}),
        ({"epsilon": 0.1, "epsilon_high": 0.3}, {"eps_low": 0.1, "eps_high": 0.3}),
        ({"epsilon_high": 0.3}, {"eps_high": 0.3}),
        ({"preset": "cispo", "epsilon_high": 3.0}, {"eps_high": 2.0}),
        ({"preset": "cispo", "loss_type": "cispo"}, {}),
        ({"delta": 2.5}, {"dual_clip": 2.5}),
        ({"importance_sampling_level": "sequence"}, {"ratio_level": "sequence"}),
        ({"loss_type": "dapo", "preset": "grpo"}, {"aggregation": "token-mean"}),
        ({"loss_type": "grpo"}, {"aggregation": "seq-mean-token-mean"}),
        ({"loss_type": "luspo"}, {"aggregation": "seq-mean-token-sum"}),
        ({"loss_type": "dr_grpo"}, {"aggregation": "constant"}),
        ({"beta": 0.04}, {"kl_coef": 0.04}),
        ({"objective": {"clip": "gppo", "dual_clip": None}}, {"clip": "gppo", "dual_clip": None}),
        ({"objective": '{"entropy_advantage": 0.4}'}, {"entropy_advantage": 0.4}),
    ],
)
def test_overrides(settings, fields):
    preset = settings.get("preset", "aepo")
    assert policy_objective(configure(**settings)) == PolicyObjective.preset(preset, **fields)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"preset": "gpro"}, ValueError, "got 'gpro': did you mean 'grpo'"),
        ({"objective": {"kl_coef": 0.1}}, ValueError, "kl_coef.* write beta="),
        ({"objective": {"importance_cap": 2.0}}, ValueError, "importance_cap.*vllm_importance_sampling_"),
        ({"objective": {"eps_low": 0.1}, "epsilon": 0.1}, ValueError, "'eps_low': 0.1.*both given"),
        ({"objective": {"dual_clip": 2.0}, "delta": 2.0}, ValueError, "'dual_clip': 2.0.*both given"),
        ({"objective": {"clips": "ppo"}}, TypeError, "no field 'clips': did you mean 'clip'"),
        ({"objective": ["ppo"]}, ValueError, "objective must be a dict .*got \\['ppo'\\]"),
        ({"preset": "cispo", "epsilon": 0.2}, ValueError, "epsilon=0.2 would be ignored.*eps_low"),
        ({"preset": "cispo", "epsilon_high": 0.28}, ValueError, "epsilon_high must be at least 1 .*got 0.28"),
        ({"preset": "cispo", "delta": 3.0}, ValueError, "^delta: dual_clip has no meaning with clip='cispo'"),
        ({"loss_type": "cispo"}, ValueError, "loss_type='cispo' is another objective than preset='aepo'"),
        ({"epsilon": -0.1}, ValueError, "^epsilon: eps_low must be in .*got -0.1"),
        ({"epsilon_high": -0.1}, ValueError, "^epsilon_high .*got -0.1"),
        ({"delta": 1.1}, ValueError, "delta must be above 1 \\+ epsilon_high, 1.2; got 1.1"),
        ({"delta": 0.5}, ValueError, "^delta: .*got 0.5"),
        ({"importance_sampling_level": "word"}, ValueError, "^importance_sampling_level: .*got 'word'"),
        ({"beta": float("inf")}, ValueError, "^beta: .*got inf"),
        ({"advantage": "loo"}, ValueError, "advantage must be group, batch, gigpo, .*got 'loo'"),
        (
            {"preset": "gigpo", "step_discount": 0.0},
            ValueError,
            "step_discount must be a number in \\(0, 1\\]; got 0.0",
        ),
        ({"branch_alpha": "much"}, ValueError, "branch_alpha must be .*got 'much'"),
        ({"fresh_paths": 9}, ValueError, "fresh_paths must be at most num_generations, 8; got 9"),
    ],
)
def test_bad_values_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        configure(**settings)


# Where a configuration comes from


def test_a_command_line():
    line = "--preset dapo --epsilon_high 0.3 --loss_type grpo --branched_rollouts true --branch_alpha 0.4 --beta 0.1"
    words = [*line.split(), "--objective", '{"dual_clip": 4.0}', "--fresh_paths", "3"]
    plain = ["--output_dir", "nowhere", "--report_to", "none", "--bf16", "false", "--use_cpu", "true"]
    (found,) = HfArgumentParser(AEPOConfig).parse_args_into_dataclasses([*words, *plain])
    assert policy_objective(found) == PolicyObjective.preset(
        "dapo", eps_high=0.3, aggregation="seq-mean-token-mean", dual_clip=4.0, kl_coef=0.1
    )
    assert (found.branched_rollouts, found.branch_alpha, found.fresh_paths) == (True, 0.4, 3)
    assert found.branch_settings().branch_alpha == 0.4
    assert configure().branch_settings().branch_alpha == "uniform"
    assert configure(fresh_paths=8).branch_settings().fresh_paths == 8  # all of num_generations: nothing branches


def test_a_yaml_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: gspo\nepsilon: 0.001\nobjective:\n  entropy_bonus: 0.01\nadvantage: batch\noutput_dir: nowhere\n"
        "report_to: none\nbf16: false\nuse_cpu: true\n"
    )
    (found,) = TrlParser((AEPOConfig,)).parse_args_and_config(["--config", str(file), "--preset", "grpo"])
    assert policy_objective(found) == PolicyObjective.preset("grpo", eps_low=1e-3, eps_high=1e-3, entropy_bonus=0.01)
    assert found.advantage_kind == "batch"


def test_its_own_dict_makes_it_again():
    """Without generation_batch_size, which TRL derives and then refuses beside what it is derived from."""
    config = configure(preset="cispo", objective={"eps_low": 0.5}, epsilon_high=3.0, advantage="batch", beta=0.1)
    kept = config.to_dict()
    del kept["generation_batch_size"]
    again = AEPOConfig(**kept)
    assert policy_objective(again) == policy_objective(config)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("preset", ["AEPO", "gpso", "ppo"])
def test_a_preset_that_there_is_not_is_called_so(preset):
    with pytest.raises(ValueError, match=f"^preset must be one of aepo, .*got '{preset}'"):
        configure(preset=preset)


def test_an_estimator_of_no_kl_is_refused():
    with pytest.raises(ValueError, match=r"kl_estimator': 'k2'.*would be ignored: beta=0"):
        configure(objective={"kl_estimator": "k2"})
    assert policy_objective(configure(objective={"kl_estimator": "k2"}, beta=0.1)).kl_estimator == "k2"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preset", None),
        ("preset", ["aepo"]),
        ("loss_type", ["dapo"]),
        ("objective", {1: 2}),
        ("objective", 0),
        ("loss", ""),
        ("loss", "nomod"),
        ("epsilon_high", "5"),
        ("delta", True),
        ("advantage", ""),
        ("advantage", ":"),
        ("advantage", 3),
        ("beta", -1.0),
        ("step_weight", float("nan")),
        ("step_weight", "1"),
        ("step_discount", None),
        ("step_discount", 0.0),
        ("branched_rollouts", "false"),
        ("fresh_paths", "2"),
        ("fresh_paths", 0),
        ("entropy_window", None),
        ("entropy_window", 0),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        configure(**{name: value})
