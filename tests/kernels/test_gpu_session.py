"""Claims about benchmarks.gpu_session: no step can stop the ones after it or outlive its limit, the JSON is complete
after every step, and the whole thing runs, here without a GPU.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aepo.bench.run import QUESTIONS
from benchmarks import gpu_session
from benchmarks.gpu_session import Step

ROOT = Path(__file__).parents[2]


def python(code):
    return [sys.executable, "-c", code]


def run_steps(monkeypatch, output, *steps):
    monkeypatch.setattr(gpu_session, "steps", lambda device, quick, output: steps)
    summary = gpu_session.session("cpu", True, output)
    assert json.loads((output / "summary.json").read_text()) == summary
    return {outcome["step"]: outcome for outcome in summary["steps"]}


def test_a_bad_step_does_not_stop_the_next_one(monkeypatch, tmp_path):
    outcomes = run_steps(
        monkeypatch,
        tmp_path / "new" / "folder",
        Step("fails", python("print('why'); raise SystemExit(3)"), 20),
        Step("crashes", python("import os; os.abort()"), 20),
        Step("absent", python("1 / 0"), 20, ("json", "no_such_package")),
        Step("works", python("print(1)"), 20),
    )
    assert [outcome["status"] for outcome in outcomes.values()] == ["failed", "failed", "skipped", "passed"]
    assert outcomes["fails"]["detail"] == "why (see fails.log)"
    assert "no_such_package" in outcomes["absent"]["detail"]
    assert "json" not in outcomes["absent"]["detail"]
    assert (tmp_path / "new" / "folder" / "fails.log").read_text() == "why\n"


def test_a_step_that_hangs_ends_with_all_its_processes(monkeypatch, tmp_path):
    marker = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    hang = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    outcomes = run_steps(monkeypatch, tmp_path, Step("hangs", python(hang), 1), Step("works", python(""), 20))
    assert time.monotonic() - start < 20
    assert [outcome["status"] for outcome in outcomes.values()] == ["timed out", "passed"]
    assert outcomes["hangs"]["detail"].endswith("(see hangs.log)")
    time.sleep(3.5)
    assert not marker.exists()


def test_the_steps_share_one_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_session, "TOTAL_LIMIT_S", 2.0)
    outcomes = run_steps(
        monkeypatch,
        tmp_path,
        Step("long", python("import time; time.sleep(60)"), 60),
        Step("late", python(""), 60),
    )
    assert outcomes["long"]["status"] == "timed out"
    assert outcomes["long"]["seconds"] < 10
    assert (outcomes["late"]["status"], outcomes["late"]["detail"]) == ("skipped", "no time left")


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
    def row(provider, ms, computes="all", percent=50.0, question="decode"):
        return {
            "question": question, "problem": "p", "provider": provider, "computes": computes, "median_ms": ms,
            "percent_of_ceiling": percent,
        }  # fmt: skip

    rows = [
        row("read once", 0.5, percent=None),  # a ceiling
        row("aepo_kernels", 2.0),
        row("aepo_kernels, in place", 1.0, percent=80.0),
        row("eager", 9.0),
        row("someone", 4.0),
        row("less work", 0.7, computes="half"),
    ]
    (headline,) = gpu_session.headlines({"rows": rows})
    assert headline == {
        "problem": "p", "median_ms": 1.0, "percent_of_ceiling": 80.0, "goal_percent_of_ceiling": 77,
        "fastest_peer": "someone", "fastest_peer_ms": 4.0,
    }  # fmt: skip
    assert gpu_session.headlines({"rows": rows[:1]}) == []


def test_every_question_of_the_benchmarks_is_asked():
    names = [step.name for step in gpu_session.steps("cuda", False, ROOT)]
    assert names == ["build", "machine", "tests", *QUESTIONS]
    assert set(gpu_session.GOALS) <= set(QUESTIONS)


@pytest.mark.slow  # builds the extension and measures: up to 40 s on 2 cores
def test_a_whole_session_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--device", "cpu", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [outcome["status"] for outcome in summary["steps"]] == ["passed"] * 4
    assert summary["machine"]["torch"]
    assert summary["tests"]["passed"] >= 2
    assert summary["failed_tests"] == []
    assert summary["headlines"][0]["median_ms"] > 0
    last = done.stdout.splitlines()[-1]
    assert summary["headlines"][0]["problem"] in last
