"""Preference pairs from a model's own answers: prompts -> answers -> scores -> the best against the worst -> a file.

Every answer and score is kept in a work file beside the output, under a key of all that it depends on. A run that was
stopped goes on from there, and one with another margin or reward makes no answer twice. The output appears when it is
whole, and is a source of `prefold run` as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from prefold.data.conversion import to_record, with_system_message
from prefold.data.dialogues import holds_dialogue
from prefold.data.preference import Problem, Prompt
from prefold.data.selection import select_rows
from prefold.data.shapes import find_shape
from prefold.errors import StageError, UserError
from prefold.files import cache_folder, new_file, without_home
from prefold.generation.endpoint import Endpoint
from prefold.generation.journal import Journal
from prefold.generation.samplers import LocalModel, RemoteModel, Sampler, answers_of
from prefold.generation.sampling import Sampling
from prefold.pairs.candidates import (
    Candidate,
    Candidates,
    best_pair,
    column_names,
    judged,
    reward_identity,
    rewarded,
)
from prefold.pairs.settings import LOCAL, PairSettings, checked, parse_reward
from prefold.recipe import Source, describe
from prefold.recipe.bounds import require_bounds
from prefold.rewards.functions import open_rewards
from prefold.rewards.judge import Judge
from prefold.terminal import say

_HEAD_ROWS = 1000


@dataclass(frozen=True)
class PairReport:
    """What became of the prompts: `prompts` = `pairs` + the sum of `left_out`; the mean scores, if there are any."""

    output: str
    prompts: int
    answers: int
    pairs: int
    left_out: dict[str, int]
    mean_score: dict[str, float] | None


def pairs(
    prompts: str | Path,
    model: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    reward: str | Sequence[str] = (),
    prefer_first: bool = False,
    num_completions: int | None = None,
    min_margin: float = 0.0,
    max_length_ratio: float | None = None,
    endpoint: str | Sequence[str] = (),
    judge_endpoint: str | None = None,
    judge_model: str | None = None,
    where: str | None = None,
    limit: int | None = None,
    name: str | None = None,
    split: str | None = None,
    prompt_column: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 42,
    concurrency: int = 8,
    timeout: float = 300.0,
    fresh: bool = False,
) -> PairReport:
    """Make preference pairs from a model's own answers to prompts, scored by rewards or a judge.

    Args:
        prompts: a file, folder, built-in set or Hub data set; `where`, `limit`, `name` (of a configuration), `split`
            and `prompt_column` say which part of it.
        model: what answers: a run folder, or a model by any name; two of them both answer every prompt.
        output: the file of pairs, .jsonl. Beside it a work file keeps answers and scores, from which a call that was
            stopped goes on; `fresh` begins anew.
        reward: what scores the answers: `NAME:SETTING=VALUE,...`, `FILE.py:FUNCTION`, `model:NAME`, or `judge` alone,
            with `judge_endpoint` and `judge_model`. Several add up.
        prefer_first: instead of scores, the first model's answer is chosen and the second's rejected.
        num_completions: answers per prompt and model; unset: 4, with `prefer_first` 1.
        min_margin: least difference of a pair's scores.
        max_length_ratio: a pair's longer answer has at most so many times the characters of the shorter.
        endpoint: address of an OpenAI-compatible server that has the models; with two models one each, or `local`.
            `concurrency` requests at a time, each for at most `timeout` seconds.
        system: a message before each prompt.
        max_new_tokens: of an answer. temperature, top_p, top_k, min_p, seed: how its tokens are drawn.

    Raises:
        UserError: settings that do not go together, prompts that cannot be read, a model, reward or endpoint that
            cannot be used.
        StageError: no pair could be made, or the judge gives no verdicts.
    """
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    limits = {"min_margin": min_margin, "max_length_ratio": max_length_ratio, "limit": limit}
    require_bounds(max_new_tokens=max_new_tokens, num_completions=num_completions, **drawn, **limits)
    require_bounds(concurrency=concurrency, timeout=timeout)
    settings = PairSettings(
        prompts=str(prompts),
        models=[str(model)] if isinstance(model, str | Path) else [str(one) for one in model],
        output=Path(output).expanduser(),
        rewards=[reward] if isinstance(reward, str) else list(reward),
        prefer_first=prefer_first,
        endpoints=[endpoint] if isinstance(endpoint, str) else list(endpoint),
        judge_endpoint=judge_endpoint,
        judge_model=judge_model,
        sampling=Sampling(max_new_tokens, num_completions or 0, temperature, top_p, top_k, min_p, seed),
        min_margin=min_margin,
        max_length_ratio=max_length_ratio,
        where=where,
        limit=limit,
        name=name,
        split=split,
        prompt_column=prompt_column,
        system=system,
        concurrency=concurrency,
        timeout=timeout,
        fresh=fresh,
    )
    return make_pairs(settings)


def make_pairs(settings: PairSettings) -> PairReport:
    """Answer, score, choose, write.

    Raises:
        UserError: settings that do not go together, prompts that cannot be read, a model, reward or endpoint that
            cannot be used.
        StageError: no pair could be made, or the judge gives no verdicts.
    """
    settings = checked(settings)
    samplers = _samplers(settings)
    prompts, left_out = _read_prompts(settings)
    work = _open_work_file(settings)
    found = _scored_candidates(settings, samplers, prompts, work)
    best = [best_pair(of, settings.min_margin, settings.max_length_ratio) for of in found]
    left_out.update(pair for pair in best if isinstance(pair, str))
    chosen = [(prompt, pair) for prompt, pair in zip(prompts, best, strict=True) if not isinstance(pair, str)]
    if not chosen:
        raise StageError(f"no pair could be made of {left_out.total()} prompts: {_listed(left_out)}")
    _write(settings.output, chosen, with_scores=not settings.prefer_first)
    return PairReport(
        output=without_home(str(settings.output)),
        prompts=len(chosen) + left_out.total(),
        answers=sum(len(of) for of in found if isinstance(of, list)),
        pairs=len(chosen),
        left_out=dict(left_out),
        mean_score=None if settings.prefer_first else _mean_scores(found, [pair for _, pair in chosen]),
    )


def print_report(report: PairReport) -> None:
    say(f"{report.pairs} pairs of {report.prompts} prompts and {report.answers} answers in {report.output}")
    if report.left_out:
        say(f"left out: {_listed(report.left_out)}")
    if report.mean_score:
        say("mean score: " + ", ".join(f"{name} {value:.4g}" for name, value in report.mean_score.items()))


REASONS = {
    "refused": "refused by the chat template or endpoint",
    "no_verdict": "no verdict of the judge",
    "too_few_answers": "fewer than two answers with words and a score",
    "cut_off": "answers cut off at --max-new-tokens",
    "identical": "all answers the same",
    "equal_scores": "all scores equal",
    "small_margin": "margin too small",
    "length_ratio": "answers too different in length",
}
"""Why a prompt has no pair; a row that is no prompt has the name of its finding."""


def _listed(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {REASONS.get(name, name)}" for name, count in left_out.items())


# ---- answers and scores -----------------------------------------------------------------------------------------


def _scored_candidates(
    settings: PairSettings, samplers: Sequence[Sampler], prompts: Sequence[Prompt], work: Journal
) -> list[Candidates]:
    """All models' answers to each prompt with their scores, or why there are none."""
    judge = _judge(settings)
    specs = [] if judge else [parse_reward(text) for text in settings.rewards]
    knows_ids = all(sampler.token_ids([]) is not None for sampler in samplers)
    known = ["prompts", "completions", *(["completion_ids"] if knows_ids else []), *column_names(prompts)]
    rewards = open_rewards(specs, known)
    identity = [reward_identity(spec) for spec in specs]
    found = _candidates(samplers, prompts, work)
    if judge:
        return judged(judge, prompts, found, work, settings.concurrency)
    if settings.prefer_first:
        return [[replace(one, score=1.0 - one.model) for one in of] if isinstance(of, list) else of for of in found]
    return rewarded(rewards, identity, prompts, found, samplers if knows_ids else (), work)


def _candidates(samplers: Sequence[Sampler], prompts: Sequence[Prompt], work: Journal) -> list[Candidates]:
    """All models' answers to each prompt, without the empty ones."""
    found = [answers_of(sampler, prompts, work) for sampler in samplers]
    return [
        "refused"
        if None in of_prompt
        else [
            Candidate(answer.text, model, finished=answer.finished)
            for model, answers in enumerate(of_prompt)
            for answer in answers or ()
            if answer.text
        ]
        for of_prompt in zip(*found, strict=True)
    ]


def _samplers(settings: PairSettings) -> list[Sampler]:
    urls = list(settings.endpoints) or [LOCAL]
    urls = urls if len(urls) == len(settings.models) else urls * len(settings.models)
    return [_sampler(name, url, settings) for name, url in zip(settings.models, urls, strict=True)]


def _sampler(model: str, url: str, settings: PairSettings) -> Sampler:
    if url == LOCAL:
        return LocalModel(model, settings.sampling)
    return RemoteModel(Endpoint(url, model, settings.timeout), settings.sampling, settings.concurrency)


def _judge(settings: PairSettings) -> Judge | None:
    if settings.judge_endpoint is None or settings.judge_model is None:
        return None
    return Judge.at(Endpoint(settings.judge_endpoint, settings.judge_model, settings.timeout), cache_folder())


def _open_work_file(settings: PairSettings) -> Journal:
    path = settings.output.with_name(f"{settings.output.name}.work")
    if settings.fresh:
        path.unlink(missing_ok=True)
    return Journal(path)


# ---- prompts ----------------------------------------------------------------------------------------------------


def _read_prompts(settings: PairSettings) -> tuple[list[Prompt], Counter[str]]:
    """The prompts, and how many rows are none, by the name of what is wrong with them."""
    columns = {"prompt": settings.prompt_column} if settings.prompt_column else None
    given = {"path": settings.prompts, "name": settings.name, "split": settings.split, "where": settings.where}
    try:
        source = Source.model_validate(given)
    except ValidationError as error:
        raise describe(error.errors(), given, "PROMPTS", {}) from None
    [selection] = select_rows([source], seed=0)
    rows = selection.rows
    head = list(islice(rows, _HEAD_ROWS))
    shape = find_shape(head, selection.name, columns, kinds=("prompts",))
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for row in chain(head, rows):
        record = with_system_message(to_record(row, shape), settings.system, "--system")
        if isinstance(record, Prompt):
            prompts.append(record)
        elif isinstance(record, Problem):
            problems.append(record)
        if len(prompts) == settings.limit:
            break
    problems += selection.problems
    if not prompts:
        where = f"{problems[0].origin.source}, row {problems[0].origin.row}"
        raise UserError(f"no row is a prompt; the first problem is: {problems[0].message}", where=where)
    return prompts, Counter(problem.kind for problem in problems)


# ---- the report and the output ------------------------------------------------------------------------------


def _mean_scores(found: Sequence[Candidates], pairs: Sequence[tuple[Candidate, Candidate]]) -> dict[str, float]:
    every = [one.score for of in found if isinstance(of, list) for one in of if one.score is not None]
    return {
        "all": fmean(every),
        "chosen": fmean(chosen.score or 0.0 for chosen, _ in pairs),
        "rejected": fmean(rejected.score or 0.0 for _, rejected in pairs),
    }


_READ_IN_PAIRS = {"prompt", "question", "instruction", "input", "system", "messages", "conversations", "chatgpt"}
_READ_IN_PAIRS |= {"llama2-13b-chat", "output_1", "output1", "response_1", "response1"}


def _write(output: Path, pairs: Sequence[tuple[Prompt, tuple[Candidate, Candidate]]], with_scores: bool) -> None:
    as_text = all(len(prompt.prompt) == 1 and not holds_dialogue(prompt.prompt[0]["content"]) for prompt, _ in pairs)
    # What cannot be written as UTF-8 can only be in the columns that were brought along.
    with new_file(output) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        for prompt, (chosen, rejected) in pairs:
            row: dict[str, Any] = {"prompt": prompt.prompt[0]["content"] if as_text else list(prompt.prompt)}
            for side, one in (("chosen", chosen), ("rejected", rejected)):
                row[side] = one.text if as_text else [{"role": "assistant", "content": one.text}]
            if with_scores:
                row |= {"score_chosen": chosen.score, "score_rejected": rejected.score}
            row |= {_column_name(name): _plain(value) for name, value in prompt.columns.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _column_name(name: str) -> str:
    """A column that would be read as part of the pair, or as its rating, gets another name."""
    taken = name in _READ_IN_PAIRS or "chosen" in name.lower() or "rejected" in name.lower()
    return f"source_{name}" if taken else name


def _plain(value: Any) -> Any:
    """The value as JSON has it: dates and bytes as text, no NaN."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)
