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

from prefold import ranks
from prefold.errors import StageError
from prefold.files import read_json, write_json
from prefold.terminal import say
from prefold.training.guards import AT_THE_END, GUARDS, Facts, Guard
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


class Guards:
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

    def look(self, step: int) -> None:
        """After each step.

        Raises:
            StageError: a guard stops the run.
            RolledBack: it is to go on from the last checkpoint.
        """
        for name, guard in GUARDS.items():
            self._ask(name, guard, step)

    def look_at_end(self, step: int) -> None:
        """When all steps are done; raises as `look`."""
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
