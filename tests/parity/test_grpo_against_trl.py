"""GRPO against TRL's `GRPOTrainer`: its loss on fixed rollouts, its advantages and metrics, and whole steps.

The loss and the advantages are those of the unmodified `_compute_loss` and `_generate_and_score_completions`. The
trainer is made without its `__init__`, and in place of a model stand functions that hand over log-probs and
completions, as in `test_losses.py`. The whole steps run both trainers on one tiny model with the same completions.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from preference_batches import logprobs, metric_means, step_loss
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from prefold.algorithms.grpo import GRPO
from prefold.data.examples import Example, Examples
from prefold.data.preference import Message, Prompt, RowId
from prefold.generation.sampling import Completion
from prefold.recipe import make_recipe
from prefold.rewards.scoring import Group, LoadedReward, scored_groups
from prefold.training.arguments import training_arguments
from prefold.training.guards import Facts, Guards
from prefold.training.loop import StepOrder, TrainingLoop
from prefold.training.record import StepRecord
from prefold.training.sampled_trees import SampledTrees, advantages_of, length_metrics, reward_metrics
from prefold.trees.head import Statistics
from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer

Settings = dict[str, Any]
GROUPS, SIZE = 3, 4
END, PAD = 2, 1


def alone(value: Any, **how: Any) -> Any:
    """Gathering over one process."""
    return value


class Idle(nn.Module):
    is_gradient_checkpointing = False


ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=alone, reduce=alone, num_processes=1, process_index=0, is_main_process=True
)


def bare(settings: Settings, folder: Path) -> Any:
    """A GRPOTrainer that has what the two methods read, and nothing else."""
    args = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        num_generations=SIZE,
        per_device_train_batch_size=GROUPS * SIZE,
        **settings,
    )
    trainer = object.__new__(GRPOTrainer)
    vars(trainer).update(
        accelerator=ACCELERATOR,
        args=args,
        model=Idle(),
        state=SimpleNamespace(num_input_tokens_seen=0, global_step=0),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        **{
            name: getattr(args, name)
            for name in (
                "beta",
                "importance_sampling_level",
                "loss_type",
                "mask_truncated_completions",
                "max_completion_length",
                "multi_objective_aggregation",
                "num_generations",
                "num_iterations",
                "off_policy_mask_threshold",
                "pad_to_multiple_of",
                "scale_rewards",
                "top_entropy_quantile",
            )
        },
        **dict.fromkeys(("environment_factories", "environments", "ref_model", "rollout_func", "tools")),
    )
    return trainer


# ---- the loss ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """`GROUPS` x `SIZE` completions of these lengths; `policy.tokens` is a leaf; `cut` says which were cut off."""

    policy: TreeLogprobs
    reference: TreeLogprobs
    trees: list[TokenTree]
    cut: Tensor


def rollout(off_policy: bool, seed: int = 0, apart: float = 0.3) -> Rollout:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (GROUPS * SIZE,), generator=draw).tolist()
    count = sum(lengths)

    def near(values: Tensor) -> Tensor:
        return values + apart * torch.randn(count, generator=draw, dtype=torch.float64)

    tokens = 1.5 * torch.rand(count, generator=draw, dtype=torch.float64).log()
    statistics = Statistics(torch.rand(count, generator=draw, dtype=torch.float64), tokens, tokens > -1)
    advantages = GRPO().advantages(torch.randn(GROUPS, SIZE, generator=draw, dtype=torch.float64)).flatten()
    policy = logprobs(
        tokens.clone().requires_grad_(),
        lengths,
        statistics=statistics,
        extras={"advantages": advantages, **({"old": near(tokens)} if off_policy else {})},
    )
    ids = iter(lengths)
    trees = [TokenTree((5, 5), tuple((7,) * next(ids) for _ in range(SIZE))) for _ in range(GROUPS)]
    cut = torch.tensor([place in (1, 5) for place in range(GROUPS * SIZE)])
    return Rollout(policy, logprobs(near(tokens), lengths), trees, cut)


def grid(logs: TreeLogprobs, tokens: Tensor) -> Tensor:
    """Tokens of prefold's flat order as TRL's `[completions, longest]`."""
    starts = logs.lengths.cumsum(0) - logs.lengths
    column = torch.arange(len(tokens)) - starts[logs.completion]
    shape = (len(logs.lengths), int(logs.lengths.max()))
    return tokens.new_zeros(shape).index_put((logs.completion, column), tokens)


def trl_loss(of: Rollout, settings: Settings, folder: Path) -> tuple[Tensor, dict[str, float]]:
    trainer, policy = bare(settings, folder), of.policy
    mask = grid(policy, torch.ones_like(policy.tokens)).long()
    if trainer.mask_truncated_completions:
        mask = mask * ~of.cut[:, None]
    assert policy.statistics is not None
    scored = grid(policy, policy.tokens), grid(policy, policy.statistics.entropy), None
    trainer._get_per_token_logps_and_entropies = lambda *args, **how: scored
    prompts = torch.full((len(mask), 2), 5)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.full_like(mask, 7),
        "completion_mask": mask,
        "advantages": policy.extras["advantages"],
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": grid(policy, of.reference.tokens),
    }
    if "old" in policy.extras:
        inputs["old_per_token_logps"] = grid(policy, policy.extras["old"])
    loss = trainer._compute_loss(None, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def without(of: Rollout, leaf: Tensor) -> Rollout:
    """What prefold is given where the completions that were cut off are left out: trees and log-probs without them."""
    policy = of.policy
    assert policy.statistics is not None
    kept = ~of.cut
    tokens, lengths = kept[policy.completion], policy.lengths[kept].tolist()
    entropy = policy.statistics.entropy[tokens]
    left = logprobs(
        leaf[tokens],
        lengths,
        statistics=Statistics(entropy, entropy, entropy > 0),
        extras={name: values[kept if name == "advantages" else tokens] for name, values in policy.extras.items()},
    )
    places = iter(kept.tolist())
    trees = [TokenTree(tree.prompt, tuple(ids for ids in tree.completions if next(places))) for tree in of.trees]
    return Rollout(left, logprobs(of.reference.tokens[tokens], lengths), trees, of.cut)


VARIANTS: list[Settings] = [
    {"loss_type": kind, "importance_sampling_level": level, **({"epsilon_high": 1.2} if kind == "cispo" else {})}
    for kind, level in itertools.product(("grpo", "bnpo", "dr_grpo", "dapo", "cispo"), ("token", "sequence"))
]
DIVERGENCES: list[Settings] = [
    {"beta": 0.0},
    {"beta": 0.2, "use_bias_correction_kl": True},
    {"beta": 0.2, "use_bias_correction_kl": False},
]
METRICS = ("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")


def named(settings: Any) -> str:
    return ",".join(map(str, settings.values())) if isinstance(settings, dict) else str(settings)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on", "off"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=named)
@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_loss(variant: Settings, divergence: Settings, off_policy: bool, masked: bool, tmp_path: Path) -> None:
    settings = {**variant, **divergence, "max_completion_length": 9, "mask_truncated_completions": masked}
    met: dict[str, set[bool]] = defaultdict(set)
    for seed in range(4):
        given = rollout(off_policy, seed)
        theirs, wanted = trl_loss(given, settings, tmp_path)
        leaf = given.policy.tokens
        ours = without(given, leaf) if masked else given
        algorithm = GRPO(num_generations=SIZE, **settings)
        output = algorithm.loss(ours.policy, ours.reference if algorithm.needs_reference else None)
        total = step_loss(output, algorithm, ours.trees)
        torch.testing.assert_close(total, theirs, rtol=1e-10, atol=1e-12)
        (mine,), (other,) = (torch.autograd.grad(loss, leaf) for loss in (total, theirs))
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
        found = metric_means(output)
        assert set(found) == {name for name in METRICS if name in wanted}
        for name, value in found.items():
            met[name].add(value > 0)
            # At sequence level TRL counts completions that it leaves out as not clipped.
            if not (masked and "clip" in name and variant["importance_sampling_level"] == "sequence"):
                assert value == pytest.approx(wanted[name], rel=1e-6, abs=1e-9), name  # TRL has float32 here
    if off_policy:
        assert all(True in values for values in met.values())  # something was clipped


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon": 0.1, "epsilon_high": 0.28},
        {"epsilon": 3e-4},
        {"epsilon": 0.1, "delta": 1.2, "beta": 0.1},  # the divergence is weighed by the ratio as it is
    ],
    ids=named,
)
def test_bounds(settings: Settings, tmp_path: Path) -> None:
    for level in ("token", "sequence"):
        given = rollout(off_policy=True)
        how = {"loss_type": "dapo", "importance_sampling_level": level, **settings}
        theirs, wanted = trl_loss(given, how, tmp_path)
        algorithm = GRPO(num_generations=SIZE, **how)
        output = algorithm.loss(given.policy, given.reference if algorithm.needs_reference else None)
        total = step_loss(output, algorithm, given.trees)
        torch.testing.assert_close(total, theirs, rtol=1e-10, atol=1e-12)
        (mine,), (other,) = (torch.autograd.grad(loss, given.policy.tokens) for loss in (total, theirs))
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
        assert metric_means(output)["clip_ratio/region_mean"] == pytest.approx(wanted["clip_ratio/region_mean"])


# ---- advantages and metrics of rewards ---------------------------------------------------------------------------


def completions(seed: int) -> list[list[Completion]]:
    """Of 1 to 9 tokens; at 9 without an end token, they were cut off."""
    draw = random.Random(seed)
    lengths = [[draw.choice([1, 3, 4, 6, 9]) for _ in range(SIZE)] for _ in range(GROUPS)]
    lengths[0][0] = 9
    return [
        [Completion((7,) * (length - 1) + ((END,) if length < 9 else (7,)), "x" * length, length < 9) for length in row]
        for row in lengths
    ]


def shortness(completions: Sequence[str], **columns: Any) -> list[float | None]:
    return [-abs(4.0 - len(text)) for text in completions]


def odd_ones(completions: Sequence[str], **columns: Any) -> list[float | None]:
    """Says nothing about the shortest ones."""
    return [None if len(text) == 1 else float(len(text) % 2) for text in completions]


def even_handed(completions: Sequence[str], **columns: Any) -> list[float | None]:
    return [None if len(text) == 1 else 0.5 for text in completions]


def trl_advantages(
    functions: Sequence[Any], weights: Sequence[float], groups: list[list[Completion]], settings: Settings, folder: Path
) -> tuple[Tensor, dict[str, float]]:
    trainer = bare(settings, folder)
    every = [one for group in groups for one in group]
    trainer.reward_funcs, trainer.reward_weights = list(functions), torch.tensor(weights)
    trainer.reward_func_names = [function.__name__ for function in functions]
    trainer.reward_processing_classes = [None] * len(functions)
    trainer.eos_token_ids, trainer._tokenizer = [END], SimpleNamespace(pad_token_id=PAD)
    trainer.processing_class = SimpleNamespace(batch_decode=lambda ids, **how: [one.text for one in every])
    trainer._tokenize_prompts = lambda prompts: ([[5, 5]] * len(prompts), None, {})
    trainer._generate_single_turn = lambda *args: ([list(one.token_ids) for one in every], None)
    output = trainer._generate_and_score_completions([{"prompt": f"{place // SIZE}"} for place in range(len(every))])
    return output["advantages"], {name: values[-1] for name, values in trainer._metrics["train"].items()}


def loaded(functions: Sequence[Any], weights: Sequence[float]) -> list[LoadedReward]:
    return [LoadedReward(each.__name__, each, weight) for each, weight in zip(functions, weights, strict=True)]


def our_groups(functions: Sequence[Any], weights: Sequence[float], groups: list[list[Completion]]) -> list[Group]:
    prompts = [Prompt((Message(role="user", content=str(place)),), {}, RowId("p", place)) for place in range(GROUPS)]
    return scored_groups(loaded(functions, weights), prompts, groups, [])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    ("functions", "weights"),
    [((shortness,), (1.0,)), ((shortness, odd_ones), (0.5, 2.0)), ((odd_ones,), (1.0,)), ((even_handed,), (1.0,))],
    ids=["one", "two", "silent", "equal"],
)
def test_advantages_and_metrics(functions: Sequence[Any], weights: Sequence[float], scale: Any, tmp_path: Path) -> None:
    for seed in range(5):
        drawn = completions(seed)
        wanted, metrics = trl_advantages(functions, weights, drawn, {"scale_rewards": scale}, tmp_path)
        groups = our_groups(functions, weights, drawn)
        found = advantages_of(GRPO(scale_rewards=scale), loaded(functions, weights), groups)
        torch.testing.assert_close(found.flatten(), wanted.double(), rtol=1e-5, atol=1e-5)
        ours = {**reward_metrics(groups), **length_metrics([one for group in drawn for one in group])}
        if scale == "batch":  # TRL then asks whether the rewards of the whole batch are equal
            del metrics["frac_reward_zero_std"], ours["frac_reward_zero_std"]
        del metrics["num_tokens"]
        assert set(ours) == {name for name, value in metrics.items() if not math.isnan(value)}
        assert ours == pytest.approx({name: metrics[name] for name in ours}, rel=1e-5, abs=1e-6)


MIXED = (shortness, odd_ones, even_handed), (0.5, 2.0, -1.0)
ONLY_SILENT = (odd_ones,), (3.0,)


@pytest.mark.parametrize(("functions", "weights"), [MIXED, ONLY_SILENT], ids=["mixed", "silent"])
def test_advantages_by_each_reward(functions: Sequence[Any], weights: Sequence[float], tmp_path: Path) -> None:
    settings = {"multi_objective_aggregation": "normalize_then_sum"}
    for seed in range(5):
        drawn = completions(seed)
        wanted, _ = trl_advantages(functions, weights, drawn, settings, tmp_path)
        groups = our_groups(functions, weights, drawn)
        found = advantages_of(GRPO(**settings), loaded(functions, weights), groups)
        torch.testing.assert_close(found.flatten(), wanted.double(), rtol=1e-5, atol=1e-5)
        assert found.abs().sum() > 1


def bare_rloo(folder: Path) -> Any:
    trainer = object.__new__(RLOOTrainer)
    vars(trainer).update(vars(bare({}, folder)))
    trainer.args = RLOOConfig(output_dir=str(folder), use_cpu=True, bf16=False, num_generations=SIZE)
    return trainer


def rloo_advantages(
    functions: Sequence[Any], weights: Sequence[float], groups: list[list[Completion]], normalised: bool, folder: Path
) -> Tensor:
    """By TRL's `RLOOTrainer`, made and fed as the other one."""
    trainer, every = bare_rloo(folder), [one for group in groups for one in group]
    trainer.reward_funcs, trainer.reward_weights = list(functions), torch.tensor(weights)
    trainer.reward_func_names = [function.__name__ for function in functions]
    trainer._tokenizer = SimpleNamespace(pad_token_id=PAD)
    trainer.normalize_advantages, trainer.reward_clip_range, trainer.beta = normalised, None, 0.0
    trainer._generate = lambda prompts: ([[5]] * len(every), [list(one.token_ids) for one in every], every)
    zeros = torch.zeros(len(every), max(len(one.token_ids) for one in every))
    trainer._get_per_token_logps_and_entropies = lambda *args, **how: (zeros, None, None)
    scores = [function(completions=[one.text for one in every]) for function in functions]
    trainer._calculate_rewards = lambda *args: torch.tensor(
        [[math.nan if value is None else value for value in row] for row in zip(*scores, strict=True)]
    )
    return trainer._generate_and_score_completions([{"prompt": "x"}] * len(every))["advantages"]


@pytest.mark.parametrize("scale", ["none", "batch"])
@pytest.mark.parametrize(("functions", "weights"), [MIXED, ONLY_SILENT], ids=["mixed", "silent"])
def test_advantages_of_rloo(functions: Sequence[Any], weights: Sequence[float], scale: Any, tmp_path: Path) -> None:
    for seed in range(5):
        drawn = completions(seed)
        wanted = rloo_advantages(functions, weights, drawn, scale == "batch", tmp_path)
        algorithm = GRPO(baseline="leave_one_out", scale_rewards=scale)
        found = advantages_of(algorithm, loaded(functions, weights), our_groups(functions, weights, drawn))
        torch.testing.assert_close(found.flatten(), wanted.double(), rtol=1e-5, atol=1e-5)
        assert found.abs().sum() > 1


def test_gradient_of_rloo(tmp_path: Path) -> None:
    """In the first step on a rollout; TRL does not divide by a length."""
    given, trainer = rollout(off_policy=False), bare_rloo(tmp_path)
    leaf, mask = given.policy.tokens, grid(given.policy, torch.ones_like(given.policy.tokens)).long()
    trainer._get_per_token_logps_and_entropies = lambda *args, **how: (grid(given.policy, leaf), 0.0 * mask, None)
    theirs = trainer._compute_loss(
        None,
        {
            "prompt_ids": mask,
            "prompt_mask": mask,
            "completion_ids": mask,
            "completion_mask": mask,
            "old_logps": grid(given.policy, leaf.detach()).sum(1),
            "advantages": given.policy.extras["advantages"],
        },
    )
    algorithm = GRPO(
        num_generations=SIZE,
        baseline="leave_one_out",
        scale_rewards="none",
        loss_type="dr_grpo",
        max_completion_length=9,
    )
    total = step_loss(algorithm.loss(given.policy, None), algorithm, given.trees)
    (mine,), (other,) = (torch.autograd.grad(loss, leaf) for loss in (total, theirs))
    torch.testing.assert_close(9 * mine, other, rtol=1e-10, atol=1e-12)


# ---- whole steps -------------------------------------------------------------------------------------------------

STEPS, PROMPTS, RATE, TEMPERATURE = 4, 3, 1e-2, 0.7
COMPARED = ("loss", "grad_norm", "kl", "entropy", "reward", "reward_std", "completions/mean_length")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2", unk_token="w0")


class Script:
    """The completions of every prompt, one group after the other as they are asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.asked = tokenizer, defaultdict(int)

    def group(self, prompt: tuple[int, ...]) -> list[Completion]:
        draw = random.Random(f"{prompt} {self.asked[prompt]}")
        self.asked[prompt] += 1
        rows = [tuple(draw.randrange(3, 97) for _ in range(draw.randint(1, 6))) for _ in range(SIZE)]
        rows = [ids if len(ids) == 6 else (*ids, END) for ids in rows]
        return [Completion(ids, self.tokenizer.decode(ids, skip_special_tokens=True), ids[-1] == END) for ids in rows]


def sum_of_words(completions: Sequence[str], **columns: Any) -> list[float | None]:
    return [sum(int(word[1:]) for word in text.split()) / 100 for text in completions]


def with_fresh_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def prompts_of_words() -> list[str]:
    draw = random.Random(1)
    return [" ".join(f"w{draw.randrange(3, 97)}" for _ in range(draw.randint(2, 7))) for _ in range(2 * PROMPTS)]


def trl_steps(model: nn.Module, tokenizer: Any, settings: Settings, folder: Path) -> list[dict[str, float]]:
    script = Script(tokenizer)

    def roll_out(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids = [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        groups = [script.group(prompt) for prompt in ids[::SIZE]]
        every = [list(one.token_ids) for group in groups for one in group]
        return {"prompt_ids": [list(row) for row in ids], "completion_ids": every, "logprobs": None}

    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=PROMPTS * SIZE,
        num_generations=SIZE,
        max_completion_length=6,
        max_steps=STEPS,
        learning_rate=RATE,
        temperature=TEMPERATURE,
        shuffle_dataset=False,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=sum_of_words,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts_of_words()]),
        processing_class=tokenizer,
        rollout_func=roll_out,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class GivenOrder(StepOrder):
    def _epoch(self, epoch: int) -> list[int]:
        return list(range(self.trees))


def prefold_steps(
    model: nn.Module, tokenizer: Any, settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, float]]:
    script = Script(tokenizer)

    def scripted(model: Any, tokenizer: Any, prompts: Any, sampling: Any, seeds: Any) -> list[list[Completion]]:
        assert (sampling.temperature, sampling.num_answers, sampling.max_new_tokens) == (TEMPERATURE, SIZE, 6)
        return [script.group(prompt) for prompt in prompts]

    monkeypatch.setattr("prefold.training.sampled_trees.sample", scripted)
    recipe = make_recipe(
        {
            "method": "grpo",
            "model": {"name": "unused", "dtype": "float32"},
            "data": {"train": [{"path": "unused"}]},
            "rewards": [{"name": "length", "target": 1}],
            "train": {"batch_size": PROMPTS, "max_steps": STEPS, "learning_rate": RATE},
            "grpo": {
                "num_generations": SIZE,
                "max_completion_length": 6,
                "temperature": TEMPERATURE,
                **settings,
            },
            "output_dir": str(folder),
        }
    )
    examples = Examples.of(
        Example(
            Prompt((Message(role="user", content=text),), {}, RowId("p", row)),
            TokenTree(tuple(tokenizer(text)["input_ids"]), ()),
        )
        for row, text in enumerate(prompts_of_words())
    )
    iterations = settings.get("num_iterations", 1)
    algorithm, scorer = recipe.algorithm, Scorer(model, 50, "prefold_joined", temperature=TEMPERATURE)
    order = GivenOrder(len(examples), PROMPTS, STEPS // iterations * PROMPTS, 0, iterations)
    record = StepRecord(folder, 0, lambda **changes: None)
    rewards = [LoadedReward("sum_of_words", sum_of_words)]
    source = SampledTrees(algorithm, scorer, examples, rewards, [], tokenizer, order, [], seed=0)
    guards = Guards({}, Facts(STEPS, RATE, PROMPTS), record, 0, str, int)
    TrainingLoop(algorithm, scorer, source, order, record, guards, training_arguments(recipe, STEPS)).train()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1, "loss_type": "dapo"},
        {"beta": 0.1, "loss_type": "grpo", "num_iterations": 2, "epsilon": 0.05},
        {"beta": 0.0, "loss_type": "dr_grpo", "num_iterations": 2, "importance_sampling_level": "sequence"},
        {"beta": 0.0, "loss_type": "cispo", "epsilon_high": 1.1, "num_iterations": 2, "scale_rewards": "batch"},
        {"beta": 0.05, "mask_truncated_completions": True, "scale_rewards": "none"},
    ],
    ids=named,
)
def test_steps(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(eos_token_id=END, pad_token_id=PAD, bos_token_id=None)
    wanted = trl_steps(with_fresh_lora(copy.deepcopy(model)), tokenizer, settings, tmp_path / "trl")
    (tmp_path / "prefold").mkdir()
    theirs = with_fresh_lora(copy.deepcopy(model))
    found = prefold_steps(theirs, tokenizer, settings, tmp_path / "prefold", monkeypatch)
    assert len(found) == len(wanted) == STEPS
    for step, (mine, other) in enumerate(zip(found, wanted, strict=True)):
        for name in COMPARED:
            assert (name in mine) == (other.get(name) is not None), f"{name} at step {step}"
            if name in mine:
                assert mine[name] == pytest.approx(other[name], rel=2e-4, abs=2e-6), f"{name} at step {step}"
    assert found[-1]["grad_norm"] > 1e-3
