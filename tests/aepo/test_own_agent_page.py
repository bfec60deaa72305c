"""docs/own_agent.md: its blocks are the files of the examples, its commands run, its count is right."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "own_agent"
PAGE = (ROOT / "docs" / "own_agent.md").read_text(encoding="utf-8")
TOY = ["train.steps=2", "train.questions=2", "rollout.paths=4", "eval.questions=4", "log.tensorboard=false"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


@pytest.mark.parametrize(
    ("language", "pattern", "count"), [("python", "*.py", 5), ("yaml", "*.yaml", 2), ("json", "museum/*.jsonl", 2)]
)
def test_every_block_is_part_of_an_example(language, pattern, count):
    files = [path.read_text(encoding="utf-8") for path in EXAMPLES.glob(pattern)]
    found = blocks(language)
    assert len(found) == count
    for block in found:
        assert any(block in text for text in files), block


def test_the_lines_of_the_table_are_counted_right():
    rows = re.findall(r"^\|.*`(examples/own_agent/\w+\.py)` \| (\d+) \| 0 \|$", PAGE, re.M)
    assert len(rows) == 6
    for file, lines in rows:
        text = (ROOT / file).read_text(encoding="utf-8")
        if f"`count` in `{file}` | {lines}" in PAGE:
            text = re.search(r"^def count.*?\n\n\n", text, re.S | re.M)[0]
        assert int(lines) == len([line for line in text.splitlines() if line.strip()]), file


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines()]


def shortened(command: str) -> str:
    """The same command at toy size."""
    if command.startswith("aepo train"):
        return f"{command} {' '.join(TOY)}"
    if command.startswith(("aepo rollout", "aepo eval museum_model")):
        return f"{command} {' '.join(TOY[2:])}"
    return f"{command} 20" if "small_chat_model.py museum.yaml" in command else command


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_an_empty_folder(tmp_path):
    """With its settings in a file, and at toy size."""
    told = commands()
    assert [line.split()[0] for line in told] == ["mkdir", "cp", "python", "head", "python", *["aepo"] * 5]
    script = "\n".join(["set -euo pipefail", *map(shortened, told[:5])])
    script = script.replace("my_agent\n", "my_agent\ncp ../museum.yaml .\n", 1)
    script += "\n" + "\n".join(map(shortened, told[5:]))
    (tmp_path / "museum.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "AEPO": str(ROOT), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    agent = tmp_path / "my_agent"
    assert list(json.loads((agent / "runs" / "museum" / "run.json").read_text())["tools"]) == ["search"]
    assert (agent / "runs" / "museum" / "report.html").exists()
    assert list((agent / "before").glob("*.html"))


def test_every_file_of_the_examples_is_used():
    """In the page, in the tests, or by another example."""
    tests = (ROOT / "tests" / "aepo" / "test_own_agent.py").read_text(encoding="utf-8")
    others = {path: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.*")}
    for path in others:
        texts = [PAGE, tests, *(text for other, text in others.items() if other != path)]
        assert any(path.stem in text for text in texts), path.name
