"""Guards, which detect from the metrics what goes wrong in training, and what follows from that.

A guard is a function for one problem. It gets the lines of `metrics.jsonl` so far, the last one of the step just done,
and the `Facts` of the run. It returns None, or the problem and advice in plain words. It reports only at a step that
has its metric, so every guard suits every method. `Guards` calls them after every step, and acts as the recipe says:

    warn         reported once, in the terminal, in run.log and in the report
    stop         the run ends with exit code 1; its checkpoints stay
    roll_back    training resumes from the last checkpoint at half the rate
    lower_rate   training goes on at half the rate

The events are in `guards.json`, each with the step after which it counts. A run that resumes from a checkpoint drops
later events, as it drops later lines of `metrics.jsonl`, and detects them again. So the rate of a step depends on the
events before it alone, and a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance
from typing import Any

from prefold import ranks
from prefold.errors import StageError
from prefold.files import read_json, write_json
from prefold.terminal import say
from prefold.training.record import StepRecord

logger = logging.getLogger("prefold")

History = Sequence[Mapping[str, float]]

LN_2 = math.log(2)
FEW = 5
"""Steps in a row that are not chance."""
ENOUGH = 32
"""Pairs, or groups, that are not chance: with one or two per step, many steps are all right or all equal by luck."""
SOME = 10
"""Steps over which a metric is averaged."""
LOWERED = 0.5
"""Factor by which a rate is lowered."""
MOST = 3
"""Times that a guard may roll back, or lower the rate, in one run."""

Event = dict[str, Any]
"""`guard`, `action`, `step` (at which it was detected), `after` (the step after which it counts), `message`, `advice`,
and perhaps `rows`."""

ACCURACIES = ("rewards/accuracies", "accuracy")
MARGINS = ("rewards/margins", "margin")
"""Names of these metrics of pairs: of policies, and of reward models."""


@dataclass(frozen=True)
class Facts:
    """What guards know of a run besides its metrics.

    `steps`: of the whole run. `learning_rate`: the highest of its schedule. `batch_size`: pairs or prompts of a step.
    `telling`: findings of the data check that tell chosen from rejected completions, in its words. `scales_gradients`:
    training in float16, where the loss scaler skips a step whose gradients overflow, and lowers the scale.
    """

    steps: int
    learning_rate: float
    batch_size: int
    telling: Sequence[str] = ()
    scales_gradients: bool = False


@dataclass(frozen=True)
class Trouble:
    """A problem and what to do; `of_rows`: the rows of the step may be its cause, and are reported."""

    message: str
    advice: str
    of_rows: bool = False


Guard = Callable[[History, Facts], Trouble | None]


# ---- numbers ----------------------------------------------------------------------------------------------------


def not_finite(history: History, facts: Facts) -> Trouble | None:
    """NaN or infinity as loss or gradient: from then on every weight is NaN."""
    line = history[-1]
    wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(line.get(name, 0.0))]
    overflows = [earlier for earlier in history[-SOME:] if not math.isfinite(earlier.get("grad_norm", 0.0))]
    if not wrong or (facts.scales_gradients and wrong == ["grad_norm"] and len(overflows) < SOME):
        return None
    before = [f"{earlier['grad_norm']:.3g}" for earlier in history[-1 - FEW : -1] if "grad_norm" in earlier]
    shown = " and ".join(f"{'gradient norm' if name == 'grad_norm' else name} {line[name]}" for name in wrong)
    return Trouble(
        f"{shown}" + (f" (gradient norms before: {', '.join(before)})" if before else ""),
        "look at the rows of the step; where the gradient norm grew before, lower `train.learning_rate` or "
        "`train.max_grad_norm`; in half precision try `model.dtype: float32`",
        of_rows=True,
    )


def no_gradient(history: History, facts: Facts) -> Trouble | None:
    """No gradient reaches the trained weights. Equal rewards, and completions all cut off, have their own guards."""
    lines = history[-FEW:]
    silent = all(line.get("grad_norm", 1.0) == 0 and line.get("frac_reward_zero_std", 0.0) < 1 for line in lines)
    if len(lines) < FEW or not silent or all(line.get("completions/clipped_ratio", 0.0) == 1 for line in lines):
        return None
    return Trouble(
        f"the gradient was 0 in each of the last {FEW} steps (loss {lines[-1].get('loss', math.nan):.4g}): nothing is "
        "learnt",
        "where the loss is 0 as well, every pair is beyond the loss's margin and there is nothing left to learn; else "
        "see that `lora.target_modules` names modules that the model uses, and that chosen and rejected differ",
    )


# ---- pairs ------------------------------------------------------------------------------------------------------


def stuck_at_start(history: History, facts: Facts) -> Trouble | None:
    """A DPO loss that stays at ln 2: the policy is still the reference. Warm-up does not count."""
    needed = max(2 * SOME, facts.steps // 10)
    lines = [line for line in history[-needed:] if line.get("learning_rate", 0.0) >= facts.learning_rate / 2]
    margins = _named(MARGINS, history[-1])
    if len(lines) < needed or margins not in history[-1]:
        return None
    loss, margin = (fmean(line.get(name, math.nan) for line in lines) for name in ("loss", margins))
    if not (abs(loss - LN_2) < 2e-3 and abs(margin) < 4e-3):
        return None
    return Trouble(
        f"after {needed} steps at the full rate the loss is still ln 2 ({LN_2:.4f}) and the margin {margin:.1g}: the "
        "model is what it was",
        f"raise `train.learning_rate` (it is {facts.learning_rate:.1g}; LoRA wants at least ten times what full "
        "fine-tuning does); see by `prefold check` that chosen and rejected differ",
    )


def chosen_falling(history: History, facts: Facts) -> Trouble | None:
    """Log-probs of chosen answers fall by half of their value while margins grow. That both fall a little is usual."""
    if not {"logps/chosen", "rewards/margins"} <= history[-1].keys() or len(history) < 2 * SOME:
        return None
    first, last = _ends(history, "logps/chosen")
    margin_was, margin_now = map(fmean, _ends(history, "rewards/margins"))
    was, now = fmean(first), fmean(last)
    # With one or two pairs per step, log-probs vary with the lengths of completions: noise is no fall.
    luck = 4 * math.hypot(_error(first), _error(last))
    if not (now < was - max(0.5 * abs(was), luck) and margin_now > margin_was):
        return None
    return Trouble(
        f"log-probs of the chosen answers fell from {was:.0f} to {now:.0f} while the margin grew from {margin_was:.2g} "
        f"to {margin_now:.2g}: the model unlearns good answers along with bad ones",
        "a little of this is usual, so much is not: lower `train.learning_rate`, raise `beta`, or add the chosen "
        "answers' own likelihood to the loss (methods `orpo`, `cpo`, `apo_zero`, or `mixed` with `sft`)",
    )


def too_easy(history: History, facts: Facts) -> Trouble | None:
    """Chosen above rejected in every pair within a few steps."""
    needed = _steps_of_enough(facts)
    values = _latest(history, _named(ACCURACIES, history[-1]), needed)
    if not values or min(values) < 1 or len(history) > max(2 * SOME, facts.steps // 10, needed):
        return None
    advice = (
        "the check of the data found neither length nor an opening that tells the sides apart, so it may be the very "
        "thing you teach: read the answers after training"
    )
    if facts.telling:
        advice = (
            f"the check of the data says by what the sides differ: {'; '.join(facts.telling)}. Unless that is what you "
            "want to teach, balance the pairs"
        )
    return Trouble(
        f"in the last {needed} steps the model preferred the chosen answer in every pair, after {len(history)} steps "
        f"of {facts.steps}: the difference is easy to learn",
        f"{advice}. Where the loss fell to 0 at once, lower `train.learning_rate`",
    )


def held_out_falling(history: History, facts: Facts) -> Trouble | None:
    """Three measurements in a row well below the best before them."""
    name = _named(tuple(f"eval_{name}" for name in MARGINS), history[-1])
    if name not in history[-1]:
        return None
    values = [line[name] for line in history if name in line]
    if len(values) < 4:
        return None
    best = max(values[:-3])
    if not max(values[-3:]) < best - max(0.1 * abs(best), 0.02):
        return None
    return Trouble(
        f"the margin on held-out pairs was {best:.3g} and is {values[-1]:.3g} now, lower for three measurements in a "
        "row: training goes on to learn what does not carry over",
        "train for fewer steps or at a lower rate; `train.load_best_model_at_end: true` goes on with the best "
        "checkpoint, `train.early_stopping_patience` ends the run by itself",
    )


def undertrained(history: History, facts: Facts) -> Trouble | None:
    """At the end of a run: pairs are told apart no better than by a coin."""
    names = [_named(known, history[-1]) for known in (ACCURACIES, MARGINS)]
    lines = [line for line in history[-max(FEW, len(history) // 4) :] if names[0] in line]
    if len(lines) < FEW:
        return None
    accuracy, margin = (fmean(line.get(name, math.nan) for line in lines) for name in names)
    if not (accuracy < 0.55 and abs(margin) < 0.05):
        return None
    return Trouble(
        f"at the end the margin is {margin:.2g} and the accuracy {accuracy:.2f}: hardly anything was learnt in "
        f"{facts.steps} steps",
        f"train for longer, or raise `train.learning_rate` (it was {facts.learning_rate:.1g}) or `lora.r`; one pass "
        "over a few hundred pairs at a small rate is rarely enough",
    )


# ---- rollouts ---------------------------------------------------------------------------------------------------


def kl_running_off(history: History, facts: Facts) -> Trouble | None:
    """More than a nat per token away from the reference, or ten times as far as before."""
    now = _latest(history, "kl", FEW)
    if not now or "reward" not in history[-1]:
        return None
    before = [line["kl"] for line in history[-3 * SOME : -FEW] if "kl" in line]
    jumped = len(before) >= SOME and min(now) > max(0.1, 10 * median(before))
    if not (fmean(now) > 1 or jumped):
        return None
    return Trouble(
        f"the model is {fmean(now):.2g} nats per token away from the reference"
        + (f", where it was {median(before):.2g} before" if before else "")
        + ": it may be leaving the language for the reward",
        "read the completions in rollouts.jsonl; lower `train.learning_rate`, or raise `beta` in the method's section",
    )


def equal_rewards(history: History, facts: Facts) -> Trouble | None:
    """Groups whose completions all score the same teach nothing."""
    needed = _steps_of_enough(facts)
    values = _latest(history, "frac_reward_zero_std", needed)
    if not values or min(values) < 0.99:
        return None
    return Trouble(
        f"in the last {needed} rollouts all completions of a prompt got the same reward: there is nothing to learn "
        "from",
        "read the completions and rewards in rollouts.jsonl; take prompts that are neither too hard nor too easy, a "
        "reward with more than two values, a higher `temperature`, or more `num_generations`",
    )


def cut_off(history: History, facts: Facts) -> Trouble | None:
    """Completions that nearly all reach the longest length: their ends, and often their answers, are never seen."""
    values = _latest(history, "completions/clipped_ratio", FEW)
    if not values or fmean(values) < 0.95:
        return None
    return Trouble(
        f"{fmean(values):.0%} of the completions of the last {FEW} rollouts were cut off at the longest length",
        "raise `max_completion_length` in the method's section; where they would never end, the model may not know its "
        "end token (see `model.chat_template`), or a reward for ending is missing",
    )


GUARDS: dict[str, Guard] = {
    "not_finite": not_finite,
    "no_gradient": no_gradient,
    "stuck_at_start": stuck_at_start,
    "chosen_falling": chosen_falling,
    "too_easy": too_easy,
    "held_out_falling": held_out_falling,
    "kl_running_off": kl_running_off,
    "equal_rewards": equal_rewards,
    "cut_off": cut_off,
}
"""Called after every step, in this order."""
AT_THE_END: dict[str, Guard] = {"undertrained": undertrained}
"""Called once all steps are done."""


def _latest(history: History, name: str, count: int) -> list[float]:
    """The last `count` values of a metric that not every step has; none if the last step has none or there are
    fewer."""
    values: list[float] = []
    for line in reversed(history if name in history[-1] else ()):
        if name in line:
            values.append(line[name])
        if len(values) == count:
            return values[::-1]
    return []


def _named(names: Sequence[str], line: Mapping[str, float]) -> str:
    """The name under which a step has a metric; the first name if it has none of them."""
    return next((name for name in names if name in line), names[0])


def _steps_of_enough(facts: Facts) -> int:
    """Steps in a row that are not chance, given the batch size."""
    return max(FEW, -(-ENOUGH // facts.batch_size))


def _ends(history: History, name: str) -> tuple[list[float], list[float]]:
    """The values of a metric at the first and at the last steps; NaN if none of them has it."""
    first, last = ([line[name] for line in part if name in line] for part in (history[:SOME], history[-SOME:]))
    return first or [math.nan], last or [math.nan]


def _error(values: Sequence[float]) -> float:
    """The standard error of their mean."""
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else 0.0


# ---- what follows -----------------------------------------------------------------------------------------------


class RolledBack(Exception):
    """Training is to resume from an earlier checkpoint."""


class Guards:
    """The guards of one run.

    Args:
        actions: by name of the guard; guards that are left out or `off` are not called.
        facts: of the run.
        record: the metrics so far; its folder holds `guards.json`.
        resumed_step: the step after which the run resumes; 0 if it begins.
        rows_of: the rows that a step was computed from, in words.
        last_step: the step of the last checkpoint, 0 if there is none.
    """

    def __init__(
        self,
        actions: Mapping[str, str],
        facts: Facts,
        record: StepRecord,
        resumed_step: int,
        rows_of: Callable[[int], str],
        last_step: Callable[[], int],
    ):
        self.actions, self.facts, self.record = actions, facts, record
        self.rows_of, self.last_step = rows_of, last_step
        self.path = record.metrics.with_name("guards.json")
        seen: list[Event] = ranks.from_first(lambda: read_json(self.path)["events"] if self.path.is_file() else [])
        self.events = [event for event in seen if event["after"] <= resumed_step]
        self._write()

    def rate(self, step: int) -> float:
        """The factor of the schedule's rate at a step."""
        lowering = [event for event in self.events if event["action"] in ("roll_back", "lower_rate")]
        return float(LOWERED ** sum(event["after"] < step for event in lowering))

    def look(self, step: int) -> None:
        """Call the guards, after each step.

        Raises:
            StageError: a guard stops the run.
            RolledBack: training is to resume from the last checkpoint.
        """
        for name, guard in GUARDS.items():
            self._ask(name, guard, step)

    def look_at_end(self, step: int) -> None:
        """Call the guards of the end, when all steps are done; raises as `look`."""
        for name, guard in AT_THE_END.items():
            self._ask(name, guard, step)

    def _ask(self, name: str, guard: Guard, step: int) -> None:
        action = self.actions.get(name, "off")
        before = [event for event in self.events if event["guard"] == name]
        if action == "off" or (action == "warn" and before):
            return
        history = self.record.history
        trouble = guard(history[before[-1]["after"] :] if before else history, self.facts)
        if trouble is None:
            return
        message, acted = trouble.message, sum(event["action"] == action for event in before)
        if action == "roll_back" and acted == MOST:
            action, message = "stop", f"{message}, after going back {MOST} times"
        if action == "lower_rate" and acted == MOST:
            return
        rows = {"rows": self.rows_of(step)} if trouble.of_rows else {}
        said = {"message": message, "advice": trouble.advice, **rows}
        self._act({"guard": name, "action": action, "step": step, "after": step, **said})

    def _act(self, event: Event) -> None:
        consequence = ""
        if event["action"] == "lower_rate":
            consequence = "the rate is halved from here on"
        elif event["action"] == "roll_back":
            after = self.last_step()
            self.events = [earlier for earlier in self.events if earlier["after"] <= after]
            event = {**event, "after": after}
            consequence = f"back to step {after}, and on from there at half the rate"
        self.events.append(event)
        self._write()
        rows = f"; rows of the step: {event['rows']}" if "rows" in event else ""
        message = f"step {event['step']}: {event['message']}{rows}"
        lines = [f"guard: {message}", f"to do: {event['advice']}", *([consequence] if consequence else [])]
        logger.warning("\n  ".join(lines))
        if event["action"] == "stop":
            advice = (
                f"{event['advice']}. What the run has saved is kept; another action of this guard, "
                f"`guards.{event['guard']}`, lets it go on from its last checkpoint"
            )
            raise StageError(f"training stopped: {message}\n  to do: {advice}")
        say("  " + "\n  ".join(lines))
        if event["action"] == "roll_back":
            raise RolledBack

    def _write(self) -> None:
        if ranks.is_first():
            write_json(self.path, {"events": self.events})
