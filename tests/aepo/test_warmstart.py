"""The warm start: what is learned from, that it is learned, and that it is done once."""

import itertools
from pathlib import Path

import pytest
import torch

from aepo.agents.tasks.facts.demonstrations import HASTY, demonstrations
from aepo.agents.tasks.facts.warmstart import encode, tags, train, untrained, warm_started
from aepo.config import WarmStartConfig
from aepo.models.language_model import LanguageModel
from aepo.models.small import IGNORED

SHORT = WarmStartConfig(steps=40, batch_tokens=512)


def losses(config: WarmStartConfig, language_model: LanguageModel) -> list[float]:
    found: list[float] = []
    train(language_model, config, lambda _step, _total, loss: found.append(loss))
    return found


def test_only_what_the_demonstrator_wrote_is_learned() -> None:
    language_model = untrained(SHORT)
    text_format = tags(language_model)
    for demonstration in itertools.islice(demonstrations("0", HASTY), 50):
        tokens, labels = encode(language_model, text_format, demonstration)
        written = "".join(f"<{step.tool}> {step.argument}</{step.tool}>" for step in demonstration.steps)
        written += f"<answer> {demonstration.answer}</answer>"
        assert text_format.decode([label for label in labels if label != IGNORED]) == written
        assert all(label in (token, IGNORED) for token, label in zip(tokens, labels, strict=True))
        text = text_format.decode(tokens)
        assert text.startswith(f"{demonstration.question}\n<")
        assert text.count("<result>") == len(demonstration.steps)


def test_the_loss_falls_and_a_seed_gives_the_same_weights() -> None:
    first, second = untrained(SHORT), untrained(SHORT)
    curve = losses(SHORT, first)
    assert len(curve) == SHORT.steps
    # ln 1826 = 7.5 for guessing; the tags and the frame of a call are learned at once.
    assert curve[0] > 6 > 4 > sum(curve[-3:]) / 3
    assert losses(SHORT, second) == curve
    for weight, same in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(weight, same)
    assert not first.model.training


def test_no_steps_leave_the_random_weights() -> None:
    config = WarmStartConfig(steps=0)
    language_model, fresh = untrained(config), untrained(config)
    train(language_model, config)
    for weight, same in zip(language_model.model.state_dict().values(), fresh.model.state_dict().values(), strict=True):
        assert torch.equal(weight, same)


def test_the_same_training_is_done_once(tmp_path: Path) -> None:
    config = WarmStartConfig(steps=2, batch_tokens=256)
    seen: list[int] = []
    first = warm_started(config, tmp_path, progress=lambda step, _total, _loss: seen.append(step))
    assert seen == [1, 2]
    again = warm_started(config, tmp_path, progress=lambda step, _total, _loss: seen.append(step))
    assert seen == [1, 2]
    assert len(list(tmp_path.iterdir())) == 1
    tokens = torch.tensor([first.tokenizer.encode("What is the capital of Peru?\n")])
    assert torch.equal(first.model(input_ids=tokens).logits, again.model(input_ids=tokens).logits)

    warm_started(WarmStartConfig(steps=2, batch_tokens=256, seed=1), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_step: int, _total: int, _loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_started(WarmStartConfig(steps=2, batch_tokens=256), tmp_path, progress=interrupt)
    assert not list(tmp_path.iterdir())
