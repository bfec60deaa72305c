"""What would end a run when a question is drawn, said before its first step: of all questions at once, in one line.

Questions that are made when they are asked for (a `Sequence` that is neither list nor tuple, as reasoning-gym's) are
not made for this: what is wrong with one of them is said when it is drawn.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.progress import track

from aepo.agents.agent import Agent
from aepo.agents.protocol import AgentError, RewardFunction, dialogue, shown
from aepo.agents.rewards.builtin import COMPARED
from aepo.config import Config
from aepo.types import Message, Question

Split = Literal["training", "held-out"]
SHOWN = 5  # questions in a message
LONG_WORK = 1000  # prompts; 2 seconds at 3 kB each (SmolLM2, one core of a 2-core AMD EPYC VM beside other work)
# A token is at least a byte of the normalised text, and NFC and NFD make at most 3 bytes of one, none more of an ASCII
# character (checked over all of Unicode 15). NFKC makes 3.3 to 11 of one for 41 signs, U+FDFA first: a text of these
# alone, a token a byte, is left to the check when it is drawn.
GROWTH = 3

PROBE = 'say "no" & <go>, 5% \\ it\'s ' * 5 + "end"
"""What JSON, HTML, URLs and wrapping write in another way."""


@dataclass(frozen=True)
class Context:
    """A prompt must have fewer tokens than `positions`. source: what says so, for people."""

    positions: int
    source: str

    @classmethod
    def of(cls, config: Config, positions: int) -> Context:
        """positions: of the engine."""
        settings, model = config.vllm, f"model.name = {config.model.name!r}"
        if config.rollout.engine == "huggingface":
            return cls(positions, f"max_position_embeddings of {model}")
        if config.rollout.engine != "vllm":
            return cls(positions, f"max_positions of rollout.engine = {config.rollout.engine}")
        if settings.endpoints:
            return cls(positions, f"--max-model-len of vllm.endpoints = {list(settings.endpoints)}")
        if settings.max_model_len is not None:
            return cls(positions, f"vllm.max_model_len = {settings.max_model_len}")
        return cls(positions, f"what vLLM serves of {model}")


def check_questions(agent: Agent, questions: Sequence[Question], split: Split, console: Console) -> None:
    """Says which built-in rewards apply to some questions only. Needs no engine.

    ValueError: two questions of one id, a column that the environment needs and some lack, answers that no reward can
    compare, or a built-in reward that can compare none of all training answers.
    """
    if not isinstance(questions, (list, tuple)):
        return
    counts = Counter(question.id for question in questions)
    if len(counts) < len(questions):
        names = [repr(name) for name, count in counts.items() if count > 1]
        raise ValueError(
            f"task {agent.task.name}: {len(names)} ids belong to several {split} questions: {_first(names)}; "
            "expected another id for every question"
        )
    if agent.environment is not None:
        for question in one_of_each_row(questions):
            agent.environment.check(question)
    _check_answers(agent, questions, split, console)


def one_of_each_row(questions: Sequence[Question]) -> list[Question]:
    """The first question; of a list or tuple, the first with each set of columns."""
    if not isinstance(questions, (list, tuple)):
        return [questions[0]] if len(questions) else []  # one of the user's own need know no slices
    firsts: dict[tuple[str, ...], Question] = {}
    for question in questions:
        firsts.setdefault(tuple(question.data), question)
    return list(firsts.values())


def _check_answers(agent: Agent, questions: Sequence[Question], split: Split, console: Console) -> None:
    silent = {
        function: [question for question in questions if not COMPARED[function](question)]
        for function in agent.rewards
        if function in COMPARED
    }
    whole = split == "training" and len(questions) == len(agent.task.train)  # a sample may miss those with answers
    if whole and (idle := [function for function, rest in silent.items() if len(rest) == len(questions)]):
        expected = "at least one (task.columns names the column of answers), or task.rewards without it"
        raise _not_compared(idle, questions, questions, split, expected)
    if silent and len(silent) == len(agent.rewards):  # no other one may apply
        ids = set.intersection(*({question.id for question in rest} for rest in silent.values()))
        if rest := [question for question in questions if question.id in ids]:
            expected = "one: leave such rows out, or add a reward of your own for them"
            raise _not_compared(silent, rest, questions, split, expected)
    for function, rest in silent.items():
        if rest:
            console.print(
                f"reward {function.__name__} applies to {len(questions) - len(rest)} of {len(questions)} {split} "
                "questions: the others have no answer that it can compare",
                markup=False,
            )


def _not_compared(
    functions: Iterable[RewardFunction],
    some: Sequence[Question],
    questions: Sequence[Question],
    split: Split,
    expected: str,
) -> ValueError:
    return ValueError(
        f"{len(some)} of {len(questions)} {split} questions have no answer that the reward "
        f"{' or '.join(function.__name__ for function in functions)} can compare: "
        f"{_first(f'{q.id} ({shown(q.answer, 40)})' for q in some)}; expected {expected}"
    )


def fitting(
    agent: Agent, questions: Sequence[Question], split: Split, context: Context, console: Console, *, drop: bool
) -> Sequence[Question]:
    """Those whose prompts leave the model room for a token; what is left out is said.

    ValueError: some do not and drop is False, or none does; or the chat template refuses a dialogue. AgentError: the
    task's `messages`, or a format of the user's own, failed.
    """
    if not isinstance(questions, (list, tuple)):
        return questions
    long = _too_long(agent, questions, split, context.positions, console)
    if not long:
        return questions
    problem = (
        f"{len(long)} of {len(questions)} {split} prompts fill the model's context: "
        f"{_first(f'{name} ({count} tokens)' for name, count in long.items())}; expected fewer than "
        f"{context.positions} tokens ({context.source})"
    )
    if not drop or len(long) == len(questions):
        raise ValueError(f"{problem}{'' if drop else '; task.long_prompts=drop leaves them out'}")
    console.print(f"left out: {problem}", markup=False)
    return [question for question in questions if question.id not in long]


def _too_long(
    agent: Agent, questions: Sequence[Question], split: Split, positions: int, console: Console
) -> dict[str, int]:
    """Tokens by id. Only prompts that could be too long are made into tokens.

    Dialogues of the same roles have the same text of the template, with the tools. So one has at most the tokens of
    the shortest of them and the bytes of its own texts, of those that the shortest has not (a system text, examples),
    where the format writes texts as they are.
    """
    groups: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = defaultdict(list)
    unbounded: list[int] = []
    for index, question in enumerate(questions):
        messages = dialogue(agent.task, question, chat=agent.chat, observed=agent.environment is not None)
        if all(map(_is_plain, messages)):
            roles, texts = tuple(m["role"] for m in messages), tuple(m["content"] for m in messages)
            groups[roles].append((index, texts))
        else:
            unbounded.append(index)  # templates write calls, tools and parts in many ways
    counts: dict[int, int] = {}
    for roles, group in groups.items():
        sizes = [sum(map(_most_tokens, texts)) for _, texts in group]
        shortest, known = group[sizes.index(min(sizes))]
        try:
            counts[shortest] = _tokens(agent, questions[shortest])
        except ValueError as error:
            raise ValueError(f"{error} ({len(group)} of {len(questions)} {split} questions have its roles)") from error
        if not _writes_as_they_are(agent, roles):
            unbounded += [index for index, _ in group]
        elif counts[shortest] + max(sizes) >= positions:
            unbounded += [index for index, texts in group if _bound(counts[shortest], known, texts) >= positions]
    work = [index for index in unbounded if index not in counts]
    if len(work) > LONG_WORK and not console.is_terminal:
        console.print(f"counting the tokens of {len(work)} long {split} prompts")
    for index in track(
        work, f"tokens of long {split} prompts", console=console, transient=True, disable=not console.is_terminal
    ):
        counts[index] = _tokens(agent, questions[index])
    return {questions[index].id: count for index, count in sorted(counts.items()) if count >= positions}


def _writes_as_they_are(agent: Agent, roles: Sequence[str]) -> bool:
    """Whether every text of a dialogue with these roles is in its prompt once: templates can quote or repeat them."""
    try:
        tokens = agent.format.prompt_tokens(tuple({"role": role, "content": PROBE} for role in roles))
        return agent.format.decode(tokens).count(PROBE) == len(roles)
    except (AgentError, ValueError):  # a format of the user's own need not know these letters
        return False


def _bound(count: int, known: Sequence[str], texts: Sequence[str]) -> int:
    """The most tokens of a dialogue with these texts. count: those of one of the same roles, with the texts `known`."""
    return count + sum(_most_tokens(text) for text, other in zip(texts, known, strict=True) if text != other)


def _is_plain(message: Message) -> bool:
    return len(message) == 2 and isinstance(message.get("content"), str) and isinstance(message.get("role"), str)


def _most_tokens(text: str) -> int:
    """A token a byte, of all that a normalizer may make of the text."""
    size = len(text)
    if text.isascii():
        return size
    # At most `more` characters are not ASCII, with `more` bytes above one each.
    more = len(text.encode("utf-8", "replace")) - size
    return size + (2 * GROWTH - 1) * more


def _tokens(agent: Agent, question: Question) -> int:
    """Of the prompt. What an environment adds to it is not known before its reset."""
    return len(agent.prompt_tokens(question, None if agent.environment is None else ""))


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return f"{', '.join(listed[:SHOWN])}{', ..' if len(listed) > SHOWN else ''}"
