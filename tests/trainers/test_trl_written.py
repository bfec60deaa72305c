"""The head runs for tokens that the model wrote, in every pass, and what TRL gets is the same there."""

import pytest
import torch
from trl_recorder import made_up, run
from trl_toys import make_model, make_tokenizer

import aepo.integrations.trl.head as head
from aepo.integrations.trl.written import OnlyWritten, of_tool_masks


@pytest.fixture
def rows(monkeypatch):
    """Rows of hidden states that our operation was given, call by call."""
    seen = []
    plain = head.linear_logprobs_and_entropy

    def counted(hidden, *args, **kwargs):
        seen.append(len(hidden))
        return plain(hidden, *args, **kwargs)

    monkeypatch.setattr(head, "linear_logprobs_and_entropy", counted)
    return seen


@pytest.mark.parametrize("changed", [{}, {"num_iterations": 2}, {"beta": 0.1}, {"preset": "grpo"}])
def test_no_product_is_made_for_results_of_tools(changed, rows, tmp_path):
    trainer = run(tmp_path, max_steps=2, gradient_accumulation_steps=1, **changed)
    steps = [micro for step in trainer.steps for micro in step.micro_batches]
    assert any((micro["tool_mask"] == 0).any() for micro in steps)
    expected = [int((micro["completion_mask"] * micro["tool_mask"]).sum()) for micro in steps]
    passes = [one for generation in trainer.generations for one in [int(_written(generation.batch).sum())]]
    # Every call, of updates and of passes before them, has as many rows as its completions have written tokens.
    assert set(rows) == set(expected + passes)
    assert sum(rows) >= sum(expected)


def _written(batch):
    return batch["completion_mask"] * batch["tool_mask"]


def test_rows_are_taken_in_order_and_padding_may_be_wider():
    calls = []
    written = of_tool_masks([[1, 0, 1], [1], [0, 1]])
    assert written.tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert of_tool_masks(None) is None
    model = OnlyWritten(lambda labels, **_: calls.append(labels.tolist()), written, columns=4)
    labels = torch.arange(12).reshape(2, 6)
    model(labels=labels, fused_lm_head=True)
    model(labels=labels[:1], fused_lm_head=True)
    assert calls == [[[0, 1, 2, -100, 4, 5], [6, 7, 8, -100, -100, 11]], [[0, 1, -100, 3, -100, 5]]]
    assert labels.tolist() == torch.arange(12).reshape(2, 6).tolist()  # the caller's


def test_what_is_asked_of_the_model_is_the_models():
    model = make_model(make_tokenizer())
    assert OnlyWritten(model, torch.ones(1, 1), 1).config is model.config


def test_made_up_completions_have_results():
    """Else the tests above would see nothing."""
    assert any(0 in mask for mask in made_up(["a", "a", "a", "a"], None)["env_mask"])
