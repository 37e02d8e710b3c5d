"""Scores of the answers to prompts, by rewards or a judge, and the choice of a pair.

Scores are kept in the work file under a key of all that they depend on; only what is missing there is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice, permutations
from pathlib import Path
from typing import Any

from prefold.data.preference import Prompt
from prefold.errors import StageError
from prefold.generation.http import Refused
from prefold.generation.journal import Journal, key_of
from prefold.generation.samplers import Sampler, files_of
from prefold.models.fetch import fetch
from prefold.recipe import RewardBase
from prefold.rewards.judge import Judge, NoVerdict
from prefold.rewards.scoring import LoadedReward, column_names, score, weighted
from prefold.terminal import progress_bar

FAILURES_IN_A_ROW = 10
"""Prompts in a row without a verdict after which the judge is given up."""
_SCORED_AT_ONCE = 8


@dataclass(frozen=True)
class Candidate:
    """An answer to a prompt; `model` is the index of the model that gave it, and `score` None if it has none."""

    text: str
    model: int
    score: float | None = None
    finished: bool = True


Candidates = list[Candidate] | str
"""The answers to a prompt, or why there are none."""


def rewarded(
    rewards: Sequence[LoadedReward],
    identity: Any,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidates],
    samplers: Sequence[Sampler],
    work: Journal,
) -> list[Candidates]:
    """The candidates with the weighted sum of their rewards.

    Args:
        identity: the `reward_identity` of each reward.
        samplers: the models, for the token ids of their answers; empty if one of them does not know these.
    """
    columns = column_names(prompts)
    with_ids = bool(samplers) and any(reward.takes("completion_ids") for reward in rewards)

    def scores(missing: Sequence[int]) -> Iterator[tuple[int, list[float | None]]]:
        for start in range(0, len(missing), _SCORED_AT_ONCE):
            batch = missing[start : start + _SCORED_AT_ONCE]
            rows = [(prompts[i], answer) for i in batch for answer in _answers_in(candidates[i])]
            messages = [list(prompt.prompt) for prompt, _ in rows]
            texts = [answer.text for _, answer in rows]
            ids = (
                [(samplers[answer.model].token_ids([answer.text]) or [[]])[0] for _, answer in rows]
                if with_ids
                else None
            )
            cells = {name: [prompt.columns.get(name) for prompt, _ in rows] for name in columns}
            totals = iter(weighted(rewards, score(rewards, messages, texts, ids, cells)))
            for index in batch:
                yield index, list(islice(totals, len(candidates[index])))

    return _with_scores(prompts, candidates, work, identity, scores)


def reward_identity(spec: RewardBase) -> Any:
    """What a reward's scores depend on beyond the prompt and the answer: its settings, its code or its weights.

    Raises:
        UserError: its model cannot be fetched.
    """
    contents: Any = None
    if spec.file is not None:
        contents = sha256(Path(spec.file).expanduser().read_bytes()).hexdigest()
    elif (model := spec.settings.get("model")) and "endpoint" not in spec.settings:
        contents = files_of(fetch(model))
    return spec.model_dump(), contents


def judged(
    judge: Judge, prompts: Sequence[Prompt], candidates: Sequence[Candidates], work: Journal, workers: int
) -> list[Candidates]:
    """The candidates with their scores: the share of a prompt's other answers that each was preferred to.

    Raises:
        StageError: the judge gives no verdict for many prompts in a row.
    """

    def scores(missing: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
        in_a_row = 0
        groups = [(prompts[i].prompt, [answer.text for answer in _answers_in(candidates[i])]) for i in missing]
        for index, result in judge.all_shares(groups, workers):
            if isinstance(result, Refused):
                raise result
            if not isinstance(result, NoVerdict):
                in_a_row = 0
                yield missing[index], result
            elif (in_a_row := in_a_row + 1) == FAILURES_IN_A_ROW:
                reply = " ".join(str(result).split())[:120]
                raise StageError(
                    f"the judge named neither answer for {in_a_row} prompts in a row; its last reply: {reply!r}\n"
                    "  to do: take a model that follows instructions (`--judge-model`)"
                )

    return _with_scores(prompts, candidates, work, (judge.endpoint.url, judge.endpoint.model), scores)


def rows_of(prompts: Sequence[Prompt], candidates: Sequence[Candidates]) -> list[tuple[Prompt, str]]:
    """Each prompt with the text of each of its answers."""
    of_prompts = zip(prompts, map(_answers_in, candidates), strict=True)
    return [(prompt, answer.text) for prompt, answers in of_prompts for answer in answers]


def _answers_in(candidates: Candidates) -> list[Candidate]:
    return candidates if isinstance(candidates, list) else []


def _with_scores(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidates],
    work: Journal,
    identity: Any,
    compute: Callable[[Sequence[int]], Iterable[tuple[int, Sequence[float | None]]]],
) -> list[Candidates]:
    """The candidates with scores, from the work file or computed; fewer than two answers stay as they are.

    Args:
        identity: what scores depend on beyond the prompt and its candidates.
        compute: yields indices of prompts with the scores of their answers; an index that it leaves out has no verdict.
    """
    keys = {
        index: key_of(
            "scores", identity, prompt.prompt, prompt.columns, [(answer.text, answer.model) for answer in answers]
        )
        for index, (prompt, answers) in enumerate(zip(prompts, map(_answers_in, candidates), strict=True))
        if len(answers) > 1
    }
    missing = [index for index, key in keys.items() if key not in work]
    with progress_bar("scores", len(keys), len(keys) - len(missing)) as advance:
        for index, scores in compute(missing) if missing else ():
            work.add(keys[index], scores)
            advance(advance=1)
    result: list[Candidates] = list(candidates)
    for index, key in keys.items():
        answers = zip(_answers_in(candidates[index]), work[key], strict=True) if key in work else ()
        result[index] = [replace(answer, score=value) for answer, value in answers] or "no_verdict"
    return result


# ---- the pair ---------------------------------------------------------------------------------------------------


def best_pair(
    candidates: Candidates, min_margin: float, max_length_ratio: float | None
) -> tuple[Candidate, Candidate] | str:
    """(chosen, rejected): of the pairs within the limits the one with the largest margin; or why there is none.

    Without limits that is the best against the worst; of equal answers, the first. An answer that was cut off is in no
    pair: training on it would teach the model to stop there.
    """
    if isinstance(candidates, str):
        return candidates
    with_score = [candidate for candidate in candidates if candidate.score is not None]
    usable = [candidate for candidate in with_score if candidate.finished]
    if len(usable) < 2 <= len(with_score):
        return "cut_off"
    pairs = [(better, worse, (better.score or 0.0) - (worse.score or 0.0)) for better, worse in permutations(usable, 2)]
    ratio = max_length_ratio or float("inf")
    for reason, holds in (
        ("too_few_answers", lambda better, worse, margin: True),
        ("identical", lambda better, worse, margin: better.text.strip() != worse.text.strip()),
        ("equal_scores", lambda better, worse, margin: margin > 0),
        ("small_margin", lambda better, worse, margin: margin >= min_margin),
        ("length_ratio", lambda better, worse, margin: _length_ratio(better.text, worse.text) <= ratio),
    ):
        pairs = [pair for pair in pairs if holds(*pair)]
        if not pairs:
            return reason
    better, worse, _ = max(pairs, key=lambda pair: pair[2])
    return better, worse


def _length_ratio(first: str, second: str) -> float:
    shorter, longer = sorted((len(first), len(second)))
    return longer / shorter
