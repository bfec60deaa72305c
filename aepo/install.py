"""What this distribution is called, what pip knows of it, and the command that installs what a part of it needs.

`aepo` on PyPI is another project (Annotation Efficient Preference Optimization), with a package and a command of our
names. So the distribution is `aepo-kernels`, and no command of ours may say `pip install` and then that name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.metadata import Distribution
from pathlib import Path
from urllib.parse import unquote

DISTRIBUTION = "aepo-kernels"
NAMESAKE = "aepo"
# The extra that each command needs. `aepo doctor` and `aepo --version` need none.
COMMANDS = {
    "train": "train",
    "eval": "train",
    "rollout": "train",
    "report": "train",
    "keys": "train",
    "bench": "bench",
}


def pip_install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def explain_missing(command: str, error: ModuleNotFoundError) -> str:
    """What a user can do about a module that a command did not find, in one line."""
    if error.name is None:  # raised by us, and says it all
        return str(error)
    module = error.name.partition(".")[0]
    of_an_extra = command in COMMANDS and module != "torch"
    remedy = pip_install(COMMANDS[command]) if of_an_extra else f"pip install {module}"
    return f"aepo {command} needs {module}, which is not installed: {remedy}"


def requirements(distribution: Distribution) -> dict[str, dict[str, str]]:
    """extra -> package -> range; the extra "" is what every installation needs.

    Without `packaging`, which an extra brings, and so without its markers: ours say the extra and nothing else.
    """
    asked: dict[str, dict[str, str]] = {"": {}}
    for line in distribution.requires or ():
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra == ['"](.+?)['"]""", marker)
        name = re.match(r"[\w.-]+", requirement)
        if name:
            wanted = requirement[name.end() :].strip()
            asked.setdefault(extra[1] if extra else "", {})[name[0]] = wanted
    return asked


def installed_from(distribution: Distribution) -> str:
    """What `pip install` was given: the name, or where a wheel or a source tree lay."""
    direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    where = unquote(str(direct.get("url", DISTRIBUTION)).removeprefix("file://"))
    return f"-e {where}" if direct.get("dir_info", {}).get("editable") else where


def changed_files(distribution: Distribution) -> list[str]:
    """Python files of ours that are gone, or not those that pip recorded: another distribution has been there."""
    changed = []
    for file in distribution.files or ():
        if file.suffix != ".py" or file.hash is None or file.parts[0] not in ("aepo", "aepo_kernels"):
            continue
        path = Path(str(file.locate()))
        digest = hashlib.new(file.hash.mode, path.read_bytes()).digest() if path.exists() else b""
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            changed.append(str(file))
    return changed
