"""Merge an adapter into its unquantised base, saved whole, and proven: what is loaded back from disk must give the
logits of base + adapter on real tokens, and its tokenizer the same ids. How far it is from a quantised model that was
trained, and whether both models write the same, is measured and reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefold.errors import StageError
from prefold.files import new_folder
from prefold.models.adapters import open_adapter
from prefold.models.device import choose_device, choose_dtype
from prefold.models.load import load_model
from prefold.models.messages import quiet
from prefold.models.score_head import set_padding
from prefold.recipe import Model, RecipeBase
from prefold.trees.head import score_layer
from prefold.trees.memory import free_memory
from prefold.trees.padding import pad
from prefold.trees.reward_head import scores_of

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest root-mean-square difference of the logits, as a share of their own root mean square, by the dtype merged
into; of a model with `DEPTH` layers. SmolLM2-135M, of 30 layers, is off by 1.7e-6, 3e-3 to 5.3e-3 and 2.4e-2: merged
weights are rounded once more, and so is what each layer makes of them."""
DEPTH = 8
SCORE_ALLOWANCE = 4
"""Times as much is tolerated of scores: they lack the offset that logits share and that makes those large beside what
rounding does."""
NEW_TOKENS = 24
"""Tokens that each model writes to each prompt, greedily, to see whether they write the same."""
SHARD = "5GB"
"""Most that a weight file of the merged model holds."""


class Behaviour(NamedTuple):
    """What a model does on real tokens: `logits` `[tokens of all rows, V]`, float32 on the CPU, and the ids that it
    writes to each prompt. Of a model that scores conversations, the scores `[rows]`."""

    logits: Tensor
    answers: list[list[int]]


def merge_adapter(
    base: Model,
    adapter: Path,
    merged: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    dtype: str,
    prompts: Sequence[Sequence[int]] = (),
    head_seed: int | None = None,
) -> dict[str, Any]:
    """Write `merged` (weights, configuration, generation settings, tokenizer, chat template) and check it.

    Args:
        rows: token ids on which the logits are compared.
        dtype: of the merged weights.
        prompts: token ids that both models go on from.
        head_seed: see `load_model`.

    Returns:
        The content of `merge.json`.

    Raises:
        StageError: the merged model is not base + adapter; nothing is written, the adapter is kept.
        UserError: the adapter belongs to another base, or the base is stored quantised.
    """
    trained = _trained_logits(base, adapter, rows, head_seed) if base.load_in_4bit or base.load_in_8bit else None
    model = load_model(base, dtype=dtype, head_seed=head_seed)
    base_logits = logits_of(model, rows)
    adapted: Any = open_adapter(model, adapter)
    wanted = Behaviour(logits_of(adapted, rows), _answers(adapted, prompts))
    effect = relative_rms(base_logits - wanted.logits, wanted.logits)
    with quiet():
        whole = adapted.merge_and_unload(safe_merge=True)
    return save_and_check(whole, merged, tokenizer, rows, prompts, wanted, effect, trained)


def save_and_check(
    model: PreTrainedModel,
    merged: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]] = (),
    wanted: Behaviour | None = None,
    adapter_effect: float | None = None,
    trained: Tensor | None = None,
) -> dict[str, Any]:
    """Save a model whole, load it back and compare it with `wanted` (unset: itself); see `merge_adapter`. `trained` are
    the logits of the quantised model that was trained, on the same rows."""
    dtype, device, scores = model.dtype, model.device, score_layer(model) is not None
    wanted = Behaviour(logits_of(model, rows), _answers(model, prompts)) if wanted is None else wanted
    tolerance = tolerance_of(model) * (SCORE_ALLOWANCE if scores else 1)
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    if scores:
        set_padding(model, tokenizer.pad_token_id)
    with new_folder(merged) as folder, quiet():
        model.save_pretrained(folder, max_shard_size=SHARD)
        tokenizer.save_pretrained(folder)
        # Whoever called may still hold the model, and there is to be one at a time.
        for weight in model.parameters():
            weight.data = weight.data.new_empty(0)
        free_memory()
        _require_same_tokenizer(tokenizer, folder, rows)
        saved = kind.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device).eval()
        logits, answers = (_scores_as_read if scores else logits_of)(saved, rows), _answers(saved, prompts)
        result = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_logit_difference": float((logits - wanted.logits).abs().max()),
            "relative_difference": relative_rms(logits - wanted.logits, wanted.logits),
            "tolerance": tolerance,
            "adapter_effect": adapter_effect,
            "tokens_compared": wanted.logits.shape[0],
            "answers_compared": len(prompts),
            "answers_equal": sum(a == b for a, b in zip(answers, wanted.answers, strict=True)),
            "difference_from_quantised": None if trained is None else relative_rms(logits - trained, trained),
        }
        _require_equal(result)
    return result


def merge_dtype(recipe: RecipeBase, dtype: torch.dtype) -> torch.dtype:
    """What the merged model is saved in: what the recipe says, else what was computed in; `model.dtype` is `dtype`."""
    setting, computed = recipe.merge.dtype, recipe.model.bnb_4bit_compute_dtype
    named = computed if setting == "auto" else setting
    return dtype if named in (None, "auto") else getattr(torch, named)


def tolerance_of(model: PreTrainedModel) -> float:
    """What rounding explains. It adds up like a random walk, by the root of the depth."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", DEPTH)
    return TOLERANCE[model.dtype] * max(1.0, math.sqrt(layers / DEPTH))


def remarks(result: dict[str, Any]) -> list[str]:
    """What the checks of a merge found, in lines for people."""
    measured, allowed = result["relative_difference"], result["tolerance"]
    lines = [f"logits differ by {measured:.1e} of their size, {allowed:.0e} is allowed"]
    drift = result["difference_from_quantised"]
    if drift is not None:
        lines.append(f"from those of the quantised model that was trained they differ by {drift:.1e}")
    equal, compared = result["answers_equal"], result["answers_compared"]
    if equal < compared:
        lines.append(
            f"greedy answers differ from those of base + adapter at {compared - equal} of {compared} prompts: rounding "
            f"in {result['dtype']} tips the scales where two tokens are nearly as likely"
        )
    return lines


def _require_equal(result: dict[str, Any]) -> None:
    difference, tolerance, effect = (result[name] for name in ("relative_difference", "tolerance", "adapter_effect"))
    measured = f"logits differ by {difference:.2g} of their size"
    if not difference <= tolerance:
        allowed = f"{tolerance:.2g} is allowed"
        raise StageError(f"the merged model is not base + adapter: {measured}, {allowed}; adapter kept")
    if effect is not None and difference > effect > 0:
        raise StageError(
            f"merging into {result['dtype']} loses the adapter: {measured}, the adapter itself moves them by "
            f"{effect:.2g}; adapter kept. To do: `merge.dtype=float32`"
        )


def _require_same_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: Sequence[Sequence[int]]) -> None:
    saved = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [str(tokenizer.decode(list(row), skip_special_tokens=False)) for row in rows]
    ids, again = (write(texts, add_special_tokens=False)["input_ids"] for write in (tokenizer, saved))
    kept = ("chat_template", "eos_token_id", "bos_token_id")
    changed = [name for name in kept if getattr(tokenizer, name) != getattr(saved, name)]
    if ids != again or changed:
        what = f"has another {changed[0]}" if changed else "writes other ids for the same text"
        raise StageError(f"the saved tokenizer {what} than the one that was trained with; adapter kept")


def _trained_logits(base: Model, adapter: Path, rows: Sequence[Sequence[int]], head_seed: int | None) -> Tensor:
    """Logits of the quantised base with its adapter, computed as in training."""
    adapted: PeftModel = open_adapter(load_model(base, quantised=True, head_seed=head_seed), adapter)
    dtype = choose_dtype(base.dtype, choose_device())
    with torch.autocast(choose_device().type, dtype, enabled=dtype != torch.float32):
        logits = logits_of(adapted, rows)
    del adapted
    free_memory()
    return logits


@torch.no_grad()
def logits_of(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[tokens of all rows, V]` float32 on the CPU; or `[rows]`, scores."""
    model.eval()
    if score_layer(model) is not None:
        return scores_of(model, rows, model.device).float().cpu()
    batches = (torch.tensor([list(row)], device=model.device) for row in rows)
    return torch.cat([model(ids, use_cache=False).logits[0].float().cpu() for ids in batches])


@torch.no_grad()
def _scores_as_read(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[rows]`: what transformers itself reads, in one batch if the model has a pad token."""
    padding = model.config.get_text_config().pad_token_id
    batches = [rows] if padding is not None else [[row] for row in rows]
    padded = (pad(batch, model.device, padding or 0) for batch in batches)
    return torch.cat([model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu() for ids, mask in padded])


@torch.no_grad()
def _answers(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    if not prompts:
        return []
    model.eval()
    stops = model.generation_config.eos_token_id
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=stops, pad_token_id=0)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        with quiet():
            written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers.append(written[0, len(prompt) :].tolist())
    return answers


def relative_rms(difference: Tensor, wanted: Tensor) -> float:
    """Scores below 1 count as 1: near zero they mean little, and rounding does not shrink with them."""
    size = wanted.square().mean().sqrt()
    return float(difference.square().mean().sqrt() / (size.clamp(min=1) if wanted.dim() == 1 else size))
