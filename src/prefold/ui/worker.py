"""Tasks that need torch, a tokenizer or a data set of the Hub, done in a child process, so that the server stays small.

Requests and answers are JSON lines on the child's stdin and stdout, one at a time. The child ends after `IDLE` seconds
without a request, and with the server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from threading import Lock, Timer
from typing import TYPE_CHECKING, Any

from prefold.errors import Explained, UserError, first_line
from prefold.recipe import Data, Model, Source, make_section
from prefold.recipe.text import field_lines, parse_yaml
from prefold.terminal import print_json, stdout_for_results

if TYPE_CHECKING:
    from prefold.data.shapes import Kind
    from prefold.recipe import RecipeBase

IDLE = 300.0
STREAMED = 1000
"""Rows that are read of a stream, which may have no end."""


@dataclass
class Worker:
    child: subprocess.Popen[str] | None = None
    lock: Lock = field(default_factory=Lock)
    timer: Timer | None = None

    def ask(self, task: str, **arguments: Any) -> dict[str, Any]:
        """Do a task of `TASKS` in the child. Raises UserError: the task fails, or the child has ended."""
        with self.lock:
            if self.timer:
                self.timer.cancel()
            if self.child and self.child.poll() is not None:
                self._end()
            if not self.child:
                command = [sys.executable, "-m", "prefold.ui.worker"]
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                self.child = subprocess.Popen(command, text=True, stderr=subprocess.DEVNULL, **pipes)
            assert self.child.stdin and self.child.stdout
            with suppress(OSError):
                self.child.stdin.write(json.dumps([task, arguments]) + "\n")
                self.child.stdin.flush()
            answer = self.child.stdout.readline()
            self.timer = Timer(IDLE, self.end)
            self.timer.daemon = True
            self.timer.start()
        if not answer.endswith("\n"):
            what = f"the process that does this has ended (exit code {self.child.wait()})"
            raise UserError(what, advice="try again; it may have run out of memory")
        result, refused = json.loads(answer)
        if refused:
            raise UserError(**refused)
        return dict(result)

    def end(self) -> None:
        with self.lock:
            self._end()

    def _end(self) -> None:
        if self.child:
            with self.child:
                self.child.terminate()
            self.child = None


checker, reader = Worker(), Worker()
"""One for checks and downloads, one for rows and surveys, so that a row need not wait for a long check."""


# ---- in the child -------------------------------------------------------------------------------------------------


def check(start: str, text: str) -> dict[str, Any]:
    """Findings and plan of a recipe, given as text, whose relative paths start from `start`."""
    os.chdir(start)
    recipe = _recipe(text)
    from prefold.runs.check import check

    return check(recipe).as_json()


def row(
    start: str,
    row: str,
    value: dict[str, Any] | None = None,
    text: str = "",
    model: str = "",
    path: str = "",
    kind: Kind = "pairs",
) -> dict[str, Any]:
    """A row from file to tokens: by a recipe, given as text, or of the file `path` by a model's chat template.
    `value`: what the row holds, if it has been read already."""
    os.chdir(start)
    if text:
        recipe = _recipe(text)
        section, data, seed, kind = recipe.model, recipe.data, recipe.train.seed, recipe.algorithm.kind.data
    else:
        section, data, seed = make_section(Model, {"name": model}), Data(train=[Source(path=path)]), 0
    from prefold.data.row import see_row

    return see_row(row, data, _tokenizer_of(section.model_dump_json()), seed, kind, value).as_json()


def download(source: str, lines: str) -> dict[str, Any]:
    """Write the rows of a data set of the Hub to a file of JSON lines; of a stream, the first `STREAMED`."""
    from prefold.data.sources import read_rows

    section = Source.model_validate_json(source)
    with Path(lines).open("w", encoding="utf-8", errors="surrogatepass") as opened:
        for row in islice(read_rows(section), STREAMED if section.streaming else None):
            opened.write(json.dumps(row.value, ensure_ascii=False, default=str) + "\n")
    return {}


def survey(path: str) -> dict[str, Any]:
    """What is known about the rows of a file without a model."""
    from prefold.data.survey import describe_data

    return describe_data(path).as_json()


def _recipe(text: str) -> RecipeBase:
    """Errors in the YAML are reported before the imports that take seconds."""
    values, lines = parse_yaml(text, "the recipe"), field_lines(text)
    if not isinstance(values, dict):
        raise UserError("it is not a mapping of sections", where="the recipe", advice="begin with `method: dpo`")
    from prefold.recipe.load import make_recipe

    return make_recipe(values, "the recipe", lines)


@cache
def _tokenizer_of(model: str) -> Any:
    from prefold.models.tokenizer import tokenizer_of

    return tokenizer_of(Model.model_validate_json(model))


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"check": check, "download": download, "row": row, "survey": survey}


def main() -> None:
    with stdout_for_results():
        for line in sys.stdin:
            task, arguments = json.loads(line)
            result, refused = None, None
            try:
                result = TASKS[task](**arguments)
            except UserError as error:
                refused = {name: getattr(error, name) for name in ("what", "where", "expected", "advice")}
            except Exception as error:
                what = str(error) if isinstance(error, Explained) else f"{type(error).__name__}: {first_line(error)}"
                refused = {"what": what}
            print_json([result, refused], indent=None, default=str)


if __name__ == "__main__":
    main()
