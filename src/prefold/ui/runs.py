"""The pages of runs: the table of all, a single one, several compared, and a new one from a recipe."""

from __future__ import annotations

import glob
import os
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from prefold.errors import UserError
from prefold.files import is_locked, write_text
from prefold.recipe import builtin_recipes, first_comment, parse_yaml, read_text
from prefold.recipe.paths import PATHS, start_of_paths, with_paths_from
from prefold.reports.page import check_values
from prefold.reports.run_files import RunRecord, read_run, readable
from prefold.ui import jobs
from prefold.ui.charts import charts
from prefold.ui.run_index import READ, RunIndex, RunRow, run_folders
from prefold.ui.site import Fields, Page, Site, action, explained, go_to, page, route, site_of, whole_number
from prefold.ui.worker import checker

PAGE = Page("/runs", "Runs")
ON_A_PAGE = 50
OF_SAMPLES = ("evaluation/heldout.jsonl", "rollouts.jsonl", "samples.jsonl", "evaluation/tasks.json")
MOST_COMPARED = 8
STATES = ("running", "done", "stopped")
SHOWN = (*READ, *OF_SAMPLES, "report.html", "data.json")
"""The files of a run that pages show."""
OF_MODELS = {"model.name", "model.adapter", "rewards.model", "evaluate.compare_with", "evaluate.win_rate.judge.model"}
CONFINED = PATHS - OF_MODELS
"""The fields of a recipe whose paths must be in the site's folders; a model may be anywhere."""
OUTCOMES = {"better": "better", "worse": "worse", "mixed": "better and worse", "unclear": "no difference"}
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""A report is a file like any other: its scripts may run, but reach neither this server nor another."""


@cache
def index_of(folders: tuple[Path, ...]) -> RunIndex:
    return RunIndex(folders)


def run_at(site: Site, path: str) -> Path:
    """A run folder. Raises HTTPException: it is none, or one of its files is not in the site's folders."""
    folder = site.inside(path)
    for name in SHOWN:
        site.inside(str(folder / name))
    if not (folder / "recipe.yaml").is_file() and not jobs.job_of(folder):
        raise HTTPException(404, "There is no run in this folder.")
    return folder


def require_inside(site: Site, values: Any, field: str = "") -> None:
    """Raises HTTPException: a recipe names data, code or a folder to write to that is in none of the folders."""
    if isinstance(values, dict):
        for key, value in values.items():
            require_inside(site, value, f"{field}.{key}".lstrip("."))
    elif isinstance(values, list):
        for value in values:
            require_inside(site, value, field)
    elif field in CONFINED and isinstance(values, str):
        exists = os.path.lexists(site.start / os.path.expanduser(values))  # else it may be a data set of the Hub
        if exists or glob.has_magic(values) or field == "publish.to":
            site.inside(values)


# ---- all runs -----------------------------------------------------------------------------------------------------


def _list(request: Request) -> Response:
    """The table, as a page or as the part of it that is refreshed."""
    site, query = site_of(request), request.query_params
    all_rows = index_of(site.folders).rows()
    rows = [row for row in all_rows if _fits(row, site, query.get("text", ""), dict(query))]
    first = ON_A_PAGE * max(whole_number(query, "page", 1) - 1, 0)
    return page(
        request,
        "runs_part.html.j2" if request.url.path.endswith("/rows") else "runs.html.j2",
        rows=rows[first : first + ON_A_PAGE],
        number=len(rows),
        first=first,
        of=len(all_rows),
        unread=sum(row.facts is None for row in all_rows),
        methods=sorted({row.facts.method for row in all_rows if row.facts and row.facts.method}),
        states=STATES,
        outcomes=OUTCOMES,
        last_page=-(-len(rows) // ON_A_PAGE),
        most=MOST_COMPARED,
    )


def _fits(row: RunRow, site: Site, text: str, wanted: dict[str, str]) -> bool:
    facts = row.facts
    words = f"{site.name_of(row.folder)} {facts.model} {facts.description}" if facts else site.name_of(row.folder)
    fields = {"method": facts.method, "verdict": facts.outcome} if facts else {}
    fields["state"] = row.state
    return text.lower() in words.lower() and all(
        not wanted.get(name) or fields.get(name) == wanted[name] for name in ("method", "state", "verdict")
    )


# ---- one run ------------------------------------------------------------------------------------------------------


def _run(request: Request) -> Response:
    """A run, as a page or as the part of it that is refreshed."""
    site = site_of(request)
    folder = run_at(site, request.query_params.get("run", ""))
    job, exists = jobs.job_of(folder), (folder / "recipe.yaml").is_file()
    is_job = bool(job and job.is_running)
    at_work = is_job or is_locked(folder)
    is_part = request.url.path.endswith("/now")
    run = read_run(folder, growing=["metrics"]) if exists else None
    return page(
        request,
        "run_part.html.j2" if is_part else "run.html.j2",
        name=site.name_of(folder),
        folder=str(folder),
        run=run,
        row=index_of(site.folders).row(folder) if exists else None,
        job=job,
        at_work=at_work,
        may_stop=is_job or (at_work and jobs.started_elsewhere(folder)),
        log=readable(job.said()) if job else _end_of(folder / "run.log"),
        charts=charts({site.name_of(folder): run}) if run else [],
        has={name: (folder / name).is_file() for name in ("report.html", "merge.json", *OF_SAMPLES)},
        has_samples=any((folder / name).is_file() for name in OF_SAMPLES),
    )


def _end_of(log: Path) -> str:
    return readable(jobs.Job("", 0, 0.0, str(log)).said())


def _report(request: Request) -> Response:
    report = run_at(site_of(request), request.query_params.get("run", "")) / "report.html"
    if not report.is_file():
        raise HTTPException(404, "This run has no report yet.")
    return FileResponse(report, headers={"content-security-policy": REPORT_POLICY})


def _continue(request: Request, fields: Fields) -> Response:
    site = site_of(request)
    folder = run_at(site, fields.get("run", ""))
    jobs.start(folder, [str(folder)], start_of_paths(folder))
    return go_to(_address(folder))


def _stop(request: Request, fields: Fields) -> Response:
    folder = site_of(request).inside(fields.get("run", ""))
    job = jobs.job_of(folder)
    if job and job.is_running:
        job.stop()
    elif process := jobs.started_elsewhere(folder):
        process.terminate()  # in a shell's background, Ctrl-C may be ignored
    else:
        what, advice = "which process is at work here is not known", "press Ctrl-C where it was started"
        raise UserError(what, where=str(folder), advice=advice)
    return go_to(_address(folder))


def _address(folder: Path) -> str:
    return f"/runs/run?{urlencode({'run': str(folder)})}"


# ---- several runs -------------------------------------------------------------------------------------------------


def _compare(request: Request) -> Response:
    site = site_of(request)
    named = dict.fromkeys(request.query_params.getlist("run"))
    if not 1 < len(named) <= MOST_COMPARED:
        advice = f"choose two to {MOST_COMPARED} in the table of runs"
        raise UserError(f"{len(named)} runs were chosen", where="Compare", advice=advice)
    folders = [run_at(site, name) for name in named]
    runs = {site.name_of(folder): read_run(folder, growing=["metrics"]) for folder in folders}
    index = index_of(site.folders)
    return page(
        request,
        "runs_compare.html.j2",
        rows={name: index.row(folder) for name, folder in zip(runs, folders, strict=True)},
        runs=runs,
        charts=charts(runs),
        fields=_side_by_side(list(runs.values())),
        command=" ".join(["prefold compare", *runs]),
    )


def _side_by_side(runs: list[RunRecord]) -> list[tuple[str, list[str], bool]]:
    """Every field of the recipes with its value in each, and whether they differ."""
    leaves = [_leaves({**run.recipe, "output_dir": None}) for run in runs]
    fields = dict.fromkeys(name for of_run in leaves for name in of_run)
    rows = [(name, [of_run.get(name, "–") for of_run in leaves]) for name in fields]
    return [(name, values, len(set(values)) > 1) for name, values in rows if name != "output_dir"]


def _leaves(value: Any, path: str = "") -> dict[str, str]:
    """The values of a recipe by dotted path."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner:
        return {path: "" if value is None else str(value)}
    return {name: text for key, item in inner for name, text in _leaves(item, f"{path}.{key}".lstrip(".")).items()}


# ---- a new run ----------------------------------------------------------------------------------------------------


def _new(request: Request) -> Response:
    site, source = site_of(request), request.query_params.get("from", "")
    source = source if source in ("", *builtin_recipes()) else str(site.inside(source))
    votes = request.query_params.get("votes", "")
    name, text = _recipe_to_start_from(site, source, votes) if source else ("", "")
    return page(
        request,
        "runs_new.html.j2",
        text=text,
        name=name,
        source=source,
        builtin={name: first_comment(name) for name in builtin_recipes()},
        recipes=recipes_in(site),
        folders=[str(folder) for folder in site.folders],
        decided_in=_decided_in(site, source, text),
    )


def _decided_in(site: Site, source: str, text: str) -> str:
    """The file of decisions about the rows of a recipe that does not name it; empty if there is none."""
    decided_in = Path(decisions_beside(site, source)) if source else None
    if decided_in is None or not decided_in.is_file() or "decisions:" in text:
        return ""
    return os.path.relpath(decided_in, site.start)


def recipes_in(site: Site) -> dict[str, str]:
    """The recipes in the folders and one level below, by path."""
    files = [file for folder in site.folders for pattern in ("*.yaml", "*/*.yaml") for file in folder.glob(pattern)]
    files = [file for file in files if not (file.name == "recipe.yaml" and any(run_folders(file.parent, 0)))]
    return {str(file): site.name_of(file) for file in sorted(files)[:200] if "method:" in _beginning(file)}


def _beginning(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            return opened.read(20_000)
    except OSError:
        return ""


def _recipe_to_start_from(site: Site, source: str, votes: str = "") -> tuple[str, str]:
    """A file name and the text of a recipe; that of a run gets a free run folder, and absolute paths. `votes`: a file
    of people's votes to train on instead of the run's data."""
    if source in builtin_recipes():
        return f"{source}.yaml", read_text(source)[0]
    path = site.inside(source)
    if not path.is_dir():
        return path.name, read_text(str(path))[0]
    text = read_text(str(run_at(site, source)))[0]
    values = parse_yaml(text, site.name_of(path))
    values = {**with_paths_from(start_of_paths(path), values), "output_dir": _free(site, path)}
    decided_in = Path(decisions_beside(site, source))
    if votes:
        # Decisions about rows of other files do not apply to these.
        values["data"] = {**values["data"], "train": [{"path": votes}], "decisions": None}
        values["evaluate"] = {**(values.get("evaluate") or {}), "win_rate": None}
    elif decided_in.is_file() and not values["data"].get("decisions"):
        values["data"]["decisions"] = os.path.relpath(decided_in, site.start)
    return f"{Path(values['output_dir']).name}.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def decisions_beside(site: Site, recipe: str) -> str:
    """The file of decisions about the data of a recipe that names none."""
    path = site.folders[0] / recipe if recipe in builtin_recipes() else site.inside(recipe)
    path = path.parent if path.name == "recipe.yaml" else path
    return str(path.with_name(f"{path.stem if path.suffix == '.yaml' else path.name}.decisions.jsonl"))


def _free(site: Site, folder: Path) -> str:
    """A folder beside this one that does not exist yet, relative to the site's `start`."""
    stem = re.sub(r"-\d+$", "", folder.name)
    name = next(name for number in range(2, 10_000) if not (folder.parent / (name := f"{stem}-{number}")).exists())
    return os.path.relpath(folder.parent / name, site.start)


def _check(request: Request, fields: Fields) -> Response:
    """Findings and plan of a recipe as it is written."""
    text = fields.get("text", "")
    if not text.strip():
        return page(request, "check_part.html.j2", facts=None)
    try:
        require_inside(site_of(request), parse_yaml(text, "the recipe"))
        facts = checker.ask("check", start=str(site_of(request).start), text=text)
    except (UserError, HTTPException) as error:  # as usual while a recipe is being written
        response = explained(request, error)
        response.status_code = 200
        return response
    return page(request, "check_part.html.j2", facts=facts, **check_values("the recipe", facts))


def _start(request: Request, fields: Fields) -> Response:
    """Write the recipe to its file, and start a run of it."""
    site, text = site_of(request), fields.get("text", "").replace("\r\n", "\n")
    values = parse_yaml(text, "the recipe")
    require_inside(site, values)
    output = values.get("output_dir") if isinstance(values, dict) else None
    if not isinstance(output, str) or not output:
        raise UserError("`output_dir` is missing", where="the recipe", expected="The run folder.")
    folder, name = site.inside(output), fields.get("name", "")
    if not re.fullmatch(r"\w[\w .-]*\.ya?ml", name):
        raise UserError(f"`{name}` cannot be its name", where="the file", expected="a name such as mine.yaml")
    file = site.inside(os.path.join(fields.get("folder", ""), name))
    with site.writing(file.parent):
        if file.exists() and file.read_text(encoding="utf-8", errors="replace") != text and not fields.get("replace"):
            what = "there is another recipe in this file"
            raise UserError(what, where=site.name_of(file), advice="give another name, or mark `replace it`")
        write_text(file, text)
    jobs.start(folder, [str(file)], site.start)
    return go_to(_address(folder))


ROUTES = [
    route("/runs", _list),
    route("/runs/rows", _list),
    route("/runs/run", _run),
    route("/runs/run/now", _run),
    route("/runs/report", _report),
    route("/runs/compare", _compare),
    route("/runs/new", _new),
    action("/runs/check", _check),
    action("/runs/start", _start),
    action("/runs/continue", _continue),
    action("/runs/stop", _stop),
]
