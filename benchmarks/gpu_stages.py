"""The measurements of benchmarks.gpu_session, one process each; the harness and the questions are those of aepo bench.

    python -m benchmarks.gpu_stages kernels --json kernels.json
    python -m benchmarks.gpu_stages kernels --json kernels.json --device cpu --quick     # a few small cases, anywhere

The file is complete after every row. `environment`, `profiled` and `odd` measure nothing: the last two are what a
profiler and a memory checker run. Without a GPU the Triton kernels run in their interpreter, what a CUDA graph would
replay is called, and with --quick nothing is compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

if "cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch
from torch import Tensor

from aepo.bench import decode, linear, policy_loss, sample, token_stats
from aepo.bench.clock import clock_for, machine
from aepo.bench.harness import OURS, Ceiling, Problem, Provider, Refusal, Row, is_ours, max_error, measure
from aepo.bench.inputs import AEPO, gate_rows, make_labels, make_logits
from aepo.bench.rates import MEMORY_BYTES, memory_rates
from aepo.bench.results import write_json
from aepo.bench.settings import LLAMA3, QWEN3, Settings
from aepo_kernels import PolicyObjective, decode_entropy, linear_policy_loss, logits_policy_loss, sample_with_entropy
from aepo_kernels import backend as backends
from aepo_kernels.ops import linear as linear_op
from aepo_kernels.ops import rows as row_ops
from aepo_kernels.ops.scaled_cast import scaled_cast
from aepo_kernels.testing import eager_token_stats

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ODD = QWEN3 - 1
"""A vocabulary whose rows begin anywhere between two 16-byte boundaries."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of a run: a GPU's, or a few small ones that show whether everything works."""

    device: str
    quick: bool

    def of(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full

    def settings(self, tokens: int, vocab: int, **others: Any) -> Settings:
        return Settings(device=self.device, tokens=(tokens,), vocab=(vocab,), **others)


Part = Callable[[], Iterable[Problem]]
"""Some problems of a stage; if it fails, the stage goes on with the next."""


def asked(
    scale: Scale, question: Any, keep: Callable[[Provider], bool], tokens: int, vocab: int, **others: Any
) -> Iterator[Problem]:
    """A question of aepo bench, with some of its providers."""
    for problem in question.problems(scale.settings(tokens, vocab, **others)):
        yield dataclasses.replace(problem, providers=[one for one in problem.providers if keep(one)])


def ours(provider: Provider) -> bool:
    return is_ours(provider.name)


def blank(question: str, title: str, device: str, **fields: Any) -> Problem:
    """A problem whose fields are set by name, for what is no question of aepo bench."""
    nothing: dict[str, Any] = {
        "tokens": 1, "vocab": 1, "hidden": None, "dtype": BF16, "inputs": None, "gate_inputs": None, "providers": [],
        "error": lambda computes, outputs: 0.0, "ceilings": [], "work": 0.0, "unit": "GB/s",
    }  # fmt: skip
    return Problem(question=question, title=title, **nothing | fields)


def at_copy_rate(name: str, moved: int, scale: Scale) -> Ceiling:
    return Ceiling(f"{name}, at the rate of a copy", None, moved, moved / memory_rates(scale.device).copy)


# What the machine can do: every other number is a share of these.


def ceilings(scale: Scale) -> Iterator[Part]:
    yield functools.partial(memory_ceilings, scale)
    full = [(2048, 4096, 131072), (8192, 4096, 131072), (4096, 4096, 131072), (2048, 4096, 4096)]
    for rows, hidden, columns in scale.of(full, [(16, 8, 64)]):
        yield functools.partial(product_ceilings, scale, rows, hidden, columns)


def memory_ceilings(scale: Scale) -> Iterator[Problem]:
    size, (copy, read) = MEMORY_BYTES[scale.device], memory_rates(scale.device)
    bits = torch.randint(2**62, (size // 8,), device=scale.device)
    known = [Ceiling("copy", None, 2 * size, 2 * size / copy), Ceiling("sum", None, size, size / read)]
    rewrite = Ceiling("read and rewrite in place", lambda: bits.bitwise_not_(), 2 * size)
    title = f"memory, {size / 1e9:.3g} GB"
    yield blank("ceilings", title, scale.device, tokens=size // 2, ceilings=[*known, rewrite])


def product_ceilings(scale: Scale, rows: int, hidden: int, columns: int) -> Iterator[Problem]:
    x = torch.randn(rows, hidden, device=scale.device).to(BF16)
    weight = torch.randn(columns, hidden, device=scale.device).to(BF16)
    yield blank(
        "ceilings", "products of a linear layer", scale.device,
        tokens=rows, vocab=columns, hidden=hidden, ceilings=linear.products(x, weight), unit="TFLOP/s",
    )  # fmt: skip


# Each kernel by itself: error against float64, time, share of the copy rate.


def kernels(scale: Scale) -> Iterator[Part]:
    full = [(8192, QWEN3, BF16), (64, QWEN3, BF16), (2048, 131072, FP32), (2048, 4096, FP32), (8192, LLAMA3, BF16),
            (8192, ODD, BF16)]  # fmt: skip
    shapes = scale.of(full, [(8, 1000, BF16), (8, 999, FP32)])
    tokens, vocab, dtype = shapes[0]
    yield functools.partial(asked, scale, token_stats, ours, tokens, vocab, dtype=dtype)
    yield functools.partial(gradient_alone, scale, tokens, vocab, dtype, dtype)
    for batch in scale.of((64, 1, 8, 256, 512), (4,)):
        vocab = scale.of(QWEN3, 1000)
        yield functools.partial(asked, scale, decode, ours_or_top10, batch, vocab)
        yield functools.partial(asked, scale, sample, ours, batch, vocab)
    yield functools.partial(cast_alone, scale)
    yield functools.partial(graphs, scale)
    for tokens, vocab, dtype in shapes[1:]:
        yield functools.partial(asked, scale, token_stats, ours, tokens, vocab, dtype=dtype)
        yield functools.partial(gradient_alone, scale, tokens, vocab, dtype, BF16)


def ours_or_top10(provider: Provider) -> bool:
    return ours(provider) or provider.computes == decode.TOP10


@dataclasses.dataclass
class GradientInputs:
    logits: Tensor
    pristine: Tensor
    out: Tensor
    """Another tensor, or the logits."""
    per_row: tuple[Tensor, ...]
    """Labels, statistics and coefficients."""

    def restore(self) -> None:
        self.logits.copy_(self.pristine)


def write_gradient(backend: str, inputs: GradientInputs) -> Tensor:
    row_ops.logits_grad(backend, inputs.logits, inputs.out, *inputs.per_row, 1.0, row_ops.NO_LABEL)
    return inputs.out


def gradient_inputs(tokens: int, vocab: int, dtype: torch.dtype, out_dtype: torch.dtype, device: str) -> GradientInputs:
    logits, labels = make_logits(tokens, vocab, dtype, device), make_labels(tokens, vocab, device)
    stats = row_ops.token_stats(backends.resolve(None, logits), logits, labels, 1.0, row_ops.NO_LABEL, False)
    coefficients = torch.linspace(0.5, 1.5, tokens, device=device), torch.linspace(-0.2, 0.3, tokens, device=device)
    working = logits.clone()
    out = working if dtype == out_dtype else torch.empty_like(logits, dtype=out_dtype)
    return GradientInputs(working, logits, out, (labels, stats.maximum, stats.log_sum, stats.entropy, *coefficients))


def gradient_alone(
    scale: Scale, tokens: int, vocab: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> Iterator[Problem]:
    inputs = gradient_inputs(tokens, vocab, dtype, out_dtype, scale.device)
    some = gate_rows(tokens, scale.device)
    labels, *_, to_logprobs, to_entropy = (x[some] for x in inputs.per_row)
    truth = eager_token_stats(inputs.pristine[some], labels, 1.0, to_logprobs, to_entropy, torch.float64).grad
    backend = "triton" if dtype != out_dtype else backends.resolve(None, inputs.logits)  # on the CPU nothing narrows
    moved = inputs.logits.numel() * (inputs.logits.element_size() + inputs.out.element_size())
    where = "in place" if inputs.out is inputs.logits else "float32 to bfloat16"
    yield blank(
        "gradient", f"gradient of log-probs and entropies, {where}", scale.device, tokens=tokens, vocab=vocab,
        dtype=dtype, inputs=inputs, gate_inputs=inputs, restore=GradientInputs.restore,
        error=lambda computes, outputs: max_error([outputs[0][some].cpu()], [truth]),
        providers=[Provider(f"{OURS}, {backend}", lambda x: (write_gradient(backend, x),), "gradient")],
        ceilings=[at_copy_rate("read and write", moved, scale)],
        work=moved,
    )  # fmt: skip


def cast_alone(scale: Scale) -> Iterator[Problem]:
    """The last step of a weight's gradient, [V, D] float32 to bfloat16."""
    vocab, hidden = scale.of((131072, 4096), (300, 8))
    x, factor = torch.randn(vocab, hidden, device=scale.device), torch.tensor(0.3, device=scale.device)
    out, some = torch.empty_like(x, dtype=BF16), gate_rows(vocab, scale.device)
    yield blank(
        "cast", "gradient times a factor, float32 to bfloat16", scale.device, tokens=vocab, vocab=hidden,
        error=lambda computes, outputs: max_error([outputs[0][some]], [x[some].double() * factor.double()]),
        providers=[Provider(f"{OURS}, triton", lambda _: (scaled_cast("triton", x, factor, out),), "product")],
        ceilings=[at_copy_rate("read and write", 6 * x.numel(), scale)], work=6 * x.numel(),
    )  # fmt: skip


def graphs(scale: Scale) -> Iterator[Problem]:
    """A replayed CUDA graph gives the numbers of the call, and how long it takes."""
    batch, vocab = scale.of((64, QWEN3), (4, 1000))
    logits = make_logits(batch, vocab, FP32, scale.device)
    temperature = torch.ones(batch, dtype=torch.float64, device=scale.device)
    zeros = torch.zeros(batch, dtype=torch.int64, device=scale.device)  # numbers would cost a launch each

    def drawn(backend: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = sample_with_entropy(x, temperature=temperature, seed=zeros, offset=zeros, backend=backend)
        return found.tokens, found.logprobs, found.entropy

    calls = [
        *decode.ours("decode_entropy", scale.device, FP32, "entropy", lambda b, x: (decode_entropy(x, backend=b),)),
        *decode.ours("sample_with_entropy", scale.device, FP32, "token, log-prob, entropy", drawn),
    ]
    for name, computes, call in calls:
        expected = call(logits)
        yield blank(
            "graph", f"replayed graph: {computes}", scale.device, tokens=batch, vocab=vocab, dtype=FP32,
            error=functools.partial(equal_or_wrong, expected),
            providers=[
                Provider(f"{name}, replayed", replayed(functools.partial(call, logits), scale.device), computes)
            ],
            ceilings=[at_copy_rate("read once", 4 * batch * vocab, scale)],
            work=4 * batch * vocab,
        )  # fmt: skip


def replayed(call: Callable[[], Sequence[Tensor]], device: str) -> Callable[[Any], Sequence[Tensor]]:
    if device == "cpu":
        return lambda inputs: call()
    call()  # a first call inside a capture would load the module there
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for output in outputs:
        output.zero_()  # which the replay has to undo

    def replay(inputs: Any) -> Sequence[Tensor]:
        graph.replay()
        return outputs

    return replay


def equal_or_wrong(expected: Sequence[Tensor], computes: str, outputs: Sequence[Tensor]) -> float:
    same = all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True))
    return 0.0 if same else float("inf")


# The losses, forward and backward: milliseconds and peak memory, over schedules and tiles.


def losses(scale: Scale) -> Iterator[Part]:
    keep = lambda one: ours(one) and one.computes == AEPO  # noqa: E731
    yield functools.partial(asked, scale, policy_loss, keep, *scale.of((8192, QWEN3), (8, 1000)))
    yield functools.partial(schedules, scale)


WHOLE = linear_op.WHOLE_VOCABULARY
TILES: dict[linear.Schedule, list[tuple[int, int]]] = {
    "keep": [(2048, WHOLE), (8192, WHOLE), (4096, 16384), (2048, 16384), (2048, 4096)],
    "recompute": [(8192, 8192), (8192, 32768), (8192, 4096), (1024, 8192), (2048, 4096)],
}
"""(rows, columns) beside those that `TILING` of aepo_kernels/ops/linear.py has for CUDA."""


def schedules(scale: Scale) -> Iterator[Problem]:
    tokens, vocab, hidden = scale.of((8192, 131072, 4096), (16, 300, 8))
    few: dict[linear.Schedule, list[tuple[int, int]]] = {"keep": [(4, WHOLE)], "recompute": [(4, 64)]}
    tiles = few if scale.quick else TILES
    _, loss = linear.problems(scale.settings(tokens, vocab, hidden=hidden))
    providers = []
    for schedule in linear.SCHEDULES:
        run = linear.loss_and_grads(linear.ours(AEPO, schedule))
        usual: tuple[int, int] = getattr(linear_op.TILING[scale.device], schedule)
        for rows, columns in dict.fromkeys([usual, *tiles[schedule]]):
            name = f"{OURS}, {schedule}, {rows} x {'V' if columns >= vocab else columns}"
            changed = with_tile(scale.device, schedule, (rows, columns), run)
            providers.append(Provider(name + " (as it is)" * ((rows, columns) == usual), changed, AEPO))
    yield dataclasses.replace(loss, providers=providers)


def with_tile(
    device: str, schedule: linear.Schedule, tile: tuple[int, int], run: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    tiling = linear_op.TILING[device]._replace(**{schedule: tile})

    def changed(inputs: Any) -> Any:
        with mock.patch.dict(linear_op.TILING, {device: tiling}):
            return run(inputs)

    return changed


# What others offer for the same, beside ours.


def peers(scale: Scale) -> Iterator[Part]:
    everyone = lambda provider: True  # noqa: E731
    yield functools.partial(asked, scale, token_stats, everyone, *scale.of((8192, QWEN3), (8, 1000)))
    shape, hidden = scale.of(((8192, 131072), 4096), ((8, 1000), 16))
    yield functools.partial(asked, scale, linear, everyone, *shape, hidden=hidden)
    yield functools.partial(asked, scale, policy_loss, everyone, *scale.of((8192, QWEN3), (8, 1000)))


# Constants of the kernels: warps, registers, waves.


def sweep(scale: Scale) -> Iterator[Part]:
    yield functools.partial(sweep_token_stats, scale)
    yield functools.partial(sweep_gradient, scale)
    yield functools.partial(sweep_single_pass, scale)
    yield functools.partial(sweep_waves, scale)


def with_constants(module: Any, run: Callable[[Any], Any], **constants: Any) -> Callable[[Any], Any]:
    def changed(inputs: Any) -> Any:
        with mock.patch.multiple(module, **constants):
            return run(inputs)

    return changed


def stats_by_triton(inputs: Any) -> Sequence[Tensor]:
    found = row_ops.token_stats("triton", *inputs, 1.0, row_ops.NO_LABEL, False)
    return found.logprobs, found.entropy


def sweep_token_stats(scale: Scale) -> Iterator[Problem]:
    from aepo_kernels.kernels import token_stats as kernel

    tokens, vocab = scale.of((8192, QWEN3), (4, 3000))
    choices = scale.of([(4, 64), (4, 72), (4, 80), (4, 96), (8, 64), (8, 80), (2, 64)], [(4, 64), (2, 64)])
    (problem,) = token_stats.problems(scale.settings(tokens, vocab))
    providers = [
        Provider(
            f"{OURS}, {warps} warps, at most {registers} registers",
            with_constants(kernel, stats_by_triton, NUM_WARPS=warps, LANES=32 * warps, MAX_REGISTERS=registers),
            "log-prob + entropy",
        )
        for warps, registers in choices
    ]
    yield dataclasses.replace(problem, question="sweep", providers=providers)


def sweep_gradient(scale: Scale) -> Iterator[Problem]:
    from aepo_kernels.kernels import logits_grad as kernel

    (problem,) = gradient_alone(scale, *scale.of((8192, QWEN3), (4, 3000)), BF16, BF16)
    providers = [
        Provider(
            f"{OURS}, {warps} warps",
            with_constants(kernel, lambda x: (write_gradient("triton", x),), NUM_WARPS=warps, LANES=32 * warps),
            "gradient",
        )
        for warps in scale.of((8, 2, 4, 16), (8, 4))
    ]
    yield dataclasses.replace(problem, question="sweep", providers=providers)


def sweep_single_pass(scale: Scale) -> Iterator[Problem]:
    """How many rows a multiprocessor has in work, and how many words of each a thread has under way on the way back."""
    from aepo_kernels.kernels import single_pass as kernel

    (problem,) = policy_loss.problems(scale.settings(*scale.of((8192, QWEN3), (4, 3000))))
    run = policy_loss.loss_and_grad(policy_loss.ours(AEPO, single_pass=True))
    providers = [
        Provider(
            f"{OURS}, {rows} rows per multiprocessor, {words} words",
            with_constants(kernel, run, resident_programs=lambda *_, n=rows: n, GRAD_WORDS=words),
            AEPO,
        )
        for rows, words in scale.of([(1, 2), (2, 2), (1, 1)], [(8, 1)])
    ]
    yield dataclasses.replace(problem, question="sweep", providers=providers)


def sweep_waves(scale: Scale) -> Iterator[Problem]:
    """Into how many programs the rows of a tile and of a decode batch are split."""
    from aepo_kernels.kernels import common

    shapes = scale.of([(2048, 4096, FP32), (64, QWEN3, FP32)], [(4, 3000, FP32)])
    processors = torch.cuda.get_device_properties(0).multi_processor_count if scale.device == "cuda" else 1
    for tokens, vocab, dtype in shapes:
        (problem,) = token_stats.problems(scale.settings(tokens, vocab, dtype=dtype))
        providers = [
            Provider(
                f"{OURS}, programs for {waves} waves",
                with_constants(
                    common, stats_by_triton, _programs_to_fill=lambda device, n=waves * 8 * processors: n
                ),
                "log-prob + entropy",
            )
            for waves in (4, 1, 2, 8)
        ]  # fmt: skip
        yield dataclasses.replace(problem, question="sweep", providers=providers)


# Nothing is measured by these.


def environment(scale: Scale) -> None:
    """Programs and packages that are here; the machine as JSON in the last line."""
    tools = {name: shutil.which(name) for name in ("nvcc", "ncu", "compute-sanitizer", "git", "g++")}
    print("\n".join(f"{name}: {place}" for name, place in tools.items()))
    for command in (["nvidia-smi"], ["nvcc", "--version"]):
        if shutil.which(command[0]):
            print(subprocess.run(command, capture_output=True, text=True).stdout)
    installed = {f"{one.metadata['Name']}=={one.version}" for one in importlib.metadata.distributions()}
    print(" ".join(sorted(installed, key=str.lower)))
    for name in backends.BACKENDS:
        print(f"backend {name}: {backends.missing(name) or 'here'}")
    print(json.dumps(machine(scale.device)))


def profiled(scale: Scale) -> None:
    """The kernels that stream the logits, twice each: the second call has warm code."""
    device = scale.device
    inputs = gradient_inputs(*scale.of((8192, QWEN3), (4, 1000)), BF16, BF16, device)
    decoded = make_logits(*scale.of((64, QWEN3), (4, 1000)), FP32, device)
    for _ in range(2):
        row_ops.token_stats("triton", inputs.pristine, inputs.per_row[0], 1.0, row_ops.NO_LABEL, False)
        write_gradient("triton", inputs)
        for name in ("triton", "cuda"):
            if backends.unserved(name, decoded, "decode_entropy") is None:
                decode_entropy(decoded, backend=name)
                sample_with_entropy(decoded, seed=0, top_k=sample.TOP_K, top_p=sample.TOP_P, backend=name)


def odd(scale: Scale) -> None:
    """Every kernel on vocabularies that are no multiple of anything, in rows that begin between 16-byte boundaries."""
    objective, device = PolicyObjective.preset("aepo"), scale.device
    for vocab, offset in scale.of(((1000, 0), (4099, 3), (20011, 1)), ((99, 3),)):
        for dtype in (BF16, FP16, FP32):
            logits = make_logits(5, vocab + 8, dtype, device)[:, offset : offset + vocab]
            labels, number = make_labels(5, vocab, device), torch.linspace(-1, 1, 5, device=device)
            for name in ("triton", "cuda"):
                if backends.unserved(name, logits, "decode_entropy") is None:
                    decode_entropy(logits, tokens=labels, backend=name)
                    sample_with_entropy(logits, top_k=5, top_p=0.5, seed=1, backend=name)
            leaf, policy = logits.clone().requires_grad_(), (labels, number - 3, number, number > -2)
            loss = logits_policy_loss(leaf, *policy, objective=objective, inplace_backward=True, backend="triton")
            loss.loss.backward()
            hidden, weight = (torch.randn(n, 20, device=device).to(dtype).requires_grad_() for n in (5, vocab))
            for schedule in linear.SCHEDULES:
                stats = (5.0, 1.0) if schedule == "keep" else None
                loss = linear_policy_loss(
                    hidden, weight, *policy, objective=objective, entropy_stats=stats, schedule=schedule,
                    backend="triton",
                )  # fmt: skip
                loss.loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel has run")


STAGES: dict[str, Callable[[Scale], Iterator[Part]]] = {
    "ceilings": ceilings, "kernels": kernels, "losses": losses, "peers": peers, "sweep": sweep,
}  # fmt: skip
CALLS = {"environment": environment, "profiled": profiled, "odd": odd}


def line(row: Row) -> str:
    """A row in one line of text."""

    def text(value: float | None, form: str, unit: str) -> str:
        return "" if value is None else f"{format(value, form)}{unit}"

    numbers = (
        f"{row.median_ms:10.4g} ms", text(row.spread, ".0%", ""), f"{row.rate:8.4g} {row.unit}",
        text(row.percent_of_ceiling, ".1f", " %"), text(row.extra_bytes and row.extra_bytes / 2**30, ".3g", " GiB"),
        text(row.max_error, ".0e", ""),
    )  # fmt: skip
    widths = (13, 5, 18, 8, 11, 6)
    return " ".join(f"{number:>{width}}" for number, width in zip(numbers, widths, strict=True)) + f"  {row.provider}"


def run(stage: str, scale: Scale, path: Path) -> int:
    """Measure a stage; 1 if one of our own rows is missing, but for a choice of constants that does not run."""
    clock, here = clock_for(scale.device), machine(scale.device)
    here |= {"copy_gb_s": memory_rates(scale.device).copy / 1e9, "read_gb_s": memory_rates(scale.device).read / 1e9}
    rows: list[Row] = []
    refused: list[Refusal] = []

    def keep(new_rows: Sequence[Row] = (), new_refused: Sequence[Refusal] = ()) -> None:
        write_json(path, here, [], [*rows, *new_rows], [*refused, *new_refused])

    keep()
    for part in STAGES[stage](scale):
        try:
            for problem in part():
                print(problem.name, flush=True)
                new_rows, new_refused = measure(problem, clock, 2 if scale.quick else 7, report=keep)
                for row in new_rows:
                    print(line(row), flush=True)
                for refusal in new_refused:
                    print(f"no row for {refusal.provider}: {refusal.reason}", flush=True)
                rows += new_rows
                refused += new_refused
        except Exception as error:  # the other parts are still worth their time
            refused.append(Refusal(stage, "inputs", OURS, f"{type(error).__name__}: {str(error)[:300]}"))
            print(f"failed: {refused[-1].reason}", flush=True)
        keep()
        if scale.device == "cuda":
            with contextlib.suppress(RuntimeError):  # after an illegal access nothing works any more
                torch.cuda.empty_cache()
    return int(any(is_ours(refusal.provider) for refusal in refused if refusal.question != "sweep"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, *CALLS])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of a stage that measures")
    args = parser.parse_args()
    scale = Scale(args.device, args.quick)
    torch.compiler.set_stance("force_eager" if args.quick else "default")
    if args.stage in CALLS:
        CALLS[args.stage](scale)
        return 0
    return run(args.stage, scale, args.json or Path(f"{args.stage}.json"))


if __name__ == "__main__":
    sys.exit(main())
