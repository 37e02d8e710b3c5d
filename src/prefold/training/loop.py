"""The training loop: one optimizer step after another, each from its trees to the changed weights. Start reading at
`TrainingLoop.step`.

    trees of the step -> rows by token budget -> log-probs -> loss -> backward      each process its share
    -> gradients of all processes -> clip -> optimizer -> schedule
    -> held-out data -> metrics -> guards -> trackers -> checkpoint

A loss consists of sums, which are divided by their counts over the whole step. So its numbers do not depend on how a
step is split into rows and over processes.

A loss that couples the trees of a step is computed once for all of them: first their log-probs without gradient, then
the gradients of the loss with respect to these, then, row by row, the backward passes of the log-probs.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from prefold import ranks
from prefold.algorithms import NO_STATE, Algorithm, Extreme, LossOutput, Mean, Metric, State
from prefold.errors import UserError, did_you_mean
from prefold.files import new_folder, remove_left_over
from prefold.training.checkpoints import TRAINER_STATE, read_manifest, write_manifest
from prefold.training.guards import Guards
from prefold.training.interrupt import Interruption
from prefold.training.optimizer import optimizer_and_schedule
from prefold.training.record import StepRecord
from prefold.training.saved_state import load_states, load_weights, reshard, save_states, save_weights
from prefold.trees.attention import CHECKPOINTING, unwrapped
from prefold.trees.logprobs import TreeLogprobs, concatenated
from prefold.trees.packing import TokenTree
from prefold.trees.reference import Reference
from prefold.trees.scorer import PADDING, Scorer, reference_model

TREES = "trees"
"""A unit of a step: the number of computed trees that have completions."""


# ---- what steps are computed from -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeSet:
    """Trees, and, by tree index, what a loss reads besides their log-probs.

    `reference`: the reference's log-probs of a tree's scored tokens, or what computes them. `extras`: by name, values
    of a tree's completions or of their scored tokens; the loss gets them in `TreeLogprobs.extras`.
    """

    trees: Sequence[TokenTree]
    reference: Sequence[Tensor] | Mapping[int, Tensor] | Reference | None = None
    extras: dict[str, Sequence[Tensor] | Mapping[int, Tensor] | Tensor] = field(default_factory=dict)

    def drawn(self, indices: Sequence[int]) -> TreeSet:
        """With the reference's log-probs of the trees at these indices; all processes compute them together."""
        reference = self.reference
        return replace(self, reference=reference.of(indices)) if isinstance(reference, Reference) else self


class StepTrees(NamedTuple):
    """What a step is computed from: the trees of `data` at `indices`. `metrics`: of how the trees were made.

    `left_out`: indices of those whose loss and gradient are 0. They count in the divisor of the loss, are not computed,
    and add `left_out_metrics` to the algorithm's metrics.
    """

    data: TreeSet
    indices: Sequence[int]
    metrics: Mapping[str, float] = {}
    left_out: frozenset[int] = frozenset()
    left_out_metrics: Mapping[str, Metric] = {}

    @property
    def computed(self) -> list[int]:
        return [i for i in self.indices if i not in self.left_out]


Source = Callable[[int], StepTrees]
"""Returns the trees of a step, given the number of steps before it."""


class StepOrder:
    """Which trees each optimizer step covers: seeded permutations, one per epoch, concatenated and cut into steps.

    Every step is full but the last, which takes what is left; `iterations` steps in a row cover the same trees. The
    order depends on the seed alone, never on the state of a random generator, so a resumed run continues it by the
    number of the step.
    """

    def __init__(self, trees: int, batch_size: int, draws: int, seed: int, iterations: int = 1):
        self.trees, self.batch_size, self.draws, self.seed = trees, batch_size, draws, seed
        self.iterations = iterations
        self._epochs: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return -(-self.draws // self.batch_size) * self.iterations

    def __getitem__(self, step: int) -> list[int]:
        batch = step // self.iterations
        draws = range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.draws))
        return [self._epoch(draw // self.trees)[draw % self.trees] for draw in draws]

    def epochs(self, steps: int) -> float:
        """Passes over the training set in that many steps."""
        return min(steps / self.iterations * self.batch_size, self.draws) / self.trees

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epochs[epoch] = torch.randperm(self.trees, generator=generator).tolist()
        return self._epochs[epoch]


@dataclass(frozen=True)
class StoredTrees:
    """A source of steps on trees that exist before training."""

    data: TreeSet
    order: StepOrder

    def __call__(self, step: int) -> StepTrees:
        indices = self.order[step]
        return StepTrees(self.data.drawn(indices), indices)


Gradients = tuple[Tensor, list[LossOutput]]
"""The loss, and the algorithm's output for each row; the gradients themselves are added to those of the weights."""


# ---- the loop ---------------------------------------------------------------------------------------------------


class TrainingLoop:
    """Trains `scorer.model`.

    Args:
        algorithm: loss and what it needs.
        scorer: how log-probs are computed, and the token budget.
        source: of the trees of each step.
        order: which items of the training set each step covers.
        record: where metrics and times of the steps go.
        guards: called after every step; they may lower the rate.
        args: the recipe's settings as transformers' arguments.
        held_out: trees on which metrics are computed at every `eval_steps`; None: no such metrics.
        patience: measurements without a better metric after which training stops; None: never.
        callbacks: transformers callbacks, called at the beginning, with metrics, at checkpoints and at the end.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        scorer: Scorer,
        source: Source,
        order: StepOrder,
        record: StepRecord,
        guards: Guards,
        args: TrainingArguments,
        held_out: TreeSet | None = None,
        patience: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.algorithm, self.scorer, self.model = algorithm, scorer, scorer.model
        self.source, self.order, self.held_out = source, order, held_out
        self.record, self.guards, self.args = record, guards, args
        self.checkpoints = Path(str(args.output_dir))
        self.couples_step = algorithm.couples_step
        self.needs: dict[str, Any] = {
            "statistics": algorithm.needs_statistics,
            "scores_prompt": algorithm.scores_prompt,
        }
        self.carried: State = NO_STATE
        """The algorithm's state between steps."""
        self.stopping = EarlyStoppingCallback(patience or sys.maxsize)
        self.callbacks = [*([self.stopping] if patience else []), *callbacks]
        self.interruption, self.control = Interruption(), TrainerControl()
        self.state: Any = TrainerState(train_batch_size=1, max_steps=len(order), num_train_epochs=1)
        self.state.compute_steps(args, len(order))
        # Checkpoints do not fall between steps on the same trees.
        self.state.save_steps = math.ceil(self.state.save_steps / order.iterations) * order.iterations
        self.best_before: int | None = None

    def train(self, checkpoint: Path | None = None) -> None:
        """Take all steps, or those that are left after a checkpoint.

        Raises:
            KeyboardInterrupt, SystemExit: the process was asked to stop; there is a checkpoint of the last step.
        """
        with self.scorer.in_place(), self.interruption:
            self._begin(checkpoint)
            while self.state.global_step < len(self.order) and not self.control.should_training_stop:
                self.step()
            self._end()
        self.interruption.leave()

    def step(self) -> None:
        """Take one optimizer step and record it; measure and save if that is due."""
        step, started = self.state.global_step + 1, time.perf_counter()
        batch = self.source(step - 1)
        loss, metrics = self.compute_gradients(batch)
        tokens = sum(self.scorer.size(batch.data.trees[i]) for i in batch.computed)
        self.record.time(step, time.perf_counter() - started, tokens)

        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        rate = self._change_weights(self.guards.rate(step))
        self.state.global_step, self.state.epoch = step, step / len(self.order)

        is_last = step == len(self.order)
        is_due = is_last or step % self.state.eval_steps == 0
        held_out = self.measure(self.held_out) if is_due and self.held_out else {}
        updated = {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate}
        line = {"epoch": self.order.epochs(step), **updated, **held_out, **metrics}
        self.record.step(step, line)
        self.guards.look(step)
        self._tell("on_log", logs=line)

        is_best = bool(held_out) and self._note_best(held_out)
        is_wanted = is_best and self.args.load_best_model_at_end
        if self._is_interrupted() or is_last or is_wanted or step % self.state.save_steps == 0:
            self._save()

    # ---- gradients ----

    def compute_gradients(self, batch: StepTrees) -> tuple[Tensor, dict[str, float]]:
        """Add the gradients of a step to those of the weights; returns its loss and its metrics.

        If memory runs out, the token budget is lowered and the step computed again.
        """
        while (result := self.scorer.attempt(partial(self._compute_gradients, batch), together=True)) is None:
            self.model.zero_grad()
            self.scorer.lower_budget([batch.data.trees[i] for i in batch.computed])
        loss, outputs = result
        self.carried = outputs[-1].state if outputs else self.carried
        all_metrics = [*(output.metrics for output in outputs), batch.left_out_metrics]
        names = dict.fromkeys(name for metrics in all_metrics for name in metrics)
        parts = {name: [metrics[name] for metrics in all_metrics if name in metrics] for name in names}
        return loss, {**batch.metrics, **{name: value_of(values) for name, values in parts.items()}}

    def _compute_gradients(self, batch: StepTrees) -> Gradients:
        self.model.train()
        data, computed = batch.data, batch.computed
        trees = [data.trees[i] for i in computed]
        rows = [[computed[i] for i in row] for row in self.scorer.rows(trees, self.scorer.share(trees))]
        units = {
            **self.algorithm.units([data.trees[i] for i in batch.indices]),
            TREES: sum(bool(tree.completions) for tree in trees),
        }
        loss, outputs = (self.coupled if self.couples_step else self.row_by_row)(data, rows, units)
        shares = ranks.gather((loss, [replace(output, loss={}, kept={}) for output in outputs]))
        ranks.sum_gradients(self.model)
        if not units[TREES]:
            # Optimizers need gradients, even if they are 0.
            weights = [weight.sum() for weight in self.model.parameters() if weight.requires_grad]
            self.accelerator.backward(0 * torch.stack(weights).sum())
        for row, output in zip(rows, outputs, strict=False):
            keep(output.kept, data, row)
        return torch.stack([loss for loss, _ in shares]).sum(), [output for _, outputs in shares for output in outputs]

    def row_by_row(self, data: TreeSet, rows: list[list[int]], units: Mapping[str, int]) -> Gradients:
        """Log-probs, loss and backward pass of each row of `data`; returns this process's part of the loss."""
        loss, outputs = torch.zeros((), device=unwrapped(self.model).device), []
        self._seed_dropout()
        self._keep_pace(rows)
        for row in rows:
            policy = self.scorer.score([data.trees[i] for i in row], **self.needs)
            output = self.loss_of(policy, data, row)
            part = per_unit(output, units) + auxiliary(policy, len(row) / units[TREES])
            self.accelerator.backward(part)
            loss = loss + part.detach()
            outputs.append(replace(output, loss={}))  # the loss would keep the graph of the row
        return loss, outputs

    def coupled(self, data: TreeSet, rows: list[list[int]], units: Mapping[str, int]) -> Gradients:
        """All log-probs, their loss, and then the backward pass of each row.

        Every process computes the loss from the log-probs of all; only the first one returns it, so it counts once.
        """
        self._seed_dropout()
        with torch.no_grad():
            self._keep_pace(rows)
            own = [(row, self.scorer.score([data.trees[i] for i in row], **self.needs)) for row in rows]
        shares = ranks.gather(own)
        scored_rows = [scored for share in shares for scored in share]
        leaf = concatenated([policy for _, policy in scored_rows]).as_leaf()
        output = self.loss_of(leaf, data, [i for row, _ in scored_rows for i in row])
        loss = per_unit(output, units)
        loss.backward()
        before = sum(map(len, shares[: ranks.rank()]))
        gradients = leaf.gradients_of([policy for _, policy in scored_rows])[before : before + len(rows)]
        loss = loss if ranks.is_first() else torch.zeros_like(loss)
        # The same dropout masks as before, so that the second pass gives the same numbers.
        self._seed_dropout()
        self._keep_pace(rows)
        for row, gradient in zip(rows, gradients, strict=True):
            policy = self.scorer.score([data.trees[i] for i in row], **self.needs)
            router_loss = auxiliary(policy, len(row) / units[TREES])
            self.accelerator.backward(policy.dot(gradient) + router_loss)
            loss = loss + router_loss
        return loss.detach(), [output] if ranks.is_first() else []

    def _keep_pace(self, rows: list[list[int]]) -> None:
        """With sharded weights, make passes that change nothing until every process has made as many as the others."""
        for _ in range(self.scorer.behind(rows)):
            nothing = 0 * self.scorer.score([PADDING], **self.needs).tokens.sum()
            if torch.is_grad_enabled():
                self.accelerator.backward(nothing)

    def _seed_dropout(self) -> None:
        """Dropout masks depend on the seed, the step and the process alone, so a resumed or repeated step draws the
        same."""
        torch.manual_seed(self.args.seed * 1_000_003 + self.state.global_step + (ranks.rank() << 40))

    def loss_of(self, policy: TreeLogprobs, data: TreeSet, indices: Sequence[int]) -> LossOutput:
        """Loss sums and metrics of the trees of `data` at `indices`, whose log-probs are `policy`."""
        device = policy.tokens.device
        chosen = {name: torch.cat([values[i] for i in indices]) for name, values in data.extras.items()}
        # MPS has no float64.
        extras = {
            name: values.to(policy.tokens if values.is_floating_point() else device) for name, values in chosen.items()
        }
        policy, reference = replace(policy, extras=extras), None
        if data.reference is not None:
            assert not isinstance(data.reference, Reference)
            tokens = torch.cat([data.reference[i] for i in indices]).to(policy.tokens)
            reference = TreeLogprobs(tokens, policy.completion, policy.lengths)
        if self.couples_step:
            # In an order that does not depend on how the step was split.
            further = self.algorithm.further_trees([data.trees[i] for i in sorted(indices)])
            policy = self._with_sums(policy, further)
            if reference is not None:
                with reference_model(self.model):
                    reference = self._with_sums(reference, further)
        return self.algorithm.loss(policy, reference, self.carried)

    @torch.no_grad()
    def _with_sums(self, logprobs: TreeLogprobs, further: Mapping[str, Sequence[TokenTree]]) -> TreeLogprobs:
        """The same, with the summed log-probs of further trees, of one completion each, among the extras."""
        sums = {name: logprobs.tokens.new_zeros(len(trees)) for name, trees in further.items()}
        for name, trees in further.items():
            for row, scored in self.scorer.scored(trees):
                sums[name][row] = scored.sums()
        return replace(logprobs, extras={**logprobs.extras, **sums})

    def _change_weights(self, lowered: float) -> float:
        """Update the weights, at the schedule's rate times `lowered`; returns that rate."""
        groups = self.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= lowered
        self.optimizer.step()
        for group, rate in zip(groups, scheduled, strict=True):
            group["lr"] = rate  # so that a checkpoint holds what the schedule says
        if not self.optimizer.step_was_skipped:  # as with float16 after an overflow
            self.schedule.step()
        self.model.zero_grad()
        return float(scheduled[0]) * lowered

    # ---- held-out data ----

    @torch.no_grad()
    def measure(self, held_out: TreeSet) -> dict[str, float]:
        """Loss and metrics of held-out trees under the current policy, named as in training with prefix `eval_`."""
        self.model.eval()
        held_out = held_out.drawn(range(len(held_out.trees)))
        # In the same order in all processes: one that rounds differently could choose another best checkpoint.
        rows = sorted(self.scorer.scored(held_out.trees, **self.needs), key=itemgetter(0))
        policy = concatenated([scored for _, scored in rows])
        output = self.loss_of(policy, held_out, [i for row, _ in rows for i in row])
        loss = per_unit(output, self.algorithm.units(held_out.trees))
        metrics = {name: value_of([metric]) for name, metric in output.metrics.items()}
        return {f"eval_{name}": value for name, value in {"loss": float(loss), **metrics}.items()}

    def _note_best(self, held_out: dict[str, float]) -> bool:
        """Whether a measurement is the best so far; early stopping gets it as well."""
        self._tell("on_evaluate", metrics=held_out)
        name, greater = self.args.metric_for_best_model, self.args.greater_is_better
        if name is None:
            return False
        value, best = held_out[f"eval_{name.removeprefix('eval_')}"], self.state.best_metric
        best = (-math.inf if greater else math.inf) if best is None else best
        is_best = value > best if greater else value < best
        self.state.best_metric = value if is_best else best
        if is_best:
            self.best_before, self.state.best_global_step = self.best, self.state.global_step
        return is_best

    def require_metric(self) -> None:
        """Check that the metric of the best checkpoint exists, as its first measurement may be hours away.

        Raises:
            UserError: held-out data have no metric of that name.
        """
        wanted = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if wanted in ("", "loss") or self.held_out is None or not self.held_out.trees:
            return
        known = sorted(name.removeprefix("eval_") for name in self.measure(first_of_each(self.held_out)))
        if wanted not in known:
            what, where = f"held-out data have no metric `{wanted}`", "`train.metric_for_best_model`"
            raise UserError(
                what, where=where, expected=f"one of: {', '.join(known)}", advice=did_you_mean(wanted, known)
            )

    # ---- beginning, checkpoints, end ----

    def _begin(self, checkpoint: Path | None) -> None:
        """Set up what steps need, with its state at a checkpoint if there is one."""
        self.require_metric()
        if ranks.is_first():
            remove_left_over(self.checkpoints)
        if getattr(self.args, CHECKPOINTING):
            getattr(unwrapped(self.model), f"{CHECKPOINTING}_enable")(getattr(self.args, f"{CHECKPOINTING}_kwargs"))
        reshard(self.model)  # after passes without gradients
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        ranks.copy_from_first(self.model)
        # transformers' Trainer sets up accelerator, optimizer and schedule; it does not train.
        trainer = Trainer(self.model, self.args, eval_dataset=self.held_out)
        self.accelerator = trainer.accelerator
        if self.args.fp16 and self.args.device.type == "cpu":  # accelerate scales losses on accelerators alone
            self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu")
        # For autocast alone. The model is not wrapped: the step sums the gradients of all processes itself.
        self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        self.optimizer, self.schedule = optimizer_and_schedule(trainer, len(self.order))
        if checkpoint is not None:
            self._resume(checkpoint)
        self.state.is_local_process_zero = self.state.is_world_process_zero = ranks.is_first()
        self._tell("on_train_begin")
        # The checkpoint may belong to a run that early stopping had ended.
        counted, patience = self.stopping.early_stopping_patience_counter, self.stopping.early_stopping_patience
        self.control.should_training_stop = counted >= patience

    def _resume(self, checkpoint: Path) -> None:
        self.scorer.max_tokens, self.carried = read_manifest(checkpoint)
        load_states(checkpoint, self.model, self.optimizer, self.schedule, self.accelerator.scaler)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self.state.max_steps = len(self.order)
        saved = self.state.stateful_callbacks.get("EarlyStoppingCallback", {"attributes": {}})
        vars(self.stopping).update(saved["attributes"])

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint; None without `load_best_model_at_end`: the best step may have no checkpoint."""
        return self.state.best_global_step if self.args.load_best_model_at_end else None

    def _is_interrupted(self) -> bool:
        """Whether the process was asked to stop, and can: not between steps on the same trees."""
        if self.state.global_step % self.order.iterations:
            return False
        # All processes must stop together, and a signal does not reach all of them in the same step.
        signals = [caught for caught in ranks.gather(self.interruption.caught) if caught is not None]
        if signals:
            self.interruption.caught = signals[0]
            self.control.should_training_stop = True
        return bool(signals)

    def _save(self) -> None:
        """Save a checkpoint, which is whole or absent, and remove older ones beyond the limit."""
        folder = self.checkpoints / f"checkpoint-{self.state.global_step}"
        self.state.best_model_checkpoint = str(self.checkpoints / f"checkpoint-{self.best}") if self.best else None
        stateful = [callback for callback in (*self.callbacks, self.control) if isinstance(callback, ExportableState)]
        self.state.stateful_callbacks = {type(callback).__name__: callback.state() for callback in stateful}
        with new_folder(folder) if ranks.is_first() else nullcontext(folder) as aside:
            save_weights(self.model, aside)
            save_states(aside, self.model, self.optimizer, self.schedule, self.accelerator.scaler)
            if ranks.is_first():
                self.state.save_to_json(str(aside / TRAINER_STATE))
                write_manifest(aside, self.scorer.max_tokens, self.carried, self.best)
                self.record.flush()
        if ranks.is_first():
            # The newest stays in any case. Should it turn out broken, the one before needs the best of its time.
            is_new_best = self.best == self.state.global_step and self.args.save_total_limit != 1
            best = self.best_before if is_new_best else self.best
            kept = str(self.checkpoints / f"checkpoint-{best}") if best else None
            rotate_checkpoints(str(self.checkpoints), self.args.save_total_limit, kept)
        ranks.wait()
        self._tell("on_save")

    def _end(self) -> None:
        """Load the best weights, if they are wanted, and call guards and callbacks for the last time."""
        if self.best:
            best = self.checkpoints / f"checkpoint-{self.best}"
            load_weights(self.model, best)
            if self.args.save_total_limit == 1 and ranks.is_first():
                for other in {*self.checkpoints.glob("checkpoint-*")} - {best}:
                    rmtree(other, ignore_errors=True)
        if self.state.global_step == len(self.order):
            self.guards.look_at_end(self.state.global_step)
        self._tell("on_train_end")

    def _tell(self, event: str, **arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, self.control, model=self.model, **arguments)


# ---- arithmetic -------------------------------------------------------------------------------------------------


def per_unit(output: LossOutput, units: Mapping[str, int]) -> Tensor:
    """The loss of a step, or a row's part of it."""
    return torch.stack([total / units[unit] for unit, total in output.loss.items()]).sum()


def auxiliary(policy: TreeLogprobs, share: float) -> Tensor:
    """A row's part of the load-balancing loss of a mixture of experts; 0 without one."""
    return policy.tokens.new_zeros(()) if policy.auxiliary is None else policy.auxiliary * share


def value_of(parts: Sequence[Metric]) -> float:
    """A metric from its parts: their mean, or their extreme."""
    extremes = [part for part in parts if isinstance(part, Extreme)]
    if extremes:
        return extremes[0].pick(float(part.value) for part in extremes)
    means = [part for part in parts if isinstance(part, Mean)]
    return float(sum(float(part.total) for part in means) / sum(part.number for part in means))


def keep(values: Mapping[str, Tensor], data: TreeSet, row: Sequence[int]) -> None:
    """Store values of a row's scored tokens in the extras of its trees."""
    lengths = [data.trees[i].scored_tokens for i in row]
    for name, of_row in values.items():
        kept: Any = data.extras.setdefault(name, {})
        kept.update(zip(row, of_row.split(lengths), strict=True))


def first_of_each(data: TreeSet) -> TreeSet:
    """A set of the first tree; if trees have extras, of the first tree with each value of them."""
    every = range(len(data.trees))
    firsts = {repr([values[i].tolist() for values in data.extras.values()]): i for i in reversed(every)}
    indices = sorted(firsts.values())
    data = data.drawn(indices)
    return TreeSet(
        [data.trees[i] for i in indices],
        [data.reference[i] for i in indices] if data.reference else None,  # type: ignore[index]
        {name: [values[i] for i in indices] for name, values in data.extras.items()},
    )
