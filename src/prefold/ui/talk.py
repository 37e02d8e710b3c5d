"""Talking to two models side by side: a run after training and before it, its checkpoints, or another run."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from prefold.data.preference import Unfit, check_prompt, messages
from prefold.data.vote_file import append_line
from prefold.recipe import Chat, make_section
from prefold.recipe.section import meaning_of
from prefold.recipe.text import parse_yaml
from prefold.reports.run_files import readable
from prefold.ui.run_index import run_folders
from prefold.ui.site import Fields, Page, Site, action, page, route, site_of
from prefold.ui.speakers import speaker_of
from prefold.ui.vote import COMPARISONS

PAGE = Page("/talk", "Talk")
SETTINGS = ("temperature", "max_new_tokens", "top_p", "top_k", "min_p", "seed")


def models_of(run: Path) -> dict[str, str]:
    """The models of a run: their names in `speaker.py`, with descriptions."""
    steps = [path.name.removeprefix("checkpoint-") for path in (run / "checkpoints").glob("checkpoint-*")]
    checkpoints = {f"checkpoint-{step}": f"at step {step}" for step in sorted(filter(str.isdigit, steps), key=int)}
    merged = {"after": "after training"} if (run / "merged").is_dir() else {}
    return {"before": "before training", **checkpoints, **merged} if (run / "recipe.yaml").is_file() else {}


def _page(request: Request) -> Response:
    site = site_of(request)
    runs = {str(run): site.name_of(run) for folder in site.folders for run in run_folders(folder)}
    sides = []
    for name, wanted in (("a", "before"), ("b", "after")):
        run = site.inside(str(request.query_params.get(name) or next(iter(runs), "")))
        models = models_of(run)
        chosen = wanted if wanted in models else next(reversed(models), "")
        sides.append({"field": name, "run": str(run), "name": site.name_of(run), "models": models, "chosen": chosen})
    settings = {name: (Chat.model_fields[name].default, meaning_of(Chat.model_fields[name])) for name in SETTINGS}
    return page(request, "talk.html.j2", runs=runs, sides=sides, settings=settings)


def _answer(request: Request, fields: Fields) -> Response:
    """A model's answer as server-sent events: the output of `speaker.py`, with `shown`: the text made safe to show."""
    settings, asked, attempt = settings_of(fields), _conversation(fields), fields.get("attempt", "0")
    if not attempt.isdecimal():
        raise HTTPException(400, "An attempt is a number.")
    answer = speaker_of(*_model(site_of(request), fields)).ask(asked, settings, int(attempt))

    async def events() -> AsyncIterator[str]:
        try:
            async for values in iterate_in_threadpool(answer):
                text = next((values[name] for name in ("text", "answer", "error") if name in values), None)
                shown = {} if text is None else {"shown": readable(text)}
                yield f"data: {json.dumps({**values, **shown})}\n\n"
        finally:
            answer.close()

    return StreamingResponse(events(), media_type="text/event-stream")


def _stop(request: Request, fields: Fields) -> Response:
    speaker_of(*_model(site_of(request), fields)).stop()
    return Response(status_code=204)


def _compare(request: Request, fields: Fields) -> Response:
    """Put two answers to the vote."""
    site, answers = site_of(request), _texts(fields, "answers")
    models = [model_name(site, *model) for model in chosen_models(site, fields)]
    if answers[0] == answers[1]:
        raise HTTPException(400, "Both said the same, so there is nothing to vote on: ask again, or something else.")
    folder = site.folders[0]
    append_line(folder / COMPARISONS, {"prompt": _conversation(fields), "answers": answers, "models": models})
    return JSONResponse({"deck": str(folder)})


def settings_of(fields: Fields) -> dict[str, Any]:
    """The settings of the sampling. Raises UserError: one is out of bounds."""
    given = {name: parse_yaml(value, name) for name in SETTINGS if (value := fields.get(name, "").strip())}
    return make_section(Chat, given, "the settings").model_dump(mode="json")


def chosen_models(site: Site, fields: Fields) -> list[tuple[Path, str]]:
    """Run folder and name of the left and of the right model."""
    return [_model(site, fields, side) for side in ("_a", "_b")]


def model_name(site: Site, run: Path, which: str) -> str:
    return f"{site.name_of(run)}, {models_of(run)[which]}"


def _model(site: Site, fields: Fields, side: str = "") -> tuple[Path, str]:
    """Run folder and name of a model. Raises HTTPException: there is no such run or model."""
    run, which = site.inside(fields.get(f"run{side}", "")), fields.get(f"which{side}", "")
    if which not in models_of(run):
        raise HTTPException(404, "This run has no such model.")
    return run, which


def _conversation(fields: Fields) -> list[dict[str, Any]]:
    """Raises HTTPException: it cannot be read, or does not wait for an answer."""
    try:
        turns = messages(json.loads(fields.get("messages", "")), "the conversation")
        check_prompt(turns, "the conversation")
    except (ValueError, RecursionError):
        raise HTTPException(400, "The conversation cannot be read.") from None
    except Unfit as unfit:
        raise HTTPException(400, unfit.message) from None
    return [dict(turn) for turn in turns]


def _texts(fields: Fields, name: str) -> list[str]:
    try:
        texts = json.loads(fields.get(name, ""))
    except (ValueError, RecursionError):
        texts = None
    if not (isinstance(texts, list) and len(texts) == 2 and all(isinstance(text, str) and text for text in texts)):
        raise HTTPException(400, f"`{name}` are two texts.")
    return texts


ROUTES = [
    route("/talk", _page),
    action("/talk/answer", _answer),
    action("/talk/stop", _stop),
    action("/talk/compare", _compare),
]
