"""Rounds: a model answers every prompt, its answers are scored, the best is trained against the worst, and the model
that comes out answers again (iterative DPO; with the model's own judge, arXiv 2401.10020).

    answers/0.jsonl     answers of the model after 0 rounds (the base), with scores; a stopped run continues from here
    pairs/1.jsonl       pairs of round 1, made of answers/0.jsonl; `1-held-out.jsonl` has its held-out pairs
    rounds/1/           the run of round 1, an ordinary run folder
    rounds.json         each model on the held-out prompts, compared with the base and with the one before
    rounds.html

Instead of scores, people's votes may make the pairs, in a file for each round. A model is measured by the rewards of
its answers to the held-out prompts, or a judge compares its first answer with the other model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from prefold import ranks
from prefold.data.examples import prompts_of
from prefold.data.preference import Prompt
from prefold.errors import StageError, UserError, counted
from prefold.evaluation.paired import beyond_half, estimate, mean_interval, measured_facts
from prefold.evaluation.win_rate import EndpointCompares, measure_win_rate, open_judge
from prefold.files import locked, read_json, remove, require_writable, without_home, write_json
from prefold.generation.journal import Journal
from prefold.generation.samplers import LocalModel, answers_of
from prefold.generation.sampling import Sampling
from prefold.generation.sequences import seed_of
from prefold.pairing.make import best_pairs, listed, mean_scores, write_pairs
from prefold.pairing.scores import Candidate, Candidates, judged, reward_identity, rewarded, rows_of
from prefold.pairing.voted import offer, voted_pairs
from prefold.recipe import Model, RecipeBase, as_dict, make_recipe
from prefold.reports.rounds import FACTS, PAGE, write_rounds
from prefold.rewards.scoring import LoadedReward, column_names, costs_of
from prefold.runs.context import Run
from prefold.runs.folder import by_dotted_path
from prefold.runs.opened import loaded_rewards
from prefold.runs.stages import passed_check, say_warnings
from prefold.terminal import say
from prefold.trees.memory import free_memory

ROUNDS, ANSWERS, PAIRS, HELD_OUT = "rounds", "answers", "pairs", "-held-out"
OF_ALL_ROUNDS = ("method", "model", "data", "rewards", "rounds")
"""Sections that no round's run folder contains in full, so that a change of theirs would not be noticed there."""
Facts = dict[str, Any]


@dataclass(frozen=True)
class ByRewards:
    """Models are compared by the mean reward of their answers to each held-out prompt."""

    rewards: Sequence[LoadedReward]
    identity: Any

    def scored(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidates], sampler: LocalModel, work: Journal
    ) -> list[Candidates]:
        return rewarded(self.rewards, self.identity, prompts, candidates, [sampler], work)

    def compared(self, prompts: Sequence[Prompt], before: Sequence[Candidates], after: Sequence[Candidates]) -> Facts:
        was, became = (np.array([mean_reward(group) for group in side], dtype=float) for side in (before, after))
        known = np.isfinite(was) & np.isfinite(became)
        if not known.any():
            raise StageError("the rewards say nothing about the answers to any held-out prompt")
        was, became = was[known], became[known]
        return measured_facts("reward", "prompt", was, became, estimate(was, became))

    def cost(self, prompts: Sequence[Prompt], candidates: Sequence[Candidates]) -> Facts:
        return costs_of(self.rewards, rows_of(prompts, candidates))


@dataclass(frozen=True)
class ByJudge:
    """A judge compares two models' first answers to each held-out prompt; its scores of answers only make the pairs."""

    judge: EndpointCompares

    def scored(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidates], sampler: LocalModel, work: Journal
    ) -> list[Candidates]:
        return judged(self.judge.judge, prompts, candidates, work, self.judge.workers)

    def compared(self, prompts: Sequence[Prompt], before: Sequence[Candidates], after: Sequence[Candidates]) -> Facts:
        both = [
            {"prompt": list(prompt.prompt), "before": [old[0].text], "after": [new[0].text]}
            for prompt, old, new in zip(prompts, before, after, strict=True)
            if isinstance(old, list) and isinstance(new, list)
        ]
        measured = measure_win_rate(self.judge, both)
        wins = np.array([wins for of_prompt in measured["outcomes"] for wins in of_prompt if wins is not None])
        if not len(wins):
            raise StageError("the judge compared the answers to none of the held-out prompts")
        alone = {name: measured[name] for name in ("length_controlled", "left_out")}
        return measured_facts("win rate", "prompt", np.full(len(wins), 0.5), wins, beyond_half(wins)) | alone

    def cost(self, prompts: Sequence[Prompt], candidates: Sequence[Candidates]) -> Facts:
        return {}


Scorer = ByRewards | ByJudge


def mean_reward(candidates: Candidates) -> float | None:
    known = [answer.score for answer in candidates if answer.score is not None] if isinstance(candidates, list) else []
    return fmean(known) if known else None


class RoundsRun:
    """The rounds of a recipe, in their folder."""

    def __init__(self, run: Run):
        assert run.recipe.rounds is not None
        self.recipe, self.rounds, self.folder = run.recipe, run.recipe.rounds, run.folder
        self.prompts, self.held_out = prompts_of(run.prepared.train), prompts_of(run.prepared.held_out)

    @cached_property
    def scorer(self) -> Scorer:
        if self.rounds.judge:
            judge = open_judge(self.rounds.judge, lambda texts: [])  # no reward, which would want token ids
            assert isinstance(judge, EndpointCompares)
            return ByJudge(judge)
        rewards = loaded_rewards(self.recipe, column_names(self.prompts))
        return ByRewards(rewards, [reward_identity(spec) for spec in self.recipe.rewards])

    def perform(self, number: int, before: Sequence[Candidates], perform_run: Callable[[Run], Path]) -> Facts | None:
        """Perform a round: answers, pairs and the run; None if no pair could be made. `before`: answers to the held-out
        prompts by the model that the round starts from.

        Raises:
            StageError: no pair could be made in the first round, or no held-out pair although `eval_steps` needs them.
        """
        scored = self.rounds.votes is None
        answers = self.answers(number - 1, self.prompts, seed_of(self.recipe.train.seed, number), scored)
        votes = None if scored else self._votes(number, answers)
        pairs = self._write_pairs(self.pairs_file(number), self.prompts, answers, votes)
        if not pairs["pairs"]:
            if number == 1:
                raise StageError(f"no pair could be made of {len(self.prompts)} prompts: {pairs['why_left_out']}")
            return None
        pairs["held_out"] = self._write_pairs(self.pairs_file(number, HELD_OUT), self.held_out, before)["pairs"]
        if self.recipe.train.eval_steps and not pairs["held_out"]:
            raise StageError("`train.eval_steps` measures held-out pairs, and none could be made of the answers")
        perform_run(Run(self.recipe_of(number, with_held_out=pairs["held_out"] > 0)))
        free_memory()
        return pairs | {"cost": self.scorer.cost(self.prompts, answers)}

    def answers(self, number: int, prompts: Sequence[Prompt], seed: int, scored: bool = True) -> list[Candidates]:
        """Answers of the model after `number` rounds, with scores if `scored`; empty answers are included."""
        rounds = self.rounds
        how = rounds.temperature, rounds.top_p, rounds.top_k, rounds.min_p
        sampling = Sampling(rounds.max_new_tokens, rounds.num_completions, *how, seed)
        sampler = LocalModel(f"round {number}" if number else "the base", sampling, self.model(number))
        (self.folder / ANSWERS).mkdir(exist_ok=True)
        work = Journal(self.folder / ANSWERS / f"{number}.jsonl")
        candidates: list[Candidates] = [
            "refused" if group is None else [Candidate(answer.text, 0, finished=answer.finished) for answer in group]
            for group in answers_of(sampler, prompts, work)
        ]
        return self.scorer.scored(prompts, candidates, sampler, work) if scored else candidates

    def _votes(self, number: int, answers: Sequence[Candidates]) -> Path:
        """The file of a round's votes. Raises UserError: it is missing; the answers to vote on have been written."""
        votes = Path(str(self.rounds.votes)).expanduser() / f"{number}.jsonl"
        if votes.is_file():
            return votes
        offered = self.pairs_file(number, "-to-vote")
        prompts = counted(offer(offered, self.prompts, answers), "prompt")
        what = f"round {number} waits for votes on two answers to {prompts}: {without_home(str(offered))}"
        advice = "write 1 or 2 in place of `vote: null`, the better answer (0: neither), into this file; run it again"
        raise UserError(what, where=without_home(str(votes)), advice=advice)

    def model(self, number: int) -> Model:
        return self.recipe.model.whole(self.run_folder(number) / "merged") if number else self.recipe.model

    def run_folder(self, number: int) -> Path:
        return self.folder / ROUNDS / str(number)

    def pairs_file(self, number: int, kind: str = "") -> Path:
        return self.folder / PAIRS / f"{number}{kind}.jsonl"

    def _write_pairs(
        self, path: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidates], votes: Path | None = None
    ) -> Facts:
        non_empty = [
            group if isinstance(group, str) else [answer for answer in group if answer.text] for group in candidates
        ]
        pairs, left_out = (
            voted_pairs(votes, prompts, non_empty) if votes else best_pairs(prompts, non_empty, self.rounds)
        )
        if pairs:
            write_pairs(path, pairs, with_scores=votes is None)
        scores = mean_scores(candidates, [pair for _, pair in pairs]) if pairs and votes is None else None
        why = {"left_out": dict(left_out), "why_left_out": listed(left_out)}
        return {"prompts": len(prompts), "pairs": len(pairs), **why, "mean_score": scores}

    def recipe_of(self, number: int, with_held_out: bool) -> RecipeBase:
        """The recipe of a round's run, which trains the model of the round before on the pairs of this one."""
        recipe, rounds = self.recipe, self.rounds
        values = as_dict(recipe)
        for name in ("rewards", "rounds"):
            values.pop(name, None)
        if number > 1 and recipe.lora == "none":
            values["model"] = self.model(number - 1).model_dump(mode="json")
        elif number > 1:
            reference = rounds.reference if rounds.reference == "base" else None
            values["model"] |= {"adapter": str(self.run_folder(number - 1) / "adapter"), "reference": reference}
            values["lora"] = None
        values["data"] = {
            "train": [{"path": str(self.pairs_file(number))}],
            "eval": [{"path": str(self.pairs_file(number, HELD_OUT))}] if with_held_out else [],
            "eval_fraction": 0.0,
            # The text is tokenized again, and may become other tokens than were sampled.
            "max_length": recipe.data.max_length + 2 * rounds.max_new_tokens,
        }
        if recipe.train.report_to:
            values["train"]["run_name"] = f"{recipe.train.run_name or self.folder.name}, round {number}"
        return make_recipe({**values, "output_dir": f"{recipe.output_dir}/{ROUNDS}/{number}"})

    def measured(self, candidates: Sequence[Candidates]) -> Facts:
        """Facts about a model's answers to the held-out prompts."""
        answers = [answer for group in candidates if isinstance(group, list) for answer in group]
        rewards = [value for group in candidates if (value := mean_reward(group)) is not None]
        by_rewards = self.rounds.judge is None and rewards
        return {
            "reward": fmean(rewards) if by_rewards else None,
            "reward_ci": mean_interval(np.array(rewards)) if by_rewards else None,
            "characters": fmean(len(answer.text) for answer in answers),
            "cut_off": fmean(not answer.finished for answer in answers),
            "cost": self.scorer.cost(self.held_out, candidates),
        }


def perform_rounds(run: Run, perform_run: Callable[[Run], Path], fresh: bool = False) -> Path:
    """Perform the rounds until one does not improve the model, skipping what is done; returns the folder of all rounds.

    Args:
        perform_run: performs all stages of a run.
        fresh: remove what earlier rounds left in the folder and start over.

    Raises:
        UserError: the recipe or what it names cannot be used, or the folder holds something else.
        StageError: the answers gave no pairs or no comparison, or a stage of a round failed; what was finished is kept.
    """
    if ranks.processes() > 1:
        what = f"answers are sampled in one process, and {ranks.processes()} were started"
        raise UserError(what, where="`rounds`", advice="leave `--nproc` out")
    say_warnings(passed_check(run))
    made = RoundsRun(run)
    with _own_folder(run.recipe, fresh):
        seed = run.recipe.train.seed
        base = before = made.answers(0, made.held_out, seed)
        facts = _begun(run.recipe) | {
            "prompts": {"train": len(made.prompts), "held_out": len(made.held_out)},
            "base": made.measured(base),
        }
        _write(run.folder, facts)
        for number in range(1, made.rounds.number + 1):
            say(f"round {number} of {made.rounds.number}")
            pairs = made.perform(number, before, perform_run)
            if pairs is None:
                facts["without_pairs"] = number
                break
            after = made.answers(number, made.held_out, seed)
            compared = {
                f"against_{name}": made.scorer.compared(made.held_out, answers, after)
                for name, answers in (("before", before), ("base", base))
            }
            facts["rounds"].append({"round": number, "pairs": pairs, "model": made.measured(after), **compared})
            _write(run.folder, facts)
            if compared["against_before"]["verdict"] != "better":
                break
            facts["best"], before = number, after
        _write(run.folder, facts | {"is_over": True})
    return run.folder


def _begun(recipe: RecipeBase) -> Facts:
    assert recipe.rounds is not None
    return {
        "recipe": {name: value for name, value in as_dict(recipe).items() if name in OF_ALL_ROUNDS}
        | {"train": {"seed": recipe.train.seed}},
        "number": recipe.rounds.number,
        "rounds": [],
        "best": 0,
        "is_over": False,
    }


def _write(folder: Path, facts: Facts) -> None:
    write_json(folder / FACTS, facts)
    write_rounds(folder)


@contextmanager
def _own_folder(recipe: RecipeBase, fresh: bool) -> Iterator[None]:
    """Lock the folder, which is new or holds rounds of this recipe. Raises UserError: it holds something else, or
    rounds that were made with other settings."""
    folder, where = recipe.run_folder, recipe.output_dir
    require_writable(folder)
    with locked(folder, where):
        if any(folder.iterdir()) and not (folder / FACTS).is_file():
            what = "is neither empty nor the folder of rounds"
            raise UserError(what, where=where, advice="choose another `output_dir`")
        # The file that marks a folder of rounds is removed last.
        for name in (ANSWERS, PAIRS, ROUNDS, PAGE, FACTS) if fresh else ():
            remove(folder / name)
        begun = _begun(recipe)
        if (folder / FACTS).is_file() and (folder / ROUNDS).is_dir():
            _require_same(read_json(folder / FACTS)["recipe"], begun["recipe"], where)
        if not (folder / FACTS).is_file():
            write_json(folder / FACTS, begun)
        yield


def _require_same(was: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    old, new = by_dotted_path(was), by_dotted_path(now)
    for name in {**old, **new}:
        if old.get(name) != new.get(name) and name != "rounds.number":
            what = f"holds rounds that were made with other settings: `{name}` was {old.get(name)!r}, is "
            advice = "take another `output_dir`, or `--fresh` to remove those rounds and start over"
            raise UserError(f"{what}{new.get(name)!r}", where=where, advice=advice)
