"""Questions from the generators of reasoning-gym, scored by its own scorers; extra [reasoning-gym].

task.name=reasoning_gym task.options='{dataset: {chain_sum: {max_terms: 3}, leg_counting: {}}, size: 2000}'
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, overload

from aepo.agents.protocol import Task, content_hash
from aepo.install import pip_install
from aepo.registry import SHOWN, nearest_first
from aepo.types import Question, Response

# Entry i of a generator is a function of its seed + i: held-out questions begin where no training set ends.
MAX_QUESTIONS = 1_000_000
_TRIES = 50  # for a training question that is none of the held-out ones

# Some scorers run the answer as Python (0.1.25: eval, or sympy's parse_expr). They get only what cannot call or take
# long: lists of words, sums without powers, and polynomials with small ones. Every other answer is wrong there.
_LISTS = re.compile(r"[\w\s,.'\"\[\]-]{0,2000}")
_SUMS = re.compile(r"(?:[\d\s+\-/().]|\*(?!\*)){0,300}")
_POLYNOMIALS = re.compile(
    r"(?:(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])|\b(?:sin|cos|tan|exp|log|sqrt)\b|\d|[\s+\-/().]|\*(?!\*)"
    r"|(?<=\w)\s?\*\*\s?\d{1,2}(?![\d*])|(?<=\))\s?\*\*\s?\d(?![\d*])){0,300}"
)
_RUNNABLE = {
    **dict.fromkeys(("string_insertion", "spiral_matrix", "binary_matrix", "n_queens"), _LISTS),
    **dict.fromkeys(("countdown", "puzzle24"), _SUMS),
    **dict.fromkeys(("simple_integration", "intermediate_integration", "polynomial_multiplication"), _POLYNOMIALS),
}
_MOST_POWERS = 3  # of brackets, which could be nested


class ReasoningGymTask(Task):
    """Questions of one or several generators in turn, made when they are asked for, always the same for a seed.

    dataset: a name, a list of names, or {name: settings of the generator}. size, heldout: how many questions.
    No prompt of a training question is that of a held-out one. ValueError, in one line: no such generator or setting,
    or one that has too few different questions.
    """

    name = "reasoning_gym"

    def __init__(
        self,
        dataset: str | Sequence[str] | Mapping[str, Mapping[str, Any]] = "chain_sum",
        *,
        size: int = 10_000,
        heldout: int = 200,
        seed: int = 0,
    ) -> None:
        for argument, number in (("size", size), ("heldout", heldout)):
            if not isinstance(number, int) or isinstance(number, bool) or not 0 < number <= MAX_QUESTIONS:
                raise ValueError(
                    f"task.options.{argument} = {number!r}: expected a number of questions from 1 to {MAX_QUESTIONS}"
                )
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"task.seed = {seed!r}: expected an integer >= 0")
        settings = _settings(dataset)
        begins = 2 * MAX_QUESTIONS * (_TRIES + 2) * seed
        held = {name: _generator(name, given, begins, heldout) for name, given in settings.items()}
        trained = {
            name: _generator(name, given, begins + MAX_QUESTIONS, size * (_TRIES + 1))
            for name, given in settings.items()
        }
        self.heldout = [_question(held, "heldout", index) for index in range(heldout)]
        self.train = _Generated(trained, size, {str(question.prompt) for question in self.heldout})
        self._scorers = held
        self._identity = {
            "reasoning_gym": version("reasoning-gym"),
            "dataset": {name: dict(given) for name, given in settings.items()},
            "size": size,
            "seed": seed,
            "heldout": content_hash(self.heldout),
            "train_begins": content_hash(self.train[:10]),
        }

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the questions, with hashes of all held-out and the first training questions."""
        return self._identity

    def reward(self, question: Question, response: Response) -> float:
        """What the generator's own scorer says, 0 to 1; without an answer 0."""
        answer = response.answer
        if answer is None or not _harmless(question.kind, answer.strip()):
            return 0.0
        entry = {"question": question.prompt, "answer": question.answer, "metadata": question.data["metadata"]}
        return float(self._scorers[question.kind].score_answer(answer.strip(), entry))


class _Generated(Sequence[Question]):
    """Training questions. One with a held-out prompt is replaced by the next that has none."""

    def __init__(self, generators: Mapping[str, Any], size: int, heldout: set[str]) -> None:
        self._generators, self._size, self._heldout = generators, size, heldout

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"question {index} of {self._size}")
        return self._make(index % self._size)

    def __iter__(self) -> Iterator[Question]:
        return map(self._make, range(self._size))

    def _make(self, index: int) -> Question:
        for attempt in range(_TRIES + 1):
            question = _question(self._generators, "train", index, attempt * self._size)
            if question.prompt not in self._heldout:
                return question
        raise ValueError(
            f"task.options.dataset: {question.kind} has too few different questions: {_TRIES} in a row are held-out "
            "ones; expected harder settings or a smaller task.options.heldout"
        )


def _question(generators: Mapping[str, Any], split: str, index: int, further: int = 0) -> Question:
    """Question `index` of the generators in turn; `further` entries later, if it needs another one."""
    names = list(generators)
    name = names[index % len(names)]
    entry = generators[name][index // len(names) + further]
    return Question(
        f"{split} {name} {index}", entry["question"], entry["answer"], name, {"metadata": entry["metadata"]}
    )


def _settings(dataset: Any) -> dict[str, Mapping[str, Any]]:
    named = [dataset] if isinstance(dataset, str) else dataset
    if isinstance(named, Sequence) and all(isinstance(name, str) for name in named):
        named = {name: {} for name in named}
    if not isinstance(named, Mapping) or not named or not all(isinstance(v, Mapping) for v in named.values()):
        raise ValueError(
            f"task.options.dataset = {dataset!r}: expected a name of reasoning-gym, a list of names or "
            "{name: {setting: value}}"
        )
    for name, given in named.items():
        if taken := given.keys() & {"seed", "size"}:
            raise ValueError(
                f"task.options.dataset.{name}.{min(taken)}: expected task.seed and task.options.size in its place"
            )
    return dict(named)


def _generator(name: str, settings: Mapping[str, Any], seed: int, size: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        needed = f"task.name = reasoning_gym needs {error.name}: {pip_install('reasoning-gym')}"
        raise ValueError(needed) from None
    if name not in DATASETS:
        near = ", ".join(nearest_first(name, DATASETS)[:SHOWN])
        raise ValueError(f"task.options.dataset = {name!r}: reasoning-gym has none of this name; it has {near}, ...")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    except Exception as error:  # its own checks are assertions
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"task.options.dataset.{name} = {dict(settings)!r}: {problem}") from error


def _harmless(name: str, answer: str) -> bool:
    allowed = _RUNNABLE.get(name)
    return allowed is None or (
        allowed.fullmatch(answer) is not None and len(re.findall(r"\)\s?\*\*", answer)) <= _MOST_POWERS
    )
