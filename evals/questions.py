"""A multiple-choice task of one's own: a file with one JSON object a line, `question`, `choices` and `answer` (from 0).

It is data and nothing else. lm-eval's own task files may hold programs, so those of a recipe's repository are not taken.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

MAX_BYTES, MAX_QUESTIONS = 64 << 20, 100_000


class QuestionsError(ValueError):
    """The file is not such a task; the message says where and why."""


@dataclass(frozen=True)
class Question:
    """A question with its choices and the number of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(raw: bytes) -> tuple[Question, ...]:
    """The questions of a file: JSON lines, or one JSON list. Raises QuestionsError."""
    if len(raw) > MAX_BYTES:
        raise QuestionsError(f"larger than {MAX_BYTES >> 20} MiB")
    try:
        text = raw.decode("utf-8-sig")
        if text.lstrip().startswith("["):
            rows = list(enumerate(json.loads(text), 1))
        else:
            rows = [(number, json.loads(line)) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    except (ValueError, RecursionError):
        raise QuestionsError("not JSON: one object a line, or a list of them") from None
    if not rows:
        raise QuestionsError("no questions in it")
    if len(rows) > MAX_QUESTIONS:
        raise QuestionsError(f"more than {MAX_QUESTIONS:,} questions")
    return tuple(_question(number, row) for number, row in rows)


def _question(number: int, row: object) -> Question:
    match row:
        case {"question": str(question), "choices": [_, _, *_] as choices, "answer": int(answer)}:
            if (
                all(isinstance(choice, str) and choice for choice in choices)
                and not isinstance(answer, bool)
                and 0 <= answer < len(choices)
            ):
                return Question(question, tuple(choices), answer)
    raise QuestionsError(
        f'question {number} is not {{"question": text, "choices": [texts, two or more], "answer": number of the right one, from 0}}'
    )
