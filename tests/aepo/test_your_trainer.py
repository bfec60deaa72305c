"""examples/your_trainer.py does what it says, its loss is AEPO's, and docs/your_trainer.md shows what stands in it."""

import copy
import dataclasses
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aepo_kernels import PolicyObjective, logprobs_and_entropy, policy_loss, selective_log_softmax

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "your_trainer.py"
PAGE = ROOT / "docs" / "your_trainer.md"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("your_trainer_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def problem(example):
    model = example.Model()
    return model, example.prepared(model, example.rollout())


def by_hand(model: torch.nn.Module, batch, *, factor_of_old: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss in float64, token by token, with statistics over all tokens; and its gradients.

    factor_of_old: AEPO's factor is that of the old policy's entropy of the token, not of the current one.
    """
    model = copy.deepcopy(model).double()
    log_p = model(batch.input_ids).log_softmax(-1)
    places = batch.mask.nonzero().tolist()
    entropies = torch.stack([-(log_p[b, t].exp() * log_p[b, t]).sum().detach() for b, t in places])
    old_entropies = torch.stack([batch.old_entropy[b, t] for b, t in places]).double()
    terms = []
    for (b, t), entropy in zip(places, old_entropies if factor_of_old else entropies, strict=True):
        logprob, old = log_p[b, t, batch.labels[b, t]], batch.old_logprobs[b, t].double()
        a = batch.advantages[b].double() * (1 + 0.2 * (entropy - old_entropies.mean()) / old_entropies.std())
        ratio = (logprob - old).exp()
        if ratio > 1.2 and a > 0:
            term = -a * 1.2 * ratio / ratio.detach()
        elif ratio < 0.8 and a < 0:
            term = -a * 0.8
        elif ratio > 3 and a < 0:
            term = -a * 3
        else:
            term = -a * ratio
        reference = batch.ref_logprobs[b, t] - logprob
        weight = (old - batch.rollout_logprobs[b, t]).exp().clamp(max=2)
        terms.append(term * weight + 0.05 * (reference.exp() - 1 - reference))
    loss = torch.stack(terms).sum() / len(terms)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shape", ["from_logprobs", "from_logits", "from_hidden", "from_logits_own", "without_entropy"])
@pytest.mark.parametrize("rows", [12, 5])
def test_every_shape_is_the_formula(example, problem, shape, rows):
    """In float32, whole and in micro-batches of 5, 5 and 2 rows, against float64: a few roundings of 6e-8."""
    model, batch = problem
    truth, gradients = by_hand(model, batch, factor_of_old=shape == "without_entropy")
    loss, found = example.optimiser_step(getattr(example, shape), model, batch, rows)
    assert truth.abs() > 1e-2
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 1e-3, name
        torch.testing.assert_close(found[name].double(), gradient, rtol=0, atol=2e-6 * scale, msg=name)


def test_the_batch_reaches_every_rule(example, problem):
    """Else agreement would say little: clips on both sides, the cap, tool results, rows and parts of several sizes."""
    model, batch = problem
    _, metrics = example.from_logits(model, batch, example.step_of(batch))
    for name in ("clip_fraction_high", "clip_fraction_low", "dual_clip_fraction", "kl", "entropy_std"):
        assert metrics[name] > 0.005, name
    weights = (batch.old_logprobs - batch.rollout_logprobs).exp()[batch.mask != 0]
    assert weights.min() < 2 < weights.max()
    counts = batch.mask.sum(-1)
    assert counts.min() < counts.max()
    assert batch.advantages.min() < 0 < batch.advantages.max()
    assert not batch.mask[:, 5:7].any(), "the labels there are the tool's"


def test_it_runs_as_it_stands():
    """Two ranks included; the assertions of its own would fail the process."""
    ran = subprocess.run([sys.executable, str(EXAMPLE)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert "the same from log-probs, logits and hidden states, whole and in micro-batches" in ran.stdout
    assert "and on 2 ranks under FSDP2" in ran.stdout


def test_statistics_do_not_cancel(example, problem):
    """Entropies of 11 nats that differ by 1e-6: their squares differ by less than a rounding in float32."""
    _, batch = problem
    entropy = torch.full_like(batch.old_entropy, 11).double()
    entropy[::2] += 1e-6
    mean, std = example.step_of(dataclasses.replace(batch, old_entropy=entropy)).entropy_stats
    counted = entropy[batch.mask != 0]
    assert mean.item() == pytest.approx(counted.mean().item(), rel=1e-15)
    assert std.item() == pytest.approx(counted.std().item(), rel=1e-9)


def test_a_rank_without_tokens_is_no_error(example, problem):
    """Its loss is 0 and so are its gradients; of a single token the standard deviation is 0."""
    model, batch = problem
    empty = dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))
    for shape in example.SHAPES[:3]:
        loss, gradients = example.optimiser_step(shape, model, empty, rows=12)
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients.values())
    one = torch.zeros_like(batch.mask)
    one[0, 3] = 1
    assert example.step_of(dataclasses.replace(batch, mask=one)).entropy_stats[1] == 0


def test_the_first_update_is_as_the_page_says(example):
    """Ratios of 1; and a temperature that only the rollout had is what its table says."""
    model, batch = example.Model(), example.rollout()
    batch = example.with_old_policy(model, batch, rows=12)
    for shape in (*example.SHAPES[:3], example.without_entropy):
        _, metrics = shape(model, batch, example.step_of(batch))
        assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
        assert metrics["approx_kl"] == 0
    with torch.no_grad():
        hot, _ = logprobs_and_entropy(model(batch.input_ids), batch.labels, temperature=0.7)
    _, metrics = example.from_logits(model, dataclasses.replace(batch, old_logprobs=hot), example.step_of(batch))
    assert metrics["ratio_max"] > 1.5


def test_parts_with_statistics_and_denominators_of_their_own_are_another_loss(example, problem):
    """What the table calls a loss that changes with the micro-batch size, by more than any rounding."""
    model, batch = problem
    truth, _ = example.optimiser_step(example.from_logits, model, batch, rows=12)
    for wrong in ("entropy_stats", "denominator"):
        losses = []
        for part in batch.parts(5):
            own = getattr(example.step_of(part), wrong)
            losses.append(
                example.from_logits(model, part, dataclasses.replace(example.step_of(batch), **{wrong: own})).loss
            )
        assert abs(sum(losses).item() / truth.item() - 1) > 5e-3, wrong


def test_errors_say_what_the_page_quotes(example, problem):
    model, batch = problem
    logits = model(batch.input_ids)
    square = logits.square().sum()  # somebody else who needs the logits
    example.from_logits(lambda _: logits, batch, example.step_of(batch)).loss.backward(retain_graph=True)
    arguments = (batch.old_logprobs, batch.old_logprobs, batch.advantages, batch.mask)
    for call, quoted in (
        (
            lambda: policy_loss(*arguments, objective=PolicyObjective.preset("aepo")),
            "entropy_advantage != 0 needs entropy",
        ),
        (lambda: selective_log_softmax(model(batch.input_ids), batch.labels), "label -100 ... is outside [0, V)"),
        (square.backward, "... needed for gradient computation has been modified"),
    ):
        assert f"`{quoted}`" in PAGE.read_text(encoding="utf-8")
        with pytest.raises((ValueError, RuntimeError), match=re.escape(quoted).replace(r"\.\.\.", ".*")):
            call()


def test_the_page_shows_pieces_of_the_example():
    pieces = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(pieces) >= 6
    example = EXAMPLE.read_text(encoding="utf-8")
    for piece in pieces:
        assert any(textwrap.indent(piece, " " * spaces) in example for spaces in (0, 4)), piece
