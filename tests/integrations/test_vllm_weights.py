"""New weights into running vLLM engines: exactly those, everywhere or nowhere, and nothing of the old ones is left."""

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import io
import logging
import mmap
import os
import re
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta

from aepo.files import tensors as tensor_file
from aepo.vllm.client import own_words
from aepo.vllm.weights import BACKEND, WeightSender, WeightUpdateError, process_secret, signing_secret, worker, write
from aepo.vllm.weights.files import TYPES, CheckpointFiles, _checked_tensors
from aepo.vllm.weights.manifest import FileUpdateInfo, ManifestError, _canonical, _hmac, check, signed
from aepo.vllm.weights.sender import finish_update, stamped
from aepo.vllm.weights.worker import FileInitInfo, FileWeightTransferEngine
from tests.aepo.engine_toys import model, tokenizer
from tests.integrations.conftest import make_llm

PROMPT = tuple(range(40, 190))  # longer than one block of vLLM's cache, 128 on CPUs
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CLOSE = 1e-5  # float32 against float64 in 3 layers; measured: 4e-6


class Client:
    """A WeightClient of an engine in this process; `before` is called with the name of each method and its argument."""

    secret = process_secret()

    def __init__(self, llm: LLM, name: str = "here", before=lambda method, argument: None) -> None:
        self.llm, self.name, self.before = llm, name, before

    def init_weight_transfer_engine(self, init_info) -> None:
        # An engine keeps to the first directory. A new one for every test would take a minute.
        self.llm.collective_rpc(lambda worker: setattr(worker.weight_transfer_engine, "_trusted", None))
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> list[str]:
        self.before("start", None)
        self.llm.start_weight_update()
        return self.llm.collective_rpc("aepo_nonce")

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
    stamps = set()
    for version in (7, 7, 8):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        old = logprobs(sample(llm))
        assert sample(llm).num_cached_tokens > 0
        stamp = sender.send(version)
        output = sample(llm)
        assert output.num_cached_tokens == 0
        assert error_against(output, trained) <= CLOSE
        assert (logprobs(output) - old).abs().max() > 0.1, "the weights differ enough to be told apart"
        assert [(span.version, span.end - span.start) for span in output.outputs[0].weight_versions] == [(stamp, 4)]
        assert re.fullmatch(f"{version}@[0-9a-f]{{12}}", stamp)
        stamps.add(stamp)
    assert len(stamps) == 3


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
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors]

    def __iter__(self):
        return iter(self._tensors)


class Later:
    """A source as vLLM 0.33 has them."""

    def __init__(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self._tensors = tensors

    @functools.cached_property
    def metadata(self):
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors]

    def iter_full(self):
        return iter(self._tensors)


def test_a_source_of_the_next_vllm(llm):
    trained = policy(seed=4)
    WeightSender([Client(llm)], Later(list(trained.named_parameters()))).send(1)
    assert error_against(sample(llm), trained) <= CLOSE


def fleeting(tensors: dict[str, torch.Tensor]):
    """As those of a trainer: each is gone when the next one comes."""
    for name, tensor in tensors.items():
        one = tensor.clone()
        yield (name, f"tied to {name}"), one
        one.zero_()


@pytest.mark.parametrize("file_bytes", [1, 100, 1 << 30])
def test_files_are_those_of_safetensors(tmp_path, monkeypatch, file_bytes):
    monkeypatch.setattr(write, "FILE_BYTES", file_bytes)
    monkeypatch.setattr(tensor_file, "PIECE", 7)
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in TYPES.values()}
    tensors |= {'ä "': torch.randn(()), "none": torch.empty(0, 4), "turned": torch.randn(4, 6).T}
    info = write.write(tmp_path, fleeting(tensors))
    files = sorted(tmp_path.iterdir())
    assert [(path.name, path.stat().st_size) for path in files] == [(one["name"], one["bytes"]) for one in info.files]
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] == [one["sha256"] for one in info.files]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    read = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert read.keys() == tensors.keys()
    assert info.tensors == len(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].double(), tensor.double()), name
    assert len(files) == {1: len(tensors) - 1, 100: 3, 1 << 30: 1}[file_bytes]


@pytest.mark.parametrize(
    ("changes", "dropped", "message"),
    [
        (
            {"intermediate_size": 56},
            "",
            r"mlp\.gate_proj\.weight' of shape \[56, 32\] does not fit .*: it has more elements",
        ),
        ({"intermediate_size": 40}, "", r"mlp\.gate_proj\.weight' of shape \[40, 32\] does not fit"),
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


def change_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace_by_a_link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def give_two_names(path: Path) -> None:
    os.link(path, path.with_suffix(".other"))


def replace_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_directory_by_a_link(path: Path) -> None:
    real = path.parent.with_name("real")
    path.parent.rename(real)
    path.parent.symlink_to(real)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"00000\.safetensors has \d+ bytes, expected"),
        (change_a_bit, "is damaged: its SHA-256 is not that of the update"),
        (replace_by_a_link, "links are refused"),
        (give_two_names, "is not a regular file with one name"),
        (replace_by_a_pipe, "is not a regular file with one name"),
        (replace_directory_by_a_link, "links are refused"),
        (Path.unlink, "is not there, of .*: trainer and engine must see the same directory"),
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(engines, damage, message, tmp_path):
    llm = engines["v1", True]

    def before(method, argument):
        if method == "update" and argument["directory"]:
            damage(tmp_path / argument["directory"] / "00000.safetensors")

    old = logprobs(sample(llm))
    with pytest.raises(WeightUpdateError, match=message):
        WeightSender([Client(llm, before=before)], policy(seed=7), tmp_path).send(4)
    assert torch.equal(logprobs(sample(llm)), old)
    if damage is not replace_directory_by_a_link:
        assert not list(tmp_path.iterdir()), "no files are left"
    WeightSender([Client(llm)], policy(seed=8)).send(5)
    assert error_against(sample(llm), policy(seed=8)) <= CLOSE


@pytest.mark.parametrize("harm", [change_a_bit, lambda path: os.truncate(path, 100), Path.unlink])
def test_a_file_that_changes_after_its_check_is_not_loaded(llm, tmp_path, harm):
    def before(method, version):
        if method == "finish" and version:
            harm(next(tmp_path.glob("*/00000.safetensors")))

    old = logprobs(sample(llm))
    with pytest.raises(WeightUpdateError, match="was changed after its check: this engine keeps its weights"):
        WeightSender([Client(llm, before=before)], policy(seed=7), tmp_path).send(4)
    assert torch.equal(logprobs(sample(llm)), old)


def test_what_is_written_through_a_map_ends_as_an_engine_that_is_not_whole(llm):
    """Which leaves the times of a file on tmpfs as they are, where its pages were written to before."""
    maps = []

    def before(method, version):
        if method == "update" and version:
            with next(Path(directory).glob("*/00000.safetensors")).open("r+b") as file:
                maps.append(mmap.mmap(file.fileno(), 0))
            maps[0][-4096:] = maps[0][-4096:]
        if method == "finish" and version:
            maps[0][-4096:] = bytes(4096)

    (loads,) = llm.collective_rpc("aepo_loads")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        with pytest.raises(WeightUpdateError, match=r"a part of the new weights only: .*changed after its check"):
            WeightSender([Client(llm, before=before)], policy(seed=7), Path(directory)).send(4)
        assert llm.collective_rpc("aepo_loads") == [loads + 1]
    WeightSender([Client(llm)], policy(seed=8)).send(5)
    assert error_against(sample(llm), policy(seed=8)) <= CLOSE


def written(directory: Path, content: bytes, tensors: int = 1) -> FileUpdateInfo:
    """A file, and a manifest that describes it rightly."""
    (directory / "update").mkdir()
    (directory / "update" / "a").write_bytes(content)
    file = {"name": "a", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return FileUpdateInfo(directory="update", files=[file], tensors=tensors, version="1")


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e8m0fnu]
)
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype):
    info = written(tmp_path, save({"w": torch.ones(3).to(dtype)}))
    with pytest.raises(ValueError, match=r"weight 'w' is '\w+'; expected one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2"):
        CheckpointFiles(tmp_path, info, torch.float32)


@pytest.mark.parametrize(
    ("value", "dtype", "engine"),
    [
        *((value, dtype, dtype) for value in (float("nan"), float("inf"), -float("inf")) for dtype in FLOATS),
        (float("nan"), torch.float8_e4m3fn, torch.bfloat16),
        (-float("inf"), torch.float8_e5m2, torch.bfloat16),
        (1e39, torch.float64, torch.float32),
        (-1e39, torch.float64, torch.bfloat16),
        (7e4, torch.float32, torch.float16),
        (7e4, torch.bfloat16, torch.float16),
    ],
)
def test_weights_that_an_engine_would_have_as_no_finite_numbers_are_refused(tmp_path, value, dtype, engine):
    good = torch.full((2,), 6e4, dtype=torch.float64).clamp(max=torch.finfo(dtype).max).to(dtype)
    broken = torch.zeros(4, 5, dtype=torch.float64)
    broken[3, 1] = value
    info = written(tmp_path, save({"good": good, "broken": broken.to(dtype)}), 2)
    with pytest.raises(ValueError, match=f"weight 'broken' is not finite in {engine}, the type of this engine"):
        CheckpointFiles(tmp_path, info, engine)


NESTED = str([[[["x" * 9] * 9] * 9] * 9] * 9).replace("'", '"')
W = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "its header is not that of safetensors"),
        ("[]", "its header is not that of safetensors"),
        ('{"w":5}', "its header is not that of safetensors"),
        ('{"w":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}', "its header is not that of safetensors"),
        ('{"w":{"dtype":"F32","shape":[2],"data_offsets":[0]}}', "weight 'w' has other bytes"),
        ("{}", "has 8 bytes of tensors, its header describes 0"),
        ('{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "has 8 bytes of tensors, its header describes 4"),
        ('{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "weight 'w' has other bytes than its shape says"),
        ('{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', "weight 'w' has other bytes than its shape says"),
        ('{"w":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}', r"weight 'w' has the shape \[-1, -2\]"),
        ('{"w":{"dtype":"F32","shape":[2,true],"data_offsets":[0,8]}}', r"weight 'w' has the shape \[2, True\]"),
        ('{"w":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', r"weight 'w' has the shape \[2.0\]"),
        ('{"w":{"dtype":"F32","shape":"2","data_offsets":[0,8]}}', "weight 'w' has the shape '2'"),
        ('{"w":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}', "weight 'w' has the shape"),
        (f'{{"w":{{"dtype":"F32","shape":[0,{2**62},{2**62}],"data_offsets":[0,0]}}}}', "weight 'w' has the shape"),
        (f'{{"w":{{"dtype":"F32","shape":[{"1," * 8}2],"data_offsets":[0,8]}}}}', "expected at most 8 lengths"),
        (f'{{"w":{{"dtype":"F32","shape":{[2**62] * 20_000},"data_offsets":[0,8]}}}}', "expected at most 8 lengths"),
        (f'{{"w":{{"dtype":"F32","shape":{NESTED},"data_offsets":[0,8]}}}}', "weight 'w' has the shape"),
        (f'{{"w":{{"dtype":"{"X" * 200_000}","shape":[2],"data_offsets":[0,8]}}}}', "weight 'w' is 'XXX"),
        (f'{{"{"w" * 513}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}', "at most 512 printable characters"),
        (W.replace('"w"', '{"\\ud800"') + "}", "at most 512 printable characters"),
        (W.replace('"w"', '{"w\\n"') + "}", "at most 512 printable characters"),
        (f'{{"w":{{"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,8]}}}}', "its header is not that of"),
        ('{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4,8]}}', "weight 'w' has other bytes"),
        (f"{{{W},{W.replace('w', 'v')}}}", "weight 'v' has other bytes|weight 'w' has other bytes"),
        ('{"w":{"dtype":"F32","shape":[1073741824],"data_offsets":[0,4294967296]}}', "describes 4294967296"),
    ],
)
def test_a_file_that_is_signed_and_no_safetensors_file_is_refused(tmp_path, header, message):
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(8)
    with pytest.raises(ValueError, match=f"update/a is damaged: .*{message}|update/a is {message}") as failure:
        CheckpointFiles(tmp_path, written(tmp_path, content), torch.float32)
    assert len(str(failure.value)) < 500 + len(str(tmp_path))
    assert str(failure.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"1234567", bytes([255] * 9), (99).to_bytes(8, "little") + b"{}"])
def test_a_file_without_room_for_its_header_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"update/a is damaged: it has a header of \d+ bytes"):
        CheckpointFiles(tmp_path, written(tmp_path, content), torch.float32)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    info = written(tmp_path, save({"w": torch.ones(100)}))
    path = tmp_path / "update" / "a"
    size = path.stat().st_size
    os.truncate(path, size - 4)
    with io.FileIO(path) as file, pytest.raises(ValueError, match="it ends early"):
        _checked_tensors(file, size, torch.float32, hashlib.sha256())
    with pytest.raises(ValueError, match=f"has {size - 4} bytes, expected {size}"):
        CheckpointFiles(tmp_path, info, torch.float32)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_weights_that_overflow_leave_nothing_behind(llm, name):
    """Finite, so they are taken, and what they leave in the cache of keys and values is not. Blocks are used again."""
    trained = policy(seed=20)
    WeightSender([Client(llm)], trained).send(1)
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        for path, parameter in broken.named_parameters():
            if name in path or "input_layernorm" in path:
                parameter.fill_(1e30)
    WeightSender([Client(llm)], broken).send(2)
    for shift in range(3):
        llm.generate(
            [TokensPrompt(prompt_token_ids=[shift, *PROMPT])] * 8, SamplingParams(max_tokens=4), use_tqdm=False
        )
    WeightSender([Client(llm)], trained).send(3)
    for _ in range(8):
        assert error_against(sample(llm), trained) <= CLOSE


class Recorder(Client):
    """Keeps the last manifest, and puts `change` of it in its place."""

    change = staticmethod(lambda manifest: manifest)
    manifest = None

    def update_weights(self, update_info) -> None:
        if not update_info["withdraw"]:
            self.manifest = update_info
            update_info = self.change(update_info)
        super().update_weights(update_info)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signature": ""}, "not signed with the key"),
        ({"signature": "\u00e9"}, "not signed with the key"),
        ({"signature": None}, "not signed with the key"),
        ({"version": "100"}, "not signed with the key"),
        ({"tensors": 1}, "not signed with the key"),
        ({"directory": None}, "not signed with the key"),
        ({"files": []}, "not signed with the key"),
        ({"nonces": ["other"]}, "not signed with the key"),
        ({"withdraw": 1}, "not signed with the key"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(llm, changes, message):
    old = logprobs(sample(llm))
    client = Recorder(llm)
    client.change = lambda manifest: {**manifest, **changes}
    with pytest.raises(WeightUpdateError, match=message) as failure:
        WeightSender([client], policy(seed=15)).send(13)
    assert not any(str(value) in str(failure.value) for value in changes.values() if value and value != 1)
    assert torch.equal(logprobs(sample(llm)), old)


def test_names_that_leave_the_directory_are_refused_even_if_signed(llm):
    for name in ("..", ".", "../x", "a/b", "/etc", "", ".hidden", "a\\b", "a\n", "a\x00", None):
        for changes in ({"directory": name}, {"files": [{"name": name, "bytes": 1, "sha256": ""}]}):
            client = Recorder(llm)
            client.change = lambda manifest, changes=changes: asdict(
                signed(FileUpdateInfo(**{**manifest, **changes}), manifest["nonces"], Client.secret)
            )
            with pytest.raises(WeightUpdateError, match="expected a plain name"):
                WeightSender([client], policy(seed=15)).send(13)


FILE = {"name": "a", "bytes": 1, "sha256": "0" * 64}
GOOD = FileUpdateInfo(directory="x", files=[FILE], tensors=1, version="17@9f2c", nonces=["n"])


def test_a_manifest_as_the_sender_makes_it_is_taken():
    for version in ("1", "x" * 64, stamped(10**6)):
        check(signed(replace(GOOD, version=version), ["n"], "secret"), "n", ["secret"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"version": wrong}, "version of the update = .*: expected 1 to 64 printable ASCII characters")
            for wrong in (5, 1.5, True, None, [], {}, "", "x" * 65, "x" * 100_000, "\x1b[31m\n", "a b", "1\n", "\u00e9")
        ),
        *(
            ({"tensors": wrong}, "tensors of the update = .*: expected an int >= 0")
            for wrong in (True, -1, 1.0, "1", None)
        ),
        *(
            ({"nonces": wrong}, "nonces of the update = .*: expected a list of texts")
            for wrong in ("n", 5, [5], {"n": 1}, ["\ud800"], ["n" * 256], [[["n" * 99] * 9] * 9] * 9)
        ),
        *(({"withdraw": wrong}, "withdraw of the update = .*: expected false") for wrong in (1, 0, None, "no")),
        *(
            ({"files": wrong}, "files of the update = .*: expected a list")
            for wrong in ({}, "a", 5, None, [FILE] * 65_537)
        ),
        *(
            ({"files": [FILE, wrong]}, r"files\[1\] of the update = .*: expected name, bytes and sha256")
            for wrong in (5, "a", {}, {"name": "a", "bytes": 1}, {**FILE, "more": 1})
        ),
        *(
            ({"files": [{**FILE, "name": wrong}]}, r"files\[0\].name of the update = .*: expected a plain name")
            for wrong in ("../x", "", 5, None, "a" * 256, ["a"])
        ),
        *(
            ({"files": [{**FILE, "bytes": wrong}]}, r"files\[0\].bytes of the update = .*: expected an int >= 0")
            for wrong in (True, -1, 1.0, "1", None)
        ),
        *(
            ({"files": [{**FILE, "sha256": wrong}]}, r"files\[0\].sha256 of the update = .*: expected 64 hex digits")
            for wrong in ("", "0" * 63, "G" * 64, "0" * 64 + "\n", 5, None)
        ),
    ],
)
def test_fields_that_are_signed_and_wrong_are_refused(changes, message):
    info = replace(GOOD, **changes)
    with pytest.raises(ManifestError, match=message) as failure:
        check(replace(info, signature=_hmac("secret", _canonical(info))), "n", ["secret"])
    assert len(str(failure.value)) < 500
    assert str(failure.value).isprintable()


def test_an_update_is_good_for_one_engine_and_once(engines, tmp_path):
    one, other = Recorder(engines["v1", True]), Client(engines["v2", True])

    def keep(manifest):
        shutil.copytree(tmp_path / manifest["directory"], tmp_path / "kept")
        return manifest

    one.change = keep
    WeightSender([one], policy(seed=16), tmp_path).send(14)
    WeightSender([other], policy(seed=17), tmp_path).send(14)
    (tmp_path / "kept").rename(tmp_path / one.manifest["directory"])
    for client in (one, other):
        client.start_weight_update()
        with pytest.raises(Exception, match="not made for this call of start_weight_update"):
            client.llm.update_weights({"update_info": one.manifest})
    assert error_against(sample(other.llm), policy(seed=17)) <= CLOSE


def receiver() -> FileWeightTransferEngine:
    """The worker's side alone, without a model."""
    return FileWeightTransferEngine.__new__(FileWeightTransferEngine)


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ((["a", "b"], "/d"), (["a b"], "/d")),
        ((["a", "b"], "/d"), (["a"], "/d")),
        ((["a"], "/d"), ([], "/")),
        (([], None), (["guessed"], "/d")),
        (([], None), ([], "/d")),
        ((["a"], "/d"), (["a"], "/e")),
        ((["a"], "/d"), (["a"], None)),
    ],
)
def test_the_first_secrets_and_directory_of_an_engine_stay(first, later):
    engine = receiver()
    engine.init_transfer_engine(FileInitInfo(*first))
    engine.init_transfer_engine(FileInitInfo(*first))
    with pytest.raises(ValueError, match="and that cannot be changed"):
        engine.init_transfer_engine(FileInitInfo(*later))
    assert engine._trusted == FileInitInfo(*first)


@pytest.mark.parametrize("secrets", [[""], ["a", ""], [None], [1], "a", None, {"a": 1}])
def test_a_secret_that_everybody_has_is_none(secrets):
    """A server without a key has none, and its development mode asks nobody who he is."""
    for known in (None, []):
        engine = receiver()
        if known is not None:
            engine.init_transfer_engine(FileInitInfo(known))
        with pytest.raises(ValueError, match="secrets must be a list of texts that are not empty"):
            engine.init_transfer_engine(FileInitInfo(secrets, "/tmp"))
        assert engine._trusted == (None if known is None else FileInitInfo(known))
    info = signed(FileUpdateInfo(directory="x"), ["n"], "")
    with pytest.raises(ManifestError, match="was given no key"):
        check(info, "n", [""])


class Ranks:
    """An engine of as many workers, each the worker's side alone; `stamps` are the versions that it had."""

    def __init__(self, count: int) -> None:
        self.workers = [receiver() for _ in range(count)]
        for one in self.workers:
            one.model = None
            one.model_config = one.parallel_config = SimpleNamespace(dtype=torch.float32, tensor_parallel_size=1)
            one.init_transfer_engine(FileInitInfo(["s"], "/"))
        self.stamps = ["0"]

    def accept(self, directory: Path, version: str) -> None:
        for one in self.workers:
            one.start_weight_update()
            one._trusted = FileInitInfo(["s"], str(directory))
        info = replace(written(directory, save({"w": torch.ones(4)})), version=version)
        info = signed(info, [str(one.nonce) for one in self.workers], "s")
        for one in self.workers:
            one.receive_weights(info)

    async def collective_rpc(self, method: str) -> list[int]:
        return [getattr(one, method.removeprefix("aepo_")) for one in self.workers]

    async def get_weight_version(self) -> str:
        return self.stamps[-1]

    async def update_weight_version(self, version: str) -> None:
        self.stamps.append(version)

    async def finish_weight_update(self, version: str) -> None:
        for one in self.workers:
            one.finish_weight_update()
        await self.update_weight_version(version)

    def finish(self, version: str) -> None:
        asyncio.run(finish_update(self, version))


@pytest.fixture
def ranks(monkeypatch) -> Ranks:
    for name in ("check_fit", "load", "clean_caches"):
        monkeypatch.setattr(worker, name, lambda *arguments: None)
    return Ranks(2)


def test_a_stamp_says_what_all_ranks_have(ranks, tmp_path):
    ranks.accept(tmp_path, "1")
    ranks.finish("1")
    assert ranks.stamps == ["0", "partly-loaded", "1"]


@pytest.mark.parametrize(("touched", "stamp"), [((0,), "1"), ((1,), "partly-loaded"), ((0, 1), "1")])
def test_ranks_of_which_one_refuses_have_weights_of_two_updates(ranks, tmp_path, touched, stamp):
    """vLLM hears the first rank that fails. Who refuses has changed nothing; whether others have counts."""
    ranks.accept(tmp_path, "1")
    ranks.finish("1")
    shutil.rmtree(tmp_path / "update")
    ranks.accept(tmp_path, "2")
    for rank in touched:
        staged = ranks.workers[rank]._staged
        staged._handles = [(file, os.stat("/")) for file, _ in staged._handles]
    with pytest.raises(RuntimeError, match="was changed after its check: this engine keeps its weights"):
        ranks.finish("2")
    assert ranks.stamps[-1] == stamp
    shutil.rmtree(tmp_path / "update")
    ranks.accept(tmp_path, "3")
    ranks.finish("3")
    assert ranks.stamps[-1] == "3"


@pytest.mark.parametrize("step", ["load", "clean_caches"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), asyncio.CancelledError()])
def test_what_ends_while_it_loads_is_not_taken_for_the_old_weights(ranks, tmp_path, monkeypatch, step, error):
    def fail(*arguments):
        raise error

    ranks.accept(tmp_path, "1")
    monkeypatch.setattr(worker, step, fail)
    with pytest.raises(type(error)):
        ranks.finish("1")
    assert ranks.stamps[-1] == "partly-loaded"
    with pytest.raises(RuntimeError, match="no update was accepted"):
        ranks.finish("2")
    assert ranks.stamps[-1] == "partly-loaded", "what it was before stays"


def test_a_manifest_is_for_the_nonces_that_it_was_signed_with():
    """Any of the trusted secrets may have signed it, wherever it stands; without a nonce nothing was begun."""
    info = signed(GOOD, ["n", "m"], "s")
    for nonce in ("n", "m"):
        for trusted in (["s"], ["s", "t"], ["t", "s"]):
            check(info, nonce, trusted)
    for nonce in ("o", "", None):
        with pytest.raises(ManifestError, match="was not made for this call of start_weight_update"):
            check(info, nonce, ["s"])
    for trusted in (["t"], ["S"], ["s "]):
        with pytest.raises(ManifestError, match="is not signed with the key"):
            check(info, "n", trusted)
    for trusted in ([], [""], ["s", ""]):
        with pytest.raises(ManifestError, match="was given no key"):
            check(info, "n", trusted)


def test_a_stranger_is_refused_with_the_workers_words(llm):
    WeightSender([Client(llm)], policy(seed=18)).send(15)
    with pytest.raises(Exception, match="takes weights from somebody else"):
        llm.init_weight_transfer_engine({"init_info": {"secrets": [signing_secret("guessed")], "directory": "/"}})


def test_words_of_a_worker():
    words = "it's not signed"
    around = f"Worker failed with error '{words}', please check the stack trace above for the root cause"
    for text in (words, around, f"Call to collective_rpc method failed: {words}", f"Call to x method failed: {around}"):
        assert own_words(RuntimeError(text)) == words


@pytest.mark.parametrize("dtype", TYPES.values())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, dtype, value):
    broken = torch.zeros(4, 5)
    broken[3, 1] = value
    broken = broken.to(dtype)
    tensors = {
        "good": torch.full((3,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype),
        "none": torch.empty(0, 4, dtype=dtype),
    }
    write.write(tmp_path, fleeting(tensors))
    (tmp_path / "00000.safetensors").unlink()
    if not broken.float().isfinite().all():
        with pytest.raises(WeightUpdateError, match="weight 'broken' is not finite"):
            write.write(tmp_path, fleeting({**tensors, "broken": broken}))


def test_nothing_is_loaded_without_an_accepted_update(llm):
    old = logprobs(sample(llm))
    for info in ({}, {"directory": None}, {"directory": "x", "withdraw": False}):
        llm.start_weight_update()
        with pytest.raises(Exception, match="not signed with the key"):
            llm.update_weights({"update_info": info})
    llm.start_weight_update()
    with pytest.raises(Exception, match="no update was accepted: this engine keeps its weights"):
        llm.finish_weight_update(weight_version="66")
    WeightSender([Client(llm)], policy(seed=19)).send(15)  # in spite of the update that is open
    assert not torch.equal(logprobs(sample(llm)), old)


def test_an_engine_that_nobody_has_told_whose_weights_to_take():
    engine = receiver()
    engine.start_weight_update()
    info = signed(FileUpdateInfo(directory="x"), [engine.nonce], "")
    with pytest.raises(ValueError, match="takes no weights: it was given no key"):
        engine.receive_weights(info)


def fail_at(name: str):
    def before(method, argument):
        if method == name:
            raise ConnectionError("the cable is out")

    return before


@pytest.mark.parametrize("method", ["start", "update"])
def test_no_replica_changes_before_all_have_accepted(engines, method):
    one, other = engines["v1", True], engines["v2", True]
    stamp = WeightSender([Client(one), Client(other, "there")], policy(seed=9)).send(6)
    with pytest.raises(WeightUpdateError, match=r"failed on replica there .*the cable is out") as failure:
        WeightSender([Client(one), Client(other, "there", fail_at(method))], policy(seed=10)).send(7)
    assert "every replica keeps the weights" in str(failure.value)
    with pytest.raises(RuntimeError, match="without a matching start_weight_update"):
        one.finish_weight_update()  # it does not hold on to files that are gone
    for llm in (one, other):
        assert error_against(sample(llm), policy(seed=9)) <= CLOSE
        assert sample(llm).outputs[0].weight_versions[0].version == stamp
    WeightSender([Client(one), Client(other, "there")], policy(seed=10)).send(7)
    assert max(error_against(sample(llm), policy(seed=10)) for llm in (one, other)) <= CLOSE


def test_a_replica_that_is_lost_at_the_end_is_named(engines):
    one, other = engines["v1", True], engines["v2", True]
    sender = WeightSender([Client(one), Client(other, "there", fail_at("finish"))], policy(seed=11))
    with pytest.raises(
        WeightUpdateError, match=r"replica there .*; here has version 8@[0-9a-f]+: send again or restart"
    ):
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
    monkeypatch.setattr(write, "FILE_BYTES", 10_000)
    told = {}
    WeightSender([Client(llm, before=told.__setitem__)], policy(seed=14), tmp_path / "new").send(11)
    assert len(told["update"]["files"]) > 5
    assert error_against(sample(llm), policy(seed=14)) <= CLOSE
    assert not list((tmp_path / "new").iterdir())


def test_no_room_is_known_before_anything_starts(llm, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 << 20))
    monkeypatch.setattr(write, "_bytes", lambda part: 5 << 20)
    calls = []
    sender = WeightSender([Client(llm, before=lambda method, _: calls.append(method))], policy(), tmp_path)
    with pytest.raises(OSError, match=rf"^{tmp_path} has 3 MiB free, the next file of the weights needs 5 MiB$"):
        sender.send(12)
    assert "start" not in calls


def test_a_sender_needs_a_replica():
    with pytest.raises(ValueError, match="clients: expected at least one replica"):
        WeightSender([], policy())
