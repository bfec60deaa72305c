"""What the CUDA C++ kernels compiled to, read from the extension as it is installed, without a GPU.

    python -m benchmarks.cuda_static_check            # table; exit status 1 if a kernel breaks its budget
    python -m benchmarks.cuda_static_check --json     # the same as JSON lines
    python -m benchmarks.cuda_static_check --sass DIR # also writes the disassembly

The counterpart of benchmarks/gpu_static_check.py, whose reader and columns it shares; the tools are those that Triton
brings along. The machine code is that of the GPUs that setup.py built for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict

from benchmarks.gpu_static_check import Case, Report, disassemble, report_of, row


def _case(name: str, logit_bytes: int, max_instructions: float, max_exp2: float = 1.13, products: int = 0) -> Case:
    # 64 registers leave room for the 8 blocks of 128 threads per multiprocessor that lane_softmax.h counts on. Budgets:
    # what the kernels take today plus a little, as for the Triton kernels.
    return Case(
        name, lambda: None, logit_bytes, max_instructions=max_instructions, max_registers=64, max_exp2=max_exp2,
        products=products,
    )  # fmt: skip


# Random numbers: 18 products per 4 logits, of which a lane has 16 or 32 in a tile.
CASES = {
    ("decode_entropy_kernel", "BFloat16"): _case("decode bf16", 2, 9.2),
    ("decode_entropy_kernel", "Float16"): _case("decode fp16", 2, 9.2),
    ("decode_entropy_kernel", "Float32"): _case("decode fp32", 4, 9.1),
    ("sample_with_entropy_kernel", "BFloat16"): _case("sample bf16", 2, 22.5, 1.17, 8 * 18),
    ("sample_with_entropy_kernel", "Float16"): _case("sample fp16", 2, 22.5, 1.17, 8 * 18),
    ("sample_with_entropy_kernel", "Float32"): _case("sample fp32", 4, 26, 1.32, 4 * 18),
}


def cubins(folder: pathlib.Path) -> list[pathlib.Path]:
    """The machine code in the extension, unpacked into a folder: one file per source and GPU (*.sm_90a.cubin)."""
    import triton

    extension = importlib.import_module("aepo_kernels._C").__file__
    assert extension is not None
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--extract-elf", "all", pathlib.Path(extension).resolve()]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return sorted(folder.glob("*.cubin"))


def kernels(cubin: pathlib.Path) -> Iterator[tuple[tuple[str, str], str, str]]:
    """((kernel, storage of the logits), resource usage, SASS) of everything that a cubin holds."""
    usage, sass = disassemble(cubin.read_bytes())
    for text in re.split(r"//-+ \.text\.", sass)[1:]:
        symbol = text.split()[0]
        name = re.search(r"[a-z][a-z_]*_kernel(?=I|E)", symbol)
        storage = re.search(r"(B?Float\d\d)Logits", symbol)
        resources = re.search(rf"{re.escape(symbol)}:\s*(REG.*)", usage)
        assert name is not None, f"a kernel that is not called .._kernel: {symbol}"
        assert resources is not None, f"cuobjdump names kernels in another way: {usage}"
        yield (name[0], storage[1] if storage else ""), resources[1], text


def reports(sass_dir: str | None = None) -> Iterator[Report]:
    with tempfile.TemporaryDirectory() as folder:
        for cubin in cubins(pathlib.Path(folder)):
            target = re.search(r"sm_(\d+)", cubin.name)
            assert target, f"cuobjdump names files in another way: {cubin.name}"
            for key, usage, sass in kernels(cubin):
                case = CASES.get(key, Case(" ".join(key), lambda: None))  # one without a hot loop must not spill
                if sass_dir:
                    pathlib.Path(sass_dir, f"{'_'.join(key)}_sm{target[1]}.sass").write_text(sass)
                yield report_of(case, key[0], int(target[1]), usage, sass, case.max_instructions)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel instead of the table")
    parser.add_argument("--sass", metavar="DIR", help="write the disassembly of every kernel to this directory")
    arguments = parser.parse_args()
    if arguments.sass:
        pathlib.Path(arguments.sass).mkdir(parents=True, exist_ok=True)
    broken = 0
    for report in reports(arguments.sass):
        print(json.dumps(asdict(report)) if arguments.json else row(report), flush=True)
        broken += bool(report.problems)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
