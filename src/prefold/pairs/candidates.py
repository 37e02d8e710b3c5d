"""Answers to a prompt, their scores, and the two of them that are a pair.

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
from prefold.generation.endpoint import in_parallel
from prefold.generation.journal import Journal, key_of
from prefold.generation.samplers import Sampler, files_of
from prefold.models.fetch import fetch
from prefold.recipe import RewardBase
from prefold.rewards.functions import LoadedReward, score, weighted
from prefold.rewards.judge import Judge, NoVerdict
from prefold.terminal import progress_bar

FAILURES_IN_A_ROW = 10
"""Prompts without a verdict after which nothing more is expected."""
_SCORED_AT_ONCE = 8


@dataclass(frozen=True)
class Candidate:
    """An answer to a prompt by one of the models; `score` is None where no reward says anything about it."""

    text: str
    model: int
    score: float | None = None
    finished: bool = True


Candidates = list[Candidate] | str
"""The answers to a prompt, or why there are none."""


# ---- scores -----------------------------------------------------------------------------------------------------


def rewarded(
    rewards: Sequence[LoadedReward],
    identity: Any,
    prompts: Sequence[Prompt],
    found: Sequence[Candidates],
    samplers: Sequence[Sampler],
    work: Journal,
) -> list[Candidates]:
    """The candidates with the weighted sum of their rewards.

    Args:
        identity: of the rewards (`reward_identity`).
        samplers: the models, which know the tokens of their answers; none if one of them does not.
    """
    columns = column_names(prompts)
    with_ids = bool(samplers) and any(reward.takes("completion_ids") for reward in rewards)

    def totals(rows: Sequence[tuple[Prompt, Candidate]]) -> list[float | None]:
        messages = [list(prompt.prompt) for prompt, _ in rows]
        ids = [(samplers[one.model].token_ids([one.text]) or [[]])[0] for _, one in rows] if with_ids else None
        cells = {name: [prompt.columns.get(name) for prompt, _ in rows] for name in columns}
        return weighted(rewards, score(rewards, messages, [one.text for _, one in rows], ids, cells))

    def scores(places: Sequence[int]) -> Iterator[tuple[int, list[float | None]]]:
        for start in range(0, len(places), _SCORED_AT_ONCE):
            batch = places[start : start + _SCORED_AT_ONCE]
            rows = [(prompts[place], one) for place in batch for one in answers_in(found[place])]
            remaining = iter(totals(rows))
            for place in batch:
                yield place, list(islice(remaining, len(found[place])))

    return _with_scores(prompts, found, work, identity, scores)


def reward_identity(spec: RewardBase) -> Any:
    """What a reward's scores depend on beyond the prompt and the answer: its settings, its code or its weights.

    Raises:
        UserError: its model cannot be had.
    """
    contents: Any = None
    if spec.file is not None:
        contents = sha256(Path(spec.file).expanduser().read_bytes()).hexdigest()
    elif model := spec.settings.get("model"):
        contents = files_of(fetch(model))
    return spec.model_dump(), contents


def judged(
    judge: Judge, prompts: Sequence[Prompt], found: Sequence[Candidates], work: Journal, workers: int
) -> list[Candidates]:
    """The candidates with the share of the others that they were preferred to.

    Raises:
        StageError: the judge gives no verdict for many prompts in a row.
    """

    def shares(place: int) -> list[float] | NoVerdict:
        try:
            return judge.shares(prompts[place].prompt, [one.text for one in answers_in(found[place])])
        except NoVerdict as error:
            return error

    def scores(places: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
        in_a_row = 0
        for place, result in in_parallel(shares, places, workers):
            if not isinstance(result, NoVerdict):
                in_a_row = 0
                yield place, result
            elif (in_a_row := in_a_row + 1) == FAILURES_IN_A_ROW:
                raise _no_verdicts(result)

    identity = judge.endpoint.url, judge.endpoint.model
    return _with_scores(prompts, found, work, identity, scores)


def column_names(prompts: Sequence[Prompt]) -> list[str]:
    return list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))


def answers_in(found: Candidates) -> list[Candidate]:
    return found if isinstance(found, list) else []


def _with_scores(
    prompts: Sequence[Prompt],
    found: Sequence[Candidates],
    work: Journal,
    identity: Any,
    compute: Callable[[Sequence[int]], Iterable[tuple[int, Sequence[float | None]]]],
) -> list[Candidates]:
    """Scores from the work file or anew, where there is something to compare.

    Args:
        identity: what scores depend on beyond the prompt and its candidates.
        compute: gives places with their scores; those without are without a verdict.
    """
    wanted = {
        place: key_of("scores", identity, prompt.prompt, prompt.columns, [(one.text, one.model) for one in of])
        for place, (prompt, of) in enumerate(zip(prompts, map(answers_in, found), strict=True))
        if len(of) > 1
    }
    missing = [place for place, key in wanted.items() if key not in work]
    with progress_bar("scores", len(wanted), len(wanted) - len(missing)) as advance:
        for place, scores in compute(missing) if missing else ():
            work.add(wanted[place], scores)
            advance(1, "")
    result: list[Candidates] = list(found)
    for place, key in wanted.items():
        pairs = zip(answers_in(found[place]), work[key], strict=True) if key in work else ()
        result[place] = [replace(one, score=value) for one, value in pairs] or "no_verdict"
    return result


def _no_verdicts(last: NoVerdict) -> StageError:
    reply = " ".join(str(last).split())[:120]
    return StageError(
        f"the judge named neither answer for {FAILURES_IN_A_ROW} prompts in a row; its last reply: {reply!r}\n"
        "  to do: take a model that follows instructions (`--judge-model`)"
    )


# ---- pairs ------------------------------------------------------------------------------------------------------


def best_pair(
    found: Candidates, min_margin: float, max_length_ratio: float | None
) -> tuple[Candidate, Candidate] | str:
    """(chosen, rejected): of the pairs within the limits the one with the largest margin; or why there is none.

    Without limits that is the best against the worst. Among equals the first ones are taken. An answer that was cut off
    is in no pair: training on it would teach to stop there.
    """
    if isinstance(found, str):
        return found
    usable = [one for one in found if one.score is not None and one.finished]
    if len(usable) < 2 <= sum(one.score is not None for one in found):
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
