"""Every loss against TRL's own code, in value, gradient and metrics, on random and extreme log-probs.

What runs is the unmodified `_compute_loss` (DPO, KTO) or `get_batch_loss_metrics` (ORPO, CPO) of TRL's trainers. The
trainer is made without its `__init__`, which would want a model and a data set, and given the attributes that these
methods read, from TRL's own config where a setting is meant. In place of a model stands a function that returns what a
model would: for DPO and KTO the log-probs per token that TRL's fused head hands over, for ORPO and CPO logits. Both
sides start from the same leaf, so their gradients by it can be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from preference_batches import CASES, Batch, batch, case, logprobs, metric_means, random_batch, step_loss
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from prefold.algorithms import Algorithm
from prefold.algorithms.aot import AOT, AOTUnpaired
from prefold.algorithms.apo import APODown, APOZero
from prefold.algorithms.bco import BCO
from prefold.algorithms.cpo import CPO
from prefold.algorithms.discopop import DiscoPOP
from prefold.algorithms.dpo import DPO
from prefold.algorithms.exo import EXO
from prefold.algorithms.hinge import Hinge
from prefold.algorithms.ipo import IPO
from prefold.algorithms.kto import KTO
from prefold.algorithms.mixed import Mixed
from prefold.algorithms.nca import NCA
from prefold.algorithms.orpo import ORPO
from prefold.algorithms.reward import BradleyTerry
from prefold.algorithms.robust import Robust
from prefold.algorithms.sft import SFT
from prefold.algorithms.sigmoid_norm import SigmoidNorm
from prefold.algorithms.simpo import SimPO
from prefold.algorithms.sppo import SPPO
from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.packing import TokenTree

Settings = dict[str, Any]


def alone(value: Any) -> Any:
    """Gathering over one process."""
    return value


class Idle(torch.nn.Module):
    """What a trainer asks for its state: in training, without checkpointing."""

    is_gradient_checkpointing = False


ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=alone, gather_for_metrics=alone)


def bare(kind: Any, **attributes: Any) -> Any:
    """A trainer that has these attributes and nothing else."""
    trainer = object.__new__(kind)
    vars(trainer).update(
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        model=Idle(),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )
    return trainer


def fused(log_probs: Tensor, log_sum_sq_probs: Tensor) -> SimpleNamespace:
    """What a model returns under TRL's `fused_lm_head`."""
    nothing = torch.zeros_like(log_probs)
    return SimpleNamespace(
        log_probs=log_probs,
        log_sum_sq_probs=log_sum_sq_probs,
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
    )


def assert_same(ours: Tensor, theirs: Tensor, leaf: Tensor, rtol: float, atol: float = 1e-12, within: str = "") -> None:
    torch.testing.assert_close(ours, theirs.to(ours), rtol=rtol, atol=atol, msg=lambda text: f"value {within}: {text}")
    (mine,) = torch.autograd.grad(ours, leaf)
    (other,) = torch.autograd.grad(theirs, leaf)
    assert torch.isfinite(mine).all()
    torch.testing.assert_close(mine, other, rtol=rtol, atol=atol, msg=lambda text: f"gradient {within}: {text}")


# ---- DPOTrainer --------------------------------------------------------------------------------------------------


def grid(tokens: Tensor, pairs: Batch) -> Tensor:
    """Tokens of prefold's flat order as TRL's `[2B, T - 1]`: all chosen rows, then all rejected ones."""
    rows, columns, trees = [], [], pairs.trees
    for i, tree in enumerate(trees):
        for side, ids in enumerate(tree.completions):
            rows += [i + side * len(trees)] * len(ids)
            columns += range(len(tree.prompt) - 1, len(tree.prompt) + len(ids) - 1)
    width = max(tree.longest for tree in trees) - 1
    return tokens.new_zeros(2 * len(trees), width).index_put((torch.tensor(rows), torch.tensor(columns)), tokens)


def trl_dpo(pairs: Batch, folder: Path, settings: Settings) -> tuple[Tensor, dict[str, float]]:
    args = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, **settings)
    scored = grid(torch.ones_like(pairs.reference.tokens), pairs)
    mask = torch.cat([torch.zeros(len(scored), 1), scored], dim=1).long()
    assert pairs.policy.statistics is not None
    policy = fused(grid(pairs.policy.tokens, pairs), grid(pairs.policy.statistics.squares.log(), pairs))
    reference = fused(grid(pairs.reference.tokens, pairs), scored)
    trainer = bare(
        DPOTrainer,
        args=args,
        ref_model=lambda **inputs: reference,
        precompute_ref_logps=False,
        loss_types=args.loss_type,
        loss_weights=args.loss_weights or [1.0] * len(args.loss_type),
        **{
            name: getattr(args, name)
            for name in (
                "beta",
                "ld_alpha",
                "f_divergence_type",
                "f_alpha_divergence_coef",
                "label_smoothing",
                "use_weighting",
            )
        },
    )
    inputs = {"input_ids": torch.full_like(mask, 5), "attention_mask": mask, "completion_mask": mask}
    loss = trainer._compute_loss(lambda **inputs: policy, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


OF_PAIRS: list[tuple[Algorithm, Settings]] = [
    (DPO(beta=0.1), {"loss_type": ["sigmoid"]}),
    (DPO(beta=0.5), {"loss_type": ["sigmoid"], "beta": 0.5}),
    (Hinge(beta=0.2), {"loss_type": ["hinge"], "beta": 0.2}),
    (IPO(beta=0.1), {"loss_type": ["ipo"]}),
    (Robust(beta=0.1, label_smoothing=0.2), {"loss_type": ["robust"], "label_smoothing": 0.2}),
    (EXO(beta=0.1, label_smoothing=1e-3), {"loss_type": ["exo_pair"], "label_smoothing": 1e-3}),
    (NCA(beta=0.05), {"loss_type": ["nca_pair"], "beta": 0.05}),
    (BCO(beta=0.05, reward_shift=False), {"loss_type": ["bco_pair"], "beta": 0.05}),
    (SPPO(beta=0.01), {"loss_type": ["sppo_hard"], "beta": 0.01}),
    (AOT(beta=0.1), {"loss_type": ["aot"]}),
    (AOT(beta=0.1, label_smoothing=0.1), {"loss_type": ["aot"], "label_smoothing": 0.1}),
    (AOTUnpaired(beta=0.1, label_smoothing=0.1), {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1}),
    (APOZero(beta=0.1), {"loss_type": ["apo_zero"]}),
    (APODown(beta=0.1), {"loss_type": ["apo_down"]}),
    (DiscoPOP(beta=0.05, discopop_tau=0.05), {"loss_type": ["discopop"], "beta": 0.05}),
    (DiscoPOP(beta=0.05, discopop_tau=0.3), {"loss_type": ["discopop"], "beta": 0.05, "discopop_tau": 0.3}),
    (SigmoidNorm(beta=5.0), {"loss_type": ["sigmoid_norm"], "beta": 5.0}),
    (SFT(), {"loss_type": ["sft"]}),
    (DPO(f_divergence_type="js_divergence"), {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"}),
    (IPO(f_divergence_type="js_divergence"), {"loss_type": ["ipo"], "f_divergence_type": "js_divergence"}),
    (DPO(ld_alpha=0.3), {"loss_type": ["sigmoid"], "ld_alpha": 0.3}),
    (IPO(ld_alpha=0.0), {"loss_type": ["ipo"], "ld_alpha": 0.0}),
    (AOT(ld_alpha=0.3), {"loss_type": ["aot"], "ld_alpha": 0.3}),
    (DPO(use_weighting=True), {"loss_type": ["sigmoid"], "use_weighting": True}),
    (NCA(beta=0.1, use_weighting=True), {"loss_type": ["nca_pair"], "use_weighting": True}),
    (DPO(use_weighting=True, ld_alpha=0.5), {"loss_type": ["sigmoid"], "use_weighting": True, "ld_alpha": 0.5}),
    (
        Mixed(
            losses=[
                {"name": "dpo", "weight": 0.8},
                {"name": "bco", "weight": 0.2, "beta": 0.1, "reward_shift": False},
                {"name": "sft"},
            ]
        ),
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
]


def named(value: Any) -> str:
    return type(value).__name__ if isinstance(value, Algorithm) else ",".join(map(str, value.values()))


@pytest.mark.parametrize(("algorithm", "settings"), OF_PAIRS, ids=named)
def test_losses_of_pairs(algorithm: Algorithm, settings: Settings, tmp_path: Path) -> None:
    for name in CASES:
        pairs = case(name)
        theirs, metrics = trl_dpo(pairs, tmp_path, settings)
        output = algorithm.loss(pairs.policy, pairs.reference if algorithm.needs_reference else None)
        # TRL takes EXO's label smoothing in float32.
        rtol = 1e-6 if isinstance(algorithm, EXO) else 1e-9
        assert_same(step_loss(output, algorithm, pairs.trees), theirs, pairs.policy.tokens, rtol, within=f"in {name}")
        for metric, value in metric_means(output).items():
            if metric in metrics:
                assert value == pytest.approx(metrics[metric], rel=1e-6, abs=1e-9), f"{metric} in {name}"


@pytest.mark.parametrize("algorithm", [algorithm for algorithm, _ in OF_PAIRS if algorithm.needs_reference], ids=named)
def test_metrics_that_are_compared(algorithm: Algorithm) -> None:
    pairs = case("ordinary")
    assert set(algorithm.loss(pairs.policy, pairs.reference).metrics) >= {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    }


def test_all_losses_of_trls_dpo_trainer_are_compared() -> None:
    documented = str(DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    known = {word.strip("'`,. ") for word in documented.split("`") if word.startswith("'")}
    assert len(known) == 15
    assert known == {kind for _, settings in OF_PAIRS for kind in settings["loss_type"]}


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (
            DPO(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha),
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha},
        )
        for alpha in (0.5, 0.0, 1.0, 1.2)
    ]
    + [(DPO(f_divergence_type="forward_kl"), {"f_divergence_type": "forward_kl"})],
    ids=named,
)
@pytest.mark.parametrize("name", CASES)
def test_divergences_with_exponentials(algorithm: Algorithm, settings: Settings, name: str, tmp_path: Path) -> None:
    """In float32, for TRL's alpha divergence knows no other wide dtype: 2,000 tokens round by 3e-4 nats."""
    pairs = case(name, torch.float32)
    theirs, _ = trl_dpo(pairs, tmp_path, settings)
    ours = step_loss(algorithm.loss(pairs.policy, pairs.reference), algorithm, pairs.trees)
    if name == "extreme" and settings["f_divergence_type"] == "forward_kl":
        # TRL has an exponential without a bound here.
        assert not theirs.isfinite()
        assert ours.isfinite() and torch.autograd.grad(ours, pairs.policy.tokens)[0].isfinite().all()
        return
    assert_same(ours, theirs, pairs.policy.tokens, rtol=1e-3 if name == "2000 tokens" else 1e-4, atol=1e-6)


def test_conservative_dpo(tmp_path: Path) -> None:
    """TRL's `sigmoid` ignores label smoothing; its `aot` has the same formula, and one pair is sorted already."""
    for seed in range(5):
        pairs = random_batch([4, 6], seed=seed)
        theirs, _ = trl_dpo(pairs, tmp_path, {"loss_type": ["aot"], "label_smoothing": 0.15})
        ours = DPO(label_smoothing=0.15).loss(pairs.policy, pairs.reference).loss["pairs"]
        assert_same(ours, theirs, pairs.policy.tokens, rtol=1e-9)


def test_discopop_is_finite_where_trl_is_not(tmp_path: Path) -> None:
    """In float32 with a margin of -100, TRL multiplies 0 by infinity."""
    pairs = batch(torch.tensor([-1002.0, -2.0]), torch.tensor([-2.0, -2.0]), [1, 1])
    theirs, _ = trl_dpo(pairs, tmp_path, {"loss_type": ["discopop"], "beta": 0.1})
    assert theirs.isnan()
    ours = DiscoPOP(beta=0.1).loss(pairs.policy, pairs.reference).loss["pairs"]
    assert ours.item() == pytest.approx(100.0)


# ---- ORPOTrainer, CPOTrainer -------------------------------------------------------------------------------------


class Conversations:
    """Pairs as logits: a leaf `[2B, T, V]` that both sides start from."""

    def __init__(self, lengths: Sequence[int], scale: float, vocabulary: int = 11, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)

        def ids(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(vocabulary, (count,), generator=draw).tolist())

        self.trees = [
            TokenTree(ids(1 + i % 4), (ids(lengths[2 * i]), ids(lengths[2 * i + 1]))) for i in range(len(lengths) // 2)
        ]
        self.lengths = list(lengths)
        width = max(tree.longest for tree in self.trees)
        shape = (2 * len(self.trees), width, vocabulary)
        self.logits = (scale * torch.randn(shape, generator=draw, dtype=torch.float64)).requires_grad_()

    def policy(self) -> TreeLogprobs:
        logs = self.logits.log_softmax(-1)
        tokens, prompts = [], []
        for i, tree in enumerate(self.trees):
            depth = len(tree.prompt)
            own = logs[i, range(depth - 1), torch.tensor(tree.prompt[1:], dtype=torch.long)]
            prompts.append(own.sum())
            for side, ids in enumerate(tree.completions):
                row = i + side * len(self.trees)
                tokens.append(logs[row, range(depth - 1, depth + len(ids) - 1), torch.tensor(ids)])
        depths = torch.tensor([len(tree.prompt) - 1 for tree in self.trees])
        return logprobs(torch.cat(tokens), self.lengths, prompts=torch.stack(prompts), prompt_lengths=depths)

    def inputs(self) -> dict[str, Tensor]:
        """TRL's padded batch."""
        found: dict[str, Tensor] = {}
        for side, name in enumerate(("chosen", "rejected")):
            width = max(len(tree.prompt) + len(tree.completions[side]) for tree in self.trees)
            for key, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
                rows = torch.full((len(self.trees), width), padding)
                for i, tree in enumerate(self.trees):
                    whole = torch.tensor(tree.prompt + tree.completions[side])
                    start = len(tree.prompt) if key == "labels" else 0
                    rows[i, start : len(whole)] = 1 if key == "attention_mask" else whole[start:]
                found[f"{name}_{key}"] = rows
        return found

    def trl(self, trainer: Any) -> tuple[Tensor, dict[str, float]]:
        def model(ids: Tensor, **others: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=self.logits[:, : ids.shape[1]])

        loss: tuple[Tensor, dict[str, float]] = trainer.get_batch_loss_metrics(model, self.inputs())
        return loss


CONVERSATIONS = {
    "ordinary": ([5, 3, 1, 7, 4, 4, 2, 9], 1.0),
    "extreme": ([5, 3, 1, 7, 4, 4, 2, 9], 300.0),
    "equal": ([3, 3, 3, 3], 0.0),
    "single tokens": ([1] * 12, 2.0),
    "2000 tokens": ([2000, 1500, 3, 2000], 2.0),
}


def compare_conversations(algorithm: Algorithm, trainer: Any, name: str, rtol: float) -> None:
    talk = Conversations(*CONVERSATIONS[name])
    theirs, metrics = talk.trl(trainer)
    output = algorithm.loss(talk.policy(), None)
    assert_same(step_loss(output, algorithm, talk.trees), theirs, talk.logits, rtol, atol=1e-7)
    found = metric_means(output)
    wanted = {key: value for key, value in metrics.items() if not key.startswith("logits/")}
    assert set(found) == set(wanted)
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_orpo(name: str, tmp_path: Path) -> None:
    """TRL takes the odds in float32."""
    args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.25)
    trainer = bare(ORPOTrainer, beta=args.beta, padding_value=0, args=args)
    compare_conversations(ORPO(beta=0.25), trainer, name, rtol=1e-4)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (CPO(), {}),
        (CPO(beta=0.3, cpo_alpha=0.5, label_smoothing=0.1), {"beta": 0.3, "cpo_alpha": 0.5, "label_smoothing": 0.1}),
        (CPO(loss_type="hinge", cpo_alpha=0.0), {"loss_type": "hinge", "cpo_alpha": 0.0}),
        (CPO(loss_type="ipo"), {"loss_type": "ipo"}),
        (
            SimPO(beta=2.0, simpo_gamma=1.0),
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        ),
    ],
    ids=named,
)
def test_cpo_and_simpo(algorithm: Algorithm, settings: Settings, name: str, tmp_path: Path) -> None:
    args = CPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    fields = ("beta", "label_smoothing", "loss_type", "cpo_alpha", "alpha", "simpo_gamma")
    trainer = bare(CPOTrainer, pad_token_id=0, **{field: getattr(args, field) for field in fields})
    talk = Conversations(*CONVERSATIONS[name])
    theirs, metrics = talk.trl(trainer)
    output = algorithm.loss(talk.policy(), None)
    assert_same(step_loss(output, algorithm, talk.trees), theirs, talk.logits, rtol=1e-9)
    found = metric_means(output)
    if settings.get("cpo_alpha") == 0.0:  # TRL does not compute what has no weight
        found.pop("nll_loss", None), metrics.pop("nll_loss")
    assert found == pytest.approx({key: metrics[key] for key in found}, rel=1e-9, abs=1e-12)
    assert {key for key in metrics if not key.startswith("logits/")} == set(found)


# ---- KTOTrainer --------------------------------------------------------------------------------------------------


def kto_batch(count: int, seed: int, size: float = 3.0) -> tuple[TreeLogprobs, TreeLogprobs]:
    """`count` completions of one token; the last is desirable, every other one is not."""
    draw = torch.Generator().manual_seed(seed)
    values = -size * torch.rand(4, count, generator=draw, dtype=torch.float64)
    labels = torch.tensor([i % 2 == 1 or i == count - 1 for i in range(count)])
    policy = logprobs(
        values[0].clone().requires_grad_(), [1] * count, extras={"label": labels, "mismatched": values[2]}
    )
    return policy, logprobs(values[1], [1] * count, extras={"mismatched": values[3]})


def trl_kto(policy: TreeLogprobs, reference: TreeLogprobs, args: KTOConfig) -> tuple[Tensor, dict[str, float]]:
    """Completions of one token behind prompts of two; the mismatched ones are told by their token ids, 7."""

    def model(of: TreeLogprobs) -> Any:
        def forward(input_ids: Tensor, **others: Any) -> SimpleNamespace:
            own = of.extras["mismatched"] if (input_ids == 7).all() else of.tokens
            assert own is not None
            log_probs = torch.stack([torch.zeros_like(own), own], dim=1)
            return fused(log_probs, log_probs)

        return forward

    mask = torch.tensor([[0, 0, 1]] * len(policy.extras["label"]))
    inputs = {"label": policy.extras["label"]}
    for prefix, token in (("", 5), ("KL_", 7)):
        inputs |= {
            f"{prefix}input_ids": torch.full_like(mask, token),
            f"{prefix}attention_mask": torch.ones_like(mask),
            f"{prefix}completion_mask": mask,
        }
    trainer = bare(
        KTOTrainer,
        args=args,
        ref_model=model(reference),
        precompute_ref_logps=False,
        calculate_KL=True,
        **{name: getattr(args, name) for name in ("beta", "loss_type", "desirable_weight", "undesirable_weight")},
    )
    loss = trainer._compute_loss(model(policy), inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("size", [3.0, 1e3])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_kto(count: int, size: float, tmp_path: Path) -> None:
    args = KTOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.2, desirable_weight=1.3, undesirable_weight=0.7
    )
    divergences = []
    for seed in range(4):
        policy, reference = kto_batch(count, seed, size)
        theirs, metrics = trl_kto(policy, reference, args)
        algorithm = KTO(beta=0.2, desirable_weight=1.3, undesirable_weight=0.7)
        output = algorithm.loss(policy, reference)
        trees = [TokenTree((5, 5), ((5,),))] * count
        assert_same(step_loss(output, algorithm, trees), theirs, policy.tokens, rtol=1e-9)
        found = metric_means(output)
        assert found == pytest.approx({key: metrics[key] for key in found}, rel=1e-9, abs=1e-12)
        assert {key for key in metrics if key.startswith(("rewards/", "logps/"))} <= set(found)
        divergences.append(found["kl"])
    assert min(divergences) == 0.0 < max(divergences)  # both sides of the bound were met


def test_kto_mismatches_as_trl_does(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2", unk_token="w0")
    rows = [{"prompt": f"w{i + 3} w4", "completion": f" w{i + 9} w{i + 10}", "label": i % 2 == 0} for i in range(5)]
    args = KTOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=5)
    trainer = bare(KTOTrainer, calculate_KL=True, _tokenizer=tokenizer, desirable_weight=1.0, undesirable_weight=1.0)
    prepared = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, args, "train")
    trees = [TokenTree(tuple(row["prompt_ids"]), (tuple(row["completion_ids"]),)) for row in prepared]
    mismatched = KTO().further_trees(trees)["mismatched"]
    assert [list(tree.completions[0]) for tree in mismatched] == prepared["KL_completion_ids"][:]
    assert [tree.prompt for tree in mismatched] == [tree.prompt for tree in trees]


# ---- RewardTrainer -----------------------------------------------------------------------------------------------

SCORES = {
    "ordinary": [0.3, -0.2, 1.5, 1.6, -0.7, -2.0, 0.1, 0.1],
    "extreme": [80.0, -80.0, -80.0, 80.0, 1e4, 1e4 + 1, 0.0, 0.0],
}


@pytest.mark.parametrize("coefficient", [None, 0.01])
@pytest.mark.parametrize("which", SCORES)
def test_reward(which: str, coefficient: float | None, tmp_path: Path) -> None:
    """TRL has all chosen conversations before all rejected ones; prefold has pairs."""
    policy = logprobs(torch.tensor(SCORES[which], dtype=torch.float64, requires_grad=True), [1] * 8)
    sides = policy.tokens.view(-1, 2).T.reshape(-1, 1)
    trainer = bare(
        RewardTrainer,
        args=RewardConfig(str(tmp_path), use_cpu=True, bf16=False, center_rewards_coefficient=coefficient),
    )
    inputs = {"input_ids": torch.zeros(8, 1), "attention_mask": torch.ones(8, 1)}
    theirs = trainer.compute_loss(lambda **inputs: SimpleNamespace(logits=sides), inputs)
    algorithm = BradleyTerry(center_rewards_coefficient=coefficient)
    output = algorithm.loss(policy, None)
    assert_same(output.loss["pairs"] / 4, theirs, policy.tokens, 1e-10)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    # TRL rounds its accuracy to float32.
    assert metric_means(output) == pytest.approx(metrics, rel=1e-6)
