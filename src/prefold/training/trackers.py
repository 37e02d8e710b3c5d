"""Trackers as callbacks that may fail: that costs their curves, never the run.

A resumed run continues the tracker's own run and sends no step twice: `trackers.json` keeps the id and the last step of
each.
"""

from __future__ import annotations

import copy
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from prefold.errors import UserError
from prefold.files import read_json, write_json
from prefold.recipe.sections import Train
from prefold.terminal import warn

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
STATE = "trackers.json"


@contextmanager
def trackers(settings: Train, folder: Path) -> Iterator[list[TrainerCallback]]:
    """transformers' callbacks for the trackers of a recipe, whose files go into the run folder.

    Raises:
        UserError: one of them is not installed.
    """
    path = folder / STATE
    state: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
    resumed = set(state)
    for name in settings.report_to:
        # MLflow names its runs itself.
        state.setdefault(name, {"id": None if name == "mlflow" else secrets.token_hex(4), "step": 0})
    wanted = _environment(settings.project, folder, {name: kept["id"] for name, kept in state.items()}, resumed)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if value is not None})

    def sent(name: str, step: int) -> None:
        if name == "mlflow":
            state[name]["id"] = sys.modules["mlflow"].active_run().info.run_id
        state[name]["step"] = step
        write_json(path, state)

    try:
        makers = get_reporting_integration_callbacks(settings.report_to)
        yield [_tolerant(name, make, state[name], sent) for name, make in zip(settings.report_to, makers, strict=True)]
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None) if value is None else os.environ.update({variable: value})
        for name in settings.report_to:
            # A tracker that is down costs its curves, never the run.
            with suppress(Exception, SystemExit):
                _close(name)


def _environment(project: str, folder: Path, ids: dict[str, str | None], resumed: set[str]) -> dict[str, str | None]:
    """Environment variables with the trackers' settings; an id or address that the user has set stays."""
    own = {
        "WANDB_RUN_ID": ids.get("wandb"),
        "WANDB_RESUME": "allow",
        "MLFLOW_TRACKING_URI": f"sqlite:///{(folder / 'mlflow.db').resolve()}",
        "MLFLOW_RUN_ID": ids.get("mlflow"),
    }
    return {
        **{name: os.environ.get(name, value) for name, value in own.items()},
        "WANDB_PROJECT": project,
        "WANDB_DIR": str(folder),
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "MLFLOW_EXPERIMENT_NAME": project,
        # The parameters of an MLflow run cannot change, and a resumed run may be longer or in another folder.
        "MLFLOW_MAX_LOG_PARAMS": "0" if "mlflow" in resumed else os.environ.get("MLFLOW_MAX_LOG_PARAMS"),
    }


def _tolerant(
    name: str, make: Callable[[], TrainerCallback], kept: dict[str, Any], sent: Callable[[str, int], None]
) -> TrainerCallback:
    """The tracker's callback, which skips steps that it has sent, and everything after its first failure."""
    try:
        tracker = make()
    except (RuntimeError, ImportError):
        what, advice = f"`{name}` is not installed", f"`pip install 'prefold[{name}]'`, or take it out"
        raise UserError(what, where="`train.report_to`", advice=advice) from None
    failed, last = False, kept["step"]

    def tolerant(event: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(arguments: Any, state: Any, control: Any, **settings: Any) -> None:
            nonlocal failed
            if failed or (event == "on_log" and state.global_step <= last):
                return
            try:
                if name == "trackio":  # which identifies a run by its name
                    arguments = copy.copy(arguments)
                    arguments.run_name += f"-{kept['id']}"
                method(arguments, state, control, **settings)
                if event == "on_log":
                    sent(name, state.global_step)
            except Exception as error:  # a server's client may raise anything
                failed = True
                _say_failed(name, error)

        return call

    for event in EVENTS:
        setattr(tracker, event, tolerant(event, getattr(tracker, event)))
    return tracker


def _close(name: str) -> None:
    """End what an interrupted run leaves open."""
    client: Any = sys.modules.get(name)
    if client is None:
        return
    if name == "mlflow":
        client.end_run("KILLED")  # does nothing where it has ended
    elif name != "tensorboard":
        client.finish()
    if name == "wandb":
        client.teardown()  # else it keeps this run's folder for the next one in the process


def _say_failed(name: str, error: Exception) -> None:
    warn(f"{name} failed ({type(error).__name__}); the run goes on without it, the run folder has it all")


def send_completions(step: int, groups: Sequence[dict[str, Any]]) -> None:
    """Send groups, as they are in the run folder, as a table to the open W&B run, if there is one."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    names = list(groups[0]["completions"][0]["scores"])
    rows = [
        [
            step,
            "\n\n".join(message["content"] for message in group["prompt"]),
            *(completion[name] for name in ("text", "tokens")),
            *(completion["scores"][name] for name in names),
            *(completion[name] for name in ("reward", "advantage")),
        ]
        for group in groups
        for completion in group["completions"]
    ]
    scores = (f"rewards/{name}" for name in names)
    columns: list[str | int] = ["step", "prompt", "completion", "tokens", *scores, "reward", "advantage"]
    try:
        # Sent with the metrics of the step, which follow.
        wandb.log({"completions": wandb.Table(columns=columns, data=rows)}, commit=False)
    except Exception as error:
        _say_failed("wandb", error)
