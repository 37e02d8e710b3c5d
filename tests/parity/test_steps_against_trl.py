"""Ten steps of prefold and of TRL from the same weights over the same pairs in the same order, in float32."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from prefold.data.mixture import load_split
from prefold.recipe import load_recipe, make_recipe
from prefold.training.arguments import training_arguments
from prefold.training.guards import Facts, Guards
from prefold.training.loop import StepOrder, StoredTrees, TrainingLoop, TreeSet
from prefold.training.record import StepRecord
from prefold.trees.packing import TokenTree
from prefold.trees.reference import Reference
from prefold.trees.scorer import Scorer

STEPS, BATCH, RATE = 10, 4, 1e-3
SETTINGS = {"dpo": {"beta": 0.1}, "orpo": {"beta": 0.1}, "reward": {"center_rewards_coefficient": 0.01}}
PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
COMPARED = {
    "dpo": ("loss", "grad_norm", *PAIR_METRICS),
    "orpo": ("loss", "grad_norm", "nll_loss", "log_odds_ratio", "log_odds_chosen", *PAIR_METRICS),
    "reward": ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"),
}


class TokenDPOTrainer(DPOTrainer):
    """TRL on pairs that are already tokens, in the order given."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class TokenORPOTrainer(ORPOTrainer):
    """The same; a row of its dataset is the token ids of a pair."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        prompt: list[int] = feature["prompt_ids"]
        row: dict[str, Any] = {"prompt_input_ids": prompt}
        for side in ("chosen", "rejected"):
            ids = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + ids
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(ids))
            row[f"{side}_labels"] = [-100] * len(prompt) + ids
        return row

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class TokenRewardTrainer(RewardTrainer):
    """The same; conversations are whole in TRL, their prompts included."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class GivenOrder(StepOrder):
    def _epoch(self, epoch: int) -> list[int]:
        return list(range(self.trees))


def short_pairs(vocabulary: int, count: int) -> list[TokenTree]:
    draw = random.Random(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(draw.randint(low, high)))

    return [TokenTree(ids(4, 12), (ids(2, 9), ids(2, 9))) for _ in range(count)]


def with_fresh_lora(model: PreTrainedModel) -> nn.Module:
    torch.manual_seed(5)
    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task))


def prefold_steps(
    method: str, model: nn.Module, trees: list[TokenTree], max_tokens: int, folder: Path
) -> list[dict[str, float]]:
    recipe = make_recipe(
        {
            "method": method,
            method: SETTINGS[method],
            "model": {"name": "unused", "dtype": "float32"},
            "data": {"train": [{"path": "unused"}]},
            "train": {"batch_size": BATCH, "max_steps": STEPS, "learning_rate": RATE},
            "output_dir": str(folder),
        }
    )
    scorer = Scorer(model, max_tokens, "prefold_joined")
    reference = Reference(scorer, trees, folder) if recipe.algorithm.needs_reference else None
    record = StepRecord(folder, 0, lambda **changes: None)
    order = GivenOrder(len(trees), BATCH, STEPS * BATCH, seed=0)
    args = training_arguments(recipe, STEPS)
    guards = Guards({}, Facts(STEPS, RATE, BATCH), record, 0, str, int)
    source = StoredTrees(TreeSet(trees, reference), order)
    TrainingLoop(recipe.algorithm, scorer, source, order, record, guards, args).train()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trl_steps(
    method: str, model: nn.Module, trees: list[TokenTree], tokenizer: Any, folder: Path
) -> list[dict[str, float]]:
    rows = [
        {"prompt_ids": list(t.prompt), "chosen_ids": list(t.completions[0]), "rejected_ids": list(t.completions[1])}
        for t in trees
    ]
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": RATE,
        **SETTINGS[method],
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer: Any
    if method == "dpo":
        config = DPOConfig(max_length=None, **settings)
        trainer = TokenDPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    elif method == "reward":
        whole = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows]
        data = Dataset.from_list(whole)
        config = RewardConfig(max_length=None, **settings)
        trainer = TokenRewardTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    else:
        for row in rows:
            row |= {"prompt": "", "chosen": "", "rejected": ""}
        trainer = TokenORPOTrainer(
            model,
            args=ORPOConfig(max_length=1024, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_steps(
    method: str, model: PreTrainedModel, tokenizer: Any, trees: list[TokenTree], folder: Path
) -> None:
    theirs = with_fresh_lora(copy.deepcopy(model))
    wanted = trl_steps(method, theirs, trees, tokenizer, folder / "trl")
    ours = with_fresh_lora(copy.deepcopy(model))
    (folder / "prefold").mkdir()
    found = prefold_steps(method, ours, trees, 64, folder=folder / "prefold")
    assert len(found) == len(wanted) == STEPS
    assert wanted[-1]["loss"] < wanted[0]["loss"] - 0.01  # ten steps in which something happened
    for step, (mine, other) in enumerate(zip(found, wanted, strict=True)):
        for name in COMPARED[method]:
            # At step 0 the rewards are zero but for rounding.
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=2e-6), f"{name} at step {step}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2", unk_token="w0")


@pytest.mark.parametrize("method", COMPARED)
def test_tiny_llama(method: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny_llama(eos_token_id=2, pad_token_id=1, bos_token_id=None, num_labels=1)
    if method == "reward":
        model = LlamaForSequenceClassification(model.config)
    assert_same_steps(method, model, tokenizer, short_pairs(97, 2 * BATCH) * (STEPS // 2), tmp_path)


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("method", COMPARED)
def test_smollm2(method: str, smollm2: Path, tmp_path: Path) -> None:
    """On real text: random tokens cost 15 nats each, and float32 rounds their sums by more than what is compared."""
    kind = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    torch.manual_seed(0)  # of a new head
    model = kind.from_pretrained(smollm2, dtype=torch.float32, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    recipe = load_recipe("demo", ["data.eval_fraction=0"])
    examples = load_split(recipe.data, tokenizer, seed=0).train
    trees = sorted(examples.trees, key=lambda tree: tree.size)[: STEPS * BATCH]
    assert_same_steps(method, model, tokenizer, trees, tmp_path)
