"""Preference pairs from a model's own answers: prompts -> answers -> scores -> the best against the worst -> a file.

Every answer and score is kept in a work file beside the output, under a key of all that it depends on. A run that was
stopped continues from there, and one with another margin or reward generates no answer again. The output appears when
it is complete, and `prefold run` reads it as it is.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any

from prefold.data.conversion import to_records
from prefold.data.dialogues import holds_dialogue
from prefold.data.preference import Problem, Prompt
from prefold.data.selection import select_rows
from prefold.data.shapes import READ_IN_PAIRS, find_shape
from prefold.data.votes import is_rating
from prefold.errors import StageError, UserError
from prefold.files import cache_folder, new_file, without_home
from prefold.generation.endpoint import Endpoint, RemoteModel, beside_messages
from prefold.generation.journal import Journal
from prefold.generation.samplers import LocalModel, Sampler, answers_of
from prefold.generation.sampling import Sampling
from prefold.generation.servers import ServedModel
from prefold.pairing.scores import Candidate, Candidates, best_pair, judged, reward_identity, rewarded, rows_of
from prefold.recipe import Generation, Pairs, Source, make_section, parse_reward
from prefold.recipe.section import with_fields
from prefold.recipe.sections import Rounds
from prefold.rewards.judge import Judge
from prefold.rewards.load import load_rewards
from prefold.rewards.scoring import column_names, costs_of
from prefold.terminal import say

LOCAL = "local"
"""In place of an endpoint's address: the model is loaded here."""
_HEAD_ROWS = 1000
Chosen = tuple[Prompt, tuple[Candidate, Candidate]]
"""A prompt with its chosen and its rejected answer."""


@dataclass(frozen=True)
class PairReport:
    """What became of the prompts: `prompts` = `pairs` + the sum of `left_out` (by reason). `mean_score`: of all, the
    chosen and the rejected answers, None without scores; `cost`: see `costs_of`."""

    output: str
    prompts: int
    answers: int
    pairs: int
    left_out: dict[str, int]
    mean_score: dict[str, float] | None
    cost: dict[str, dict[str, int]] = field(default_factory=dict)


@with_fields(Pairs)
def pairs(
    prompts: str | Path, model: str | Path | Sequence[str | Path], output: str | Path, **settings: Any
) -> PairReport:
    """Make preference pairs from a model's own answers to prompts, scored by rewards or a judge.

    Args:
        prompts: a file, folder, built-in set or Hub data set.
        model: the model that answers: a run folder, or a model by any name; of two, both answer every prompt.
        output: the file of pairs, .jsonl. A work file beside it keeps answers and scores, from which a call that was
            stopped continues.
        **settings

    Raises:
        UserError: settings do not go together, the prompts cannot be read, or a model, reward or endpoint cannot be
            used.
        StageError: no pair could be made, or the judge gives no verdicts.
    """
    return make_pairs(make_section(Pairs, {"prompts": prompts, "model": model, "output": output, **settings}))


def make_pairs(settings: Pairs) -> PairReport:
    _require_output(settings)
    samplers = _samplers(settings)
    prompts, left_out = _read_prompts(settings)
    candidates, cost = _candidates(settings, samplers, prompts)
    chosen, without_pair = best_pairs(prompts, candidates, settings)
    left_out += without_pair
    if not chosen:
        raise StageError(f"no pair could be made of {left_out.total()} prompts: {listed(left_out)}")
    write_pairs(settings.output, chosen, with_scores=not settings.prefer_first)
    return PairReport(
        output=without_home(str(settings.output)),
        prompts=len(chosen) + left_out.total(),
        answers=sum(len(of_prompt) for of_prompt in candidates if isinstance(of_prompt, list)),
        pairs=len(chosen),
        left_out=dict(left_out),
        mean_score=None if settings.prefer_first else mean_scores(candidates, [pair for _, pair in chosen]),
        cost=cost,
    )


def print_report(report: PairReport) -> None:
    say(f"{report.pairs} pairs of {report.prompts} prompts and {report.answers} answers in {report.output}")
    if report.left_out:
        say(f"left out: {listed(report.left_out)}")
    if report.mean_score:
        say("mean score: " + ", ".join(f"{name} {value:.4g}" for name, value in report.mean_score.items()))
    for name, cost in report.cost.items():
        say(f"{name}: " + ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in cost.items()))


REASONS = {
    "refused": "refused by the chat template or endpoint",
    "no_verdict": "no verdict of the judge",
    "too_few_answers": "fewer than two answers with words and a score",
    "cut_off": "answers cut off at --max-new-tokens",
    "identical": "all answers the same",
    "equal_scores": "all scores equal",
    "small_margin": "margin too small",
    "length_ratio": "answers too different in length",
    "no_vote": "without a vote",
    "tie": "with a vote for neither",
}
"""Why a prompt has no pair. A row that is no prompt is counted by the name of its finding instead."""


def listed(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {REASONS.get(name, name)}" for name, count in left_out.items())


# ---- answers and scores -----------------------------------------------------------------------------------------


def _candidates(
    settings: Pairs, samplers: Sequence[Sampler], prompts: Sequence[Prompt]
) -> tuple[list[Candidates], dict[str, dict[str, int]]]:
    """All models' answers to each prompt with their scores, or why there are none; and the cost of the scores."""
    judge = None
    if settings.judge_endpoint is not None and settings.judge_model is not None:
        judge = Judge.at(Endpoint(settings.judge_endpoint, settings.judge_model, settings.timeout), cache_folder())
    specs = [] if judge else [parse_reward(text) for text in settings.reward]
    knows_ids = all(sampler.token_ids([]) is not None for sampler in samplers)
    known = ["prompts", "completions", *(["completion_ids"] if knows_ids else []), *column_names(prompts)]
    rewards, identity = load_rewards(specs, known), [reward_identity(spec) for spec in specs]
    path = settings.output.with_name(f"{settings.output.name}.work")
    if settings.fresh:
        path.unlink(missing_ok=True)
    work = Journal(path)
    candidates = _answers(samplers, prompts, work)
    if judge:
        return judged(judge, prompts, candidates, work, settings.concurrency), {}
    if settings.prefer_first:
        preferred: list[Candidates] = [
            of_prompt
            if isinstance(of_prompt, str)
            else [replace(candidate, score=1.0 - candidate.model) for candidate in of_prompt]
            for of_prompt in candidates
        ]
        return preferred, {}
    scored = rewarded(rewards, identity, prompts, candidates, samplers if knows_ids else (), work)
    return scored, costs_of(rewards, rows_of(prompts, candidates))


def _answers(samplers: Sequence[Sampler], prompts: Sequence[Prompt], work: Journal) -> list[Candidates]:
    """All models' answers to each prompt, without the empty ones."""
    of_models = [answers_of(sampler, prompts, work) for sampler in samplers]
    return [
        "refused"
        if None in of_prompt
        else [
            Candidate(answer.text, model, finished=answer.finished)
            for model, answers in enumerate(of_prompt)
            for answer in answers or ()
            if answer.text
        ]
        for of_prompt in zip(*of_models, strict=True)
    ]


def _samplers(settings: Pairs) -> list[Sampler]:
    sampling = Sampling.of(settings, settings.answers_per_model)
    if settings.server:
        given = {"urls": settings.server, "concurrency": settings.concurrency, "timeout": settings.timeout}
        return [ServedModel(settings.model[0], sampling, make_section(Generation, {"engine": "vllm", **given}))]
    urls = settings.endpoint or [LOCAL]
    urls = urls if len(urls) == len(settings.model) else urls * len(settings.model)
    return [
        LocalModel(name, sampling)
        if url == LOCAL
        else RemoteModel(Endpoint(url, name, settings.timeout), sampling, settings.concurrency)
        for name, url in zip(settings.model, urls, strict=True)
    ]


# ---- prompts ----------------------------------------------------------------------------------------------------


def _read_prompts(settings: Pairs) -> tuple[list[Prompt], Counter[str]]:
    """The prompts, and how many rows are none, by the kind of their problem."""
    columns = {"prompt": settings.prompt_column} if settings.prompt_column else None
    given = {"path": settings.prompts, "name": settings.name, "split": settings.split, "where": settings.where}
    [selection] = select_rows([make_section(Source, given, "PROMPTS")], seed=0)
    rows = selection.rows
    head = list(islice(rows, _HEAD_ROWS))
    shape = find_shape(head, selection.name, columns, kinds=("prompts",))
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for row in chain(head, rows):
        records = to_records(row, shape, settings.system, "--system")
        prompts += [record for record in records if isinstance(record, Prompt)]
        problems += [record for record in records if isinstance(record, Problem)]
        if settings.limit and len(prompts) >= settings.limit:
            break
    problems += selection.problems
    if not prompts:
        where = str(problems[0].origin)
        raise UserError(f"no row is a prompt; the first problem is: {problems[0].message}", where=where)
    return prompts[: settings.limit], Counter(problem.kind for problem in problems)


# ---- the report and the output ----------------------------------------------------------------------------------


def best_pairs(
    prompts: Sequence[Prompt], candidates: Sequence[Candidates], limits: Pairs | Rounds
) -> tuple[list[Chosen], Counter[str]]:
    """The prompts that have a pair within the limits, with this pair; and how many have none, by reason."""
    best = [best_pair(of_prompt, limits.min_margin, limits.max_length_ratio) for of_prompt in candidates]
    chosen = [(prompt, pair) for prompt, pair in zip(prompts, best, strict=True) if not isinstance(pair, str)]
    return chosen, Counter(reason for reason in best if isinstance(reason, str))


def _require_output(settings: Pairs) -> None:
    output, where = settings.output, without_home(str(settings.output))
    if output.suffix != ".jsonl":
        raise UserError("the output is written as JSON lines", where=where, expected="a name that ends in .jsonl")
    if not output.parent.is_dir():
        raise UserError("its folder does not exist", where=where, advice=f"mkdir -p {without_home(str(output.parent))}")
    if not os.access(output.parent, os.W_OK):
        raise UserError("its folder cannot be written to", where=where)
    if output.is_dir() or output.resolve() == Path(settings.prompts).expanduser().resolve():
        raise UserError(
            "is not a file to write pairs to", where=where, expected="another file than that of the prompts"
        )


def mean_scores(candidates: Sequence[Candidates], pairs: Sequence[tuple[Candidate, Candidate]]) -> dict[str, float]:
    answers = [answer for of_prompt in candidates if isinstance(of_prompt, list) for answer in of_prompt]
    return {
        "all": fmean(answer.score for answer in answers if answer.score is not None),
        "chosen": fmean(chosen.score or 0.0 for chosen, _ in pairs),
        "rejected": fmean(rejected.score or 0.0 for _, rejected in pairs),
    }


def write_pairs(output: Path, pairs: Sequence[Chosen], with_scores: bool = True) -> None:
    as_text = all(len(prompt.prompt) == 1 and not holds_dialogue(prompt.prompt[0]["content"]) for prompt, _ in pairs)
    # Only the prompts' other columns can hold what UTF-8 cannot encode.
    with new_file(output) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        for prompt, (chosen, rejected) in pairs:
            row: dict[str, Any] = {"prompt": prompt.prompt[0]["content"] if as_text else list(prompt.prompt)}
            for side, answer in (("chosen", chosen), ("rejected", rejected)):
                row[side] = answer.text if as_text else [{"role": "assistant", "content": answer.text}]
            if with_scores:
                row |= {"score_chosen": chosen.score, "score_rejected": rejected.score}
            row |= beside_messages(prompt)
            for name, value in prompt.columns.items():
                # A column that would be read as part of the pair, or as its rating, gets another name.
                taken = name in READ_IN_PAIRS or is_rating(name, value)
                # Valid JSON: dates and bytes become text, NaN becomes null.
                cell = json.loads(json.dumps(value, default=str), parse_constant=lambda constant: None)
                row[f"source_{name}" if taken else name] = cell
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
