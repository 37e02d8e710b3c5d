"""Questions of tasks that occur in the training data, by the rule of `data.decontaminate`: 13 words in a row, or a
shorter question whole.

What all questions of a task start and end with (an instruction, "Answer:") is not part of any of them.
Data in: opened tasks and the records of the training data; data out: the texts of such questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefold.data.duplicates import Parts, overlapping
from prefold.data.preference import Record
from prefold.evaluation.scores import OpenTask, question_of, shared_start
from prefold.terminal import progress_bar

COMPARED = 1000
"""Questions that are enough to find out what all questions of a task have in common."""


def questions_in(records: Sequence[Record], tasks: Sequence[OpenTask], limit: int | None) -> frozenset[str]:
    """The questions, as they are asked, that occur in a record: of the first `limit` of each task (None: of all)."""
    questions = [question for task in tasks for question in _questions(task, limit)]
    with progress_bar("questions in the training data", len(records)) as advance:

        def parts() -> Iterator[Parts]:
            for record in records:
                yield (record.prompt, *record.answers)
                advance(advance=1)

        contained = overlapping([own for _, own in questions], parts())
    return frozenset(text for (text, _), is_contained in zip(questions, contained, strict=True) if is_contained)


def _questions(opened: OpenTask, limit: int | None) -> list[tuple[str, str]]:
    """Each question as it is asked, and the part of it that not all questions share."""
    docs = opened.task.doc_iterator(limit=max(limit, COMPARED) if limit else None)
    texts = [text for _, doc in docs if (text := question_of(opened.task, doc)).strip()]
    start, end = shared_start(texts[:COMPARED]), shared_start([text[::-1] for text in texts[:COMPARED]])[::-1]
    # The shared start ends with a colon or line, since "What is" is part of a question; the shared end is whole lines.
    begins, line = max(start.rfind(":"), start.rfind("\n")) + 1, end.find("\n")
    behind = len(end) - line if line >= 0 else 0
    return [(text, text[begins : len(text) - behind].strip() or text) for text in texts[:limit]]
