"""Language models: tokens and text, the tiny model before training, loading by name."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from aepo.agents.protocol import ChatFormat
from aepo.agents.tasks.facts.geography import documents, real_world
from aepo.agents.tasks.facts.prompt import INSTRUCTIONS
from aepo.agents.tasks.facts.task import FactsTask
from aepo.agents.tasks.facts.tiny import TAGS
from aepo.agents.tasks.facts.warmstart import untrained
from aepo.config import Config, ModelConfig, WarmStartConfig
from aepo.load import load_agent, load_model
from aepo.models.language_model import LanguageModel
from aepo.models.small import small_llama
from aepo.models.smollm2 import gguf_file
from aepo.types import Question, TokenIds, ToolResult, Turn

UNTRAINED = WarmStartConfig(steps=0)


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return untrained(UNTRAINED)


def encode(language_model: LanguageModel, text: str) -> list[int]:
    return language_model.tokenizer.encode(text, add_special_tokens=False)


def facts_format(language_model: LanguageModel) -> ChatFormat:
    """That of the demo's agent."""
    with closing(load_agent(Config(), language_model)) as agent:
        return agent.format


def asked(language_model: LanguageModel, text: str) -> TokenIds:
    """The tokens of a question of the demo's task."""
    with closing(load_agent(Config(), language_model)) as agent:
        return agent.prompt_tokens(Question("q", text))


def test_text_of_the_task_survives_tokenization(tiny: LanguageModel) -> None:
    task, unknown = FactsTask(), tiny.tokenizer.unk_token_id
    texts = [*documents(real_world()), *(plan.text for plan in (*task.train_plans, *task.heldout_plans))]
    texts += [f"<python> print(round({i} * 1000 / 7))</python><result> {i}.25\n</result>\n" for i in range(0, 5000, 7)]
    texts += ["error: ZeroDivisionError: division by zero", "x = [1]; print(x[0]) # {'Foo_bar'}"]
    for text in texts:
        tokens = encode(tiny, text)
        assert unknown not in tokens
        assert tiny.tokenizer.decode(tokens) == text


def test_a_tag_a_number_and_a_name_of_one_word_are_one_token(tiny: LanguageModel) -> None:
    for text in (*TAGS, "0", "7", "38", "999", " Warsaw", " Poland", " million"):
        assert len(encode(tiny, text)) == 1, text
    assert len(encode(tiny, " Burkina Faso")) == 2
    assert len(encode(tiny, "1234")) == 2


def test_prompt_result_and_end_of_text(tiny: LanguageModel) -> None:
    text_format = facts_format(tiny)
    assert text_format.decode(asked(tiny, "What is the capital of Peru?")) == "What is the capital of Peru?\n"
    peru = "Peru: Lima is the capital of Peru."
    result = text_format.result_tokens(Turn("", ""), [ToolResult(peru, None, 0.0)])
    assert list(result) == encode(tiny, f"<result> {peru}</result>\n")
    assert text_format.eos_ids == tiny.eos_ids == (tiny.tokenizer.eos_token_id,)
    turn = text_format.read([*encode(tiny, "<answer> Lima</answer>"), *tiny.eos_ids], "stop")
    assert (turn.answered, turn.answer, turn.well_formed) == (True, " Lima", True)
    assert tiny.vocab_size == len(tiny.tokenizer) == tiny.model.get_input_embeddings().weight.shape[0]


def test_the_initial_weights_are_a_function_of_the_seed_alone(tiny: LanguageModel) -> None:
    before = torch.random.get_rng_state()
    again, other = small_llama(tiny.tokenizer, 0).state_dict(), small_llama(tiny.tokenizer, 1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, weight in tiny.model.state_dict().items():
        assert torch.equal(weight, again[name])
    assert not torch.equal(other["model.embed_tokens.weight"], again["model.embed_tokens.weight"])


@torch.no_grad()
def test_attention_copies_from_the_start(tiny: LanguageModel) -> None:
    # A word that stands before is likelier than the same word where it does not; with ordinary random weights the
    # difference is zero on average.
    names = [f" {name}" for name in ("Warsaw", "Lima", "Kyiv", "Oslo", "Tunis", "Tokyo", "Quito", "Hanoi")]
    ids = torch.tensor([encode(tiny, name)[0] for name in names])
    prompts = torch.tensor([encode(tiny, f"The capital is{name}. The capital is") for name in names])
    logprobs = tiny.model(input_ids=prompts).logits[:, -1].log_softmax(-1)[:, ids]
    assert (logprobs.diagonal() - logprobs.mean(1)).mean() > 0.1


def test_a_model_directory_is_loaded(tiny: LanguageModel, tmp_path: Path) -> None:
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(name=str(tmp_path)), UNTRAINED)
    tokens = torch.tensor([asked(tiny, "What is the capital of Peru?")])
    assert torch.equal(loaded.model(input_ids=tokens).logits, tiny.model(input_ids=tokens).logits)
    assert not loaded.model.training
    assert encode(loaded, INSTRUCTIONS) == encode(tiny, INSTRUCTIONS)
    half = load_model(ModelConfig(name=str(tmp_path), dtype="bfloat16"), UNTRAINED)
    assert half.model.dtype == torch.bfloat16


def test_a_name_that_is_none_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.name = 'gpt': expected tiny, smollm2-135m-instruct, or a directory"):
        load_model(ModelConfig(name="gpt", cache_dir=str(tmp_path)), UNTRAINED)


def _smollm2_is_installed() -> bool:
    try:
        return gguf_file().exists()
    except ModuleNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _smollm2_is_installed(), reason="SmolLM2's weights are not installed (extra smollm2)")
@torch.no_grad()
def test_smollm2_speaks_english() -> None:
    language_model = load_model(ModelConfig(name="smollm2-135m-instruct"), UNTRAINED)
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    tokens = torch.tensor([encode(language_model, text)])
    loss = language_model.model(input_ids=tokens, labels=tokens).loss
    assert loss < 3.0  # nats per token; ln(49152) = 10.8 for weights that are wrong

    text_format = facts_format(language_model)
    prompt = text_format.decode(asked(language_model, "What is the capital of Peru?"))
    assert "<search>words</search>" in prompt
    assert prompt.count("What is the currency of the country whose capital is Poseidonis?") == 1
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of Peru?<|im_end|>\n<|im_start|>assistant\n")
    assert language_model.tokenizer.convert_tokens_to_ids("<|im_end|>") in text_format.eos_ids
    result = text_format.result_tokens(Turn("", ""), [ToolResult("42", None, 0.0)])
    assert text_format.decode(result) == "<result> 42</result>\n"
