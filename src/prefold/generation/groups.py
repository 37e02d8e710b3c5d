"""Groups: completions of prompts as token ids. What a group is depends on the model, the prompt and the group's seed,
and on nothing else that is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefold.errors import UserError
from prefold.generation.engine import LocalEngine, end_tokens
from prefold.generation.sampling import Completion, Sampling
from prefold.generation.weights import fold_adapter
from prefold.terminal import Advance


def require_end_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that a completion can end.

    Raises:
        UserError: neither model nor tokenizer names an end token.
    """
    if not end_tokens(model, tokenizer):
        raise UserError(
            "names no end token, so no completion would ever end",
            where=model.name_or_path or "model",
            expected="`eos_token_id` in generation_config.json, or an EOS token of the tokenizer",
            advice="name an instruct model in `model.name`",
        )


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    seeds: Sequence[int],
    advance: Advance = lambda amount, text: None,
) -> list[list[Completion]]:
    """`sampling.num_answers` completions of each prompt, adapters folded in meanwhile where that is exact to undo.
    Several processes sample a share each, and all of them get everything.

    Args:
        seeds: one for each prompt, instead of that of `sampling`.
        advance: told of each prompt that is done.
    """
    with fold_adapter(model):
        return LocalEngine(model, tokenizer).sample(prompts, replace(sampling, seed=0), seeds, advance)
