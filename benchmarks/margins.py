"""How far bfloat16 moves the margins of real pairs, in prefold and in TRL.

    python -m benchmarks.margins --data pairs.jsonl --pairs 24

The margin of a pair is policy minus reference, chosen minus rejected, in nats, for an adapter after a few steps. Truth
is float32 with weights that bfloat16 can hold, as those of published models are. Prints a table and a line of JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from benchmarks.results import parser_for, quieten, write
from benchmarks.workloads import lora_settings, text_pairs
from prefold.models.adapters import add_lora
from prefold.models.fetch import fetch
from prefold.models.load import load_model
from prefold.recipe import Lora, Model
from prefold.trees.packing import TokenTree
from prefold.trees.reference import compute_reference
from prefold.trees.scorer import choose_scorer

TRAINING_PAIRS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = parser_for("margins", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="jsonl of prompt, chosen, rejected")
    parser.add_argument("--max-length", type=int, default=640)
    parser.add_argument("--pairs", type=int, default=24)
    options = parser.parse_args(arguments)
    quieten()
    folder = fetch(options.model)
    pairs, _ = text_pairs(options.data, folder, options.max_length, options.pairs + TRAINING_PAIRS)
    training, pairs = pairs[:TRAINING_PAIRS], pairs[TRAINING_PAIRS:]
    model = adapted(folder, "float32")
    adapter = trained(model, training)
    exact = prefold_margins(model, pairs, torch.float32)
    theirs = trl_margins(adapted(folder, "float32"), adapter, AutoTokenizer.from_pretrained(folder), pairs)
    low = adapted(folder, "bfloat16")
    set_peft_model_state_dict(low, adapter)
    ours = prefold_margins(low, pairs, torch.bfloat16)
    measured = {
        "margin_rms": rms(exact),
        "error_trl": rms(theirs - exact),
        "error_prefold": rms(ours - exact),
        "pairs": len(pairs),
    }
    table = Table("nats, rms over pairs", "")
    table.add_row("margin in float32", f"{measured['margin_rms']:.3f}")
    table.add_row("error of TRL in bfloat16", f"{measured['error_trl']:.3f}")
    table.add_row("error of prefold in bfloat16", f"{measured['error_prefold']:.3f}")
    Console().print(table)
    write("margins-cpu", options, measured)
    print(json.dumps(measured))


def rms(values: Tensor) -> float:
    return round(float(values.square().mean().sqrt()), 4)


def adapted(folder: Path, dtype: str) -> Any:
    model = load_model(Model(name=str(folder)), dtype=dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
    return add_lora(model, Lora(**lora_settings()), seed=0)


def trained(model: Any, pairs: list[TokenTree]) -> dict[str, Tensor]:
    """The adapter after a few plain steps that raise the chosen and lower the rejected completions."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
    scorer = choose_scorer(model, pairs[:2], 1024)
    model.train()
    for start in range(0, len(pairs), 4):
        with scorer.in_place():
            for row in scorer.rows(pairs[start : start + 4]):
                chosen, rejected = scorer.score([pairs[start + i] for i in row]).pairs()
                (rejected - chosen).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(get_peft_model_state_dict(model))


@torch.no_grad()
def prefold_margins(model: Any, pairs: list[TokenTree], dtype: torch.dtype) -> Tensor:
    """`[n]`, as a training step computes them."""
    model.eval()
    scorer = choose_scorer(model, pairs[:2], 1024)
    scored = compute_reference(scorer, pairs, dtype)
    reference = torch.stack([margin(tokens, tree) for tokens, tree in zip(scored, pairs, strict=True)])
    policy = torch.zeros(len(pairs))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for row in scorer.rows(pairs):
            chosen, rejected = scorer.score([pairs[i] for i in row]).pairs()
            policy[row] = chosen - rejected
    return policy - reference


def margin(tokens: Tensor, tree: TokenTree) -> Tensor:
    first = len(tree.completions[0])
    return tokens[:first].sum() - tokens[first:].sum()


def trl_margins(
    model: Any, adapter: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, pairs: list[TokenTree]
) -> Tensor:
    """`[n]`, by TRL's own loss under the autocast of `bf16=True`, one pair at a time."""

    class TokenDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

    rows = [
        {"prompt_ids": list(t.prompt), "chosen_ids": list(t.completions[0]), "rejected_ids": list(t.completions[1])}
        for t in pairs
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=1.0,
            max_length=None,
            bf16=True,
            use_cpu=True,
            report_to=[],
            gradient_checkpointing=False,
        )
        trainer = TokenDPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        # Only now: the adapter that a model brings along is a part of TRL's reference.
        set_peft_model_state_dict(model, adapter)
        margins = []
        model.eval()
        for row in rows:
            trainer._metrics["eval"].clear()
            # What `bf16=True` wraps the model's forward in when it trains.
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                trainer.compute_loss(model, trainer.data_collator([row]))
            margins.append(trainer._metrics["eval"]["rewards/margins"][0])
    return torch.tensor(margins)


if __name__ == "__main__":
    main()
