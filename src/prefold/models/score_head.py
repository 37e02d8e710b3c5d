"""The head of a reward model: a linear layer that gives the last token of a conversation its score, in place of the
vocabulary's head.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefold.errors import UserError
from prefold.trees.head import SCORE, score_layer

WEIGHT = f"{SCORE}.weight"


def set_up_head(model: PreTrainedModel, report: dict[str, Any], seed: int, name: str) -> dict[str, Any]:
    """Initialise a head that the files lack: small random weights, the same for the same seed on every device. Returns
    transformers' loading report without what the change of heads explains.

    Raises:
        UserError: the model has no such head, or one for several labels.
    """
    head = score_layer(model)
    if type(head) is not nn.Linear:
        expected = "a model that writes from left to right, or a reward model"
        raise UserError("its classifier has no linear head on the last token", where=name, expected=expected)
    if any(WEIGHT in entry for entry in report["mismatched_keys"]):
        expected = "a reward model has one score"
        raise UserError("is a classifier with several labels", where=name, expected=expected)
    if WEIGHT in report["missing_keys"]:
        spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
        drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
        if isinstance(head.weight, DTensor):
            drawn = distribute_tensor(drawn, head.weight.device_mesh, head.weight.placements)
        head.weight.data.copy_(spread * drawn)
    if model.config.get_text_config().pad_token_id is None:
        # Without one the model refuses batches; which one does not matter to the engine, which knows the last tokens.
        set_padding(model, 0)
    trunk = f"{model.base_model_prefix}."
    return {
        **report,
        "missing_keys": set(report["missing_keys"]) - {WEIGHT},
        "unexpected_keys": [key for key in report["unexpected_keys"] if key.startswith(trunk)],
    }


def unshard_head(model: PreTrainedModel) -> None:
    """Have every process hold the head of a sharded reward model whole, like the LoRA weights beside which it is
    trained: peft copies it, and a copy of a part would stay a part."""
    sharded = score_layer(model)
    if sharded is None:
        return
    assert isinstance(sharded.weight, DTensor)
    head = deepcopy(sharded)
    head.weight = nn.Parameter(sharded.weight.full_tensor())
    sharded.requires_grad_(False)  # FSDP2 goes on gathering it
    setattr(model, SCORE, head)


def set_padding(model: PreTrainedModel, token: int | None) -> None:
    """Set a classifier's pad token: it reads the score at the last token that is not padding."""
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = token


def pad_apart(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
    """Pad with a special token that is not one of `ends`, with which conversations end: in a batch a classifier of
    transformers would read their scores one token early.

    The tokenizer's pad token is kept if it is none of them. If all special tokens are, there is no pad token
    afterwards, and classifiers refuse batches.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *special]
    free = (token for token in tokens if token is not None and tokenizer.convert_tokens_to_ids(token) not in ends)
    tokenizer.pad_token = next(free, None)
