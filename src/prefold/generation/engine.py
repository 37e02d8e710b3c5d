"""Completions of prompts.

A prompt is encoded once, and its keys and values serve all its completions; completions that have ended leave the
batch, and new prompts take their place. Models that cannot share prompts answer by transformers' own `generate`.
Data in: token ids of prompts; data out: `Completion`s.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from prefold import ranks
from prefold.data.chat import Template, render
from prefold.data.preference import Message
from prefold.errors import StageError
from prefold.generation.kv_cache import ATTENTION, HALF, Decode, Group, Prefill, Wave
from prefold.generation.packed_weights import packed_weights
from prefold.generation.sampling import Completion, Sampling
from prefold.generation.sequences import OnToken, Row, Writing
from prefold.generation.transformers_engine import write_plainly
from prefold.terminal import progress_bar
from prefold.trees.attention import using_attention
from prefold.trees.memory import free_memory, is_out_of_memory
from prefold.trees.packing import TokenTree, pack, split_by_budget
from prefold.trees.scorer import COARSE, in_float32, obstacle, stretched_positions, unwrapped

ROWS = {"cpu": 64, "cuda": 256}
"""Completions that are written side by side; beyond them, a row more costs what it brings."""
PREFILL_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of prompts that are encoded in one row."""
CACHE_BYTES = 2 * 2**30
"""What keys and values may take on a CPU; on an accelerator, half of what is free."""
CHECKED_TOKENS = 256
TOLERANCE = 1e-3
"""Largest difference of a log-prob in nats, between the shared prompts and a plain pass, that rounding explains."""

Waves = list[tuple[Wave, list[Row]]]

logger = logging.getLogger("prefold")
_lowered: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Tokens that were too many for a model's memory, halved."""


class LocalEngine:
    """Completions by a transformers model, with or without adapters.

    Args:
        max_tokens: tokens of prompts and completions whose keys and values are kept at a time; by default, what memory
            allows. A single prompt may exceed it.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None):
        self._model, self._tokenizer, self._max_tokens = unwrapped(model), tokenizer, max_tokens

    def sample(self, prompts: Sequence[Sequence[int]], settings: Sampling) -> list[list[Completion]]:
        """`num_answers` completions of each prompt, given as token ids, in the order of `prompts`."""
        found = dict(self.stream(prompts, settings))
        return [found[place] for place in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        numbers: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The places of prompts with their completions, as they are done. The model must not be used meanwhile.

        Args:
            numbers: what a prompt's random numbers depend on beside the seed; by default its place.

        Raises:
            StageError: out of memory with a single prompt.
        """
        if not prompts:
            return
        numbers = range(len(prompts)) if numbers is None else numbers
        writing = Writing(prompts, settings, self._tokenizer, self._end_tokens(settings), numbers, on_token)
        training = self._model.training
        self._model.eval()
        try:
            reason = why_not_shared(self._model, max(prompts, key=len), settings.max_new_tokens)
            if reason is None:
                # Reordering takes as long as some steps, which nobody should wait for who reads the tokens.
                with packed_weights(self._model) if on_token is None else nullcontext():
                    yield from self._write(writing)
            else:
                logger.warning("completions are written by transformers' own generate: %s", reason)
                yield from write_plainly(self._model, writing, ROWS.get(self._model.device.type, 64))
        finally:
            self._model.train(training)

    def _end_tokens(self, settings: Sampling) -> Sequence[int]:
        return end_tokens(self._model, self._tokenizer) if settings.end_tokens is None else settings.end_tokens

    def _write(self, writing: Writing) -> Iterator[tuple[int, list[Completion]]]:
        """Where memory runs out, the prompts under way are begun anew with less room: what is drawn for them hangs on
        their seeds, so their completions are the same."""
        waiting = deque(range(len(writing.prompts)))
        waves: Waves = []
        room = min(self._max_tokens or cache_tokens(self._model), _lowered.get(self._model, sys.maxsize))
        while waiting or waves:
            begun = self._admitted(waiting, waves, writing, room)
            stepped = self._try_to_step(begun, waves, writing)
            if stepped is None:
                under_way = {row.prompt for _, rows in waves for row in rows}.union(begun)
                waves, waiting = [], deque(sorted(under_way.union(waiting)))
                room = self._lowered_room(room, [_size(writing, place) for place in under_way])
            else:
                rows, waves = stepped
                yield from writing.finished(rows)

    def _try_to_step(self, begun: Sequence[int], waves: Waves, writing: Writing) -> tuple[list[Row], Waves] | None:
        """None if memory ran out; the waves are of no use then."""
        try:
            return self._step(begun, waves, writing)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _step(self, begun: Sequence[int], waves: Waves, writing: Writing) -> tuple[list[Row], Waves]:
        """A token for the prompts that begin, or else for all rows under way; these rows, and the waves that go on."""
        if begun:
            rows = [row for place in begun for row in writing.begin(place)]
            wave, logits = prefill(self._model, [writing.prompts[place] for place in begun], writing.settings)
            waves = [*waves, (wave, rows)]
            logits = logits.repeat_interleave(writing.settings.num_answers, 0)
        else:
            rows = [row for _, rows in waves for row in rows]
            starts = [len(writing.prompts[row.prompt]) for row in rows]
            logits = decode(self._model, [wave for wave, _ in waves], [row.tokens[-1] for row in rows], starts)
        with torch.no_grad():
            writing.extend(rows, logits)
        return rows, _without_finished(waves)

    def _lowered_room(self, room: int, sizes: Sequence[int]) -> int:
        """Half of what prompts of these sizes take, for which memory ran out; it stays so for the model.

        Raises:
            StageError: it is a single prompt.
        """
        free_memory()
        if len(sizes) == 1:
            raise StageError(
                f"out of memory with a single prompt and its completions ({sizes[0]:,} tokens); ask for fewer or "
                "shorter completions, or take a smaller model"
            )
        lowered = _lowered[self._model] = sum(sizes) // 2
        logger.warning("out of memory: the token budget of completions goes from %s to %s", f"{room:,}", f"{lowered:,}")
        return lowered

    def _admitted(self, waiting: deque[int], waves: Waves, writing: Writing, room: int) -> list[int]:
        """The prompts that begin now: as many as fit once half of the room is free, so that they are encoded together.

        One always fits where there is nothing else to do.
        """
        most, settings = ROWS.get(self._model.device.type, 64), writing.settings
        tokens = sum(wave.reserved for wave, _ in waves)
        rows = sum(len(rows) for _, rows in waves)
        admitted: list[int] = []
        if 2 * tokens > room or 2 * rows > most:
            return admitted
        while waiting:
            tokens += _size(writing, waiting[0])
            rows += settings.num_answers
            if (tokens > room or rows > most) and (waves or admitted):
                break
            admitted.append(waiting.popleft())
        return admitted


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: those of the model's generation settings, else the tokenizer's; perhaps none."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends: Any = tokenizer.eos_token_id if own is None else own
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]


def _size(writing: Writing, place: int) -> int:
    """Tokens of a prompt with its completions at their longest."""
    return len(writing.prompts[place]) + writing.settings.num_answers * writing.settings.max_new_tokens


def _without_finished(waves: Waves) -> Waves:
    left: Waves = []
    for wave, rows in waves:
        live = [place for place, row in enumerate(rows) if not row.over]
        if len(live) < len(rows):
            wave.keep(live)
        if live:
            left.append((wave, [rows[place] for place in live]))
    return left


# ---- the model's passes -----------------------------------------------------------------------------------------
# Not under inference mode: what models and masks cache on the way must serve training too.


@torch.no_grad()
def prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: Sampling) -> tuple[Wave, Tensor]:
    """Encode prompts: their rows as a wave, and the logits `[prompts, V]` of what follows each."""
    groups = [Group(settings.num_answers) for _ in prompts]
    logits: dict[int, Tensor] = {}
    budget = PREFILL_TOKENS.get(model.device.type, 1024)
    for part in split_by_budget([len(prompt) for prompt in prompts], budget):
        packed = pack([TokenTree(tuple(prompts[place]), ()) for place in part], model.device)
        ends = torch.tensor([block.prompt[1] - 1 for block in packed.blocks], device=model.device)
        layout = Prefill(packed, [groups[place] for place in part])
        found = _forward(model, packed.input_ids, packed.positions, layout, logits_to_keep=ends)
        logits.update(zip(part, found, strict=True))
    wave = Wave(groups, settings.max_new_tokens)
    return wave, torch.stack([logits[place] for place in range(len(prompts))])


@torch.no_grad()
def decode(model: PreTrainedModel, waves: Sequence[Wave], tokens: Sequence[int], starts: Sequence[int]) -> Tensor:
    """One step: logits `[rows, V]` of what follows the rows' newest tokens.

    Args:
        starts: tokens of each row's prompt.
    """
    filled = [wave.filled for wave in waves for _ in range(wave.rows)]
    positions = [start + own for start, own in zip(starts, filled, strict=True)]
    ids, places = (torch.tensor([values], device=model.device) for values in (tokens, positions))
    logits = _forward(model, ids, places, Decode(waves, max(positions) + 1))
    for wave in waves:
        wave.filled += 1
    return logits


def _forward(
    model: PreTrainedModel, input_ids: Tensor, positions: Tensor, layout: Prefill | Decode, **kwargs: Any
) -> Tensor:
    with using_attention(model, ATTENTION):
        output = model(input_ids=input_ids, position_ids=positions, use_cache=False, trees=layout, **kwargs)
    logits: Tensor = output.logits[0]
    return logits


def cache_tokens(model: PreTrainedModel) -> int:
    """Tokens whose keys and values may be kept at a time."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    on_cuda = model.device.type == "cuda"
    size = 2 if on_cuda and model.dtype in HALF else 4
    room = torch.cuda.mem_get_info(model.device)[0] // 2 if on_cuda else CACHE_BYTES
    return int(room // (config.num_hidden_layers * 2 * heads * width * size))


# ---- whether the model can share prompts ------------------------------------------------------------------------

_checked: WeakKeyDictionary[nn.Module, dict[bool, str | None]] = WeakKeyDictionary()


def why_not_shared(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> str | None:
    """None if the model's completions can share their prompt, else what is in the way.

    A model is checked once on the end of a real prompt, and once more on one that is longer than its window.
    """
    reason = stretched_positions(model, len(prompt) + max_new_tokens) or obstacle(model)
    if reason is not None:
        return reason
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    beyond = len(prompt) > window > 0
    found = _checked.setdefault(model, {})
    if beyond not in found:
        found[beyond] = failed_check(model, prompt[-(CHECKED_TOKENS + (window if beyond else 0)) :])
    return found[beyond]


@torch.no_grad()
def failed_check(model: PreTrainedModel, prompt: Sequence[int]) -> str | None:
    """Compare the likeliest tokens' log-probs with a plain pass, in float32; say what is wrong, or None.

    Two prompts are encoded side by side, and two tokens of two completions of the first are written beside one of the
    second: what one sees of another shows.
    """
    ids = [*prompt, *prompt[:2], *prompt[:1]]
    cut, half = len(ids) - 2, len(ids) // 2
    with in_float32(model):
        places = torch.tensor([cut - 1, half - 1, cut, half, cut + 1, half + 1], device=model.device)
        tokens = torch.tensor([ids], device=model.device)
        try:
            plain = model(tokens, use_cache=False, logits_to_keep=places).logits[0].log_softmax(-1)
            wave, logits = prefill(model, [ids[:cut], ids[:half]], Sampling(2, 2))
            found = [logits]
            for step in range(2):
                newest = [ids[cut + step]] * 2 + [ids[half + step]] * 2
                found.append(decode(model, [wave], newest, [cut, cut, half, half])[1:3])
        except (NotImplementedError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return f"sharing its prompts failed ({str(error).splitlines()[0]})"
    if len(wave.own) != model.config.get_text_config().num_hidden_layers:
        return f"{len(wave.own)} of its layers call the attention that sharing replaces"
    shared = torch.cat(found).log_softmax(-1)
    likeliest = plain.argmax(-1, keepdim=True)
    difference = float((shared.gather(-1, likeliest) - plain.gather(-1, likeliest)).abs().max())
    quantised = any(not parameter.dtype.is_floating_point for parameter in model.parameters())
    if not difference <= (COARSE if quantised else TOLERANCE):
        return f"with shared prompts its log-probs differ by {difference:.2g} nats"
    return None


# ---- text in, text out ------------------------------------------------------------------------------------------


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    label: str = "answers",
    streamer: BaseStreamer | None = None,
    template: Template = "chat",
    progress: bool = True,
) -> list[list[str]]:
    """`num_answers` answers to each conversation, in the order of `prompts`. Several processes write a share each, and
    all of them get everything.

    Args:
        streamer: for a single prompt with one answer, receives the tokens as they come.
        progress: whether to draw a progress bar, named `label`.
    """
    ids = [render(prompt, tokenizer, template) for prompt in prompts]
    if streamer is not None:
        streamer.put(torch.tensor(ids))
    on_token = None if streamer is None else lambda prompt, number, token: streamer.put(torch.tensor([token]))
    own, answers = ranks.share([len(prompt) for prompt in ids]), {}
    with progress_bar(label, len(prompts)) if progress else nullcontext(lambda amount, text: None) as advance:
        for place, completions in LocalEngine(model, tokenizer).stream([ids[i] for i in own], sampling, own, on_token):
            answers[own[place]] = [completion.text.strip() for completion in completions]
            advance(1, "")
        answers = ranks.merged(answers)
        advance(len(prompts) - len(own), "")
    if streamer is not None:
        streamer.end()
    return [answers[place] for place in range(len(prompts))]
