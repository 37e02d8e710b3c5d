"""Tasks of lm-evaluation-harness: found by name, opened before anything is trained, and asked of a model.

Names are those of `suites.py`, of the harness, of `builtin/`, and of the user's own YAML files. The harness builds the
questions and says what an answer is worth; who answers is `harness.py`.
Data in: names and a model; data out: `TaskScores`.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from prefold.errors import UserError
from prefold.evaluation.scores import OpenTask, TaskScores, primary_metric, scores_of
from prefold.evaluation.suites import SUITES, Wanted, wanted_by
from prefold.evaluation.task_names import WHERE, manager_of
from prefold.files import cache_folder, without_home, without_secrets
from prefold.generation.opening import open_model
from prefold.models.messages import quiet
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import Evaluate, Model
from prefold.trees.memory import free_memory
from prefold.user_code import UserCodeFailed, call_user_code, summary_of

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TOKENS = 4096
"""Tokens of questions and answers that are assumed to be in memory at a time."""
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The harness's defaults."""


def open_tasks(settings: Evaluate, tokenizer: PreTrainedTokenizerBase | None = None) -> list[OpenTask]:
    """The tasks that a recipe names, each checked by building its first question. The tokenizer, of the model that will
    be asked, is checked for a chat template if the recipe applies it.

    Raises:
        UserError: a name is unknown, a task cannot be opened or asked here, or the chat template is missing.
    """
    if not settings.tasks:
        return []
    if settings.apply_chat_template and tokenizer is not None and not tokenizer.chat_template:
        what = "the tokenizer has no chat template to apply"
        raise UserError(what, where="evaluate.apply_chat_template", advice="set it to false, or name a chat model")
    wanted = list(dict.fromkeys(task for name in settings.tasks for task in wanted_by(name)))
    with _as_the_harness_runs():
        manager = manager_of([task.task for task in wanted], settings.include_path)
        tasks = _told_apart([opened for task in wanted for opened in _opened(manager, task, settings.num_fewshot)])
        for opened in tasks:
            _prove(opened)
    return tasks


def _opened(manager: TaskManager, wanted: Wanted, num_fewshot: int | None) -> list[OpenTask]:
    """The task, or all tasks of the group."""
    try:
        tasks = call_user_code(lambda: manager.load([wanted.task])["tasks"])
    except UserCodeFailed as failure:  # tasks run code of their own, and each kind of data fails in its own way
        raise _cannot_be_opened(manager, wanted.task, failure.error) from failure.error
    group = wanted.task if list(tasks) != [wanted.task] and wanted.group is None else wanted.group
    shots = num_fewshot if wanted.num_fewshot is None else wanted.num_fewshot
    for task in tasks.values():
        # As in the harness: a task that is defined to have no examples gets none.
        if shots is not None and task.config.num_fewshot != 0:
            task.set_config("num_fewshot", shots)
    return [OpenTask(name, task, replace(wanted, task=name, group=group)) for name, task in tasks.items()]


def _cannot_be_opened(manager: TaskManager, name: str, error: BaseException) -> UserError:
    entry = manager.task_index.get(name)
    data = (entry.cfg or {}).get("dataset_path") if entry else None
    first = without_secrets(without_home((str(error).splitlines() or [""])[0]))
    advice = "see that its files are there, and that its YAML names them"
    if isinstance(data, str) and data not in ("json", "csv", "parquet", "text", "arrow"):
        advice = (
            f"its data is `{data}` on the Hub: run `prefold check` once where the Hub can be reached, which keeps "
            "it in the cache; or describe the task in a YAML file with `dataset_path: json` in `evaluate.include_path`"
        )
    what = f"the task `{name}` cannot be opened ({type(error).__name__}: {first})"
    return UserError(what, where=WHERE, advice=advice)


def _told_apart(tasks: Sequence[OpenTask]) -> list[OpenTask]:
    """The tasks; one that is named twice, with different numbers of examples, gets different names."""
    shots: dict[str, int] = {}
    return [
        opened
        if shots.setdefault(opened.name, opened.num_fewshot) == opened.num_fewshot
        else replace(opened, name=f"{opened.name}_{opened.num_fewshot}shot")
        for opened in tasks
    ]


def _prove(opened: OpenTask) -> None:
    """Build the first question and score a dummy answer to it. Raises UserError if the task cannot be asked here."""
    name, task = opened.name, opened.task
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"the task `{name}` runs code that the model writes, which prefold does not", where=WHERE)
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"the task `{name}` shows pictures or plays sound, and prefold is for text", where=WHERE)
    unknown: dict[str, Any] = {"generate_until": "", "loglikelihood_rolling": -1.0}

    def first_results() -> Any:
        task.set_fewshot_seed(SEEDS["fewshot"])
        task.build_all_requests(limit=1, rank=0, world_size=1)
        responses = [unknown.get(request.request_type, (-1.0, False)) for request in task.instances]
        return task.process_results(task.instances[0].doc, responses)

    try:
        results = call_user_code(first_results)
    except UserCodeFailed as failure:
        what = f"the task `{name}` cannot build and judge its first question ({summary_of(failure.error)})"
        advice = "see its YAML; with `num_fewshot`, that it has as many examples"
        raise UserError(what, where=WHERE, advice=advice) from failure.error
    primary_metric(opened, results)


def measure_model(
    section: Model,
    tasks: Sequence[OpenTask],
    settings: Evaluate,
    when: str,
    trained_on: Collection[str] | None = None,
    in_16_bits: bool | None = None,
) -> list[TaskScores]:
    """Load a model, put the tasks to it, and release it. `when`: what progress bars show after the task's name, e.g.
    `before`; `trained_on` as in `scores_of`, `in_16_bits` as in `how_to_keep`."""
    model = open_model(section, "`evaluate.tasks`", measured=True, tokens=TOKENS, in_16_bits=in_16_bits)
    scores = measure(model, tokenizer_of(section), tasks, settings, when, trained_on)
    del model
    free_memory()
    return scores


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[OpenTask],
    settings: Evaluate,
    when: str = "",
    trained_on: Collection[str] | None = None,
) -> list[TaskScores]:
    """Put tasks to a model as it is: with or without adapters, quantised or not. Responses are cached by the model's
    weights and the requests."""
    from lm_eval.evaluator import evaluate

    from prefold.evaluation.harness import TreeLM

    lm = TreeLM(model, tokenizer, cache_folder() / "evaluation")
    scores = []
    for opened in tasks:
        lm.label = f"{opened.name} {when}".strip()
        with _as_the_harness_runs():
            opened.task.set_fewshot_seed(SEEDS["fewshot"])
            task_dict = {"tasks": {opened.name: opened.task}, "groups": {}}
            asked = {"limit": settings.limit, "apply_chat_template": settings.apply_chat_template}
            asked |= {"fewshot_as_multiturn": True, "bootstrap_iters": 0}
            try:
                results: Any = call_user_code(partial(evaluate, lm=lm, task_dict=task_dict, **asked))
            except UserCodeFailed as failure:
                if isinstance(failure.error, Exception):
                    raise failure.error from None
                what = f"the code of the task `{opened.name}` ends the process ({summary_of(failure.error)})"
                raise UserError(what, where=WHERE, advice="leave it out, or mend its code") from failure.error
            scores.append(scores_of(opened, results["samples"][opened.name], trained_on))
    return scores


def recorded_settings(settings: Evaluate) -> dict[str, Any]:
    """How the questions were asked, to be recorded with the scores."""
    return {
        "harness": f"lm_eval {version('lm_eval')}",
        "apply_chat_template": settings.apply_chat_template,
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "suites": {name: SUITES[name].differs for name in settings.tasks if name in SUITES},
    }


@contextmanager
def _as_the_harness_runs() -> Iterator[None]:
    """The harness's random seeds, with its logs and progress bars off and its prints on stderr; all is restored
    afterwards."""
    environment = dict(os.environ)
    import lm_eval.api.task
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, module, shows_bars = logging.getLogger("lm_eval"), vars(lm_eval.api.task), not are_progress_bars_disabled()
    level, bar, states = logger.level, module["tqdm"], (random.getstate(), np.random.get_state())
    logger.setLevel(logging.ERROR)
    module["tqdm"] = partial(bar, disable=True)
    disable_progress_bars()
    try:
        with quiet(), torch.random.fork_rng(range(torch.cuda.device_count())), redirect_stdout(sys.stderr):
            random.seed(SEEDS["random"])
            np.random.seed(SEEDS["numpy"])
            torch.manual_seed(SEEDS["torch"])
            yield
    finally:
        if shows_bars:
            enable_progress_bars()
        logger.setLevel(level)
        module["tqdm"] = bar
        random.setstate(states[0])
        np.random.set_state(states[1])
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
