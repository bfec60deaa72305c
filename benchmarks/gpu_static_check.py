"""What the Triton kernels compile to, without a GPU: registers, spills, access width and instructions per logit.

    python -m benchmarks.gpu_static_check            # table; exit status 1 if a kernel breaks its budget
    python -m benchmarks.gpu_static_check --json     # the same as JSON lines
    python -m benchmarks.gpu_static_check --sass DIR # also writes the disassembly

The real launchers run on tensors without memory ("meta") at real sizes; a stand-in for the GPU driver turns each launch
into a compilation, so the variants and configurations are those of the launchers, not a copy. The numbers are read from
the machine code with the tools that Triton brings along. Nothing here is a timing: `issue` and `MUFU` say how long the
hot loop keeps the schedulers and the exponential units busy, as a share of the time that device memory needs for the
same logits (public peak figures). Above 1 the kernel cannot reach the memory's speed, far below 1 it has a chance to.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from unittest import mock

import torch

from aepo_kernels.objective import ObjectiveNumbers, PolicyObjective

ROWS, VOCAB = 8192, 151_936


@dataclass(frozen=True)
class Gpu:
    name: str
    processors: int
    clock_ghz: float
    memory_tb_per_s: float
    cache_mib: int  # second level
    exp2_per_clock: int = 16  # per processor; instructions: 4 schedulers x 32 lanes


GPUS = {
    80: Gpu("A100", 108, 1.41, 2.04, 40),
    90: Gpu("H100", 132, 1.98, 3.35, 50),
    100: Gpu("B200", 148, 1.965, 8.0, 126),
}


@dataclass(frozen=True)
class Case:
    """A call of a launcher and the budget of the kernel that streams the logits in it (None: none does)."""

    name: str
    launch: Callable[[], object]
    logit_bytes: int = 2
    passes: float = 1  # over the logits: 1 = read, 2 = read and write, 1.5 = read and write at half the width
    max_instructions: float | None = None  # per logit
    max_registers: int = 255
    min_registers: int = 0
    max_exchanges: int = 0  # barriers and shuffles in the loop: 0 = no lane waits for another
    min_store_bits: int = 128
    max_exp2: float = 1.13  # per logit, with the logarithms that bound the noise of a sampler's words
    writing: bool | None = None  # of a kernel with two hot loops: whether the one that also writes is meant
    products: int = 0  # with 64 bits, per lane and tile of the hot loop: the random numbers of a sampler


@dataclass(frozen=True)
class Report:
    case: str
    kernel: str
    capability: int
    registers: int
    stack_bytes: int
    local_memory_instructions: int  # spills, in the hot loop where there is one
    loads: dict[str, int]  # in the hot loop: bits -> number
    stores: dict[str, int]
    instructions: float  # per logit, like exp2
    exp2: float
    nan_maxima: float  # maxima that keep a NaN, per logit: the guard against 0 * -inf must not hide one
    barriers: int  # in the hot loop, like shuffles
    shuffles: int
    issue_share: float
    exp2_share: float
    problems: list[str]


def _stats(dtype: torch.dtype, rows: int = ROWS, odd: bool = False) -> None:
    from aepo_kernels.kernels.token_stats import token_stats

    token_stats(_logits(dtype, rows, odd), _tensor(rows, dtype=torch.int64), 0.7, -100, False)


def _grad(dtype: torch.dtype, entropy: bool = True, odd: bool = False, odd_out: bool = False) -> None:
    from aepo_kernels.kernels.logits_grad import logits_grad

    logits, labels, row = _logits(dtype, ROWS, odd), _tensor(ROWS, dtype=torch.int64), _tensor(ROWS)
    out = _logits(dtype, ROWS, odd_out) if odd_out else logits
    logits_grad(logits, labels, row, row, row, row, row if entropy else None, 0.7, -100, out)


def _decode(dtype: torch.dtype, rows: int) -> None:
    from aepo_kernels.kernels.decode_entropy import decode_entropy

    integers, number = _tensor(rows, dtype=torch.int64), _tensor(rows)
    decode_entropy(_logits(dtype, rows, False), number, 1.0, integers, integers, number, number)


def _sample(dtype: torch.dtype, rows: int) -> None:
    from aepo_kernels.kernels.sample_with_entropy import sample_with_entropy

    number, integer = _tensor(rows, dtype=torch.float64), _tensor(rows, dtype=torch.int64)
    sample_with_entropy(_logits(dtype, rows, False), number, integer, number, number, integer, integer)


def _narrowing_grad() -> None:
    """A tile of the linear operations on a GPU: float32 logits in, 16-bit gradients out."""
    from aepo_kernels.kernels.logits_grad import logits_grad

    tile, row = _tensor(2048, 4096), _tensor(2048)
    labels = _tensor(2048, dtype=torch.int64)
    logits_grad(tile, labels, row, row, row, row, row, 0.7, -100, torch.empty_like(tile, dtype=BF16))


def _scaled_cast() -> None:
    """The weight's gradient of the linear operations, [V, D]."""
    from aepo_kernels.kernels.scaled_cast import scaled_cast

    sums = _tensor(VOCAB, 4096)
    scaled_cast(sums, _tensor(), torch.empty_like(sums, dtype=BF16))


def _policy(sequences: bool = False, optional: bool = True) -> None:
    from aepo_kernels.kernels.policy_terms import policy_terms

    token, none = _tensor(ROWS), (None,) * 4
    cu_seqlens = _tensor(65, dtype=torch.int64) if sequences else None
    policy_terms(
        token, token, token, token, *((token,) * 4 if optional else none), cu_seqlens, None, _numbers(optional)
    )


def _single_pass(dtype: torch.dtype, everything: bool = False, odd: bool = False, vocab: int = VOCAB) -> None:
    from aepo_kernels.kernels import single_pass

    token, labels, logits = _tensor(ROWS), _tensor(ROWS, dtype=torch.int64), _logits(dtype, ROWS, odd)[:, :vocab]
    extra, numbers = token if everything else None, _numbers(everything)
    gpu = GPUS[_target()]
    with mock.patch.object(single_pass, "processors_and_cache", return_value=(gpu.processors, gpu.cache_mib << 20)):
        single_pass.single_pass(
            logits, labels, 0.7, -100, token, token, token, extra, extra, extra, _tensor(2), numbers, logits
        )


def _target() -> int:
    """The compute capability that _Compiler stands for."""
    import triton

    return int(triton.runtime.driver.active.get_current_device())


def _numbers(optional: bool) -> ObjectiveNumbers:
    some = {"entropy_advantage": 0.2, "kl_coef": 0.01, "entropy_bonus": 0.01, "importance_cap": 2.0}
    return PolicyObjective(clip="aepo", dual_clip=3.0, **(some if optional else {})).numbers()


def _logits(dtype: torch.dtype, rows: int, odd: bool) -> torch.Tensor:
    """Logits whose rows start on 16-byte boundaries, or (odd) all over the place."""
    return _tensor(rows, VOCAB + 1, dtype=dtype)[:, 1:] if odd else _tensor(rows, VOCAB, dtype=dtype)


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Budgets: what the kernels take with Triton 3.6 to 3.9; the registers are what their occupancy is planned with.
CASES = [
    Case("stats bf16", functools.partial(_stats, BF16), max_instructions=9.8, max_registers=64),
    Case("stats fp16, odd rows", functools.partial(_stats, FP16, odd=True), max_instructions=9.3, max_registers=64),
    Case("stats fp32", functools.partial(_stats, FP32), logit_bytes=4, max_instructions=9.0, max_registers=64),
    Case("stats bf16, 4 rows", functools.partial(_stats, BF16, rows=4), max_instructions=9.8, max_registers=64),
    Case("decode fp32", functools.partial(_decode, FP32, ROWS), 4, max_instructions=9.0, max_registers=64),
    Case("decode fp32, 4 rows", functools.partial(_decode, FP32, 4), 4, max_instructions=9.0, max_registers=64),
    Case("grad bf16", functools.partial(_grad, BF16), passes=2, max_instructions=13.5, max_registers=40),
    Case(
        "grad fp16, odd rows",
        functools.partial(_grad, FP16, odd=True),
        passes=2,
        max_instructions=13.5,
        max_registers=40,
    ),
    Case("grad fp32", functools.partial(_grad, FP32), logit_bytes=4, passes=2, max_instructions=14, max_registers=40),
    Case("grad fp32 to bf16", _narrowing_grad, 4, 1.5, max_instructions=14, max_registers=40, min_store_bits=64),
    Case("grad bf16, no entropy", functools.partial(_grad, BF16, entropy=False), passes=2, max_instructions=11.5),
    # So many registers that no program more becomes resident than the cache has room for.
    *(
        Case(
            f"single pass {name}, {'write' if writing else 'read'}",
            functools.partial(_single_pass, dtype, **how),
            2 if dtype == BF16 else 4,
            max_instructions=writes if writing else 10,
            max_registers=64,
            min_registers=52,
            writing=writing,
        )
        for name, dtype, how, writes in (
            ("bf16", BF16, {}, 11.5),
            ("bf16, all", BF16, {"everything": True}, 13.5),
            ("bf16, odd rows", BF16, {"odd": True}, 11.5),
            ("bf16, V 32768", BF16, {"vocab": 32768}, 11.5),
            ("fp32", FP32, {}, 11.5),
        )
        for writing in (False, True)
    ),
    Case("scaled cast fp32 to bf16", _scaled_cast, 4, 1.5, max_instructions=4, max_registers=64),
    # One vote per tile, whether any lane may win (4 barriers).
    Case("sample bf16", functools.partial(_sample, BF16, ROWS), 2, 1, 30, max_registers=192, max_exchanges=20),
    Case("sample fp32", functools.partial(_sample, FP32, 64), 4, 1, 31, max_registers=128, max_exchanges=20),
    Case("policy", _policy, max_registers=104),
    Case("policy, sequences", functools.partial(_policy, sequences=True), max_registers=112),
    Case("policy, clip alone", functools.partial(_policy, optional=False), max_registers=80),
]
# Those that stream the logits; the others do not, or come back to rows that are in the cache.
STREAMING = ("token_stats_kernel", "decode_entropy_kernel", "logits_grad_kernel", "single_pass_kernel",
             "scaled_cast_kernel", "sample_parts_kernel", "sample_with_entropy_kernel")  # fmt: skip
# The price of an `out` whose rows lie differently on 16-byte boundaries; shown, and the negative control of the check.
NARROW = Case("grad bf16, odd out", functools.partial(_grad, BF16, odd_out=True), passes=2, max_instructions=13)


class _Compiler:
    """Stands in for Triton's driver: names the GPU to compile for. The compute capability serves as device number, so
    that Triton keeps its kernels per target apart."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def compile_case(case: Case, capability: int) -> dict[str, bytes]:
    """The machine code of every kernel that the case launches, by name."""
    import triton
    from triton.runtime.jit import JITFunction

    binaries = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        binaries[self.fn.__name__] = kernel.asm["cubin"]

    triton.runtime.driver.set_active(_Compiler(capability))
    JITFunction.run = compile_only
    try:
        case.launch()
    finally:
        JITFunction.run = run
    return binaries


def disassemble(binary: bytes) -> tuple[str, str]:
    """(resource usage, SASS) as printed by cuobjdump and nvdisasm."""
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        commands = ([str(tools / "cuobjdump"), "-res-usage", file.name], [str(tools / "nvdisasm"), "-c", file.name])
        usage, sass = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, sass


def _resource(usage: str, name: str) -> int:
    found = re.search(rf"{name}:(\d+)", usage)
    assert found, f"cuobjdump names no {name}: {usage}"
    return int(found[1])


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """Instructions ("LDG.E.128 R4, ...", without predicate) and for each label the index of the one behind it."""
    code: list[str] = []
    labels = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", line):
            code.append(match[1])
    return code, labels


def hot_loop(code: list[str], labels: dict[str, int], products: int = 0, writing: bool | None = None) -> list[str]:
    """The shortest loop with a 128-bit global load; without one, the shortest loop with the most global loads.

    What a forward branch inside the loop jumps over is left out: the rare case of a tile with a new winner. With
    `products`, a loop has exponentials and that many products, and no branch jumps over one that is needed for them.
    """
    loops = []
    for end, instruction in enumerate(code):
        start = _branch_target(instruction, labels)
        if start is not None and start < end:
            loops.append(_usual_path(code, labels, start, end, products))
    if products:
        loops = [loop for loop in loops if _products(loop) >= products and any("MUFU.EX2" in i for i in loop)]
    if writing is not None:
        loops = [loop for loop in loops if any(i.startswith("STG") for i in loop) == writing]
    wide = [loop for loop in loops if any(_is_load(i) and ".128" in i for i in loop)]
    return (
        min(wide, key=len) if wide else max(loops, key=lambda loop: (sum(map(_is_load, loop)), -len(loop)), default=[])
    )


def _products(code: list[str]) -> int:
    return sum(i.startswith("IMAD.WIDE.U32") for i in code)


def _branch_target(instruction: str, labels: dict[str, int]) -> int | None:
    target = re.search(r"\.L_\w+", instruction)
    return labels[target[0]] if instruction.startswith("BRA") and target else None


def _usual_path(code: list[str], labels: dict[str, int], start: int, end: int, products: int) -> list[str]:
    path, i = [], start
    while i <= end:
        path.append(code[i])
        target = _branch_target(code[i], labels) or i
        jumps = i < target <= end and _products(path) + _products(code[target : end + 1]) >= products
        i = target if jumps else i + 1
    return path


def _is_load(instruction: str) -> bool:
    """A load of logits; not one past the first cache, by which blocks see what others have left (STRONG)."""
    return instruction.startswith("LDG") and ".STRONG" not in instruction


def _bits(instruction: str) -> int:
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", instruction.split()[0])
    return int(width[1]) if width else 32


def inspect(case: Case, kernel: str, capability: int, binary: bytes, sass_dir: str | None = None) -> Report:
    usage, sass = disassemble(binary)
    if sass_dir:
        name = re.sub(r"\W+", "_", f"{case.name}_{kernel}_sm{capability}")
        pathlib.Path(sass_dir, f"{name}.sass").write_text(sass)
    budget = case.max_instructions if kernel in STREAMING else None
    return report_of(case, kernel, capability, usage, sass, budget)


def report_of(case: Case, kernel: str, capability: int, usage: str, sass: str, budget: float | None) -> Report:
    """What one kernel's resource usage and SASS say; budget: instructions per logit, None without a hot loop."""
    code, labels = instructions(sass)
    loop = [] if budget is None else hot_loop(code, labels, case.products, case.writing)
    loads = collections.Counter(_bits(i) for i in loop if _is_load(i))
    stores = collections.Counter(_bits(i) for i in loop if i.startswith("STG"))
    logits = max(1, sum(bits * n for bits, n in loads.items()) // (8 * case.logit_bytes))
    per_logit = len(loop) / logits
    exp2 = sum(i.startswith("MUFU") for i in loop) / logits
    gpu = GPUS[capability]
    lanes_per_s = gpu.processors * gpu.clock_ghz * 1e9
    memory_s = case.logit_bytes * case.passes / (gpu.memory_tb_per_s * 1e12)
    report = Report(
        case=case.name,
        kernel=kernel,
        capability=capability,
        registers=_resource(usage, "REG"),
        stack_bytes=_resource(usage, "STACK"),
        local_memory_instructions=sum(i.startswith(("LDL", "STL")) for i in (loop or code)),
        loads={str(bits): n for bits, n in loads.items()},
        stores={str(bits): n for bits, n in stores.items()},
        instructions=round(per_logit, 2),
        exp2=round(exp2, 2),
        nan_maxima=round(sum("MNMX" in i and ".NAN" in i for i in loop) / logits, 2),
        barriers=sum(i.startswith("BAR") for i in loop),
        shuffles=sum(i.startswith("SHFL") for i in loop),
        issue_share=round(per_logit / (lanes_per_s * 4 * 32) / memory_s, 2),
        exp2_share=round(exp2 / (lanes_per_s * gpu.exp2_per_clock) / memory_s, 2),
        problems=[],
    )
    report.problems.extend(_problems(report, case, budget))
    return report


def _problems(r: Report, case: Case, max_instructions: float | None) -> list[str]:
    problems = []
    # Outside the loops over logits a number or two may wait in local memory: there are V times fewer tokens.
    if (r.local_memory_instructions and r.kernel in STREAMING) or r.stack_bytes > 16:
        problems.append(f"spills: {r.local_memory_instructions} local accesses, {r.stack_bytes} bytes of stack")
    if r.registers > case.max_registers:
        problems.append(f"{r.registers} registers > {case.max_registers}")
    if r.registers < case.min_registers:
        problems.append(f"{r.registers} registers < {case.min_registers}")
    if max_instructions is not None:
        if set(r.loads) != {"128"} or any(int(bits) < case.min_store_bits for bits in r.stores):
            problems.append(f"accesses narrower than 128 bits: loads {r.loads}, stores {r.stores}")
        if r.barriers + r.shuffles > case.max_exchanges:
            problems.append(f"lanes wait for each other: {r.barriers} barriers, {r.shuffles} shuffles")
        if r.instructions > max_instructions:
            problems.append(f"{r.instructions} instructions per logit > {max_instructions}")
        if r.exp2 > case.max_exp2:
            problems.append(f"{r.exp2} exponentials per logit > {case.max_exp2}")
    return problems


def check(task: tuple[Case, int, str | None]) -> list[Report]:
    case, capability, sass_dir = task
    return [inspect(case, name, capability, code, sass_dir) for name, code in compile_case(case, capability).items()]


def row(r: Report) -> str:
    accesses = " ".join(
        f"{name}{n}x{bits}" for name, each in (("L", r.loads), ("S", r.stores)) for bits, n in each.items()
    )
    loop = f"{r.instructions:7.1f} {r.exp2:5.2f} {r.issue_share:6.2f} {r.exp2_share:5.2f}" if r.loads else " " * 26
    return (
        f"{r.case:22s} {r.kernel:21s} sm_{r.capability:<4d}{r.registers:4d} {r.local_memory_instructions:6d}  "
        f"{accesses:14s}{loop}  {'; '.join(r.problems) or 'ok'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel instead of the table")
    parser.add_argument("--sass", metavar="DIR", help="write the disassembly of every kernel to this directory")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    if arguments.sass:
        pathlib.Path(arguments.sass).mkdir(parents=True, exist_ok=True)
    tasks = [(case, capability, arguments.sass) for case in [*CASES, NARROW] for capability in GPUS]
    if not arguments.json:
        print(
            f"{'case':22s} {'kernel':21s} {'target':7s} regs spills  hot loop       per logit    share of memory time"
        )
        print(f"{'':73s}{'instr':>7s} {'exp2':>5s} {'issue':>6s} {'MUFU':>5s}")
    broken = 0
    with multiprocessing.get_context("fork").Pool(arguments.processes) as pool:
        for reports in pool.imap(check, tasks):
            for report in reports:
                print(json.dumps(asdict(report)) if arguments.json else row(report), flush=True)
                broken += bool(report.problems) and report.case != NARROW.name
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
