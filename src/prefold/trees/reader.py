"""How likely texts are under a model, without gradients; common prefixes are read once.

If that does not give the plain method's numbers for a model, each text is read by itself, with one line in the log.
Data in: `Text`; data out: `Likelihood`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefold import ranks
from prefold.trees.attention import BLOCK_MASK, candidates, unwrapped, using_attention, widened
from prefold.trees.budget import attempt, from_all, lowered, pad, row_by_row, split_by_length
from prefold.trees.forest import WORTH_SHARING, Text, pack_forest, split_texts
from prefold.trees.logprobs import packed_logprobs
from prefold.trees.self_check import (
    NONE_IS_RIGHT,
    choose_attention,
    obstacle,
    packing_fault,
    stretched_positions,
)

ROW_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens that are read at once, by device. Rows are longer than in training: nothing is kept for a backward pass."""
CHECKED_TOKENS = 64
"""Tokens of a real text in the self-check; more where the model has a window."""

logger = logging.getLogger("prefold")


class Likelihood(NamedTuple):
    """Log-prob in nats of a text's scored tokens given those before; `greedy`: each of them is the most likely one."""

    logprob: float
    greedy: bool


@dataclass
class Reader:
    """Reads texts with one model. `attention` is the name of the backend, None for the plain path; `one_by_one`: texts
    must not share a batch."""

    model: nn.Module
    max_tokens: int
    attention: str | None
    one_by_one: bool = False

    def read(self, texts: Sequence[Text]) -> Iterator[tuple[list[int], list[Likelihood]]]:
        """Row by row, the indices of its texts and how likely they are.

        Several processes read a share of the rows each, and all of them get all results.

        Raises:
            StageError: out of memory with the texts of a single context.
        """

        def smaller(row: list[int], left: list[int]) -> list[list[int]]:
            tried = [texts[i] for i in row]
            sizes = [len(text.tokens) for text in tried]
            self.max_tokens = lowered(self.max_tokens, sizes, _single(tried), partial(self._rows, tried))
            return rows_of(left)

        def rows_of(indices: Sequence[int]) -> list[list[int]]:
            rows = self._rows([texts[i] for i in indices], self.max_tokens)
            return [[indices[i] for i in row] for row in rows]

        rows = rows_of(range(len(texts)))
        own = [rows[i] for i in ranks.share([sum(len(texts[i].tokens) for i in row) for row in rows])]
        read = row_by_row(own, lambda row: attempt(partial(self._likelihoods, [texts[i] for i in row])), smaller)
        yield from from_all(read)

    def _rows(self, texts: Sequence[Text], max_tokens: int) -> list[list[int]]:
        if self.attention is not None:
            return split_texts(texts, max_tokens)
        return split_by_length([len(text.tokens) for text in texts], 0 if self.one_by_one else max_tokens)

    @torch.no_grad()
    def _likelihoods(self, texts: Sequence[Text]) -> list[Likelihood]:
        logprobs, greedy, owner = self.tokens(texts)
        sums = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, owner, logprobs.double())
        missed = torch.zeros(len(texts), dtype=torch.long).index_add_(0, owner, (~greedy).long())
        return [Likelihood(*values) for values in zip(sums.tolist(), (missed == 0).tolist(), strict=True)]

    def tokens(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor, Tensor]:
        """`[S]` each, on the CPU: log-probs of the scored tokens, whether each is the most likely, and its text."""
        if self.attention is None:
            return _read_plainly(self.model, texts)
        row = pack_forest(texts, unwrapped(self.model).device)
        with using_attention(self.model, self.attention):
            scored = packed_logprobs(self.model, row, statistics=True)
        assert scored.statistics is not None
        return scored.tokens.cpu(), scored.statistics.top1.cpu(), scored.completion.cpu()


def _single(texts: Sequence[Text]) -> str:
    """What memory ran out with, for an error message."""
    return f"a text of {max(len(text.tokens) for text in texts):,} tokens; take a smaller model or device_map"


def _read_plainly(model: nn.Module, texts: Sequence[Text]) -> tuple[Tensor, Tensor, Tensor]:
    """Each text in a row of its own, padded on the right."""
    device = unwrapped(model).device
    padded, mask = pad([text.read for text in texts], device)
    logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    logprobs, greedy = [], []
    for text, row in zip(texts, logits, strict=True):
        own = widened(row[len(text.read) - text.scored : len(text.read)])
        targets = torch.tensor(text.tokens[-text.scored :], device=device)
        # On a CPU log_softmax adds a vocabulary's probabilities one after another: +8e-6 nats a token in float32.
        logprobs.append(own.gather(-1, targets[:, None]).squeeze(-1) - own.logsumexp(-1))
        greedy.append(own.argmax(-1) == targets)
    owner = torch.arange(len(texts)).repeat_interleave(torch.tensor([text.scored for text in texts]))
    return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu(), owner


def choose_reader(model: nn.Module, texts: Sequence[Text], max_tokens: int | None = None) -> Reader:
    """A reader that reads common prefixes once if the self-check passes, else a plain one, with the reason in the log.

    Args:
        texts: all that will be read.
        max_tokens: tokens to read at once; by default `ROW_TOKENS` of the device.
    """
    base = unwrapped(model)
    budget = max_tokens or ROW_TOKENS.get(base.device.type, ROW_TOKENS["cpu"])
    stretched = stretched_positions(model, max(len(text.read) for text in texts))
    longest = max(texts, key=lambda text: len(text.tokens)).tokens
    window = getattr(base.config.get_text_config(), "sliding_window", None) or 0
    ids = longest[-(CHECKED_TOKENS + (window if len(longest) > window else 0)) :]
    # Texts with common prefixes of different lengths.
    half, quarter = ids[: (len(ids) + 1) // 2], ids[: (len(ids) + 3) // 4]
    nested = [ids, half + ids[-2:], half + ids[:2], quarter + ids[-3:]]
    checked = [Text(row, min(len(row) - 1, WORTH_SHARING)) for row in nested]
    row, dtype = pack_forest(checked, base.device), base.dtype
    # Compiling FlexAttention takes longer than reading a set of tasks with segments.
    names = [name for name in candidates(base.device, dtype, base.config.get_text_config()) if name != BLOCK_MASK]

    def plainly() -> Tensor:
        return torch.cat([_read_plainly(model, [text])[0] for text in checked]).to(base.device)

    def choose() -> tuple[str | None, str]:
        if reason := stretched or obstacle(model) or packing_fault(model, row, names[-1], plainly):
            return None, reason
        return choose_attention(model, names, [row], dtype), NONE_IS_RIGHT

    attention, reason = attempt(choose, f"out of memory with {_single(checked)}") or (None, "")
    if attention:
        return Reader(model, budget, attention)
    logger.warning("common prefixes of texts are read once per text (plain path): %s", reason)
    return Reader(model, budget, None, one_by_one=stretched is not None)
