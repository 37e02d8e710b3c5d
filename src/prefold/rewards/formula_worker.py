"""The process behind `formulas.py`: reads lines of JSON, [answer, completion], and writes a line with 1, 0 or null for
each, after an empty object that says it is ready. Runs as a file by itself and imports nothing of prefold."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import suppress
from typing import Any

MOST_BYTES = 4 * 2**30
MARK = "####"
LONGEST = 20_000
"""Characters of a text, from its end, that are looked at."""


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    logging.disable()
    with suppress(ImportError):  # on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    from math_verify import parse, verify

    def formulas(text: str, is_formula: bool) -> list[Any]:
        text = text[-LONGEST:]
        marked = text.rpartition(MARK)[2].strip() if MARK in text else ""
        is_formula = bool(marked) or (is_formula and "$" not in text and "\\boxed" not in text)
        text = marked or text
        parsed = parse(f"${text}$", parsing_timeout=None) if is_formula and "$" not in text else []
        # A text stands for what could not be parsed.
        return [formula for formula in parsed or parse(text, parsing_timeout=None) if not isinstance(formula, str)]

    def compared(answer: str, completion: str) -> float | None:
        right = formulas(answer, is_formula=True)
        return float(verify(right, formulas(completion, is_formula=False), timeout_seconds=None)) if right else None

    replies.write("{}\n")
    replies.flush()
    for line in sys.stdin:
        replies.write(json.dumps(compared(*json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
