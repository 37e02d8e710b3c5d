"""The process behind `formulas.py`: writes an empty JSON object when it is ready, then reads lines of JSON, [answer,
completion], and writes 1, 0 or null for each. It runs as a script and imports nothing of prefold."""

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
"""Characters at the end of a text that are parsed."""


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
        # math-verify returns a string for what it could not parse.
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
