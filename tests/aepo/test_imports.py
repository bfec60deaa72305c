"""Imports flow one way: csrc <- aepo_kernels <- aepo <- {benchmarks, examples, tests}, and so do the rooms inside.

Read from the syntax trees, so that imports inside functions count too.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. A module may import from its own floor and from those below; a name stands for all that is in it.
# A new module must be given its place here.
FLOORS = (
    (
        "aepo_kernels.objective",
        "aepo_kernels.advantages",
        "aepo_kernels.entropy_advantage",
        "aepo_kernels.backend",
        "aepo_kernels.testing",
    ),
    ("aepo_kernels.reference", "aepo_kernels.kernels", "aepo_kernels.cuda"),
    ("aepo_kernels.ops", "aepo_kernels.linear_head"),
    ("aepo_kernels",),
    ("aepo.types", "aepo.install", "aepo.output", "aepo.registry", "aepo.own_code", "aepo.files", "aepo.parallel"),
    ("aepo.branching",),
    ("aepo.config",),
    ("aepo.interrupt",),
    ("aepo.agents.protocol",),
    ("aepo.models",),
    ("aepo.agents.formats", "aepo.agents.tools", "aepo.agents.rewards"),
    ("aepo.agents.tasks", "aepo.agents.agent"),
    ("aepo.agents.question_checks", "aepo.agents.remembered"),
    ("aepo.load",),
    ("aepo.run.files", "aepo.run.lock", "aepo.run.records", "aepo.run.layout", "aepo.run.outputs", "aepo.run.clock"),
    ("aepo.rollout",),
    ("aepo.vllm",),
    ("aepo.rollout.engines.vllm",),
    ("aepo.rollout.engines.make",),
    ("aepo.advantages", "aepo.own_loss"),
    ("aepo.integrations",),
    ("aepo.learning",),
    ("aepo.scoring", "aepo.answers", "aepo.estimates"),
    ("aepo.run",),
    ("aepo.evaluation",),
    ("aepo.data", "aepo.heldout"),
    ("aepo.trainer",),
    ("aepo.report", "aepo.doctor", "aepo.bench"),
    ("aepo.subject", "aepo.evaluation_display", "aepo.cli_shared"),
    ("aepo.play", "aepo.cli_eval", "aepo.cli_machine"),
    ("aepo.cli",),
    ("aepo.__main__",),
)
HEAVY = {"triton", "transformers", "vllm", "trl", "torchtitan", "verl"}


def sources(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


MODULES = dict(item for package in ("aepo_kernels", "aepo") for item in sources(package))


def imports(path: Path, *, module_level: bool = False, typing_only: bool = True) -> set[str]:
    """Dotted names that a file imports; `from a import b` counts as a.b where that is a module of ours. typing_only:
    also under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    unrun = {inner for node in ast.walk(tree) if _typing_only(node) and not typing_only for inner in ast.walk(node)}
    for node in _module_level(tree) if module_level else ast.walk(tree):
        if node in unrun:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & MODULES.keys() or {str(node.module)}
    return names


def _module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: no function bodies, no `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if _typing_only(node):
            continue
        yield node
        yield from _module_level(node)


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def floor(module: str) -> int:
    """The floor of the longest listed name that holds the module; package `aepo`: the first above aepo_kernels."""
    if module == "aepo":
        return floor("aepo_kernels") + 1
    names = [(len(name), level) for level, names in enumerate(FLOORS) for name in names]
    matches = [
        (size, level) for size, level in names if module[:size] in FLOORS[level] and module[size:][:1] in ("", ".")
    ]
    assert matches, f"{module} has no place in FLOORS"
    return max(matches)[1]


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_points_back(module):
    for name in imports(MODULES[module]):
        top = name.partition(".")[0]
        assert top not in {"benchmarks", "examples", "tests"}, f"{module} imports {name}"
        if top in {"aepo", "aepo_kernels"}:
            assert floor(name) <= floor(module), f"{module} imports {name}, which stands above it"


OPEN_TO_INTEGRATIONS = ("aepo_kernels", "aepo.integrations", "aepo.types", "aepo.advantages", "aepo.branching")
ALSO_OPEN = ("aepo.own_loss", "aepo.registry")  # the user's own functions, by name


def test_an_integration_sees_little_of_us_and_nobody_sees_it():
    """What others' trainers stand on must not be what only our own trainer needs; the comparison of them sees both."""
    within = (*OPEN_TO_INTEGRATIONS, *ALSO_OPEN)
    for module, path in MODULES.items():
        for name in imports(path):
            inside = module.startswith("aepo.integrations")
            if inside and name.startswith("aepo"):
                assert name.startswith(within), f"{module} imports {name}: an integration may see {', '.join(within)}"
            if name.startswith("aepo.integrations"):
                assert inside or module.startswith("aepo.bench"), f"{module} imports {name}"


def test_there_is_no_circle():
    """Of modules, also by imports inside functions; nor of folders, which two siblings are at whatever depth they part.

    What only a type checker imports is no arrow: it says what is handed in, and runs nothing.
    """
    modules, folders = arrows({module: (path, imports(path, typing_only=False)) for module, path in MODULES.items()})
    assert circle(modules) is None
    assert circle(folders) is None
    assert "aepo/rollout" in folders["aepo/learning"] | folders["aepo/run"]  # there is something to look at


def test_a_circle_is_seen(tmp_path):
    given = {
        "p.a.x": (ROOT / "p/a/x.py", {"p.b.y"}),
        "p.b.y": (ROOT / "p/b/y.py", {"p.b.z"}),
        "p.b.z": (ROOT / "p/b/z.py", {"p.a.w"}),
        "p.a.w": (ROOT / "p/a/w.py", set()),
    }
    modules, folders = arrows(given)
    assert circle(modules) is None
    assert set(circle(folders)) == {"p/a", "p/b"}
    given["p.a.w"][1].add("p.a.x")
    assert set(circle(arrows(given)[0])) == set(given)


def arrows(imported: dict[str, tuple[Path, set[str]]]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """From modules and from folders to those that they import."""
    modules: dict[str, set[str]] = {module: set() for module in imported}
    folders: dict[str, set[str]] = {}
    for module, (path, names) in imported.items():
        for name in names & imported.keys() - {module}:
            modules[module].add(name)
            ours, theirs = (p.relative_to(ROOT).parent.parts for p in (path, imported[name][0]))
            level = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if level is not None:
                one, other = ("/".join(parts[: level + 1]) for parts in (ours, theirs))
                folders.setdefault(one, set()).add(other)
    return modules, folders


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_backends_do_not_know_each_other():
    for module, path in MODULES.items():
        for one, other in (("reference", "kernels"), ("kernels", "reference")):
            if module.startswith(f"aepo_kernels.{one}"):
                assert not [name for name in imports(path) if name.startswith(f"aepo_kernels.{other}")], module


def test_heavy_packages_have_their_rooms():
    for module, path in MODULES.items():
        heavy = {name.partition(".")[0] for name in imports(path)} & HEAVY
        if module.startswith("aepo_kernels"):
            assert heavy <= {"triton"}, module
            assert not heavy or module.startswith("aepo_kernels.kernels"), module
        elif module.startswith("aepo.vllm"):
            assert heavy <= {"vllm"}, module
        elif module.startswith("aepo.rollout.engines.vllm"):
            assert heavy <= {"vllm", "transformers"}, module
        elif module.startswith("aepo.integrations.trl"):
            assert heavy <= {"trl", "transformers"}, module
        elif module == "aepo.integrations.titan":
            assert heavy <= {"torchtitan"}, module
        elif module not in ("aepo.bench.peers", "aepo.bench.trainer_steps"):  # measure whatever is installed
            assert heavy <= {"transformers"}, f"{module}: {heavy} belong to aepo.vllm and aepo.integrations"


def test_config_and_types_need_no_torch():
    late = ("aepo", "aepo.own_loss")  # which looks its version up late; which has torch in its annotations
    free = (
        "aepo.types",
        "aepo.files.sums",
        "aepo.install",
        "aepo.registry",
        "aepo.own_code",
        "aepo.report",
    )
    settings = [module for module in MODULES if module.partition(".")[2].partition(".")[0] == "config"]
    assert "aepo.config.setting_types" in settings
    for module in (*late, *free, *settings):
        loaded = imports(MODULES[module], module_level=module in late)
        assert not {name.partition(".")[0] for name in loaded} & {"torch", "aepo_kernels"}, module


def test_native_headers_are_free_of_torch():
    """What stands in csrc/include can be built and tested without torch: raw pointers and sizes."""
    for path in (ROOT / "csrc" / "include").rglob("*.h"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ("<torch/", "<ATen/", "<c10/") if word in text], path


def test_the_tests_of_this_file_see_imports():
    """The walker itself: an arrow inside a function is seen, and counts as not at module level."""
    path = MODULES["aepo.report.page"]
    assert "jinja2" in imports(path)
    assert "jinja2" not in imports(path, module_level=True)
    assert floor("aepo.trainer") > floor("aepo.rollout.engine") > floor("aepo") > floor("aepo_kernels.ops.rows")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import aepo", {"torch", *HEAVY}),
        ("import aepo.config, aepo.types", {"torch", *HEAVY}),
        ("import aepo_kernels", HEAVY | {"aepo"}),
        ("import aepo.advantages, aepo.learning.pack_paths, aepo.report", HEAVY),
    ],
)
def test_importing_is_cheap(statement, absent):
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not absent & set(loaded.split())
