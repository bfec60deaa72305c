"""A virtual environment that holds what some requirements bring and nothing else, made of what is installed here.

No download and no copy: the requirements, and theirs, are linked into it one by one. So what ours do not ask for is not
there, as in the environment of somebody who has just installed them.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Container, Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def closure(requirements: Iterable[str], left_out: Container[str] = ()) -> dict[str, metadata.Distribution]:
    """Every distribution that pip would install for these, by name. PackageNotFoundError: one is not here."""
    found: dict[str, metadata.Distribution] = {}
    done = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.name in left_out:
            continue
        if (key := (requirement.name.lower(), frozenset(requirement.extras))) in done:
            continue
        done.add(key)
        distribution = metadata.distribution(requirement.name)
        found[distribution.name] = distribution
        for line in distribution.requires or ():
            wanted = Requirement(line)
            extras = requirement.extras or {""}
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(wanted)
    return found


def make_environment(folder: Path, requirements: Iterable[str], left_out: Container[str] = ()) -> Path:
    """Make it and return its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    for distribution in closure(requirements, left_out).values():
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link, target = packages / name, Path(str(distribution.locate_file(name)))
            # Packages that several distributions share are linked once; one may have taken a file of another with it.
            if target.exists() and not link.exists():
                link.symlink_to(target)
    return python


def install(python: Path, wheel: Path, *options: str) -> None:
    """With pip's own check that all that the wheel requires is there; nothing can be fetched."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    subprocess.run([*pip, *options, str(wheel)], check=True)
