"""The examples of docs/own_agent.md at toy size: they train, resume and are looked at, and their worlds stay apart."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aepo import cli
from aepo.config import Config, WarmStartConfig, load_config
from aepo.load import load_agent, load_model
from aepo.models.language_model import LanguageModel
from aepo.registry import resolve_function
from aepo.rollout.branching import branch_rule
from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine
from aepo.rollout.sampler import Sampler
from aepo.rollout.tree import path_nodes
from aepo.run.log import read_records
from aepo.types import RolloutTree, ToolResult

EXAMPLES = Path(__file__).parents[2] / "examples" / "own_agent"
# Enough to write calls, and quite often the right ones.
SHORT = WarmStartConfig(steps=60, batch_tokens=512, careful_share=1.0)
TOY = [
    "train.steps=1",
    "train.questions=2",
    "rollout.paths=4",
    "eval.questions=2",
    "log.tensorboard=false",
    "run.threads=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the examples as the current directory. Their modules are forgotten afterwards."""
    copy, before = tmp_path_factory.mktemp("agents") / "own_agent", set(sys.modules)
    shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("*_model", "runs", "__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        patch.syspath_prepend(str(copy))
        yield copy
    for name in {path.stem for path in copy.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(folder: Path) -> Callable[[str], Path]:
    """The model directory of an example, after a training of seconds."""

    def make(name: str) -> Path:
        directory = folder / f"{name}_model"
        if not directory.exists():
            demonstrations = resolve_function(f"{name}_data:demonstrations", "demonstrations", "seed, careful")
            import_module("small_chat_model").make_model(Path(f"{name}.yaml"), demonstrations, SHORT)
        return directory

    return make


def command(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def sampled(config: Config, questions: int) -> tuple[LanguageModel, list[RolloutTree]]:
    language_model = load_model(config.model, config.warm_start)
    agent = load_agent(config, language_model)
    with closing(agent):
        engine = HuggingFaceEngine(language_model.model, language_model.tokenizer, agent.format.eos_ids, version=0)
        sampler = Sampler(engine, agent, config.rollout, branch_rule(config.rollout))
        return language_model, sampler.rollout(agent.task.train[:questions], seed=0)


def calls_of(tree: RolloutTree, path: int) -> list[tuple[str, dict[str, Any], ToolResult]]:
    nodes = path_nodes(tree, path)
    pairs = [pair for node in nodes for pair in zip(node.calls, node.results, strict=True)]
    return [(call.tool, dict(call.arguments), result) for call, result in pairs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tools", "files"),
    [
        ("museum", ["search"], {"train": 270, "heldout": 90}),
        ("calculator", ["add", "subtract", "multiply"], {"train": None}),
        ("robot", ["go", "take"], {"train": 200}),
    ],
)
def test_an_example_trains_resumes_and_is_evaluated(name, tools, files, model, tmp_path):
    """And its run remembers task, data, format and tools, and refuses others."""
    run, before = tmp_path / "run", tmp_path / "before"
    directory = model(name)
    command("rollout", directory, "--config", f"{name}.yaml", "--questions", "2", "--out", before, *TOY)
    assert any(before.glob("*.html"))
    command("train", "--config", f"{name}.yaml", *TOY, f"run.dir={run}", f"model.name={directory}")
    output = command("train", "--resume", run, "train.steps=2")
    assert "resumed after step 1" in output
    records = read_records(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert sum(record["tools.calls"] for record in records) > 0

    facts = json.loads((run / "run.json").read_text())
    assert sorted(facts["tools"]) == sorted(tools)
    assert facts["format"]["name"] == "chat"
    assert facts["format"]["calls"] == "hermes"
    assert facts["task"]["name"] == "files"
    for split, rows in files.items():
        (file,) = facts["task"]["data"]["files"][split].values()
        assert len(file["sha256"]) == 64
        assert rows is None or file["rows"] == rows

    evaluated = tmp_path / "eval.json"
    command("eval", run, "--samples", "2", "--pass-at", "1,2", "--temperature", "1", "--json", evaluated)
    assert "pass@2" in evaluated.read_text()
    command("report", run)
    assert (run / "report.html").stat().st_size > 10_000

    changed = json.loads((run / "run.json").read_text())
    changed["task"]["data"]["files"]["train"] = {"other.jsonl": {"rows": 1, "sha256": "0" * 64}}
    (run / "run.json").write_text(json.dumps(changed))
    refused = CliRunner().invoke(cli.app, ["train", "--resume", str(run), "train.steps=3"])
    assert refused.exit_code == 1
    assert "task.data.files.train" in refused.output


def test_results_of_the_calculator_are_those_of_the_server(model):
    """The MCP server really calculates, in a process of its own."""
    config = load_config("calculator.yaml", [f"model.name={model('calculator')}"])
    _, trees = sampled(config, 6)
    found = [call for tree in trees for path in tree.paths for call in calls_of(tree, path.id)]
    right = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b}
    good = [(right[tool](**arguments), result.text) for tool, arguments, result in found if result.error is None]
    assert len(good) >= 3
    assert all(str(expected) == text for expected, text in good)


@pytest.mark.parametrize("environment", ["ForkingRobot", "Robot"])
def test_branches_of_the_robot_have_houses_of_their_own(environment, model):
    """Every path's calls, done once more in a house that nobody else is in, have the same results and reward."""
    settings = [
        "rollout.fresh_paths=2",
        "rollout.branch_alpha=1.0",
        "rollout.branch_penalty=0",
        "rollout.max_tokens=200",
    ]
    config = load_config(
        "robot.yaml", [f"model.name={model('robot')}", f"task.environment=robot:{environment}", *settings]
    )
    robot = import_module("robot")
    _, trees = sampled(config, 4)
    branches = [path for tree in trees for path in tree.paths if path.branch_node is not None]
    assert len(branches) >= 12
    compared = 0
    for tree in trees:
        for path in tree.paths:
            alone = robot.Robot()
            alone.reset(**tree.question.data)
            for tool, arguments, result in calls_of(tree, path.id):
                if result.error in (None, "raised"):
                    compared += 1
                    assert answer_of(alone, tool, arguments) in result.text
            assert path.environment_reward == alone.get_reward()
    assert compared > 30


def answer_of(robot: Any, tool: str, arguments: dict[str, Any]) -> str:
    try:
        return getattr(robot, tool)(**arguments)
    except Exception as error:
        return str(error)


def test_searches_find_documents_of_the_museum(model, folder):
    config = load_config("museum.yaml", [f"model.name={model('museum')}", "rollout.paths=4"])
    _, trees = sampled(config, 2)
    documents = [json.loads(line)["text"] for line in (folder / "museum" / "corpus.jsonl").read_text().splitlines()]
    calls = [call for tree in trees for path in tree.paths for call in calls_of(tree, path.id)]
    results = [result.text for _, _, result in calls if result.error is None]
    assert len(results) >= 4
    assert all(line in (*documents, "no results") for text in results for line in text.splitlines())


def test_demonstrations_are_what_the_format_of_a_rollout_makes(model):
    """Token by token: the prompt, and behind every call what the sampler would put there."""
    small = import_module("small_chat_model")
    config = load_config("museum.yaml", [f"model.name={model('museum')}"])
    language_model = load_model(config.model, config.warm_start)
    with closing(load_agent(config, language_model)) as agent:
        one = next(one for one in import_module("museum_data").demonstrations("0", True) if len(one.calls) == 2)
        tokens, labels = small.dialogue(agent, language_model.tokenizer, one)
        text = agent.format.decode(tokens)
        results = [f"<tool_response>{result}</tool_response>" for _, result in one.calls]
        written = agent.format.decode([label for label in labels if label != small.IGNORED])
        unknown = language_model.tokenizer.encode("naïve <|im_end|>", add_special_tokens=False)
        assert language_model.tokenizer.decode(unknown) == "naïve <|im_end|>"
    assert text.startswith("<|im_start|>system\ntool search(query)\n<|im_end|>\n<|im_start|>user\n")
    assert all(result in text and result not in written for result in results)
    assert written.count("<tool_call>") == 2
    assert written.endswith(f"{one.answer}<|im_end|>")


@pytest.mark.parametrize("name", ["museum", "calculator", "robot"])
def test_the_data_is_what_its_script_writes(name, folder, tmp_path):
    import_module(f"{name}_data").write(tmp_path / name)
    for path in (tmp_path / name).iterdir():
        assert path.read_bytes() == (EXAMPLES / name / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["museum", "calculator", "robot"])
def test_careful_demonstrations_are_right_and_hasty_ones_often_wrong(name, folder):
    module = import_module(f"{name}_data")

    def lengths(careful: bool) -> float:
        found = module.demonstrations("1", careful)
        return sum(len(next(found).calls) for _ in range(300)) / 300

    assert lengths(True) > lengths(False) + 0.2
    assert not any("unknown" in next(module.demonstrations(str(seed), True)).answer for seed in range(50))


def test_a_task_class_and_a_format_of_ones_own(model, tmp_path):
    """letters_task.py and react_format.py, with a model that knows neither."""
    run = tmp_path / "run"
    own = ["task.name=letters_task:Letters", "task.options={longest: 5}", "format.name=react_format:React"]
    command("train", *own, *TOY, f"run.dir={run}", f"model.name={model('museum')}", "rollout.max_tokens=30")
    facts = json.loads((run / "run.json").read_text())
    assert facts["format"]["name"] == "react_format:React"
    assert facts["task"]["name"] == "Letters"
    assert facts["task"]["train_questions"] + facts["task"]["heldout_questions"] == 45
    assert list(facts["tools"]) == ["count"]

    config = load_config(overrides=[*own, f"model.name={model('museum')}"])
    with closing(load_agent(config, load_model(config.model, config.warm_start))) as agent:
        react = agent.format
        prompt = react.decode(agent.prompt_tokens(agent.task.train[0]))
        assert (
            prompt == "count: Count the letters of a word.\nQuestion: Answer with a number.\nHow many letters has b?\n"
        )
        turn = react.read(react.prompt_tokens([{"role": "user", "content": "Action: count[b]"}]), "stop")
        assert [(call.tool, dict(call.arguments)) for call in turn.calls] == [("count", {"word": "b"})]
        assert react.decode(react.result_tokens(turn, [ToolResult("1", None, 0.0)])) == "\nObservation: 1\n"


@pytest.mark.slow
def test_smollm2_as_a_chat_model_with_tools(folder, tmp_path):
    """One step: its template shows no tools, so they are described in the system message."""
    run = tmp_path / "run"
    command(
        "train",
        *("--config", "museum.yaml", "model.name=smollm2-135m-instruct", "format.name=chat", "format.calls=hermes"),
        *(*TOY, f"run.dir={run}", "rollout.paths=2", "train.questions=1", "rollout.max_tokens=96", "eval.questions=1"),
        "rollout.max_segment_tokens=48",
    )
    (record,) = read_records(run / "metrics.jsonl")
    assert record["tokens.generated"] > 4
    facts = json.loads((run / "run.json").read_text())
    assert (facts["format"]["name"], facts["format"]["calls"]) == ("chat", "hermes")


def test_a_fork_of_the_robot_shares_nothing(folder):
    """What the one takes is still there for the other."""
    robot = import_module("robot").ForkingRobot()
    robot.reset("key", {"kitchen": ["key"]})
    robot.go("kitchen")
    other = robot.fork()
    assert robot.take("key") == other.take("key") == "You carry the key."
    robot.go("hall")
    assert (robot.get_reward(), other.get_reward()) == (1.0, 0.2)
