"""Preference training on stored pairs: transformers' Trainer with a step of our own.

One item of the dataloader is one whole optimizer step, as indices of its trees. `training_step` splits it into token
budgets, divides every loss sum by its count over the whole step and accumulates the gradients; the rest (optimizer,
schedule, clipping, trackers, resuming) is the Trainer's.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from prefold.algorithms import Algorithm, LossOutput
from prefold.errors import UserError
from prefold.files import read_json, write_json
from prefold.models.load import quiet
from prefold.trainers.record import StepRecord
from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.memory import is_out_of_memory
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer

BUDGET = "budget.json"
"""In a checkpoint: the token budget that it was trained with, so that a resumed run splits its steps alike."""


class StepOrder(Dataset[list[int]]):
    """Which trees each optimizer step covers: seeded permutations, one per epoch, cut into steps end to end.

    Every step is full but the last, which takes what is left. The order depends on the seed alone, never on the state
    of a random generator, so a resumed run continues it by the number of the step.
    """

    def __init__(self, trees: int, batch_size: int, draws: int, seed: int):
        self.trees, self.batch_size, self.draws, self.seed = trees, batch_size, draws, seed
        self._epochs: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return -(-self.draws // self.batch_size)

    def __getitem__(self, step: int) -> list[int]:
        draws = range(step * self.batch_size, min((step + 1) * self.batch_size, self.draws))
        return [self._epoch(draw // self.trees)[draw % self.trees] for draw in draws]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epochs[epoch] = torch.randperm(self.trees, generator=generator).tolist()
        return self._epochs[epoch]


class PreferenceTrainer(Trainer):
    """Trains `scorer.model` on trees.

    Args:
        algorithm: loss and what it needs.
        scorer: how log-probs are computed, and the token budget.
        trees: the training set.
        reference: per tree, the reference's log-probs of its completion tokens; None if the algorithm needs none.
        order: which trees each step covers.
        record: where metrics and times of the steps go.
        args: of transformers; batch size and accumulation are 1, since an item is a whole step.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        scorer: Scorer,
        trees: Sequence[TokenTree],
        reference: Sequence[Tensor] | None,
        order: StepOrder,
        record: StepRecord,
        args: TrainingArguments,
    ):
        self.algorithm, self.scorer, self.trees, self.reference = algorithm, scorer, trees, reference
        self.order, self.record = order, record
        self.checkpoints = Path(str(args.output_dir))
        self._checkpoint_parent = self.checkpoints
        super().__init__(model=scorer.model, args=args)
        self.remove_callback(PrinterCallback)
        self.step_metrics: dict[str, float] = {}

    def get_train_dataloader(self) -> DataLoader[list[int]]:
        return DataLoader(self.order, batch_size=1, collate_fn=lambda steps: steps[0])

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward passes of one optimizer step; returns its loss.

        Out of memory: the token budget is lowered and the whole step done again.
        """
        started = time.perf_counter()
        indices: list[int] = inputs
        while (loss := self._try_step(model, indices)) is None:
            model.zero_grad()
            self.scorer.lower_budget([self.trees[i] for i in indices])
        tokens = sum(self.scorer.size(self.trees[i]) for i in indices)
        self.record.time(self.state.global_step + 1, time.perf_counter() - started, tokens)
        return loss

    def _try_step(self, model: nn.Module, indices: list[int]) -> Tensor | None:
        """None if memory ran out."""
        try:
            return self._step(model, indices)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _step(self, model: nn.Module, indices: list[int]) -> Tensor:
        model.train()
        # Dropout depends on the number of the step alone, so a resumed or repeated step draws the same masks.
        torch.manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        trees = [self.trees[i] for i in indices]
        units = self.algorithm.units(trees)
        loss = torch.zeros((), device=self.args.device)
        metrics: dict[str, list[tuple[float, int]]] = {}
        for row in self.scorer.rows(trees):
            policy, output = self.loss_of(model, [indices[i] for i in row])
            share = torch.stack([total / units[unit] for unit, total in output.loss.items()]).sum()
            if policy.auxiliary is not None:
                share = share + policy.auxiliary * (len(row) / len(trees))
            self.accelerator.backward(share)
            loss += share.detach()
            for name, mean in output.metrics.items():
                metrics.setdefault(name, []).append((float(mean.total), mean.number))
        self.step_metrics = {name: mean_of(parts) for name, parts in metrics.items()}
        return loss

    def loss_of(self, model: nn.Module, indices: Sequence[int]) -> tuple[TreeLogprobs, LossOutput]:
        """Log-probs, loss sums and metrics of the trees at `indices`, computed in one piece."""
        policy = self.scorer.score([self.trees[i] for i in indices], model)
        if self.reference is None:
            return policy, self.algorithm.loss(policy, None)
        tokens = torch.cat([self.reference[i] for i in indices]).to(policy.tokens)
        return policy, self.algorithm.loss(policy, TreeLogprobs(tokens, policy.completion, policy.lengths))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the metrics of a step to the run folder and hand them to the trackers."""
        if "learning_rate" not in logs:  # the Trainer's closing summary; the run folder has its own
            return
        step = self.state.global_step
        epoch = min(step * self.order.batch_size, self.order.draws) / self.order.trees
        logs = {"epoch": epoch, **logs, **self.step_metrics}
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

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # ---- checkpoints: written aside and renamed ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_parent)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        aside = self.checkpoints / ".writing"
        shutil.rmtree(aside, ignore_errors=True)
        self._checkpoint_parent = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint_parent = self.checkpoints
        write_json(aside / name / BUDGET, {"max_tokens": self.scorer.max_tokens})
        shutil.rmtree(self.checkpoints / name, ignore_errors=True)
        os.replace(aside / name, self.checkpoints / name)
        shutil.rmtree(aside)
        rotate_checkpoints(str(self.checkpoints), save_total_limit=self.args.save_total_limit)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The weights and nothing else: transformers would add a pickle of its arguments."""
        save_weights(self.scorer.model, Path(output_dir or self.checkpoints))


def save_weights(model: Any, folder: Path) -> None:
    """A model's or an adapter's weights and configuration, as safetensors."""
    with quiet():
        model.save_pretrained(folder)


def mean_of(parts: Sequence[tuple[float, int]]) -> float:
    """The mean of values that come as sums with their numbers."""
    return sum(total for total, _ in parts) / sum(number for _, number in parts)


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def budget_of(checkpoint: Path) -> int:
    """The token budget that a checkpoint was trained with."""
    return int(read_json(checkpoint / BUDGET)["max_tokens"])
