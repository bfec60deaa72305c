"""What the documentation and the sources cite exists: paths, make targets, `aepo` commands, modules, settings."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from aepo.config import all_keys

ROOT = Path(__file__).parents[2]
PAGES = [path for pattern in ("*.md", "docs/**/*.md") for path in sorted(ROOT.glob(pattern))]
ROOMS = ("aepo", "aepo_kernels", "benchmarks", "configs", "csrc", "docs", "examples", "tests")
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".yaml"}
SOURCES = [  # without this file, whose samples are not there
    path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*"))
    if path.suffix in SUFFIXES and path != Path(__file__)
]
# A path starts at the root of the repository and ends with a file's suffix or a folder's slash; * and ** are globs.
CITED_PATH = re.compile(
    rf"(?<![\w/.<-])((?:{'|'.join(ROOMS)}|\.ci)/(?:[\w.*-]+/)*"
    r"(?:[\w*-]+\.(?:py|md|h|cpp|cu|ya?ml|json|js|css|j2|txt))?)(?![\w/])"
)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(page: Path) -> list[str]:
    """The lines of the code blocks, fenced or indented, and the inline code of a Markdown page.

    A backslash at the end of a line joins it with the next one.
    """
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fences = re.compile(r"^ *```\w*\n(.*?)^ *```", re.S | re.M)
    prose = fences.sub("", text)
    lines = [line for block in fences.findall(text) for line in block.splitlines()]
    lines += re.findall(r"^ {4,}(.+)$", prose, re.M) + re.findall(r"`([^`\n]+)`", prose)
    return [line.strip() for line in lines]


def commands(pages: list[Path]) -> list[tuple[str, list[str]]]:
    """(page, words) of every cited command; comments and the folder of the environment are cut off."""
    found = []
    for page in pages:
        for line in code_of(page):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a piece of Python or prose with an apostrophe
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*|\$", words[0]):  # environment variables, a prompt
                words.pop(0)
            if words:
                found.append((name(page), [words[0].rpartition("/")[2], *words[1:]]))
    return found


def cli_commands() -> set[str]:
    from aepo.cli import app

    return {one.name or one.callback.__name__.replace("_", "-") for one in app.registered_commands}


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w.-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile", ROOT / "pyproject.toml"], ids=name)
def test_cited_paths_exist(page):
    for cited in CITED_PATH.findall(page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(cited)), f"{name(page)} cites {cited}"


def test_paths_cited_in_sources_exist():
    for source in SOURCES:
        for cited in CITED_PATH.findall(source.read_text(encoding="utf-8")):
            assert list(ROOT.glob(cited)), f"{name(source)} cites {cited}"


OTHERS_INSTALL = re.compile(r"""pip3? install\b[^\n`]*?[\s"'=]aepo(?=[\s"'`\[=<>~!;,)]|$)""", re.M)


def test_nobody_is_told_to_install_the_other_project_of_our_name():
    """`aepo` on PyPI is not ours; ours is aepo-kernels."""
    places = [*PAGES, *SOURCES, *(ROOT / one for one in ("Makefile", "pyproject.toml", "setup.py", ".ci/run"))]
    assert len(places) > 150
    told = {name(path): OTHERS_INSTALL.findall(path.read_text(encoding="utf-8")) for path in places}
    assert not {path: found for path, found in told.items() if found}


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ('pip install "aepo[train]"', True),
        ("pip install 'aepo[vllm]'", True),
        ("pip install aepo", True),
        ("`pip install -U aepo`", True),
        ("python -m pip install --quiet aepo==0.1", True),
        ('pip install "aepo-kernels[train]"', False),
        ("pip install aepo-kernels", False),
        ("pip install -e .", False),
        ("pip uninstall --yes aepo", False),
    ],
)
def test_the_pattern_of_others_installs_sees_them(text, others):
    assert bool(OTHERS_INSTALL.search(text)) is others


def test_cited_commands_exist():
    for page, words in commands(PAGES):
        if words[0] == "make":
            unknown = {word for word in words[1:] if "=" not in word} - make_targets()
            assert not unknown, f"{page} cites `make {' '.join(unknown)}`"
        if words[0] == "aepo" and len(words) > 1:
            assert words[1] in cli_commands() | {"--help", "--version"}, f"{page} cites `{' '.join(words)}`"
        if words[0].startswith("python") and words[1:2] == ["-m"]:
            assert importlib.util.find_spec(words[2]), f"{page} cites `{' '.join(words)}`"


def test_cited_settings_exist():
    known = {key.name for key in all_keys()} | {"section.key"}  # the form itself
    sections = {key.partition(".")[0] for key in known}
    for page, words in commands(PAGES):
        for key in (word.partition("=")[0] for word in words if re.match(r"[a-z_]+\.[a-z_]+=", word)):
            assert key in known, f"{page} sets {key}"
        if len(words) == 1 and re.fullmatch(r"[a-z_]+\.[a-z_]+", words[0]) and words[0].partition(".")[0] in sections:
            # `log.py` and `train.jsonl` are files, `train.steps` is a setting
            is_file = any((ROOT / "aepo").rglob(words[0])) or words[0].endswith((".json", ".jsonl", ".yaml"))
            assert words[0] in known or is_file, f"{page} cites the setting {words[0]}"


def test_the_reader_of_this_file_sees_what_it_should(tmp_path):
    page = tmp_path / "x.md"
    page.write_text(
        "See `make demo`.\n```sh\nA=1 .venv/bin/aepo train \\\n  train.steps=3  # c\n```\n"
        "[a](pages/b.md#c)\n\n    make test"
    )
    assert code_of(page) == ["A=1 .venv/bin/aepo train    train.steps=3  # c", "make test", "make demo"]
    assert CITED_PATH.findall("in tests/aepo/x.py, csrc/ and <runs/aepo/y.py>") == ["tests/aepo/x.py", "csrc/"]
    assert LINK.findall(page.read_text()) == ["pages/b.md"]
    assert {"demo", "test", "test-fast"} <= make_targets()
