"""New weights into running vLLM engines: exactly those, everywhere or nowhere, and nothing of the old ones is left."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed.weight_transfer.base import ModuleSource

from aepo.vllm import weights
from aepo.vllm.weights import BACKEND, WeightSender, WeightUpdateError
from tests.aepo.engine_toys import model, tokenizer
from tests.integrations.conftest import make_llm

PROMPT = tuple(range(40, 190))  # longer than one block of vLLM's cache, 128 on CPUs
CLOSE = 1e-5  # float32 against float64 in 3 layers; measured: 4e-6


class Client:
    """A WeightClient of an engine in this process; `before` is called with the name of each method and its argument."""

    def __init__(self, llm: LLM, name: str = "here", before=lambda method, argument: None) -> None:
        self.llm, self.name, self.before = llm, name, before

    def init_weight_transfer_engine(self, init_info) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.before("start", None)
        self.llm.start_weight_update()

    def update_weights(self, update_info) -> None:
        self.before("update", update_info)
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version=None) -> None:
        self.before("finish", weight_version)
        self.llm.finish_weight_update(weight_version=weight_version)

    def reset_prefix_cache(self) -> bool:
        return self.llm.reset_prefix_cache()


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[tuple[str, bool], LLM]:
    """By runner and by whether the output layer is the embedding."""
    made = {}
    for tied in (True, False):
        path = tmp_path_factory.mktemp("model")
        policy(tied).save_pretrained(path)
        tokenizer().save_pretrained(path)
        for runner in ("v1", "v2"):
            made[runner, tied] = make_llm(
                str(path), runner, weight_transfer_config={"backend": BACKEND}, max_logprobs=-1
            )
    return made


@pytest.fixture(params=["v1", "v2"])
def runner(request) -> str:
    return request.param


@pytest.fixture
def llm(engines, runner) -> LLM:
    return engines[runner, True]


def policy(tied: bool = True, seed: int = 0, **changes):
    """The model of the engines, with other weights for another seed."""
    made = model(dtype=torch.float32, head_dim=32, tie_word_embeddings=tied, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def sample(llm: LLM, tokens: int = 4):
    parameters = SamplingParams(temperature=0, max_tokens=tokens, logprobs=-1, ignore_eos=True)
    return llm.generate([TokensPrompt(prompt_token_ids=list(PROMPT))], parameters, use_tqdm=False)[0]


def logprobs(output) -> torch.Tensor:
    """[tokens, vocabulary] of a RequestOutput."""
    steps = output.outputs[0].logprobs
    return torch.tensor([[step[i].logprob for i in range(len(step))] for step in steps], dtype=torch.float64)


def error_against(output, module) -> float:
    """Largest difference of log-probs to those of a transformers model in float64."""
    tokens = [*PROMPT, *output.outputs[0].token_ids]
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return (logprobs(output) - truth[len(PROMPT) - 1 : -1]).abs().max().item()


@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_runs_the_weights_that_were_sent(engines, runner, tied):
    llm, trained = engines[runner, tied], policy(tied)
    sender = WeightSender([Client(llm)], trained)
    for version in (7, 8):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        old = logprobs(sample(llm))
        assert sample(llm).num_cached_tokens > 0
        sender.send(version)
        output = sample(llm)
        assert output.num_cached_tokens == 0
        assert error_against(output, trained) <= CLOSE
        assert (logprobs(output) - old).abs().max() > 0.1, "the weights differ enough to be told apart"
        assert [(span.version, span.end - span.start) for span in output.outputs[0].weight_versions] == [
            (str(version), 4)
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_converted_to_the_type_of_the_engine(llm, dtype, caplog):
    trained = policy(seed=3)
    for parameter in trained.parameters():  # the tables of the rotary embedding stay as they are
        parameter.data = parameter.data.to(dtype)
    logger = logging.getLogger("vllm")  # hands nothing on to the root
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, "vllm"):
        WeightSender([Client(llm)], trained).send(1)
    logger.removeHandler(caplog.handler)
    assert error_against(sample(llm), trained) <= CLOSE
    assert not caplog.records, "a warning for each tensor that was converted, and for those that are in no file"


class Listed(ModuleSource):
    """A source of these tensors."""

    def __init__(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self._tensors = tensors

    def metadata(self):
        holder = torch.nn.ParameterDict({name.replace(".", "/"): tensor for name, tensor in self._tensors})
        return ModuleSource(holder).metadata()

    def __iter__(self):
        return iter(self._tensors)


@pytest.mark.parametrize(
    ("changes", "dropped", "message"),
    [
        (
            {"intermediate_size": 56},
            "",
            r"mlp\.down_proj\.weight' of shape \[32, 56\] does not fit .*: it has more elements",
        ),
        ({"intermediate_size": 40}, "", r"mlp\.down_proj\.weight' of shape \[32, 40\] does not fit"),
        ({"vocab_size": 270}, "", r"embed_tokens\.weight' of shape \[270, 32\] does not fit"),
        ({"num_hidden_layers": 4}, "", r"layers\.3\..* does not fit"),
        ({}, "layers.1.self_attn.k_proj", r"not there, in model\.layers\.1\.self_attn\.qkv_proj\)"),
        ({}, "embed", r"not there, in model\.embed_tokens"),
    ],
)
def test_another_model_is_refused_and_changes_nothing(llm, changes, dropped, message):
    before = logprobs(sample(llm))
    other = list(policy(seed=5, **changes).named_parameters())
    source = Listed([(name, tensor) for name, tensor in other if not dropped or dropped not in name])
    with pytest.raises(WeightUpdateError, match=message) as failure:
        WeightSender([Client(llm)], source).send(2)
    assert "update_weights failed on replica here" in str(failure.value)
    assert "every replica keeps the weights" in str(failure.value)
    assert torch.equal(logprobs(sample(llm)), before)
    whole = policy(seed=6)
    WeightSender([Client(llm)], whole).send(3)
    assert error_against(sample(llm), whole) <= CLOSE


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(path: Path) -> None:
    path.write_bytes(b"no tensors here" * 100)


def of_another_update(path: Path) -> None:
    save_file(load_file(path), path, metadata={"token": "other"})


def lose_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    with weights.safe_open(path, "pt") as file:
        save_file(tensors, path, metadata=file.metadata())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is damaged"),
        (overwrite, "is damaged"),
        (of_another_update, "belongs to another update"),
        (lose_a_tensor, "tensors, expected"),
        (Path.unlink, "is not there: trainer and engine must see the same directory"),
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(engines, damage, message, tmp_path):
    llm = engines["v1", True]

    def before(method, argument):
        if method == "update" and argument["directory"]:
            damage(weights.file_path(Path(argument["directory"]), 0))

    old = logprobs(sample(llm))
    with pytest.raises(WeightUpdateError, match=message):
        WeightSender([Client(llm, before=before)], policy(seed=7), tmp_path).send(4)
    assert torch.equal(logprobs(sample(llm)), old)
    assert not list(tmp_path.iterdir()), "no files are left"
    WeightSender([Client(llm)], policy(seed=8)).send(5)
    assert error_against(sample(llm), policy(seed=8)) <= CLOSE


def fail_at(name: str):
    def before(method, argument):
        if method == name:
            raise ConnectionError("the cable is out")

    return before


@pytest.mark.parametrize("method", ["start", "update"])
def test_no_replica_changes_before_all_have_accepted(engines, method):
    one, other = engines["v1", True], engines["v2", True]
    WeightSender([Client(one), Client(other, "there")], policy(seed=9)).send(6)
    with pytest.raises(WeightUpdateError, match=r"failed on replica there .*the cable is out") as failure:
        WeightSender([Client(one), Client(other, "there", fail_at(method))], policy(seed=10)).send(7)
    assert "every replica keeps the weights" in str(failure.value)
    with pytest.raises(RuntimeError, match="without a matching start_weight_update"):
        one.finish_weight_update()  # it does not hold on to files that are gone
    for llm in (one, other):
        assert error_against(sample(llm), policy(seed=9)) <= CLOSE
        assert sample(llm).outputs[0].weight_versions[0].version == "6"
    WeightSender([Client(one), Client(other, "there")], policy(seed=10)).send(7)
    assert max(error_against(sample(llm), policy(seed=10)) for llm in (one, other)) <= CLOSE


def test_a_replica_that_is_lost_at_the_end_is_named(engines):
    one, other = engines["v1", True], engines["v2", True]
    sender = WeightSender([Client(one), Client(other, "there", fail_at("finish"))], policy(seed=11))
    with pytest.raises(WeightUpdateError, match=r"replica there .*; here has version 8: send again or restart"):
        sender.send(8)
    WeightSender([Client(one), Client(other, "there")], policy(seed=12)).send(9)
    assert max(error_against(sample(llm), policy(seed=12)) for llm in (one, other)) <= CLOSE


def test_unfinished_requests_are_told_of(llm):
    engine = llm.llm_engine
    engine.add_request("open", TokensPrompt(prompt_token_ids=[*PROMPT]), SamplingParams(max_tokens=50, ignore_eos=True))
    engine.step()
    with pytest.raises(WeightUpdateError, match="unfinished requests hold keys and values of the old weights"):
        WeightSender([Client(llm)], policy(seed=13)).send(10)
    engine.abort_request(["open"])
    while engine.has_unfinished_requests():
        engine.step()
    WeightSender([Client(llm)], policy(seed=13)).send(10)
    assert error_against(sample(llm), policy(seed=13)) <= CLOSE


def test_many_files_are_one_update(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FILE_BYTES", 10_000)
    told = {}
    WeightSender([Client(llm, before=told.__setitem__)], policy(seed=14), tmp_path / "new").send(11)
    assert told["update"]["files"] > 5
    assert error_against(sample(llm), policy(seed=14)) <= CLOSE
    assert not list((tmp_path / "new").iterdir())


def test_no_room_is_known_before_anything_starts(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "size", lambda source: 1 << 60)
    calls = []
    sender = WeightSender([Client(llm, before=lambda method, _: calls.append(method))], policy(), tmp_path)
    with pytest.raises(OSError, match=r"MiB free, the weights need 1099511627776 MiB"):
        sender.send(12)
    assert "start" not in calls


def test_a_sender_needs_a_replica():
    with pytest.raises(ValueError, match="clients: expected at least one replica"):
        WeightSender([], policy())
