"""Preference training on stored pairs: transformers' Trainer with a step of our own.

One item of the dataloader is one whole optimizer step, as indices of its trees. `training_step` splits it into token
budgets, divides every loss sum by its count over the whole step and accumulates the gradients; the rest (optimizer,
schedule, clipping, trackers, best checkpoint, early stopping, resuming) is the Trainer's.

Of several processes each takes a share of the step's trees. What they find is gathered, and their gradients are summed,
at the end of the step; so its numbers are those of one process.

A loss that couples the trees of a step is computed once for all of them: first their log-probs without gradient, then
the gradients of the loss by these log-probs, then, budget by budget, the backward passes of the log-probs.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments

from prefold import ranks
from prefold.algorithms import Algorithm, Extreme, LossOutput, Mean, Metric
from prefold.algorithms.kto import mismatched
from prefold.errors import StageError, UserError
from prefold.training.keeping import KeepingTrainer
from prefold.training.record import StepRecord
from prefold.training.watch import Watch
from prefold.trees.logprobs import TreeLogprobs, concatenated
from prefold.trees.memory import is_out_of_memory
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import PADDING, Scorer, reference_model

TREES = "trees"
"""Among the units of a step: how many trees have something to score."""


@dataclass(frozen=True)
class TreeSet:
    """Trees with what the algorithm asks for: the reference's log-probs of each tree's completion tokens, and whether a
    tree's completion is desirable."""

    trees: Sequence[TokenTree]
    reference: Sequence[Tensor] | None = None
    labels: Sequence[bool] | None = None


class StepOrder(Dataset[list[int]]):
    """Which trees each optimizer step covers: seeded permutations, one per epoch, cut into steps end to end.

    Every step is full but the last, which takes what is left; `iterations` steps in a row cover the same. The order
    depends on the seed alone, never on the state of a random generator, so a resumed run continues it by the number of
    the step.
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
        """How often that many steps have seen the training set."""
        return min(steps / self.iterations * self.batch_size, self.draws) / self.trees

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epochs[epoch] = torch.randperm(self.trees, generator=generator).tolist()
        return self._epochs[epoch]


class PreferenceTrainer(KeepingTrainer):
    """Trains `scorer.model` on trees.

    Args:
        algorithm: loss and what it needs.
        scorer: how log-probs are computed, and the token budget.
        data: the training set.
        held_out: what metrics are computed on at every `eval_steps`; None where they are not.
        order: which trees each step covers.
        record: where metrics and times of the steps go.
        args: of transformers; batch size and accumulation are 1, since an item is a whole step.
        patience: evaluations without a better metric after which training stops; None: never.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        scorer: Scorer,
        data: TreeSet,
        order: StepOrder,
        record: StepRecord,
        args: TrainingArguments,
        held_out: TreeSet | None = None,
        patience: int | None = None,
    ):
        self.algorithm, self.data, self.held_out, self.order = algorithm, data, held_out, order
        stopping: list[Any] = [EarlyStoppingCallback(patience)] if patience else []
        super().__init__(scorer, record, args, eval_dataset=held_out and order, callbacks=stopping)
        # That is: the model is not to be wrapped, since `_step` sums the gradients.
        self.is_distributed_loading_by_transformers = ranks.processes() > 1
        self.remove_callback(PrinterCallback)
        self.watch: Watch | None = None
        self.step_metrics: dict[str, float] = {}
        self.held_out_metrics: dict[str, float] = {}

    def watch_by(self, watch: Watch) -> None:
        """Have guards look at every step from now on."""
        self.watch = watch
        self.add_callback(watch)

    def get_train_dataloader(self) -> DataLoader[list[int]]:
        return DataLoader(self.order, batch_size=1, collate_fn=lambda steps: steps[0])

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward passes of one optimizer step; returns its loss.

        Out of memory: the token budget is lowered and the whole step done again.
        """
        started = time.perf_counter()
        indices = self.indices_of(inputs)
        trees = [self.data.trees[i] for i in indices]
        while (loss := self._try_step(model, indices)) is None:
            model.zero_grad()
            self.scorer.lower_budget(trees)
        tokens = sum(map(self.scorer.size, trees))
        self.record.time(self.state.global_step + 1, time.perf_counter() - started, tokens)
        return loss

    def indices_of(self, item: Any) -> Sequence[int]:
        """The trees of the step for which the dataloader gave `item`."""
        indices: list[int] = item
        return indices

    def _try_step(self, model: nn.Module, indices: Sequence[int]) -> Tensor | None:
        """None if memory ran out, here or in another process."""
        try:
            return self._step(model, indices)
        except ranks.FailedElsewhere:
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self.scorer.sharded:
                # The others wait for this one's part of the weights.
                budget = f"{self.scorer.max_tokens:,}"
                raise StageError(f"out of memory with rows of {budget} tokens; lower `train.max_tokens`") from None
        ranks.tell_failure()
        return None

    def _step(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        model.train()
        trees = [self.data.trees[i] for i in indices]
        rows = [[indices[i] for i in row] for row in self.scorer.rows(trees, self.scorer.share(trees))]
        units = {**self.algorithm.units(trees), TREES: sum(bool(tree.completions) for tree in trees)}
        perform = self._coupled_step if self.algorithm.couples_step else self._separable_step
        parts = ranks.gather(perform(model, rows, units))
        ranks.sum_gradients(model)
        loss = torch.stack([part for part, _ in parts]).sum()
        outputs = [output for _, of_one in parts for output in of_one]
        metrics: dict[str, list[Metric]] = {}
        for output in outputs:
            for name, metric in output.metrics.items():
                metrics.setdefault(name, []).append(metric)
        self.step_metrics = {name: value_of(parts) for name, parts in metrics.items()}
        self.carried = outputs[-1].state if outputs else self.carried
        return loss

    def _separable_step(
        self, model: nn.Module, rows: list[list[int]], units: dict[str, int]
    ) -> tuple[Tensor, list[LossOutput]]:
        """Row by row: log-probs, loss, backward. This process's part of the loss, and what was found."""
        loss, outputs = torch.zeros((), device=self.args.device), []
        self._seed_dropout()
        self._keep_pace(model, rows)
        for row in rows:
            policy = self._score(model, [self.data.trees[i] for i in row])
            output = self.loss_of(policy, self.data, row)
            share = _per_unit(output, units) + _auxiliary(policy, len(row) / units[TREES])
            self.accelerator.backward(share)
            loss += share.detach()
            outputs.append(replace(output, loss={}))
        return loss, outputs

    def _coupled_step(
        self, model: nn.Module, rows: list[list[int]], units: dict[str, int]
    ) -> tuple[Tensor, list[LossOutput]]:
        """All log-probs, the loss by them, and then the backward pass of each row.

        Every process computes the loss, with the log-probs of all; the first one has it in its part.
        """
        self._seed_dropout()
        with torch.no_grad():
            self._keep_pace(model, rows)
            own = [(row, self._score(model, [self.data.trees[i] for i in row])) for row in rows]
        shares = ranks.gather(own)
        parts = [part for share in shares for part in share]
        whole = concatenated([logprobs for _, logprobs in parts]).as_leaf()
        output = self.loss_of(whole, self.data, [i for row, _ in parts for i in row])
        loss = _per_unit(output, units)
        loss.backward()
        before = sum(map(len, shares[: ranks.rank()]))
        grads = whole.gradients_of([logprobs for _, logprobs in parts])[before : before + len(rows)]
        loss = loss if ranks.is_first() else torch.zeros_like(loss)
        # The same masks as before: the second pass is that of the same numbers.
        self._seed_dropout()
        self._keep_pace(model, rows)
        for row, grad in zip(rows, grads, strict=True):
            policy = self._score(model, [self.data.trees[i] for i in row])
            auxiliary = _auxiliary(policy, len(row) / units[TREES])
            self.accelerator.backward(policy.dot(grad) + auxiliary)
            loss = loss + auxiliary
        return loss.detach(), [replace(output, loss={})] if ranks.is_first() else []

    def _keep_pace(self, model: nn.Module, rows: list[list[int]]) -> None:
        """With sharded weights, as many more passes as another process has rows, of nothing."""
        for _ in range(self.scorer.behind(rows)):
            nothing = 0 * self._score(model, [PADDING]).tokens.sum()
            if torch.is_grad_enabled():
                self.accelerator.backward(nothing)

    def _seed_dropout(self) -> None:
        """Masks depend on the number of the step and of the process alone, so a resumed or repeated step draws the
        same."""
        torch.manual_seed(self.args.seed * 1_000_003 + self.state.global_step + (ranks.rank() << 40))

    def _score(self, model: nn.Module, trees: Sequence[TokenTree]) -> TreeLogprobs:
        needs = self.algorithm
        return self.scorer.score(trees, model, needs.needs_statistics, needs.scores_prompt)

    def loss_of(self, policy: TreeLogprobs, data: TreeSet, indices: Sequence[int]) -> LossOutput:
        """Loss sums and metrics of the trees of `data` at `indices`, whose log-probs are `policy`."""
        reference = None
        if data.reference is not None:
            tokens = torch.cat([data.reference[i] for i in indices]).to(policy.tokens)
            reference = TreeLogprobs(tokens, policy.completion, policy.lengths)
        if data.labels is not None:
            labels = torch.tensor([data.labels[i] for i in indices], device=policy.tokens.device)
            policy = replace(policy, labels=labels)
        if self.algorithm.needs_mismatched:
            assert reference is not None
            # In an order that does not depend on how the step was split.
            others = mismatched([data.trees[i] for i in sorted(indices)])
            policy = replace(policy, mismatched=self._sums(others))
            with reference_model(self.scorer.model):
                reference = replace(reference, mismatched=self._sums(others))
        return self.algorithm.loss(policy, reference, self.carried)

    @torch.no_grad()
    def _sums(self, trees: Sequence[TokenTree]) -> Tensor:
        """`[completions]`, in the order of the trees."""
        found = torch.zeros(len(trees), device=self.args.device)
        for row, logprobs in self.scorer.scored(trees):
            found[row] = logprobs.sums()
        return found

    # ---- held-out data -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, held_out: TreeSet) -> dict[str, float]:
        """Loss and metrics of held-out trees under the policy as it is, by the names of training with `eval_`."""
        self.scorer.model.eval()
        needs = self.algorithm
        scored = self.scorer.scored(held_out.trees, needs.needs_statistics, needs.scores_prompt)
        # In the same order everywhere: a process that rounds otherwise could find another checkpoint the best, or stop.
        parts = sorted(scored, key=itemgetter(0))
        order = [i for row, _ in parts for i in row]
        output = self.loss_of(concatenated([policy for _, policy in parts]), held_out, order)
        loss = _per_unit(output, self.algorithm.units(held_out.trees))
        metrics = {name: value_of([metric]) for name, metric in output.metrics.items()}
        return {f"eval_{name}": value for name, value in {"loss": float(loss), **metrics}.items()}

    def require_metric(self) -> None:
        """Ask for the metric by which checkpoints are to be told apart now: its first measurement may be hours away.

        Raises:
            UserError: held-out data have no metric of that name.
        """
        wanted = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if wanted in ("", "loss") or self.held_out is None or not self.held_out.trees:
            return
        known = sorted(name.removeprefix("eval_") for name in self.measure(_one_of_each(self.held_out)))
        if wanted not in known:
            near = difflib.get_close_matches(wanted, known, n=1)
            raise UserError(
                f"held-out data have no metric `{wanted}`",
                where="`train.metric_for_best_model`",
                expected=f"one of: {', '.join(known)}",
                advice=f"did you mean `{near[0]}`?" if near else "",
            )

    def evaluate(self, *args: Any, **settings: Any) -> dict[str, float]:
        """What `log` has just measured, for the choice of the best checkpoint and for early stopping."""
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, self.held_out_metrics)
        return self.held_out_metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the metrics of a step to the run folder and hand them to the trackers."""
        if "learning_rate" not in logs:  # the Trainer's closing summary; the run folder has its own
            return
        step = self.state.global_step
        if self.control.should_evaluate and self.held_out is not None:
            self.held_out_metrics = self.measure(self.held_out)
            logs |= self.held_out_metrics
        logs = {"epoch": self.order.epochs(step), **logs, **self.step_metrics}
        self.record.step(step, logs)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def create_scheduler(self, *args: Any, **settings: Any) -> Any:
        """As transformers', with a wrong setting explained.

        Raises:
            UserError: the schedule wants other `lr_scheduler_kwargs`.
        """
        try:
            return super().create_scheduler(*args, **settings)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"cannot be set up: {error}",
                where="`train.lr_scheduler_type`",
                advice="give its settings in `train.lr_scheduler_kwargs`",
            ) from None

    def _get_learning_rate(self) -> float:
        """The rate of the step that is being done, lowered by guards or not."""
        lowered = self.watch.rate(self.state.global_step + 1) if self.watch else 1.0
        return float(super()._get_learning_rate()) * lowered

    def _run_epoch(self, *args: Any, **settings: Any) -> None:
        """Nothing more, where the checkpoint that is gone on from is of a run that early stopping had ended."""
        stopping = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        if any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in stopping):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **settings)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """All processes start alike; transformers' hooks would average gradients in each backward pass."""
        ranks.copy_from_first(model)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


def _one_of_each(data: TreeSet) -> TreeSet:
    """The first tree, or where trees have labels, the first one of each."""
    labels = data.labels
    places = [0] if labels is None else sorted({list(labels).index(label) for label in set(labels)})
    return TreeSet(
        [data.trees[place] for place in places],
        data.reference and [data.reference[place] for place in places],
        labels and [labels[place] for place in places],
    )


def _per_unit(output: LossOutput, units: dict[str, int]) -> Tensor:
    """The loss of a step, or a row's share of it."""
    return torch.stack([total / units[unit] for unit, total in output.loss.items()]).sum()


def _auxiliary(policy: TreeLogprobs, share: float) -> Tensor:
    return policy.tokens.new_zeros(()) if policy.auxiliary is None else policy.auxiliary * share


def value_of(parts: Sequence[Metric]) -> float:
    """The mean, or the extreme, of values that came in parts."""
    extremes = [part for part in parts if isinstance(part, Extreme)]
    if extremes:
        return extremes[0].pick(float(part.value) for part in extremes)
    means = [part for part in parts if isinstance(part, Mean)]
    return float(sum(float(part.total) for part in means) / sum(part.number for part in means))
