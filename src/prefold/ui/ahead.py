"""Answers of two models to many prompts, generated in a thread while people already talk or vote."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from prefold.data.conversion import to_records
from prefold.data.formats import read_file, reader_for
from prefold.data.preference import Problem
from prefold.data.shapes import find_shape
from prefold.data.vote_file import append_line
from prefold.errors import UserError
from prefold.reports.run_files import as_list, readable, turns
from prefold.ui.site import Fields, Site, action, page, route, site_of
from prefold.ui.speakers import Speaker, speaker_of
from prefold.ui.talk import chosen_models, model_name, settings_of
from prefold.ui.vote import COMPARISONS

HEAD_ROWS = 1000
MOST = 1000
HELD_OUT = "held-out"

Prompt = list[dict[str, Any]]


@dataclass
class Work:
    """Prompts for two models to answer, all by the first and then by the second, since they may not fit into memory
    together. `first`: how the first ended each of its answers; `done`: prompts that both have answered; `same`: of
    these, those that they answered alike; `error`: why it stopped early."""

    folder: Path
    models: list[str]
    prompts: list[Prompt]
    first: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0
    same: int = 0
    error: str = ""
    is_over: bool = False
    stopped: Event = field(default_factory=Event)

    def perform(self, speakers: Sequence[Speaker], settings: dict[str, Any]) -> None:
        first, second = speakers
        try:
            for end in self._answers(first, self.prompts, settings):
                self.first.append(end)
            for end in self._answers(second, self.prompts[: len(self.first)], settings):
                self._compare(self.prompts[self.done], self.first[self.done], end)
        except UserError as error:
            self.error = readable(str(error))
        finally:
            self.is_over = True

    def _answers(
        self, speaker: Speaker, prompts: Sequence[Prompt], settings: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """How a model ends its answer to each prompt, until it cannot answer one or is stopped."""
        for prompt in prompts:
            if self.stopped.is_set():
                return
            end = deque(speaker.ask(prompt, settings), maxlen=1)[0]
            if "error" in end:
                self.error = readable(str(end["error"]))
                return
            yield end

    def _compare(self, prompt: Prompt, *ends: dict[str, Any]) -> None:
        answers, cut_off = [end["answer"] for end in ends], [not end["finished"] for end in ends]
        if answers[0] == answers[1]:
            self.same += 1
        else:
            line = {"prompt": prompt, "answers": answers, "models": self.models, "cut_off": cut_off}
            append_line(self.folder / COMPARISONS, line)
        self.done += 1


_WORK: dict[Path, Work] = {}


def work_in(folder: Path) -> Work | None:
    """The current or last work whose comparisons go to a folder."""
    return _WORK.get(folder)


def prompts_of(site: Site, named: str, run: Path) -> Iterator[Prompt]:
    """The different prompts that a run held out, or those of a file. Raises HTTPException: it is not a file of data;
    UserError: it cannot be read."""
    path = run / "evaluation" / "heldout.jsonl" if named == HELD_OUT else site.inside(named)
    if not path.is_file() or reader_for(path.name) is None:
        raise HTTPException(400, "There are no prompts: give a .jsonl, .json, .csv or .parquet file in these folders.")
    rows = read_file(path, site.name_of(path))
    if named == HELD_OUT:
        held_out = (as_list((row.value or {}).get("prompt")) for row in rows)
        prompts: Iterator[Prompt] = (prompt for prompt in held_out if turns(prompt))
    else:
        head = list(islice(rows, HEAD_ROWS))
        shape = find_shape(head, site.name_of(path), kinds=["prompts"])
        records = (record for row in (*head, *rows) for record in to_records(row, shape))
        prompts = ([dict(turn) for turn in record.prompt] for record in records if not isinstance(record, Problem))
    seen: set[str] = set()
    for prompt in prompts:
        if (key := json.dumps(prompt, sort_keys=True)) not in seen:
            seen.add(key)
            yield prompt


def _begin(request: Request, fields: Fields) -> Response:
    site = site_of(request)
    models, settings, count = chosen_models(site, fields), settings_of(fields), fields.get("count", "")
    if not count.isdecimal() or not 0 < int(count) <= MOST:
        raise HTTPException(400, f"How many prompts? A number from 1 to {MOST:,}.")
    folder = site.folders[0]
    if (going_on := work_in(folder)) and not going_on.is_over:
        raise HTTPException(400, "Answers are being made already: wait for them, or stop that first.")
    prompts = list(islice(prompts_of(site, fields.get("prompts", ""), models[1][0]), int(count)))
    if not prompts:
        raise HTTPException(400, "There are no prompts in it.")
    work = _WORK[folder] = Work(folder, [model_name(site, *model) for model in models], prompts)
    speakers = [speaker_of(*model) for model in models]
    Thread(target=work.perform, args=(speakers, settings), daemon=True).start()
    return _state(request)


def _stop(request: Request, fields: Fields) -> Response:
    if work := work_in(site_of(request).folders[0]):
        work.stopped.set()
    return _state(request)


def _state(request: Request) -> Response:
    folder = site_of(request).folders[0]
    return page(request, "ahead.html.j2", work=work_in(folder), deck=str(folder))


ROUTES = [route("/talk/ahead", _state), action("/talk/ahead", _begin), action("/talk/ahead/stop", _stop)]
