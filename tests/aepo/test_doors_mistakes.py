"""What a user gets wrong at any door: one line that says what came and what is expected, before the first step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from door_toys import FILES, OWN, SMALL, aepo, save_chat_model, write_home
from format_templates import tokenizer

SERVER = f"mcp:{sys.executable} -m mcp_server_time --local-timezone UTC"
MISTAKES = {
    # tools
    "no type hint": (["task.tools=mine:untyped"], "parameter 'a' has no type hint; expected one, as in a: str"),
    "no docstring": (["task.tools=mine:mute"], "tool mute (mine.py:"),
    "one name twice": (["task.tools=[mine:add,mine:Box]"], "two tools are called 'add': FunctionTool(add of mine.py:"),
    "of an environment": (
        ["task.tools=mine:move_far", "task.environment=mine:World"],
        "two tools are called 'move': World.move and ",
    ),
    "of a server": (
        [f"task.tools=['{SERVER}',mine:Clock.get_current_time]"],
        "two tools are called 'get_current_time': get_current_time of mcp:",
    ),
    "of server and environment": (
        [f"task.tools='{SERVER}'", "task.environment=mine:Clock"],
        "two tools are called 'get_current_time': Clock.get_current_time and get_current_time of mcp:",
    ),
    "an environment as a tool": (["task.tools=mine:World"], "World has a method reset(): it is an environment"),
    "no tool": (["task.tools=mine:number"], "expected a function, a tool or a class of tools, got 5"),
    "tool's name": (["task.tools=mine:ad"], "task.tools = 'mine:ad': mine has no 'ad'; has add, "),
    "tool's kind": (["task.tools=pyhton"], "task.tools = 'pyhton': expected python, search:CORPUS.jsonl, "),
    "no such server": (["task.tools='mcp:no_such_program'"], "there is no command 'no_such_program'"),
    "a server that ends": (
        [f"task.tools='mcp:{sys.executable} -c 1'"],
        "the MCP server cannot be used: it ended with exit code 0",
    ),
    "no server there": (["task.tools='mcp+http://127.0.0.1:9/mcp'"], "the MCP server cannot be used: "),
    "no retriever there": (["task.tools='http://127.0.0.1:9/retrieve'"], "the retriever cannot be reached"),
    "no corpus": (["task.tools='search:none.jsonl'"], "expected a JSONL file of documents: "),
    # environments
    "no reset": (["task.environment=mine:NoWorld"], "environment NoWorld: expected a method reset(self, **row)"),
    "no column": (["task.environment=mine:WantsColour"], "WantsColour.reset needs 'colour', question 'rows.jsonl:1'"),
    "no class": (["task.environment=mine:number"], "environment: expected a class with reset(**row), got 5"),
    "its name": (["task.environment=mine:Word"], "task.environment = 'mine:Word': mine has no 'Word'; has World, "),
    "reset fails": (["task.environment=mine:BrokenWorld"], "BrokenWorld.reset raised RuntimeError: "),
    # formats
    "no tools in template": (
        ["model.name=gemma", "task.tools=mine:add", "format.name=chat"],
        "does not show tools (add); set format.name=tags",
    ),
    "no template": (["model.name=plain", "format.name=chat"], "expected a chat template, it has none"),
    "no round trip": (["model.name=lossy"], "tokenizer lossy: expected that a text survives encoding and decoding"),
    "format's name": (["format.name=chad"], "format.name = 'chad': expected auto, chat, tags, or package.module:Class"),
    "no format": (["format.name=mine:NoFormat"], "NoFormat has no eos_ids, stop_strings, vocab_size, prompt_tokens"),
    "a number": (["format.name=mine:number"], "format.name = 'mine:number': expected a class; it is of type int"),
    "format fails": (
        ["format.name=mine:BrokenFormat"],
        "format.name = 'mine:BrokenFormat': making it failed: RuntimeError: no format (mine.py, line ",
    ),
    "parser's name": (
        ["task.tools=mine:add", "format.calls=hermess"],
        "format.calls = 'hermess': expected auto, hermes, qwen3_coder, llama3_json, glm45, or package.module:Name",
    ),
    "another parser": (["task.tools=mine:add", "format.calls=qwen3_coder"], "qwen3_coder did not read the call that"),
    "own parser": (["task.tools=mine:add", "format.calls=mine:parses_nothing"], "mine:parses_nothing did not read the"),
    "parser fails": (
        ["task.tools=mine:add", "format.calls=mine:BrokenParser"],
        "format.calls = 'mine:BrokenParser': making one without arguments failed: RuntimeError: no parser (mine.py, ",
    ),
    "parser without tools": (["format.calls=hermes"], "format.calls = 'hermes': expected auto, there are no tools"),
    # rewards
    "too few values": (
        ["task.rewards=mine:too_few"],
        "expected a list of 2 numbers or None, one per completion, got 1 values (tried at the start",
    ),
    "one number": (
        ["task.rewards=mine:one_number"],
        "expected a list of 2 numbers or None, one per completion, got float",
    ),
    "reward raises": (["task.rewards=mine:raising"], "path 0: KeyError: 'colour' (mine.py, line "),
    "a text": (["task.rewards=mine:a_text"], "path 0: expected a number or None, got str '0.5'"),
    "not finite": (["task.rewards=mine:not_finite"], "path 0: expected a finite number, got nan"),
    "none applies": (["task.rewards=mine:silent"], "no reward applies; silent returned None, expected a number"),
    "another signature": (["task.rewards=mine:strange"], "reward strange: expected f(question, response), TRL's "),
    "wants a column": (["task.rewards=mine:wants_colour"], "its parameter 'colour' is no column; columns: id, kind, "),
    "no function": (["task.rewards=mine:number"], "it is of type int"),
    "reward's name": (["task.rewards=exakt"], "task.rewards = 'exakt': expected exact_match, math, "),
    "its weight": (["task.rewards={mine:a_text: x}"], "task.rewards.mine:a_text = 'x': expected a finite number"),
    "none": (["task.rewards=null"], "task.rewards = null: expected reward functions (docs/rewards.md), task files has"),
    "no get_reward": (
        ["task.rewards=environment"],
        "task.rewards = 'environment': expected an environment with a",
    ),
    # data
    "a row": (["task.train=half.jsonl"], "task.train: 1 of 3 rows cannot be used: half.jsonl:2: no prompt"),
    "no prompt": (["task.train=no_prompt.jsonl"], "task.columns.prompt: expected one of the columns prompt, question,"),
    "a column": (["task.columns={prompt: nope}"], "task.columns.prompt = 'nope': expected one of the columns prompt, "),
    "empty": (["task.train=empty.jsonl"], "task.train: expected at least one row, got none"),
    "nothing held out": (["task.heldout=empty.jsonl"], "task.heldout: expected at least one row, got none"),
    "one row": (["task.train=one.jsonl"], "the held-out set would be empty"),
    "no file": (["task.train=none.jsonl"], "task.train = 'none.jsonl': there is no such file"),
    "no train": (["task.train=null"], "task.train = None: expected a .jsonl or .parquet file"),
    "no share": (["task.heldout=2"], "task.heldout = 2.0: expected files or a share of task.train in (0, 1)"),
    "too few": (["train.questions=50"], "train.questions = 50: expected <= the task's 11 training questions"),
    "system text": (["task.system=prompts/none.txt"], "task.system = 'prompts/none.txt': there is no such file"),
    "a long prompt": (
        ["task.train=long.jsonl"],
        " tokens); expected fewer than 32768 tokens (max_position_embeddings of model.name = 'qwen'); task.",
    ),
    "roles": (
        ["model.name=gemma", "task.train=roles.jsonl"],
        "question 'roles.jsonl:2': the chat template of gemma refuses a dialogue of roles",
    ),
    "no number": (
        ["task.train=words.jsonl", "task.rewards=numbers"],
        "1 of 10 training questions have no answer that the reward numbers can compare: words.jsonl:2 ('many')",
    ),
    # the algorithm
    "advantage": (["policy.advantage=gruop"], "policy.advantage = 'gruop': expected group, batch, gigpo or "),
    "own advantage": (
        ["policy.advantage=mine:one_argument"],
        "expected a function (rewards, questions); it is one_argument(rewards)",
    ),
    "loss": (["policy.loss=mine:losss"], "policy.loss = 'mine:losss': mine has no 'losss'; has loss, "),
    "branch rule": (["rollout.branch_rule=mine:no_argument"], "expected a function (point); it is no_argument()"),
    "rule's name": (["rollout.branch_rule=rule"], "rollout.branch_rule = 'rule': expected package.module:name"),
}
TASKS = {
    "nothing held out": (["task.name=mine:NoHeldout"], "expected at least one held-out question, it has none"),
    "no reward": (["task.name=mine:NoReward"], "task NoReward has none of its own"),
    "fails": (["task.name=mine:BrokenTask"], "making it failed: OSError: no disk (mine.py, line "),
    "no task": (["task.name=mine:World"], "expected a class derived from aepo.agents.protocol.Task"),
    "no module": (["task.name=mein:Sums"], "task.name = 'mein:Sums': no module 'mein' in "),
    "no name": (["task.name=factz"], "task.name = 'factz': expected facts, files, reasoning_gym, or package.module"),
    "an option": (["task.name=mine:Sums", "task.options={siez: 3}"], "expected arguments of Sums(size: int = 10): got"),
    "no question": (["task.name=mine:Sums", "task.options={size: 0}"], "expected at least one training question"),
    "an option of ours": (["task.name=reasoning_gym", "task.options={siez: 3}"], "expected arguments of ReasoningGym"),
    "options of none": (["task.name=facts", "task.options={a: 1}"], "expected none with task.name = facts"),
    "files for another": (["task.name=facts", "task.train=rows.jsonl"], "expected task.name = files with it"),
    "columns for another": (["task.name=mine:Sums", "task.columns={prompt: a}"], "expected task.name = files with it"),
}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.chdir(home)
        write_home(home)
        write_bad_rows(home)
        for family in ("qwen", "gemma"):
            save_chat_model(home / family, family)
        save_chat_model(home / "plain", tokenizer(None, eos="<eos>", special=["<eos>"]))
        save_chat_model(home / "lossy", lossy())
        yield


def write_bad_rows(home: Path) -> None:
    """The second of eleven has what no run can use."""
    user = {"role": "user", "content": "a"}
    bad = {
        "long": {"prompt": "z" * 40_000, "answer": "1"},
        "roles": {"prompt": [user, user], "answer": "1"},
        "words": {"prompt": "How many?", "answer": "many"},
    }
    for name, row in bad.items():
        rows = [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(11)]
        rows[1] = row
        (home / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def lossy():
    """A tokenizer that knows no capital letters."""
    from tokenizers import normalizers

    made = tokenizer(None, eos="<eos>", special=["<eos>"])
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    return made


@pytest.mark.parametrize(("settings", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_one_line(settings: list[str], expected: str) -> None:
    done = aepo("train", *SMALL, *FILES, *settings, "--overwrite")
    assert expected in done.failure
    assert "step 1/" not in done.output


@pytest.mark.parametrize(("settings", "expected"), TASKS.values(), ids=TASKS)
def test_one_line_about_the_task(settings: list[str], expected: str) -> None:
    done = aepo("train", *SMALL, "model.name=qwen", *settings, "--overwrite")
    assert expected in done.failure
    assert not Path("run").exists() or not Path("run/metrics.jsonl").exists()


@pytest.mark.parametrize("command", ["eval", "rollout"])
def test_the_other_commands_say_it_too(command: str, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"] if command == "rollout" else []
    done = aepo(command, "qwen", *FILES[1:], "run.threads=1", "task.rewards=mine:raising", *out)
    assert "reward raising, question 'rows.jsonl:" in done.failure
    done = aepo(command, "qwen", *FILES[1:], "run.threads=1", "task.tools=mine:untyped", *out)
    assert "parameter 'a' has no type hint" in done.failure


def test_a_list_of_rewards_and_weights_after_it(tmp_path: Path) -> None:
    """The last one counts as a whole, whatever the file had."""
    file = tmp_path / "mine.yaml"
    file.write_text("task: {rewards: [mine:raising, exact_match], columns: {prompt: nope}}\n")
    settings = [*FILES[:-1], "task.rewards={exact_match: 2}", "task.columns={prompt: prompt}"]
    done = aepo("train", "--config", file, *SMALL, *settings, "--overwrite", "train.steps=0")
    assert done.code == 0, done.output


def test_own_agent_without_its_model() -> None:
    done = aepo("train", *SMALL, *OWN, "model.name=nowhere", "--overwrite")
    assert "model.name = 'nowhere': expected tiny, smollm2-135m-instruct, or a directory with a config.json" in (
        done.failure
    )
