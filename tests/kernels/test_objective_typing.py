"""Claims about the types of PolicyObjective: mypy sees a wrong preset, field and value, and no more."""

import re
from pathlib import Path

import pytest

import aepo_kernels.objective

api = pytest.importorskip("mypy.api", reason="needs mypy, of the extra dev")

# What is wrong with a line stands behind it.
SNIPPET = """
from aepo_kernels.objective import PolicyObjective

PolicyObjective.preset("aepo")
PolicyObjective.preset("reinforce++", eps_high=0.28, kl_estimator="k2", dual_clip=None, clamp_entropy_factor=True)
PolicyObjective.preset("dapo", dual_clip=3, importance_cap=2.0, aggregation="constant")
PolicyObjective(clip="gppo", eps_low=0.1)
name: str = "aepo"
PolicyObjective.preset("ppo")  # arg-type
PolicyObjective.preset("AEPO")  # arg-type
PolicyObjective.preset(name)  # arg-type
PolicyObjective.preset("aepo", eps_hi=0.3)  # call-arg
PolicyObjective.preset("aepo", eps_high="0.3")  # arg-type
PolicyObjective.preset("aepo", aggregation="mean")  # arg-type
PolicyObjective.preset("aepo", clip=None)  # arg-type
PolicyObjective(eps_hi=0.3)  # call-arg
PolicyObjective(clip="sapo")  # arg-type
PolicyObjective.preset("aepo").eps_hi  # attr-defined
"""


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_mypy_sees_what_is_wrong_and_nothing_else(tmp_path, version):
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    # Other imports are left alone: checking torch would take a minute.
    settings = ["--config-file=", f"--cache-dir={tmp_path}", "--follow-imports=skip", f"--python-version={version}"]
    output, errors, _ = api.run([*settings, str(file), str(Path(aepo_kernels.objective.__file__))])
    found = re.findall(r"snippet\.py:(\d+): error: .*\[([\w-]+)\]", output)
    expected = re.findall(
        r"^(\d+) .*  # ([\w-]+)$", "\n".join(f"{n} {x}" for n, x in enumerate(SNIPPET.split("\n"), 1)), re.M
    )
    assert (found, errors) == (expected, ""), output
    assert output.count("error:") == len(found) == 10, output
