"""Calls the guards after every step, and does what the recipe wants done when one of them sees something.

    warn         said once, in the terminal, in run.log and in the report
    stop         the run ends with exit code 1; its checkpoints stay
    roll_back    back to the last checkpoint, and on from there at half the rate
    lower_rate   on at half the rate

What was seen is in `guards.json`. Each event there says after which step it counts: a run that goes on from a
checkpoint drops the later ones, as it drops later lines of `metrics.jsonl`, and meets them again. So the rate of a step
depends on the events before it alone, and a resumed run is a straight one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from prefold import ranks
from prefold.errors import StageError
from prefold.files import read_json, write_json
from prefold.terminal import say
from prefold.training.guards import AT_THE_END, GUARDS, Facts, Guard, Sighting
from prefold.training.record import StepRecord

logger = logging.getLogger("prefold")

LOWERED = 0.5
"""What a rate is multiplied with."""
MOST = 3
"""Times that a guard may roll back, or lower the rate, in one run."""

Event = dict[str, Any]
"""`guard`, `action`, `step` (that it was seen at), `after` (the step from which on it counts), `message`, `advice`, and
perhaps `rows`."""


class RolledBack(Exception):
    """Training is to be taken up again from an earlier checkpoint."""


class Watch(TrainerCallback):
    """The guards of one run.

    Args:
        actions: what follows, by the name of the guard; those that are left out or `off` are not asked.
        facts: of the run.
        record: the metrics so far; its folder holds `guards.json`.
        resumed_step: the step after which the run goes on.
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
        """What the schedule's rate is multiplied with at a step."""
        lowering = [event for event in self.events if event["action"] in ("roll_back", "lower_rate")]
        return float(LOWERED ** sum(event["after"] < step for event in lowering))

    # ---- transformers' hooks ----

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
        self.scheduled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.rate(state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
        # So that a checkpoint holds what the schedule says.
        for group, rate in zip(optimizer.param_groups, self.scheduled, strict=True):
            group["lr"] = rate

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        for name, guard in GUARDS.items():
            self._ask(name, guard, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step >= self.facts.steps:
            for name, guard in AT_THE_END.items():
                self._ask(name, guard, state.global_step)

    # ---- asking and acting ----

    def _ask(self, name: str, guard: Guard, step: int) -> None:
        action = self.actions.get(name, "off")
        before = [event for event in self.events if event["guard"] == name]
        if action == "off" or (action == "warn" and before):
            return
        history = self.record.history
        found = guard(history[before[-1]["after"] :] if before else history, self.facts)
        if found is None:
            return
        acted = sum(event["action"] == action for event in before)
        if action == "roll_back" and acted == MOST:
            action, found = "stop", _in_vain(found)
        if action == "lower_rate" and acted == MOST:
            return
        getattr(self, f"_{action}")(self._event(name, action, step, found))

    def _event(self, name: str, action: str, step: int, found: Sighting) -> Event:
        rows = {"rows": self.rows_of(step)} if found.of_rows else {}
        told = {"message": found.message, "advice": found.advice, **rows}
        return {"guard": name, "action": action, "step": step, "after": step, **told}

    def _warn(self, event: Event) -> None:
        self._note(event, "")

    def _lower_rate(self, event: Event) -> None:
        self._note(event, "the rate is halved from here on")

    def _roll_back(self, event: Event) -> None:
        after = self.last_step()
        self.events = [earlier for earlier in self.events if earlier["after"] <= after]
        self._note({**event, "after": after}, f"back to step {after}, and on from there at half the rate")
        raise RolledBack

    def _stop(self, event: Event) -> None:
        self._note(event, "")
        advice = (
            f"{event['advice']}. What the run has saved is kept; another action of this guard, "
            f"`guards.{event['guard']}`, lets it go on from its last checkpoint"
        )
        raise StageError(f"training stopped: {_told(event)}\n  to do: {advice}")

    def _note(self, event: Event, consequence: str) -> None:
        self.events.append(event)
        self._write()
        lines = [f"guard: {_told(event)}", f"to do: {event['advice']}", *([consequence] if consequence else [])]
        logger.warning("\n  ".join(lines))
        if event["action"] != "stop":  # a stop is told by its error
            say("  " + "\n  ".join(lines))

    def _write(self) -> None:
        if ranks.is_first():
            write_json(self.path, {"events": self.events})


def _told(event: Event) -> str:
    rows = f"; rows of the step: {event['rows']}" if "rows" in event else ""
    return f"step {event['step']}: {event['message']}{rows}"


def _in_vain(found: Sighting) -> Sighting:
    return Sighting(f"{found.message}, after going back {MOST} times", found.advice, found.of_rows)
