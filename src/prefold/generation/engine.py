"""Generating completions of prompts.

A prompt is encoded once, and its keys and values serve all its completions; completions that have ended leave their
batch, and new prompts take their place. Models that cannot share prompts use transformers' own `generate`.
Data in: token ids of prompts; data out: `Completion`s.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from prefold import ranks
from prefold.data.chat import Template, render
from prefold.data.preference import Message
from prefold.device import is_half
from prefold.errors import UserError, first_line
from prefold.generation.kv_cache import (
    ATTENTION,
    Decode,
    Prefill,
    Products,
    Prompt,
    SequenceBatch,
    VariableLength,
    attend,
    attends_in,
)
from prefold.generation.sampling import Completion, Sampling
from prefold.generation.sequences import Drawing, GenerationRequest, OnToken, PartialCompletion
from prefold.generation.transformers_engine import ASK_FOR_LESS, SINGLE_PROMPT, generate_plainly
from prefold.generation.weights import fold_adapter, packed_weights
from prefold.models.gate import require_prompts
from prefold.terminal import Advance, progress_bar
from prefold.trees.attention import Shape, evaluating, heads_of, unwrapped, using_attention
from prefold.trees.budget import attempt, lowered, split_by_budget
from prefold.trees.memory import free_on, gpus_of, is_out_of_memory
from prefold.trees.packing import TokenTree, pack
from prefold.trees.self_check import COARSE, difference, obstacle, stretched_positions

ROWS = {"cpu": 64, "cuda": 256}
"""Completions that are generated side by side; with more, the throughput hardly grows."""
PREFILL_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of prompts that are encoded in one row."""
STEPS_BETWEEN_LOOKS = {"cuda": 4}
"""Steps after which the drawn tokens are read from a device, if not after each."""
CACHE_BYTES = 2 * 2**30
"""Bytes that keys and values may take on a CPU; on CUDA GPUs they may take half of the free memory."""
CHECKED_TOKENS = 256
TOLERANCE = 1e-3
"""Largest difference of a log-prob in nats, between the shared prompts and a plain pass, that rounding explains."""
HALF_TOLERANCE = 1e-2
"""Relative difference of the attention's output that rounding to bfloat16 explains."""
PROMPTS_OF_CHECK, WINDOW_OF_CHECK = (24, 9), 12
"""Tokens of the prompts that attention in half precision is checked on, and the window if the model has one."""

UnderWay = list[tuple[SequenceBatch, Drawing]]
"""Batches in progress, each with the completions of its sequences."""

logger = logging.getLogger("prefold")


@dataclass
class ModelState:
    """What generation has learned about a model, as an attribute of it.

    `max_tokens`: lowered if memory runs out. `longest`: prompts with completions of up to so many tokens can be shared
    as far as the configuration tells. `obstacles`: the result of the check for prompts within the model's window
    (False) and beyond it (True). `variable_length`: dtypes in which that attention has passed the check.
    """

    max_tokens: int = sys.maxsize
    longest: int = 0
    obstacles: dict[bool, str | None] = field(default_factory=dict)
    variable_length: set[torch.dtype] = field(default_factory=set)

    @staticmethod
    def of(model: nn.Module) -> ModelState:
        return vars(model).setdefault("generation_state", ModelState())  # type: ignore[no-any-return]


class Engine(Protocol):
    """Samples completions: from a local model, or from servers."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        numbers: Sequence[int] | None = None,
        advance: Advance = ...,
    ) -> list[list[Completion]]: ...


class LocalEngine:
    """Completions by a transformers model, with or without adapters.

    Args:
        max_tokens: tokens of prompts and completions whose keys and values are kept at a time; by default, what memory
            allows. A single prompt may exceed it.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None):
        self._model, self._tokenizer, self._max_tokens = unwrapped(model), tokenizer, max_tokens
        self._most = ROWS.get(self._model.device.type, 64)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        numbers: Sequence[int] | None = None,
        advance: Advance = lambda **changes: None,
        on_token: OnToken | None = None,
    ) -> list[list[Completion]]:
        """`num_answers` completions of each prompt, given as token ids, in the order of `prompts`. Several processes
        generate a share each, and all of them get all completions.

        Args:
            numbers, on_token: see `stream`; `numbers` are by default the indices.
            advance: called for each prompt that is done.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        own, completions = ranks.share([len(prompt) for prompt in prompts]), {}
        for i, group in self.stream([prompts[i] for i in own], settings, [numbers[i] for i in own], on_token):
            completions[own[i]] = group
            advance(advance=1)
        completions = ranks.merged(completions)
        advance(advance=len(prompts) - len(own))
        return [completions[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        numbers: Sequence[int],
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The indices of prompts with their completions, as they are done. The model must not be used meanwhile.

        Args:
            numbers: what each prompt's random numbers depend on besides the seed.

        Raises:
            StageError: out of memory with a single prompt.
        """
        if not prompts:
            return
        own = settings.end_tokens
        ends = end_tokens(self._model.generation_config, self._tokenizer) if own is None else own
        request = GenerationRequest(prompts, settings, self._tokenizer, ends, numbers, on_token)
        with evaluating(self._model):
            reason = why_not_shared(self._model, max(prompts, key=len), settings.max_new_tokens)
            if reason is None:
                # Reordering takes as long as some steps, too long for a user who reads the tokens as they come.
                with packed_weights(self._model) if on_token is None else nullcontext():
                    yield from self._generate(request)
            else:
                logger.warning("completions are written by transformers' own generate: %s", reason)
                yield from generate_plainly(self._model, request, self._most)

    def _generate(self, request: GenerationRequest) -> Iterator[tuple[int, list[Completion]]]:
        """If memory runs out, the prompts in progress are begun again within a smaller budget: their random numbers
        depend on their seeds, so their completions are the same."""
        state, waiting = ModelState.of(self._model), deque(range(len(request.prompts)))
        under_way: UnderWay = []
        budget = min(self._max_tokens or cache_tokens(self._model), state.max_tokens)
        while waiting or under_way:
            begun = self._admitted(waiting, under_way, request, budget)
            stepped = attempt(partial(self._step, begun, under_way, request))
            if stepped is None:
                again = {*request.unfinished, *begun}
                request.unfinished.clear()
                under_way, waiting = [], deque(sorted(again.union(waiting)))
                sizes = [request.size(prompt) for prompt in again]
                single = f"{SINGLE_PROMPT} ({sizes[0]:,} tokens); {ASK_FOR_LESS}"
                budget = state.max_tokens = lowered(budget, sizes, single, what="the token budget of completions goes")
            else:
                completions, under_way = stepped
                yield from request.finished(completions)

    def _step(
        self, begun: Sequence[int], under_way: UnderWay, request: GenerationRequest
    ) -> tuple[list[PartialCompletion], UnderWay]:
        """Draw the first token after prompts that begin, or else the next ones of all sequences in progress. Returns
        the completions, and the batches that go on. If memory runs out, the batches cannot be used any more."""
        with torch.no_grad(), using_attention(self._model, ATTENTION):
            if begun:
                batch, logits = prefill(self._model, [request.prompts[prompt] for prompt in begun], request.settings)
                drawing = request.begin(begun)
                drawing.draw(logits.repeat_interleave(request.settings.num_answers, 0))
                under_way = [*under_way, (batch, drawing)]
            else:
                # The tokens are read after each step if they are streamed.
                most = 1 if request.on_token else STEPS_BETWEEN_LOOKS.get(self._model.device.type, 1)
                longest = max(len(completion.tokens) for _, drawing in under_way for completion in drawing.completions)
                for _ in range(min(most, request.settings.max_new_tokens - longest)):
                    newest = torch.cat([drawing.newest for _, drawing in under_way]).to(self._model.device)
                    logits = decode(self._model, [batch for batch, _ in under_way], newest)
                    rows = [batch.sequences for batch, _ in under_way]
                    for (_, drawing), own in zip(under_way, logits.split(rows), strict=True):
                        drawing.draw(own)
        completions = [completion for _, drawing in under_way if drawing.unread for completion in drawing.completions]
        left: UnderWay = []
        for batch, drawing in under_way:
            kept = request.read(drawing)
            if 0 < len(kept) < len(drawing.completions):
                batch.keep(kept)
                drawing.keep(kept)
            if kept:
                left.append((batch, drawing))
        return completions, _joined(left)

    def _admitted(self, waiting: deque[int], under_way: UnderWay, request: GenerationRequest, budget: int) -> list[int]:
        """The prompts that begin now: once half of the budget is free, as many as fit, so that they are encoded
        together. If nothing is in progress, one always fits."""
        tokens = sum(batch.reserved for batch, _ in under_way)
        rows = sum(batch.sequences for batch, _ in under_way)
        admitted: list[int] = []
        if 2 * tokens > budget or 2 * rows > self._most:
            return admitted
        while waiting:
            tokens += request.size(waiting[0])
            rows += request.settings.num_answers
            if (tokens > budget or rows > self._most) and (under_way or admitted):
                break
            admitted.append(waiting.popleft())
        return admitted


def _joined(under_way: UnderWay) -> UnderWay:
    """The batches as a single one, if their kind allows it."""
    batches = [batch for batch, _ in under_way if isinstance(batch, VariableLength)]
    if len(under_way) < 2 or len(batches) < len(under_way):
        return under_way
    drawing, *others = (drawing for _, drawing in under_way)
    batches[0].take_over(batches[1:])
    drawing.take_over(others)
    return [(batches[0], drawing)]


def end_tokens(settings: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: those of a model's generation settings, else the tokenizer's; perhaps none."""
    own = None if settings is None else settings.eos_token_id
    ends: Any = tokenizer.eos_token_id if own is None else own
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]


# ---- the model's passes -----------------------------------------------------------------------------------------
# Not under inference mode: what models and masks cache on the way must serve training too.


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    kind: type[SequenceBatch] | None = None,
) -> tuple[SequenceBatch, Tensor]:
    """Encode prompts: the batch of their sequences, and the logits `[prompts, V]` of what follows each.

    Args:
        kind: of the batch; by default the one that the check has chosen.
    """
    if kind is None:
        kind = VariableLength if computed_in(model) in ModelState.of(model).variable_length else Products
    lengths = [len(prompt) for prompt in prompts]
    of_prompts = [Prompt(length, settings.num_answers) for length in lengths]
    batch = kind(of_prompts, settings.max_new_tokens, model.device)
    logits: dict[int, Tensor] = {}
    budget = PREFILL_TOKENS.get(model.device.type, 1024)
    for row in split_by_budget(lengths, budget):
        packed = pack([TokenTree(tuple(prompts[i]), ()) for i in row], model.device)
        ends = [prompt[1] - 1 for prompt in packed.prompts]  # no tensor: hidden states may be on another device
        row_pass = Prefill(packed, batch, row)
        row_logits = _forward(model, packed.input_ids, packed.positions, row_pass, logits_to_keep=ends)
        logits.update(zip(row, row_logits, strict=True))
    return batch, torch.stack([logits[i] for i in range(len(prompts))])


@torch.no_grad()
def decode(model: PreTrainedModel, batches: Sequence[SequenceBatch], tokens: Tensor) -> Tensor:
    """One step: logits `[R, V]` of the tokens after the sequences' newest tokens `[R]`."""
    positions = torch.cat([batch.positions for batch in batches])
    logits = _forward(model, tokens[None], positions[None], Decode(batches))
    for batch in batches:
        batch.advance()
    return logits


def _forward(
    model: PreTrainedModel, input_ids: Tensor, positions: Tensor, cached: Prefill | Decode, **kwargs: Any
) -> Tensor:
    # Switching the attention takes as long as some layers.
    switched = model.config._attn_implementation == ATTENTION
    with nullcontext() if switched else using_attention(model, ATTENTION):
        output = model(input_ids=input_ids, position_ids=positions, use_cache=False, trees=cached, **kwargs)
    return output.logits[0]  # type: ignore[no-any-return]


def computed_in(model: PreTrainedModel) -> torch.dtype:
    """The dtype of the attention's inputs."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def cache_tokens(model: PreTrainedModel) -> int:
    """Tokens whose keys and values may be kept at a time; of several GPUs, by the one with the least free memory."""
    config, gpus = model.config.get_text_config(), gpus_of(model) if model.device.type == "cuda" else set()
    _, heads, width = heads_of(config)
    size = model.dtype.itemsize if attends_in(model.dtype, model.device.type) else 4
    free = len(gpus) * min(map(free_on, gpus)) // 2 if gpus else CACHE_BYTES
    return int(free // (config.num_hidden_layers * 2 * heads * width * size))


# ---- whether the model can share prompts ------------------------------------------------------------------------


def why_not_shared(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> str | None:
    """Why the model's completions cannot share their prompt; None if they can.

    A model is checked once on the end of a real prompt, and once more on one that is longer than its window.
    """
    state, longest = ModelState.of(model), len(prompt) + max_new_tokens
    if longest > state.longest:
        reason = stretched_positions(model, longest) or obstacle(model)
        if reason is not None:
            return reason
        state.longest = longest
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    beyond = len(prompt) > window > 0
    if beyond not in state.obstacles:
        checked = prompt[-(CHECKED_TOKENS + (window if beyond else 0)) :]
        fatal = f"out of memory with {SINGLE_PROMPT} ({len(checked):,} tokens); {ASK_FOR_LESS}"
        state.obstacles[beyond] = attempt(partial(failed_check, model, checked), fatal)
    return state.obstacles[beyond]


def failed_check(model: PreTrainedModel, prompt: Sequence[int]) -> str | None:
    """Compare the most likely tokens' log-probs with a plain pass, and attention in half precision, if that is used,
    with float32. Returns what is wrong, or None. In half precision, products are used if variable-length attention
    fails.

    Two prompts are encoded side by side, and two tokens of two completions of each are generated. A completion of each
    prompt is compared, so that attention across completions shows.
    """
    ids = [*prompt, *prompt[:2], *prompt[:1]]
    cut, half = len(ids) - 2, len(ids) // 2

    @cache
    def plain() -> Tensor:
        kept: Any = [cut - 1, half - 1, cut, half, cut + 1, half + 1]
        tokens = torch.tensor([ids], device=model.device)
        return model(tokens, use_cache=False, logits_to_keep=kept).logits[0].log_softmax(-1)  # type: ignore[no-any-return]

    def logits(kind: type[SequenceBatch]) -> tuple[Tensor, SequenceBatch]:
        batch, first = prefill(model, [ids[:cut], ids[:half]], Sampling(2, 2), kind)
        steps = [first]
        for step in range(2):
            newest = [ids[cut + step]] * 2 + [ids[half + step]] * 2
            steps.append(decode(model, [batch], torch.tensor(newest, device=model.device))[1:3])
        return torch.cat(steps), batch

    def shared() -> tuple[Tensor, int]:
        likeliest = plain().argmax(-1, keepdim=True)
        computed, batch = logits(Products)
        assert isinstance(batch, Products)
        return computed.log_softmax(-1).gather(-1, likeliest), len(batch.own)

    quantised = any(not parameter.dtype.is_floating_point for parameter in model.parameters())
    rounding = COARSE if quantised else TOLERANCE
    device, dtype = model.device.type, computed_in(model)
    with torch.autocast(device, enabled=False):
        reason = difference(model, shared, lambda: plain().amax(-1, keepdim=True), rounding)
    if reason or not is_half(dtype) or not attends_in(dtype, device):
        return reason
    if VariableLength.fits(model.config):
        reason = failed_half(model, dtype, VariableLength, partial(logits, VariableLength))
        if reason is None:
            ModelState.of(model).variable_length.add(dtype)
            return None
        logger.warning("completions are sampled without variable-length attention: %s", reason)
    return failed_half(model, dtype, Products)


@torch.no_grad()
def failed_half(
    model: PreTrainedModel,
    dtype: torch.dtype,
    kind: type[SequenceBatch] = Products,
    perform: Callable[[], Any] = lambda: None,
) -> str | None:
    """Compare the attention of a layer in half precision, by a kind of batch, with that in float32 by products, on
    random states of its shape: two prompts, and two steps of their three completions. Returns what is wrong, or None.

    Args:
        perform: passes of the model itself, which must not fail either.
    """
    config, device, generator = model.config.get_text_config(), model.device, torch.Generator().manual_seed(0)
    queries, keys, width = heads_of(config)
    prompts = pack([TokenTree((0,) * length, ()) for length in PROMPTS_OF_CHECK], device)
    states = [
        [torch.randn(1, heads, tokens, width, generator=generator).to(device, dtype) for heads in (queries, keys, keys)]
        for tokens in (prompts.tokens, 3, 3)
    ]

    def attended(dtype: torch.dtype, kind: type[SequenceBatch], shape: Shape) -> Tensor:
        of_prompts = [Prompt(length, 2 - i) for i, length in enumerate(PROMPTS_OF_CHECK)]
        batch, row = kind(of_prompts, 2, device), replace(prompts, scratch={"calls": 1})
        outputs: list[Tensor] = []
        for query, key, value in states:
            cached = Decode([batch], {"calls": 1}) if outputs else Prefill(row, batch, [0, 1])
            outputs.append(attend(query.to(dtype), key.to(dtype), value.to(dtype), cached, shape)[0])
            if len(outputs) > 1:
                batch.advance()
        return torch.cat(outputs).float()

    try:
        perform()
        for window in {None, getattr(config, "sliding_window", None) and WINDOW_OF_CHECK}:
            shape = Shape(width**-0.5, window, getattr(config, "attn_logit_softcapping", None))
            wanted = attended(torch.float32, Products, shape)
            off = float((attended(dtype, kind, shape) - wanted).norm() / wanted.norm())
            if not off <= HALF_TOLERANCE:
                explained = f"rounding explains {HALF_TOLERANCE:.2g}"
                return f"its attention in {dtype} is off by {off:.2g} of its size, {explained}"
    except Exception as error:  # a kernel or driver may fail in any way
        if is_out_of_memory(error):
            raise
        return f"its attention in {dtype} failed ({first_line(error)})"
    return None


# ---- for training, and for readers ------------------------------------------------------------------------------


def require_end_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that a completion can end.

    Raises:
        UserError: neither model nor tokenizer names an end token.
    """
    if not end_tokens(model.generation_config, tokenizer):
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
    advance: Advance = lambda **changes: None,
) -> list[list[Completion]]:
    """A group of completions of each prompt, with adapters folded into the weights meanwhile if that can be undone
    exactly. A group depends on the model, its prompt and its seed, and on nothing else that is sampled.

    Args:
        seeds: one for each prompt, instead of that of `sampling`.
        advance: called for each prompt that is done.
    """
    with fold_adapter(model):
        return LocalEngine(model, tokenizer).sample(prompts, replace(sampling, seed=0), seeds, advance)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    label: str = "answers",
    streamer: BaseStreamer | None = None,
    template: Template = "chat",
    given: Sequence[dict[str, Any]] | None = None,
    engine: Engine | None = None,
) -> list[list[Completion]]:
    """`num_answers` answers to each conversation, in the order of `prompts`, without spaces around their texts.

    Args:
        given: for each prompt further arguments of its chat template, such as `tools`.
        engine: by default `LocalEngine`.
        label: of the progress bar.
        streamer: for a single prompt with one answer, receives the tokens as they come, in place of the bar.

    Raises:
        UserError: a prompt has tokens that the model has no rows for, or leaves no positions for its answer.
    """
    beside = given or [{}] * len(prompts)
    ids = [render(prompt, tokenizer, template, more) for prompt, more in zip(prompts, beside, strict=True)]
    require_prompts(model, tokenizer, ids, sampling.max_new_tokens)
    own = LocalEngine(model, tokenizer)
    if streamer is None:
        with progress_bar(label, len(prompts)) as advance:
            answers = (engine or own).sample(ids, sampling, advance=advance)
    else:
        streamer.put(torch.tensor(ids))
        answers = own.sample(ids, sampling, on_token=lambda prompt, number, token: streamer.put(torch.tensor([token])))
        streamer.end()
    return [[replace(completion, text=completion.text.strip()) for completion in group] for group in answers]
