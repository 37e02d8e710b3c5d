"""What a model wrote while it trained on its own completions: the best and the worst by their rewards, so that a reward
that is being gamed is seen."""

from __future__ import annotations

from typing import NamedTuple

from prefold.reports import run_record as read
from prefold.reports.run_record import Number, RunRecord, Values, finite, section


class Written(NamedTuple):
    """A completion; `scores` are those of single rewards, where there are several."""

    text: str
    reward: Number
    advantage: Number
    tokens: Number
    finished: bool
    scores: list[tuple[str, Number]]


class Sampled(NamedTuple):
    """A prompt as (role, text) messages, with two of its completions."""

    step: Number
    prompt: list[tuple[str, str]]
    worst: Written
    best: Written


def sampled(run: RunRecord) -> list[Sampled]:
    """Of the first, a middle and the last step that was recorded, a group whose rewards differ if there is one."""
    by_step: dict[str, list[Values]] = {}
    for group in run.rollouts:
        if len(_judged(group)) > 1:
            by_step.setdefault(str(group.get("step")), []).append(group)
    steps = list(by_step.values())
    places = dict.fromkeys((0, len(steps) // 2, len(steps) - 1)) if steps else {}
    return [_sampled(max(steps[place], key=_spread)) for place in places]


def _sampled(group: Values) -> Sampled:
    written = sorted(_judged(group), key=_reward)
    step, prompt = read.count(group.get("step")), read.turns(group.get("prompt"))
    return Sampled(step, prompt, _written(written[0]), _written(written[-1]))


def _written(one: Values) -> Written:
    scores = section(one, "scores")
    return Written(
        str(one.get("text", "")),
        read.signed(one.get("reward")),
        read.signed(one.get("advantage")),
        read.count(one.get("tokens")),
        one.get("finished") is not False,
        [(name, read.signed(value)) for name, value in scores.items()] if len(scores) > 1 else [],
    )


def _spread(group: Values) -> float:
    rewards = [_reward(one) for one in _judged(group)]
    return max(rewards) - min(rewards)


def _reward(one: Values) -> float:
    return finite(one.get("reward")) or 0.0


def _judged(group: Values) -> list[Values]:
    """The completions that a reward says something about."""
    return [one for one in read.objects(group.get("completions")) if finite(one.get("reward")) is not None]
