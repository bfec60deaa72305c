"""What is compared with the installed TRL before any of it is overridden or replaced, and what a user gets to know."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
import types
import warnings

import pytest
import torch
from trl import GRPOTrainer
from trl.trainer import utils

from aepo.integrations.trl import head, versions
from aepo.integrations.trl.versions import check_overrides, check_trl, head_differences


def installed(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "trl" else None)


@pytest.mark.parametrize("version", ["1.16.0", "1.16.4", "1.16.0.dev0"])
def test_the_known_version_is_taken_in_silence(monkeypatch, version):
    installed(monkeypatch, version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trl()


@pytest.mark.parametrize("version", ["0.29.1", "1.9.0", "1.15.3"])
def test_an_older_version_is_refused(monkeypatch, version):
    installed(monkeypatch, version)
    with pytest.raises(ImportError, match=rf"1\.16 or later; found TRL {version}: pip install .aepo-kernels\[trl\]"):
        check_trl()


@pytest.mark.parametrize(
    ("version", "unknown"),
    [("1.17.0", "only the documentation"), ("1.18.2", "only the documentation"), ("1.19.0", "nothing is known")],
)
def test_a_newer_version_is_taken_with_a_warning(monkeypatch, version, unknown):
    installed(monkeypatch, version)
    with pytest.warns(UserWarning, match=f"written for TRL 1.16 .* found TRL {version}, of which {unknown}"):
        check_trl()


def test_without_trl_the_error_says_how_to_install_it(monkeypatch):
    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    with pytest.raises(ImportError, match=r"not installed: pip install .aepo-kernels\[trl\]"):
        check_trl()


def test_where_torch_is_alone_the_error_is_the_same():
    """`packaging` comes with transformers."""
    hidden = "import sys; sys.modules['packaging'] = None; sys.modules['packaging.version'] = None\n"
    code = hidden + (
        "import importlib.metadata as metadata\n"
        "def none(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = none\n"
        "import aepo.integrations.trl\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: aepo.integrations.trl needs TRL, which is not installed"
    )


def test_the_installed_trainer_has_what_is_overridden():
    check_overrides(GRPOTrainer)


def test_all_differences_of_a_trainer_are_said_at_once():
    class Other(GRPOTrainer):
        _generate = None

        def _compute_loss(self, model, inputs, num_items):
            """One more that TRL would pass, and we would not."""

        def _calculate_rewards(self, inputs, completions, prompts, completion_ids_list):
            """Two have changed places."""

        def _prepare_inputs(self, generation_batch, step=None, *others, **more):
            """What may be left out is no difference."""

        def _tokenize_prompts(self):
            """One is gone."""

    with pytest.raises(TypeError) as error:
        check_overrides(Other)
    start, *found = str(error.value).replace(": ", "; ", 1).split("; ")
    assert start == "Other of TRL 1.16.0 is not the one AEPOTrainer was written for"
    assert sorted(found) == [
        "_calculate_rewards takes (inputs, completions, prompts, completion_ids_list), "
        "expected (inputs, prompts, completions, completion_ids_list)",
        "_compute_loss also needs num_items",
        "_generate is missing",
        "_tokenize_prompts takes (), expected (prompts)",
    ]


def test_the_installed_head_is_the_known_one():
    assert head_differences(utils) == []


class FourResults:
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
    ):
        """The parameters are the known ones."""

    @classmethod
    def apply(cls, *args):
        return utils._ChunkedLogProbFunction.apply(*args)[:4]


class Exchanged(FourResults):
    """Entropy first."""

    @classmethod
    def apply(cls, *args):
        logprobs, entropy, *others = utils._ChunkedLogProbFunction.apply(*args)
        return entropy, logprobs, *others


class OneMore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs, labels):
        """Other parameters."""


def reads_no_compact(model):
    def forward():
        return utils._ChunkedLogProbFunction

    return forward


def within_a_block(module: types.SimpleNamespace) -> tuple[bool, dict]:
    with head.linear_head() as ours:
        return ours, dict(vars(module))


@pytest.mark.parametrize(
    ("name", "value", "difference"),
    [
        ("_ChunkedLogProbFunction", None, "has no _ChunkedLogProbFunction"),
        ("_use_triton", None, "has no _use_triton"),
        ("_ChunkedLogProbFunction", OneMore, r"logit_scale, outputs\), found forward\(ctx.*outputs, labels\)"),
        ("_ChunkedLogProbFunction", len, "found no forward"),
        ("_ChunkedLogProbFunction", FourResults, "to return 5 things, found 4"),
        ("_ChunkedLogProbFunction", Exchanged, r"expected.*\[\[-0.6931, -0.6931\].*found \[\[0.6931, 0.6931\]"),
        ("add_fused_lm_head", reads_no_compact, "add_fused_lm_head does not read _use_triton"),
    ],
)
def test_another_head_is_said_and_left_alone(monkeypatch, name, value, difference):
    other = types.SimpleNamespace(**vars(utils) | {name: value})
    monkeypatch.setattr(head, "_utils", lambda: other)
    before = dict(vars(other))
    with pytest.warns(UserWarning, match=f"TRL is left as it is: .*{difference}"):
        assert head.patch_trl() is False
    with pytest.warns(UserWarning, match=difference):
        block = within_a_block(other)
    assert block == (False, before)
    head.unpatch_trl()
    assert vars(other) == before


def test_the_table_has_every_parameter_of_the_head():
    forward = inspect.signature(utils._ChunkedLogProbFunction.forward)
    assert list(forward.parameters) == ["ctx", *versions.HEAD_PARAMETERS]
    assert list(inspect.signature(head.Head.apply).parameters) == ["self", *versions.HEAD_PARAMETERS]


def test_a_head_that_cannot_be_compared_is_left_alone(monkeypatch):
    def raises(*_):
        raise RuntimeError("another head")

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", raises)
    assert head_differences(utils) == ["comparing it failed: RuntimeError: another head"]
    monkeypatch.setattr(utils, "add_fused_lm_head", print)
    assert head_differences(utils)[0].startswith("comparing it failed: AttributeError")


def test_what_leaves_positions_out_is_compared_too(monkeypatch):
    monkeypatch.setattr(utils, "_use_triton", lambda device, dtype: True)
    assert head_differences(utils) == ["expected _use_triton(device), found _use_triton(device, dtype)"]


def test_a_version_that_is_none_is_refused(monkeypatch):
    installed(monkeypatch, "garbage")
    with pytest.raises(ImportError, match=r"needs TRL 1\.16 or later; found 'garbage'"):
        check_trl()
