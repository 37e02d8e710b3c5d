"""How likely texts are to a model, without gradients: what they share at their start is read once.

A model for which that does not give the plain method's numbers reads each text by itself, with one line in the log.
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
from prefold.errors import StageError
from prefold.trees.attention import candidates, using_attention
from prefold.trees.forest import WORTH_SHARING, Ids, Text, pack_forest, split_texts
from prefold.trees.logprobs import packed_logprobs
from prefold.trees.memory import free_memory, is_out_of_memory
from prefold.trees.scorer import differs, differs_from_plain, obstacle, stretched_positions, unwrapped

ROW_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens that are read at once. Longer rows than in training: nothing is kept for a backward pass."""
CHECKED_TOKENS = 64
"""Of a real text, in the self-check; more where the model has a window."""
GATHERING = "prefold_variable_length"

logger = logging.getLogger("prefold")


class Likelihood(NamedTuple):
    """Log-prob in nats of a text's scored tokens given those before; `greedy`: each of them is the likeliest one."""

    logprob: float
    greedy: bool


@dataclass
class Reader:
    """How one model reads texts. `attention` is the name of the backend, None for the plain path; `one_by_one`: rows
    must not share a batch."""

    model: nn.Module
    max_tokens: int
    attention: str | None
    one_by_one: bool = False

    def read(self, texts: Sequence[Text]) -> Iterator[tuple[list[int], list[Likelihood]]]:
        """Row by row, the places of its texts and how likely they are.

        Several processes read a share of the rows each, and all of them get everything.

        Raises:
            StageError: out of memory with the texts of a single context.
        """
        own = []
        for row, found in self._read_here(texts):
            own.append((row, found))
            yield row, found
        for process, part in enumerate(ranks.gather(own)):
            if process != ranks.rank():
                yield from part

    def _read_here(self, texts: Sequence[Text]) -> Iterator[tuple[list[int], list[Likelihood]]]:
        rows = self._rows(texts, range(len(texts)))
        waiting = [rows[i] for i in ranks.share([sum(len(texts[place].tokens) for place in row) for row in rows])]
        while waiting:
            row = waiting.pop(0)
            found = self._try_to_read([texts[place] for place in row])
            if found is not None:
                yield row, found
                continue
            if self.max_tokens < min(len(texts[place].tokens) for place in row):
                longest = max(len(texts[place].tokens) for place in row)
                raise StageError(f"out of memory with a text of {longest:,} tokens; take a smaller model or device_map")
            waiting = self._rows(texts, [place for unread in (row, *waiting) for place in unread])

    def _rows(self, texts: Sequence[Text], places: Sequence[int]) -> list[list[int]]:
        chosen = [texts[place] for place in places]
        if self.attention is not None:
            rows = split_texts(chosen, self.max_tokens)
        else:
            rows = [[place] for place in range(len(chosen))] if self.one_by_one else _padded(chosen, self.max_tokens)
        return [[places[place] for place in row] for row in rows]

    def _try_to_read(self, texts: Sequence[Text]) -> list[Likelihood] | None:
        """None if memory ran out; the budget is halved then."""
        try:
            return self._likelihoods(texts)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, whose traceback would keep the tensors of the failed attempt alive.
        free_memory()
        self.max_tokens //= 2
        logger.warning("out of memory: texts are read %s tokens at a time", f"{self.max_tokens:,}")
        return None

    @torch.no_grad()
    def _likelihoods(self, texts: Sequence[Text]) -> list[Likelihood]:
        logprobs, greedy, owner = self.tokens(texts)
        sums = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, owner, logprobs.double())
        missed = torch.zeros(len(texts), dtype=torch.long).index_add_(0, owner, (~greedy).long())
        return [Likelihood(*found) for found in zip(sums.tolist(), (missed == 0).tolist(), strict=True)]

    def tokens(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor, Tensor]:
        """`[S]` each, on the CPU: log-probs of the scored tokens, whether each is the likeliest, and its text."""
        device = unwrapped(self.model).device
        if self.attention is None:
            return _read_plainly(self.model, texts, device)
        row = pack_forest(texts, device)
        with using_attention(unwrapped(self.model), self.attention):
            found = packed_logprobs(self.model, row, statistics=True)
        assert found.statistics is not None
        return found.tokens.cpu(), found.statistics.top1.cpu(), found.completion.cpu()


def _padded(texts: Sequence[Text], max_tokens: int) -> list[list[int]]:
    """Batches of neighbours in length whose padded rows stay within `max_tokens`."""
    batches: list[list[int]] = []
    for place in sorted(range(len(texts)), key=lambda place: -len(texts[place].tokens)):
        if batches and len(texts[batches[-1][0]].tokens) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def _read_plainly(model: nn.Module, texts: Sequence[Text], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Each text in a row of its own, padded on the right."""
    longest = max(len(text.read) for text in texts)
    padded = torch.tensor([[*text.read, *[0] * (longest - len(text.read))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text.read) + [0] * (longest - len(text.read)) for text in texts], device=device)
    logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    logprobs, greedy = [], []
    for text, row in zip(texts, logits, strict=True):
        own = row[len(text.read) - text.scored : len(text.read)]
        own = own.float() if own.dtype in (torch.float16, torch.bfloat16) else own
        targets = torch.tensor(text.tokens[-text.scored :], device=device)
        # On a CPU log_softmax adds a vocabulary's probabilities one after another: +8e-6 nats a token in float32.
        logprobs.append(own.gather(-1, targets[:, None]).squeeze(-1) - own.logsumexp(-1))
        greedy.append(own.argmax(-1) == targets)
    owner = torch.arange(len(texts)).repeat_interleave(torch.tensor([text.scored for text in texts]))
    return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu(), owner


def choose_reader(model: nn.Module, texts: Sequence[Text], max_tokens: int | None = None) -> Reader:
    """A reader that shares what texts have in common, if the self-check on some of them passes, else a plain one with
    the reason in the log.

    Args:
        texts: all that will be read.
        max_tokens: tokens to read at once; by default what the device reads well.
    """
    stretched = stretched_positions(model, max(len(text.read) for text in texts))
    attention, reason = _checked_backend(model, max(texts, key=lambda text: len(text.tokens)).tokens)
    reason = stretched or reason
    budget = max_tokens or ROW_TOKENS.get(unwrapped(model).device.type, ROW_TOKENS["cpu"])
    if reason is None:
        return Reader(model, budget, attention)
    logger.warning("texts are read by themselves, what they share once for each (plain path): %s", reason)
    return Reader(model, budget, None, one_by_one=stretched is not None)


def _checked_backend(model: nn.Module, longest: Ids) -> tuple[str | None, str | None]:
    """The backend that reads forests and gives plain log-probs, or None and what is in the way."""
    base = unwrapped(model)
    reason = obstacle(model)
    if reason is not None:
        return None, reason
    window = getattr(base.config.get_text_config(), "sliding_window", None) or 0
    texts = _nested(longest[-(CHECKED_TOKENS + (window if len(longest) > window else 0)) :])
    row = pack_forest(texts, base.device)
    surest, *others = candidates(base.device, base.dtype)
    plainly = partial(_read_plainly, model, device=base.device)
    reason = differs_from_plain(model, row, surest, lambda: torch.cat([plainly([text])[0] for text in texts]))
    if reason is not None:
        return None, reason
    return GATHERING if GATHERING in others and not differs(model, row, GATHERING, surest) else surest, None


def _nested(ids: Ids) -> list[Text]:
    """Texts that share starts of different lengths, from the tokens of a real one."""
    half, quarter = ids[: (len(ids) + 1) // 2], ids[: (len(ids) + 3) // 4]
    rows = [ids, half + ids[-2:], half + ids[:2], quarter + ids[-3:]]
    return [Text(row, min(len(row) - 1, WORTH_SHARING)) for row in rows]
