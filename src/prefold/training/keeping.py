"""What a trainer keeps: checkpoints are written aside, sealed and renamed, the best one beside the newest; and training
goes on from them. Sharded weights are kept whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from prefold import ranks
from prefold.algorithms import NO_STATE, State
from prefold.models.messages import quiet
from prefold.training.checkpoints import seal
from prefold.training.record import StepRecord
from prefold.training.sharded import (
    giving_whole_states,
    has_shards,
    keep_own_parts,
    load_whole_weights,
    taking_whole_states,
    whole_weights,
)
from prefold.trees.scorer import Scorer


class KeepingTrainer(Trainer):
    """A trainer of `scorer.model` with checkpoints of ours.

    Args:
        scorer: whose token budget is kept with each checkpoint.
        record: whose lines are on the disk before a checkpoint is there.
        args: of transformers.
        settings: of transformers' Trainer.
    """

    def __init__(self, scorer: Scorer, record: StepRecord, args: TrainingArguments, **settings: Any):
        self.scorer, self.record = scorer, record
        self.carried: State = NO_STATE
        """What the algorithm takes along from step to step."""
        self.best_before: int | None = None
        self.checkpoints = Path(str(args.output_dir))
        self._checkpoint_parent = self.checkpoints
        keep_own_parts(scorer.model)
        # transformers cannot save what training of sharded weights is resumed from; see below.
        args.save_only_model = scorer.sharded
        super().__init__(model=scorer.model, args=args, **settings)
        args.save_only_model = False

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As transformers', and a best one that is wanted in the end is saved whatever `save_steps` says."""
        before = self.best
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.best_before = before
            self.control.should_save = True
        return is_best

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_parent)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        aside = self.checkpoints / ".writing"
        if ranks.is_first():
            shutil.rmtree(aside, ignore_errors=True)
        self._checkpoint_parent = aside
        try:
            super()._save_checkpoint(model, trial)
            self._point_to_best()
            if ranks.is_first():
                self._put_in_place(aside / name)
        finally:
            self._checkpoint_parent = self.checkpoints
            if ranks.is_first():
                shutil.rmtree(aside, ignore_errors=True)
        ranks.wait()

    def _put_in_place(self, written: Path) -> None:
        self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        seal(written, self.scorer.max_tokens, self.carried, self.best)
        self.record.settle()
        shutil.rmtree(self.checkpoints / written.name, ignore_errors=True)
        os.replace(written, self.checkpoints / written.name)
        # The newest stays anyway. Should it turn out broken, the one before is worth nothing without its own best.
        is_new_best = self.best == self.state.global_step and self.args.save_total_limit != 1
        best = self.best_before if is_new_best else self.best
        rotate_checkpoints(
            str(self.checkpoints),
            self.args.save_total_limit,
            best_model_checkpoint=str(self.checkpoints / f"checkpoint-{best}") if best else None,
        )

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint. Where none is wanted in the end, the best step may have no checkpoint."""
        return self.state.best_global_step if self.args.load_best_model_at_end else None

    def _point_to_best(self) -> None:
        """Where the best checkpoint lies for good: not where it was written, nor where the run folder was then."""
        self.state.best_model_checkpoint = str(self.checkpoints / f"checkpoint-{self.best}") if self.best else None

    def _init_training_state(self, *args: Any, **settings: Any) -> tuple[int, int]:
        found: tuple[int, int] = super()._init_training_state(*args, **settings)
        self._point_to_best()
        return found

    def _load_best_model(self) -> None:
        self._point_to_best()
        if not load_whole_weights(self.scorer.model, Path(str(self.state.best_model_checkpoint))):
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with giving_whole_states(self.optimizer, self.scorer.model):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with taking_whole_states(self.optimizer, self.scorer.model):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_whole_weights(self.scorer.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_rng_state(self, output_dir: str) -> None:
        """Of one process only: no number depends on it."""
        if ranks.processes() == 1:
            super()._save_rng_state(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The weights and nothing else: transformers would add a pickle of its arguments."""
        save_weights(self.scorer.model, Path(output_dir or self.checkpoints))


def save_weights(model: Any, folder: Path) -> None:
    """A model's or an adapter's weights and configuration, as safetensors, by the first process. Sharded weights take
    all of them."""
    keep_own_parts(model)
    if not (ranks.is_first() or has_shards(model)):
        return
    # Else peft adds the whole embeddings where the vocabulary has grown, and asks the hub whether it has.
    settings: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        settings = {"save_embedding_layers": False, "state_dict": whole_weights(model)}
    with quiet():
        model.save_pretrained(folder, is_main_process=ranks.is_first(), **settings)
