"""Claims about benchmarks.gpu_session: no step can stop the ones after it or outlive its limit, what needs the build
waits and the rest does not, one archive has everything after every step and whatever ends the call, and the whole thing
runs, here without a GPU.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from aepo_kernels import backend as backends
from benchmarks import gpu_session, gpu_stages
from benchmarks.gpu_session import Step

ROOT = Path(__file__).parents[2]


def python(code):
    return [sys.executable, "-c", code]


def appends(file, word):
    return f"open({str(file)!r}, 'a').write({word!r} + ' ')"


QUICK_BUILD = Step("build", python(""), 20)


def archived(output, name="gpu_session"):
    """{file in the archive: its content}; nothing but the archive and the summary is there."""
    assert {path.name for path in output.iterdir()} == {f"{name}.tar.gz", "summary.json"}
    with tarfile.open(output / f"{name}.tar.gz") as tar:
        return {entry.name.removeprefix(f"{name}/"): tar.extractfile(entry).read().decode() for entry in tar}


def run_steps(tmp_path, *steps, build=QUICK_BUILD):
    output = tmp_path / "new" / "output"
    session = gpu_session.Session("cpu", True, tmp_path / "work", output)
    session.run(build, steps)
    files = archived(output)
    assert json.loads((output / "summary.json").read_text()) == session.summary == json.loads(files["summary.json"])
    return {outcome["step"]: outcome for outcome in session.summary["steps"]}, files


def test_a_bad_step_does_not_stop_the_next_one(tmp_path):
    outcomes, files = run_steps(
        tmp_path,
        Step("fails", python("print('why'); raise SystemExit(3)"), 20),
        Step("crashes", python("import os; os.abort()"), 20),
        Step("absent", python("1 / 0"), 20, ("json", "no_such_package")),
        Step("toolless", python("1 / 0"), 20, tools=("bash", "no-such-tool")),
        Step("works", python("print(1)"), 20),
    )
    del outcomes["build"]
    assert [outcome["status"] for outcome in outcomes.values()] == ["failed", "failed", "skipped", "skipped", "passed"]
    assert outcomes["fails"]["detail"] == "why (see fails.log)"
    assert "no_such_package" in outcomes["absent"]["detail"]
    assert "json" not in outcomes["absent"]["detail"]
    assert outcomes["toolless"]["detail"] == "no no-such-tool here"
    assert files["fails.log"] == "why\n"


def test_a_step_that_hangs_ends_with_all_its_processes(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    hang = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    outcomes, _ = run_steps(tmp_path, Step("hangs", python(hang), 1), Step("works", python(""), 20))
    assert time.monotonic() - start < 20
    assert [outcomes[name]["status"] for name in ("hangs", "works")] == ["timed out", "passed"]
    assert outcomes["hangs"]["detail"].endswith("(see hangs.log)")
    time.sleep(3.5)
    assert not marker.exists()


def test_the_steps_share_one_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_session, "TOTAL_LIMIT_S", gpu_session.PACKING_S + 2.0)
    outcomes, _ = run_steps(
        tmp_path,
        Step("long", python("import time; time.sleep(60)"), 60),
        Step("late", python(""), 60),
    )
    assert outcomes["long"]["status"] == "timed out"
    assert outcomes["long"]["seconds"] < 10
    assert (outcomes["late"]["status"], outcomes["late"]["detail"]) == ("skipped", "no time left")


def test_only_what_needs_the_build_waits_for_it(tmp_path):
    order = tmp_path / "order"
    slow_build = Step("build", python(f"import time; time.sleep(2); {appends(order, 'build')}"), 20)
    outcomes, _ = run_steps(
        tmp_path,
        Step("first", python(appends(order, "first")), 20),
        Step("needs it", python(appends(order, "needs")), 20, after_build=True),
        Step("last", python(appends(order, "last")), 20),
        build=slow_build,
    )
    assert order.read_text().split() == ["first", "last", "build", "needs"]
    assert {outcome["status"] for outcome in outcomes.values()} == {"passed"}


def test_a_build_that_hangs_is_given_up_and_the_rest_is_done(tmp_path):
    outcomes, _ = run_steps(
        tmp_path,
        Step("needs it", python(""), 20, after_build=True),
        build=Step("build", python("import time; time.sleep(60)"), 1),
    )
    assert [outcomes[name]["status"] for name in ("build", "needs it")] == ["timed out", "passed"]


def test_nobody_waits_for_a_build_that_nothing_needs(tmp_path):
    start = time.monotonic()
    outcomes, _ = run_steps(
        tmp_path, Step("works", python(""), 20), build=Step("build", python("import time; time.sleep(60)"), 50)
    )
    assert time.monotonic() - start < 20
    assert outcomes["build"]["status"] == "stopped"


DRIVER = """
import sys
from pathlib import Path
from benchmarks import gpu_session
from benchmarks.gpu_session import Step
work = Path(sys.argv[1])
row = {"question": "decode", "problem": "p", "provider": "aepo_kernels", "computes": "e", "median_ms": 1.0,
       "percent_of_ceiling": 50.0, "max_error": 0.0}
measures = f"import json; json.dump({{'rows': [{row}]}}, open({str(work / 'work/measures.json')!r}, 'w'))"
hangs = f"import time; print('begun', flush=True); open({str(work / 'begun')!r}, 'w'); time.sleep(60)"
gpu_session.steps = lambda device, quick, folder: [
    Step("measures", [sys.executable, "-c", measures], 20),
    Step("hangs", [sys.executable, "-c", hangs], 50),
    Step("never", [sys.executable, "-c", "1 / 0"], 50),
]
gpu_session.build = lambda: Step("build", [sys.executable, "-c", ""], 20)
sys.argv[1:] = ["--work", str(work / "work"), "--output", str(work / "output")]
sys.exit(gpu_session.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_an_archive_of_what_was_measured(number, tmp_path):
    """Also one that nobody can catch: the archive is as old as the last step then."""
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        printed = process.communicate(timeout=20)[0]
    files = archived(tmp_path / "output")
    summary = json.loads(files["summary.json"])
    statuses = {outcome["step"]: outcome["status"] for outcome in summary["steps"]}
    assert "measures.json" in files
    assert summary["headlines"][0]["median_ms"] == 1.0
    if number == signal.SIGKILL:
        assert statuses == {"build": "passed", "measures": "passed"}
        return
    assert process.returncode == 1
    assert statuses == {"build": "passed", "measures": "passed", "hangs": "stopped", "never": "stopped"}
    assert {outcome["detail"] for outcome in summary["steps"][2:]} == {f"stopped by {signal.Signals(number).name}"}
    assert files["hangs.log"] == "begun\n"
    assert printed.splitlines()[-1].endswith("output/gpu_session.tar.gz")


def test_an_error_of_the_session_itself_leaves_an_archive(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_session, "absent", lambda step: 1 / 0 if step.name == "second" else None)
    with pytest.raises(ZeroDivisionError):
        run_steps(tmp_path, Step("first", python(""), 20), Step("second", python(""), 20))
    summary = json.loads(archived(tmp_path / "new" / "output")["summary.json"])
    assert {outcome["step"] for outcome in summary["steps"]} >= {"first"}


def test_the_archive_has_the_end_of_a_long_log_and_all_of_a_json_file(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_session, "LOG_BYTES", 10)
    work, output = tmp_path / "work", tmp_path / "output"
    output.mkdir()
    (work / "deeper").mkdir(parents=True)
    (work / "a.log").write_text("much ado about nothing")
    (work / "deeper" / "b.json").write_text("much ado about nothing")
    gpu_session.pack(work, output / "x.tar.gz")
    (output / "summary.json").touch()
    assert archived(output, "x") == {"a.log": "ut nothing", "deeper/b.json": "much ado about nothing"}


def test_numbers_of_an_earlier_session_are_not_packed_again(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / gpu_session.MARK).touch()
    (tmp_path / "work" / "ceilings.json").write_text("{}")
    _, files = run_steps(tmp_path, Step("works", python(""), 20))
    assert set(files) == {"build.log", "works.log", "summary.json"}


@pytest.mark.parametrize("xdist", [False, True])
def test_tests_are_counted_even_in_a_log_that_breaks_off(xdist, tmp_path):
    lines = [
        "a.py::good[gppo, gradient kept-cpu] PASSED                 [ 25%]",
        "a.py::bad[x - y] FAILED [ 50%]",
        "a.py::left_out SKIPPED (no GPU) [ 75%]",
        "a.py::broken ERROR [100%]",
        "FAILED a.py::bad[x - y] - AssertionError: not PASSED",
        "a.py::hangs ",
    ]
    if xdist:
        lines = [
            "[gw0] [ 25%] PASSED a.py::good[gppo, gradient kept-cpu] ",
            "a.py::bad[x - y] ",
            "[gw1] [ 50%] FAILED a.py::bad[x - y] ",
            "[gw1] [ 75%] SKIPPED a.py::left_out ",
            "[gw10] [100%] ERROR a.py::broken ",
        ]
    counts, failed = gpu_session.count_tests("\n".join(lines))
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert failed == ["a.py::bad[x - y]", "a.py::broken"]


def test_headlines_take_our_fastest_row_and_the_fastest_that_computes_the_same():
    def row(provider, ms, computes="all", percent=50.0, question="decode", error=0.0):
        return {
            "question": question, "problem": "p", "provider": provider, "computes": computes, "median_ms": ms,
            "percent_of_ceiling": percent, "max_error": error,
        }  # fmt: skip

    rows = [
        row("read once", 0.5, computes="all", percent=None, error=None),  # a ceiling
        row("aepo_kernels", 2.0),
        row("aepo_kernels, in place", 1.0, percent=80.0),
        row("eager", 9.0),
        row("someone", 4.0, percent=None),  # unsteady
        row("less work", 0.7, computes="half"),
    ]
    (headline,) = gpu_session.headlines({"rows": rows})
    assert headline == {
        "problem": "p", "provider": "aepo_kernels, in place", "median_ms": 1.0, "percent_of_ceiling": 80.0,
        "goal_percent_of_ceiling": 71, "fastest_peer": "someone", "fastest_peer_ms": 4.0,
    }  # fmt: skip
    assert gpu_session.headlines({"rows": rows[:1]}) == []


def test_order_and_limits_of_the_slot():
    """Measurements by their worth, tests behind them; all of it, the packing too, in less than 9 minutes."""
    steps = gpu_session.steps("cuda", False, ROOT)
    assert [step.name for step in steps] == ["env", "ceilings", "kernels", "losses", "peers", "tests", "sweep"]
    assert sum(step.limit_s for step in steps) + gpu_session.PACKING_S <= gpu_session.TOTAL_LIMIT_S <= 530
    assert gpu_session.PACKING_S >= 5  # ending a step takes up to 3
    assert [step.name for step in steps if step.after_build] == ["kernels", "tests"]
    assert set(gpu_stages.STAGES) <= {step.name for step in steps}
    assert set(gpu_session.GOALS) <= {"token-stats", "gradient", "policy-loss", "linear", "decode"}


def test_the_tests_on_a_gpu_are_those_of_its_kernels_in_12_processes(monkeypatch):
    monkeypatch.setattr(gpu_session, "_installed", lambda module: True)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    command = gpu_session.tests("cuda", False).command
    assert command[-2:] == ["--gpu", "tests/kernels"]
    assert command[command.index("-n") + 1] == "12"
    monkeypatch.setattr(gpu_session, "_installed", lambda module: module != "xdist")
    assert "-n" not in gpu_session.tests("cuda", False).command


def test_pytest_gpu_takes_pairs_of_a_gpu_and_a_kernel(tmp_path):
    """Here with names of devices alone: no CUDA tensor is made."""
    conftest = Path(__file__).with_name("conftest.py").read_text()
    devices = re.sub(r"^DEVICES = .*$", "DEVICES = ('cpu', 'cuda')", conftest, flags=re.M)
    (tmp_path / "conftest.py").write_text(devices)
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('device', ['cpu', 'cuda'])\n"
        "@pytest.mark.parametrize('backend', ['reference', 'triton', 'cuda'])\n"
        "def test_pair(backend, device): pass\n"
        "def test_device(device): pass\n"
        "def test_neither(): pass\n"
    )
    (tmp_path / "test_module.py").write_text("DEVICE = 'cuda'\ndef test_of_module(): pass\n")
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    on_gpu = {"test_pair[triton-cuda]", "test_pair[cuda-cuda]", "test_device[cuda]", "test_of_module"}
    for options, count in (["--gpu"], 4), ([], 10):
        done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        names = {line.split("::")[1].split()[0] for line in done.stdout.splitlines() if " PASSED" in line}
        assert len(names) == count
        assert names >= on_gpu


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.tex").write_text("years")
    for kind in (work, work / "thesis.tex"):
        with pytest.raises(ValueError, match="--work must be a new or empty folder"):
            gpu_session.Session("cpu", True, kind, tmp_path / "output")
    assert (work / "thesis.tex").read_text() == "years"
    (work / "thesis.tex").unlink()
    session = gpu_session.Session("cpu", True, work, tmp_path / "output")
    with pytest.raises(ValueError, match="another session is running in --work"):
        gpu_session.Session("cpu", True, work, tmp_path / "output")
    for output in (work, work / "inside"):
        with pytest.raises(ValueError, match="--output must not be inside --work"):
            gpu_session.Session("cpu", True, work, output)
    del session  # and with it the lock
    gpu_session.Session("cpu", True, work, tmp_path / "output")


def test_a_failed_build_says_why_and_what_ran_without_it(tmp_path):
    broken = python("print('one'); print('g++: fatal error: no room'); print('Traceback'); raise SystemExit(1)")
    steps = Step("tests", python("print('1')"), 20, after_build=True), Step("losses", python(""), 20)
    outcomes, _ = run_steps(tmp_path, *steps, build=Step("build", broken, 20))
    assert outcomes["build"]["detail"] == "g++: fatal error: no room (see build.log)"
    assert outcomes["tests"]["detail"].startswith("with what an earlier build left")
    assert outcomes["losses"]["detail"] == ""


def test_a_child_that_leaves_its_group_ends_with_its_step(tmp_path):
    flag = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(flag)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    run_steps(tmp_path, Step("parent", python(code), 20), Step("waits", python("import time; time.sleep(4)"), 20))
    assert not flag.exists()


def test_a_file_that_is_no_table_has_no_headlines(tmp_path):
    odd = f"open({str(tmp_path / 'work' / 'odd.json')!r}, 'w').write('[1]')"
    outcomes, _ = run_steps(tmp_path, Step("odd", python(odd), 20), Step("next", python(""), 20))
    assert [outcome["status"] for outcome in outcomes.values()] == ["passed"] * 3


def test_an_earlier_archive_is_kept(tmp_path):
    for name in ("one", "two"):
        session = gpu_session.Session("cpu", True, tmp_path / name, tmp_path / "output")
        session.run(QUICK_BUILD, [Step(name, python(""), 20)])
    for archive, name in (("gpu_session.before.tar.gz", "one"), ("gpu_session.tar.gz", "two")):
        with tarfile.open(tmp_path / "output" / archive) as tar:
            assert f"gpu_session/{name}.log" in tar.getnames()


def test_a_bad_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--device", "cpu", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"or that of an earlier session; got {tmp_path}")
    assert (tmp_path / "file").exists()


def test_an_output_folder_that_goes_away_ends_nothing(tmp_path, capsys):
    output = tmp_path / "new" / "output"
    away = f"import shutil; shutil.rmtree({str(output)!r}); open({str(output)!r}, 'w')"
    back = f"import os; os.remove({str(output)!r})"
    outcomes, _ = run_steps(
        tmp_path, Step("away", python(away), 20), Step("meanwhile", python(""), 20), Step("back", python(back), 20)
    )
    assert [outcome["status"] for outcome in outcomes.values()] == ["passed"] * 4
    assert "cannot write the results" in capsys.readouterr().out


def test_a_working_folder_that_goes_away_is_a_failed_step(tmp_path):
    away = f"import shutil; shutil.rmtree({str(tmp_path / 'work')!r}); open({str(tmp_path / 'work')!r}, 'w')"
    session = gpu_session.Session("cpu", True, tmp_path / "work", tmp_path / "output")
    session.run(QUICK_BUILD, [Step("away", python(away), 20), Step("next", python(""), 20)])
    outcomes = {outcome["step"]: outcome for outcome in session.summary["steps"]}
    assert outcomes["next"]["status"] == "failed"
    assert "Not a directory" in outcomes["next"]["detail"]
    assert session.problem


def test_the_machine_is_found_among_what_libraries_print(tmp_path):
    lines = ["{", '{"gpu": 1}', "[1]", "warning: so long"]
    printed = f"print({chr(10).join(lines)!r}); raise SystemExit(1)"
    session = gpu_session.Session("cpu", True, tmp_path / "work", tmp_path / "output")
    session.run(QUICK_BUILD, [Step("env", python(printed), 20)])
    assert session.summary["machine"] == {"gpu": 1}
    session = gpu_session.Session("cpu", True, tmp_path / "work2", tmp_path / "output")
    session.run(QUICK_BUILD, [Step("env", python(""), 20), Step("next", python(""), 20)])
    assert session.summary["machine"] is None
    assert session.summary["steps"][-1]["status"] == "passed"


def test_the_second_call_does_again_what_did_not_pass(tmp_path):
    passed = [{"step": name, "status": "passed"} for name in ("env", "ceilings", "losses", "peers")]
    others = [{"step": "kernels", "status": "timed out"}, {"step": "sweep", "status": "skipped"}]
    first = {"device": "cuda", "quick": False, "steps": passed + others}
    steps = gpu_session.second_steps("cuda", False, tmp_path, first)
    assert [step.name for step in steps] == ["kernels", "tests", "sweep", "profile", "memcheck"]
    rehearsals = [first | {"device": "cpu"}, first | {"quick": True}]
    for other in (None, *rehearsals):
        again = gpu_session.second_steps("cuda", False, tmp_path, other)
        assert [step.name for step in again] == ["profile", "memcheck"]
    profile, memcheck = steps[-2:]
    assert (profile.tools, memcheck.tools) == (("ncu",), ("compute-sanitizer",))
    assert profile.command[:3] == ["ncu", "--clock-control", "none"]  # the card is measured as it is
    assert memcheck.command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    assert memcheck.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or it would not see where tensors end


def test_a_part_that_fails_is_said_and_the_next_one_measured(monkeypatch, tmp_path):
    scale = gpu_stages.Scale("cpu", True)
    good = lambda: gpu_stages.product_ceilings(scale, 4, 8, 16)  # noqa: E731
    monkeypatch.setitem(gpu_stages.STAGES, "toy", lambda scale: iter([lambda: 1 / 0, good]))
    assert gpu_stages.run("toy", scale, tmp_path / "toy.json") == 1
    result = json.loads((tmp_path / "toy.json").read_text())
    assert [row["title"] for row in result["rows"]] == ["products of a linear layer"] * 3
    assert "ZeroDivisionError" in result["refused"][0]["reason"]
    assert result["machine"]["copy_gb_s"] > 0


def test_a_graph_that_replays_other_numbers_is_wrong():
    x = torch.ones(3)
    assert gpu_stages.equal_or_wrong([x, x], "", [x, x.clone()]) == 0
    assert gpu_stages.equal_or_wrong([x, x], "", [x, x + 1e-7]) == float("inf")


def test_tiles_and_constants_are_those_asked_for_during_a_call_alone():
    before = gpu_stages.linear_op.TILING["cpu"]
    seen = lambda _: gpu_stages.linear_op.TILING["cpu"]  # noqa: E731
    assert gpu_stages.with_tile("cpu", "keep", (7, 9), seen)(None) == before._replace(keep=(7, 9))
    assert seen(None) == before
    module = type("Module", (), {"WARPS": 4})
    assert gpu_stages.with_constants(module, lambda _: module.WARPS, WARPS=2)(None) == 2
    assert module.WARPS == 4


@pytest.mark.slow  # builds the extension and measures: a minute on 2 cores
def test_a_whole_session_without_a_gpu(tmp_path):
    """Both calls, with every step really executed, and nothing but the archive and the summary left."""
    with_cuda = backends.missing("cuda") is None  # what is there is not built anew
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "AEPO_CUDA": "" if with_cuda else "0",
                   "AEPO_COMMIT": "abc1234"}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--device", "cpu", "--quick", "--work"]
    command.append(str(tmp_path / "work"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout
    files = archived(tmp_path / "out")
    summary = json.loads(files["summary.json"])
    steps = ["env", "ceilings", "kernels", "losses", "peers", "tests", "sweep"]
    assert {outcome["step"]: outcome["status"] for outcome in summary["steps"]} == dict.fromkeys(
        ["build", *steps], "passed"
    )
    assert summary["machine"]["commit"] == "abc1234"
    assert summary["tests"]["passed"] >= 2
    assert summary["failed_tests"] == []
    for stage in gpu_stages.STAGES:
        result = json.loads(files[f"{stage}.json"])
        assert not [one for one in result["refused"] if one["provider"].startswith("aepo_kernels")]
        assert result["machine"]["copy_gb_s"] > 0
        assert all(row["median_ms"] > 0 for row in result["rows"])
    results = [json.loads(files[f"{stage}.json"]) for stage in gpu_stages.STAGES]
    assert {row["question"] for result in results for row in result["rows"]} == {
        "ceilings", "token-stats", "gradient", "decode", "sample", "cast", "graph", "linear", "policy-loss", "sweep"
    }  # fmt: skip
    assert len(summary["headlines"]) >= 10
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "gpu_session.tar.gz")
    assert summary["headlines"][-1]["problem"] in done.stdout

    environment["OUT"] = str(tmp_path / "out2")
    done = subprocess.run(
        [*command, "--second"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout
    files = archived(tmp_path / "out2", "gpu_session_second")
    summary = json.loads(files["summary.json"])
    assert [outcome["step"] for outcome in summary["steps"]] == ["build", "profile", "memcheck"]
    assert "every kernel has run" in files["memcheck.log"]
