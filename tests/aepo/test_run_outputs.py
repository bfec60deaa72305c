"""No file that is written for a user lands on those of a run."""

from __future__ import annotations

import pytest
from run_toys import content, make_run

from aepo.report import write_report
from aepo.run.directory import RunDirectory
from aepo.run.outputs import refuse_output

OWN_FILES = (
    "run.json config.yaml metrics.jsonl evals.jsonl .lock .run.json.writing trees/step_000007.json trees/new "
    "answers/step_000010.jsonl checkpoints/step_000010/run.yaml checkpoints/new tensorboard/new "
    "abandoned/1/evals.jsonl wandb/new link/metrics.jsonl ../other/../run/metrics.jsonl to_a_file to_a_new_file"
)


@pytest.mark.parametrize("name", OWN_FILES.split())
@pytest.mark.parametrize("damaged", [False, True])
def test_no_output_is_written_over_the_files_of_a_run(name, damaged, tmp_path):
    path = tmp_path / "run"
    make_run(path)
    RunDirectory.claim(path, resume_step=0).release()
    (tmp_path / "other").mkdir()
    (path / "link").symlink_to(".")
    (path / "to_a_file").symlink_to("metrics.jsonl")
    (path / "to_a_new_file").symlink_to("trees/step_000099.json")
    if damaged:
        (path / "run.json").write_text("{")
    before = content(path)
    for refuse in (lambda: refuse_output("--out", path / name), lambda: write_report([path], path / name)):
        with pytest.raises(
            ValueError, match=f"^--out {path / name}: expected another place, .*run is a run"
        ) as refused:
            refuse()
        assert "\n" not in str(refused.value)
    assert content(path) == before


@pytest.mark.parametrize("target", ["run/metrics.jsonl", "other/run.json", "other/checkpoints/new"])
def test_no_page_is_written_through_a_link_to_the_files_of_a_run(target, tmp_path):
    for name in ("run", "other"):
        make_run(tmp_path / name)
        RunDirectory.claim(tmp_path / name, resume_step=0).release()
    runs = [tmp_path / "run", tmp_path / "other"]
    for page, reported in ((tmp_path / "run" / "report.html", runs[:1]), (tmp_path / "report.html", runs)):
        page.symlink_to(tmp_path / target)
        before = content(tmp_path)
        with pytest.raises(ValueError, match=f"^report {page}: expected another place, .* is a run"):
            write_report(reported)
        assert content(tmp_path) == before


def test_outputs_beside_the_files_of_a_run_are_written(tmp_path):
    path = tmp_path / "run"
    make_run(path)
    with RunDirectory.claim(path, resume_step=0) as held:
        held.set_aside(20)
        for name in ("report.html", "numbers.json", "metrics.jsonl.bak", "abandoned/1/report.html", "../metrics.jsonl"):
            refuse_output("--out", path / name)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "run.json").write_text('{"success": 1}')
    refuse_output("--json", tmp_path / "no-run" / "run.json")
