"""Blind voting: two answers to a prompt side by side, without names, in an order that depends on answers and voter.

What is voted on is in a folder: the answers of a run before and after training (`samples.jsonl`), and any two answers
that were put to the vote (`comparisons.jsonl`). The votes are beside them, in `votes.jsonl`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from prefold.data.formats import read_file
from prefold.data.vote_file import WINNERS, append_line, compared_key, key_of, read_votes
from prefold.evaluation.people import rate_by_votes
from prefold.recipe.paths import start_of_paths
from prefold.reports.run_files import as_list, cleaned, readable, section, turns
from prefold.ui import jobs
from prefold.ui.run_index import run_folders
from prefold.ui.site import Fields, Page, Site, action, go_to, page, route, site_of

PAGE = Page("/vote", "Vote")
SAMPLES, COMPARISONS, VOTES = "samples.jsonl", "comparisons.jsonl", "votes.jsonl"
TALKED = "what was talked about"
"""Name of the comparisons that are no run's."""
LONGEST_NAME, LONGEST_NOTE = 60, 4000


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt, of two models; `cut_off`: whether the token limit ended them."""

    prompt: list[dict[str, str]]
    answers: tuple[str, str]
    models: tuple[str, str]
    cut_off: tuple[bool, bool] = (False, False)

    @property
    def key(self) -> str:
        return compared_key(self.prompt, self.answers)

    def order_for(self, voter: str) -> tuple[int, int]:
        """The indices of the answers in the order shown: pseudo-random, and always the same for a voter."""
        drawn = blake2b(f"{voter}\n{self.key}".encode("utf-8", "backslashreplace")).digest()[0] & 1
        return drawn, 1 - drawn

    def shown_to(self, voter: str) -> dict[str, Any]:
        """What a voter sees, which does not tell which model is which."""
        order = self.order_for(voter)
        answers = [[self.answers[side], self.cut_off[side]] for side in order]
        prompt = [[role, text] for role, text in turns(self.prompt)]
        return dict(cleaned({"id": short_key(self.key), "prompt": prompt, "answers": answers}))


def short_key(key: str) -> str:
    return blake2b(key.encode("utf-8", "backslashreplace"), digest_size=12).hexdigest()


# ---- what is voted on -------------------------------------------------------------------------------------------


def comparisons_of(folder: Path) -> dict[str, Comparison]:
    """What is voted on in a folder, by its short key; not where both answers are equal."""
    comparisons = [*_of_file(folder / SAMPLES), *_of_file(folder / COMPARISONS)]
    return {short_key(compared.key): compared for compared in comparisons if compared.answers[0] != compared.answers[1]}


def _of_file(path: Path) -> list[Comparison]:
    try:
        state = path.stat()
    except OSError:
        return []
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _read(path: Path, changed: int, size: int) -> list[Comparison]:
    """The comparisons in a file, cached until it changes."""
    lines = [row.value for row in read_file(path, path.name) if row.value is not None]
    return [
        compared
        for line in lines
        for compared in (_sampled(line, path.parent.name) if path.name == SAMPLES else _compared(line))
    ]


def _sampled(line: dict[str, Any], name: str) -> Iterator[Comparison]:
    before, after, reasons = as_list(line.get("before")), as_list(line.get("after")), section(line, "finish_reasons")
    for number, texts in enumerate(zip(before, after, strict=False)):
        ends = [as_list(reasons.get(when))[number : number + 1] == ["length"] for when in ("before", "after")]
        models = [f"{name}, before", f"{name}, after"]
        yield from _compared({**line, "answers": list(texts), "models": models, "cut_off": ends})


def _compared(line: dict[str, Any]) -> Iterator[Comparison]:
    """The comparison on a line; nothing if the line is something else."""
    prompt, answers, models = (as_list(line.get(name)) for name in ("prompt", "answers", "models"))
    cut_off = [value is True for value in as_list(line.get("cut_off"))] or [False, False]
    are_texts = all(isinstance(text, str) for text in (*answers, *models))
    if are_texts and turns(prompt) and len(answers) == len(models) == len(cut_off) == 2:
        yield Comparison(prompt, (answers[0], answers[1]), (models[0], models[1]), (cut_off[0], cut_off[1]))


def decks(site: Site) -> dict[str, str]:
    """The folders with something to vote on, with their names."""
    runs = [run for folder in site.folders for run in run_folders(folder)]
    names = dict.fromkeys(site.folders, TALKED) | {run: site.name_of(run) for run in runs}
    return {
        str(folder): name
        for folder, name in names.items()
        if (folder / SAMPLES).is_file() or (folder / COMPARISONS).is_file()
    }


# ---- the page ---------------------------------------------------------------------------------------------------


def _page(request: Request) -> Response:
    name = str(request.query_params.get("voter", ""))
    deck = str(request.query_params.get("deck", ""))
    if "part" in request.headers.get("accept", ""):
        return _answer(request, _folder(request, deck), _voter(name))
    if not deck or not name.strip():
        return page(request, "vote_start.html.j2", decks=decks(site_of(request)), deck=deck, voter=cleaned(name))
    return page(request, "vote.html.j2", **_ballot(request, _folder(request, deck), _voter(name)))


def _cast(request: Request, fields: Fields) -> Response:
    folder, voter = _folder(request, fields.get("deck", "")), _voter(fields.get("voter", ""))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if fields.get("undo"):
        if own := _own(comparisons_of(folder), read_votes(folder / VOTES), voter):
            append_line(folder / VOTES, {"undo": own[-1]["id"], "voter": voter, "time": now})
        return _answer(request, folder, voter)
    compared, winner = comparisons_of(folder).get(fields.get("id", "")), fields.get("winner", "")
    if compared is None or winner not in WINNERS:
        raise HTTPException(400, "This is not voted on here; reload the page.")
    if len(note := fields.get("note", "").strip()) > LONGEST_NOTE:
        raise HTTPException(400, f"A note has {LONGEST_NOTE:,} characters at most.")
    a, b = compared.order_for(voter)
    vote = {"id": secrets.token_hex(6), "voter": voter, "prompt": compared.prompt}
    vote |= {"answer_a": compared.answers[a], "answer_b": compared.answers[b]}
    vote |= {"model_a": compared.models[a], "model_b": compared.models[b]}
    append_line(folder / VOTES, {**vote, "winner": winner, "note": note, "time": now})
    return _answer(request, folder, voter)


def _report(request: Request, fields: Fields) -> Response:
    """Continue the run of a folder, so that its report says what people prefer."""
    folder = _folder(request, fields.get("deck", ""))
    if not (folder / "recipe.yaml").is_file() or not (folder / VOTES).is_file():
        raise HTTPException(404, "There are no votes on a run in this folder.")
    judged = json.dumps({"votes": str(folder / VOTES)})
    jobs.start(folder, [str(folder), f"evaluate.win_rate={judged}"], start_of_paths(folder))
    return go_to(f"/runs/run?{urlencode({'run': str(folder)})}")


def _answer(request: Request, folder: Path, voter: str) -> Response:
    if "part" in request.headers.get("accept", ""):
        return page(request, "ballot.html.j2", **_ballot(request, folder, voter))
    return go_to(f"/vote?{urlencode({'deck': str(folder), 'voter': voter})}")


def _ballot(request: Request, folder: Path, voter: str) -> dict[str, Any]:
    comparisons, votes = comparisons_of(folder), read_votes(folder / VOTES)
    voted = {short_key(key_of(vote)) for vote in votes if vote["voter"].strip() == voter}
    left = [compared for key, compared in comparisons.items() if key not in voted]
    return {
        "deck": str(folder),
        "name": site_of(request).name_of(folder),
        "voter": voter,
        "next": left[0].shown_to(voter) if left else None,
        "done": len(comparisons) - len(left),
        "all": len(comparisons),
        "may_undo": bool(_own(comparisons, votes, voter)),
        "results": _results(comparisons, votes),
        "file": os.path.relpath(folder / VOTES, site_of(request).start),
        "of_run": (folder / "recipe.yaml").is_file(),
    }


def _results(comparisons: dict[str, Comparison], votes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What people prefer of each two models, and how many votes each voter gave."""
    samples: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for compared in comparisons.values():
        of_prompt = samples.setdefault(compared.models, {}).setdefault(
            compared_key(compared.prompt, ()), {"prompt": compared.prompt, "before": [], "after": []}
        )
        for when, answer in zip(("before", "after"), compared.answers, strict=True):
            of_prompt[when].append(answer)
    results = []
    for models, by_prompt in samples.items():
        keys = {key for key, compared in comparisons.items() if compared.models == models}
        own = [vote for vote in votes if short_key(key_of(vote)) in keys]
        voters = sorted({vote["voter"].strip() for vote in own})
        counts = {name: sum(vote["voter"].strip() == name for vote in own) for name in voters}
        facts = rate_by_votes(own, list(by_prompt.values()), at_equal_lengths=False)
        results.append(cleaned({"models": list(models), "voters": counts}) | {"facts": facts})
    return results


def _own(comparisons: dict[str, Comparison], votes: list[dict[str, Any]], voter: str) -> list[dict[str, Any]]:
    """The votes that a voter can undo, the latest last."""
    own = [vote for vote in votes if vote["voter"].strip() == voter and "id" in vote]
    return [vote for vote in own if short_key(key_of(vote)) in comparisons]


def _folder(request: Request, deck: str) -> Path:
    """Raises HTTPException: it, or a file that is read or written in it, is outside."""
    site = site_of(request)
    folder = site.inside(deck)
    for name in (SAMPLES, COMPARISONS, VOTES):
        site.inside(str(folder / name))
    return folder


def _voter(name: str) -> str:
    if not (name := readable(" ".join(name.split()))) or len(name) > LONGEST_NAME:
        raise HTTPException(400, f"A voter has a name of up to {LONGEST_NAME} characters.")
    return name


ROUTES = [route("/vote", _page), action("/vote", _cast), action("/vote/report", _report)]
