"""Packed or plain: the choice for one model, made by checking it, and the token budget.

Packed log-probs of a few real trees are compared with plain ones before a run relies on them. Where they differ by more
than rounding, or the model cannot be packed at all, the plain path is taken, with one line in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.fsdp import is_fsdp_managed_module

from prefold import ranks
from prefold.errors import StageError
from prefold.trees.attention import BACKENDS, Shape, candidates, using_attention
from prefold.trees.head import head_obstacle
from prefold.trees.logprobs import TreeLogprobs, packed_logprobs, plain_logprobs, router_coefficient
from prefold.trees.memory import free_memory, is_out_of_memory
from prefold.trees.packing import PackedTrees, TokenTree, pack, split_by_budget
from prefold.trees.scores import packed_scores, plain_scores, score_layer

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference of a token's log-prob, in nats, that rounding in a dtype explains."""
COARSE = 1.0
"""The same where 8-bit layers round their inputs, each row of tokens in its own way: half a nat is common there, a leak
makes several."""
PADDING = TokenTree((0,), ((0,),))
"""The least that can be scored, where a pass is made for the sake of the other processes."""

logger = logging.getLogger("prefold")


@dataclass
class Scorer:
    """How the log-probs of trees are computed with one model.

    `attention` is the name of the backend, None for the plain path; then `reason` says why. `max_tokens` is what a
    micro-batch may hold. `one_by_one`: plain rows must not share a batch. `temperature` divides the logits, as in
    sampling: the log-probs are those of the distribution that is sampled from at it.
    """

    model: nn.Module
    max_tokens: int
    attention: str | None
    reason: str = ""
    one_by_one: bool = False
    temperature: float = 1.0

    @property
    def packed(self) -> bool:
        return self.attention is not None

    def score(
        self,
        trees: Sequence[TokenTree],
        model: nn.Module | None = None,
        statistics: bool = False,
        scores_prompt: bool = False,
    ) -> TreeLogprobs:
        """Log-probs of the trees' completions, all in one row when packed.

        Args:
            model: the wrapped model to call instead of `self.model` (DDP, FSDP, autocast).
            statistics: with entropy, squares and top-1 of every scored position.
            scores_prompt: with the log-probs of the prompts as well.
        """
        called = self.model if model is None else model
        row = pack(trees, next(self.model.parameters()).device, scores_prompt)
        if self.packed:
            with self.in_place():
                return _of_packed(called, row, statistics, self.temperature)
        if score_layer(called) is not None:
            return plain_scores(called, row, self.max_tokens, self.one_by_one)
        return plain_logprobs(called, row, self.max_tokens, statistics, self.one_by_one, self.temperature)

    def in_place(self) -> AbstractContextManager[None]:
        """Keeps the attention in place for a backward pass too, where gradient checkpointing runs the layers again."""
        if self.attention is None:
            return nullcontext()
        return using_attention(unwrapped(self.model), self.attention)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights, so that a pass takes all of them."""
        return is_fsdp_managed_module(unwrapped(self.model))

    def rows(self, trees: Sequence[TokenTree], places: Iterable[int] | None = None) -> list[list[int]]:
        """Indices of the trees of each micro-batch of at most `max_tokens`: of all trees, or of those at `places`. A
        tree without completions, of which there is nothing to score, is in none."""
        sizes = self._sizes(trees, range(len(trees)) if places is None else places)
        scored = list(sizes)
        return [[scored[place] for place in row] for row in split_by_budget(list(sizes.values()), self.max_tokens)]

    def share(self, trees: Sequence[TokenTree]) -> list[int]:
        """Indices of the trees that this process scores: of all of them in one process, else of its share by tokens."""
        sizes = self._sizes(trees, range(len(trees)))
        scored = list(sizes)
        return [scored[place] for place in ranks.share(list(sizes.values()))]

    def _sizes(self, trees: Sequence[TokenTree], places: Iterable[int]) -> dict[int, int]:
        return {place: self.size(tree) for place in places if (tree := trees[place]).completions}

    def behind(self, rows: Sequence[list[int]]) -> int:
        """How many passes this process has to make with nothing, beside those through its rows: with sharded weights
        all processes make as many."""
        return ranks.missing(len(rows)) if self.sharded else 0

    def scored(
        self, trees: Sequence[TokenTree], statistics: bool = False, scores_prompt: bool = False
    ) -> Iterator[tuple[list[int], TreeLogprobs]]:
        """Log-probs of many trees, row by row with the indices of each row's trees, for use without gradients.

        Several processes score a share each, and all of them get everything.

        Raises:
            StageError: out of memory with a single tree.
        """
        own = []
        for row, found in self._scored_here(trees, statistics, scores_prompt):
            if ranks.processes() > 1:
                own.append((row, found))
            yield row, found
        for process, part in enumerate(ranks.gather(own)):
            if process != ranks.rank():
                yield from part

    def _scored_here(
        self, trees: Sequence[TokenTree], statistics: bool, scores_prompt: bool
    ) -> Iterator[tuple[list[int], TreeLogprobs]]:
        waiting = self.rows(trees, self.share(trees))
        for _ in range(self.behind(waiting)):
            self.score([PADDING], None, statistics, scores_prompt)
        while waiting:
            row = waiting.pop(0)
            found = self._try_to_score([trees[i] for i in row], statistics, scores_prompt)
            if found is not None:
                yield row, found
                continue
            rest = [i for unscored in (row, *waiting) for i in unscored]
            waiting = self.rows(trees, rest)

    def _try_to_score(self, trees: list[TokenTree], statistics: bool, scores_prompt: bool) -> TreeLogprobs | None:
        """None if memory ran out; the budget is lowered then."""
        try:
            return self.score(trees, None, statistics, scores_prompt)
        except Exception as error:
            if not is_out_of_memory(error) or self.sharded:
                raise
        # Outside the handler, whose traceback would keep the tensors of the failed attempt alive.
        self.lower_budget(trees)
        return None

    def lower_budget(self, trees: Sequence[TokenTree]) -> None:
        """Halve the token budget after memory ran out on these trees, as often as it takes to split them.

        Raises:
            StageError: they were one by one already.
        """
        free_memory()
        before, parts = self.max_tokens, len(self.rows(trees))
        smallest = min(self.size(tree) for tree in trees)
        while self.max_tokens > smallest and len(self.rows(trees)) == parts:
            self.max_tokens //= 2
        if len(self.rows(trees)) == parts:
            self.max_tokens = before
            raise StageError(
                f"out of memory with a single prompt and its completions ({max(map(self.size, trees)):,} tokens); set "
                "`train.gradient_checkpointing: true`, lower `data.max_length`, or take a smaller model"
            )
        logger.warning("out of memory: the token budget goes from %s to %s", f"{before:,}", f"{self.max_tokens:,}")

    def size(self, tree: TokenTree) -> int:
        """Tokens of a tree as this model computes it."""
        return tree.size if self.packed else tree.plain_size


def _of_packed(model: nn.Module, row: PackedTrees, statistics: bool = False, temperature: float = 1.0) -> TreeLogprobs:
    if score_layer(model) is not None:
        return packed_scores(model, row)
    return packed_logprobs(model, row, statistics, temperature)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def choose_scorer(
    model: nn.Module, trees: Sequence[TokenTree], max_tokens: int, setting: str = "auto", longest: int | None = None
) -> Scorer:
    """Packed if the model allows it and the self-check on `trees` passes, else plain, with the reason in the log.

    Args:
        trees: real ones, a few.
        setting: `model.attn_implementation` of the recipe; `trees` raises instead of falling back.
        longest: tokens of the longest prompt with completion that will come; by default that of `trees`.

    Raises:
        StageError: `trees` was asked for and cannot be had.
    """
    longest = max(tree.longest for tree in trees) if longest is None else longest
    stretched = stretched_positions(model, longest)
    if setting in ("sdpa", "eager"):
        return Scorer(model, max_tokens, None, f"the recipe asks for {setting}", one_by_one=stretched is not None)
    reason = stretched or obstacle(model)
    attention = None
    if reason is None:
        attention, reason = _checked_backend(model, trees)
    if attention is not None:
        return Scorer(model, max_tokens, attention)
    if setting == "trees":
        raise StageError(f"`model.attn_implementation: trees` cannot be had for this model: {reason}")
    logger.warning("prompts are encoded once per completion (plain path): %s", reason)
    return Scorer(model, max_tokens, None, str(reason), one_by_one=stretched is not None)


# ---- what rules packing out -------------------------------------------------------------------------------------


def obstacle(model: nn.Module) -> str | None:
    """What about the model is known to rule packing out, or None."""
    base = unwrapped(model)
    if not base._can_set_attn_implementation():
        return "its attention cannot be replaced"
    odd = sorted(set(getattr(_text_config(base), "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if odd:
        return f"it has layers that carry a state or a mask of their own ({', '.join(odd)})"
    if router_coefficient(base):
        return "the auxiliary loss of its router counts the tokens of padded batches"
    return None if score_layer(base) is not None else head_obstacle(base)


def stretched_positions(model: nn.Module, longest: int) -> str | None:
    """Why rows cannot share a batch: rotary frequencies that the longest position of a row decides."""
    parameters: dict[str, Any] = getattr(_text_config(unwrapped(model)), "rope_parameters", None) or {}
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = rope.get("rope_type", "default")
        limit = rope.get("original_max_position_embeddings") or _text_config(unwrapped(model)).max_position_embeddings
        if (kind == "longrope" or "dynamic" in kind) and longest > limit:
            return f"its {kind} positions change beyond {limit:,} tokens, and the longest row has {longest:,}"
    return None


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


# ---- the self-check ---------------------------------------------------------------------------------------------


def _checked_backend(model: nn.Module, trees: Sequence[TokenTree]) -> tuple[str | None, str | None]:
    """The fastest backend of the device that gives plain log-probs, or None and what was wrong."""
    base = unwrapped(model)
    surest, *others = candidates(base.device, base.dtype)
    reason = failed_self_check(model, trees, surest)
    if reason is not None:
        return None, reason
    row = pack(trees, base.device)
    right = [surest, *(name for name in others if not differs(model, row, name, surest))]
    fastest = min(right, key=lambda name: _seconds(model, trees, name) if others else 0.0)
    return ranks.from_first(lambda: fastest), None


def failed_self_check(model: nn.Module, trees: Sequence[TokenTree], attention: str) -> str | None:
    """Compare packed with plain log-probs of a few real trees; say what is wrong, or None.

    The trees are checked together in one row, so that a token that sees a neighbouring tree shows as well.
    """
    plain = Scorer(model, max(tree.plain_size for tree in trees), None)
    with reference_model(model):
        row = pack(trees, unwrapped(model).device)
        return differs_from_plain(model, row, attention, lambda: plain.score(trees).tokens)


@torch.no_grad()
def differs_from_plain(
    model: nn.Module, row: PackedTrees, attention: str, plain: Callable[[], torch.Tensor]
) -> str | None:
    """How the log-probs of a row differ from those that `plain` computes, or None.

    Both are computed in float32 whatever the weights are kept in, so that a small mistake cannot hide in rounding.
    """
    with in_float32(model):
        try:
            with using_attention(unwrapped(model), attention):
                packed = _of_packed(model, row)
        except (NotImplementedError, TypeError, RuntimeError) as error:
            return f"its packed forward pass failed ({str(error).splitlines()[0]})"
        wanted = plain()
    calls, layers = row.scratch.get("calls", 0), _text_config(unwrapped(model)).num_hidden_layers
    if calls != layers:
        return f"{calls} of its {layers} layers call the attention that packing replaces"
    difference = float((packed.tokens - wanted).abs().max())
    explained = COARSE if _rounds_inputs(model) else TOLERANCE[_exact(model)]
    if not difference <= explained:
        what, unit = ("log-probs", " nats") if score_layer(model) is None else ("scores", "")
        measured, allowed = f"{difference:.2g}{unit}", f"{explained:.2g}{unit}"
        return f"packed {what} differ from plain ones by {measured}, rounding explains {allowed}"
    return None


def freeze_reference(policy: nn.Module) -> None:
    """Make a frozen copy of the adapter as it is now part of the reference, which is the bare base otherwise."""
    policy.frozen_adapter = {  # type: ignore[assignment]
        name: parameter.detach().clone() for name, parameter in policy.named_parameters() if parameter.requires_grad
    }


def frozen_adapter(policy: nn.Module) -> dict[str, torch.Tensor]:
    """By name, the weights of the adapter that the reference has; none if it is the bare base."""
    found: dict[str, torch.Tensor] = vars(policy).get("frozen_adapter", {})
    return found


@contextmanager
def reference_model(policy: nn.Module) -> Iterator[None]:
    """While open, `policy` computes as the reference: adapter off, or as it was at first if it came with one; dropout
    off."""
    training = policy.training
    policy.eval()
    try:
        with _adapter_of_the_reference(policy):
            yield
    finally:
        policy.train(training)


@contextmanager
def _adapter_of_the_reference(policy: nn.Module) -> Iterator[None]:
    frozen = frozen_adapter(policy)
    if not frozen:
        with policy.disable_adapter() if hasattr(policy, "disable_adapter") else nullcontext():  # type: ignore[operator]
            yield
        return
    trained = {name: parameter for name, parameter in policy.named_parameters() if name in frozen}
    kept = {name: parameter.data for name, parameter in trained.items()}
    try:
        for name, parameter in trained.items():
            parameter.data = frozen[name].to(parameter.device)
        yield
    finally:
        for name, parameter in trained.items():
            parameter.data = kept[name]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While open, every module with half-precision weights computes in float32, its weights cast for the call alone;
    4-bit layers unpack theirs to float32."""
    kept: list[tuple[nn.Module, nn.Parameter, torch.Tensor]] = []
    packed: dict[Any, Any] = {each: each.compute_dtype for each in model.modules() if hasattr(each, "compute_dtype")}

    def weights(module: nn.Module) -> Iterator[nn.Parameter]:
        # What PEFT wraps is not always called, but its weights are used.
        return module.parameters(recurse=isinstance(module, AuxiliaryTrainingWrapper))

    def widen(module: nn.Module, *arguments: Any) -> None:
        for parameter in weights(module):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                kept.append((module, parameter, parameter.data))
                parameter.data = parameter.data.float()

    def narrow(module: nn.Module, *arguments: Any) -> None:
        # By the module: sharded weights have been exchanged for their shards when this is called.
        while kept and kept[-1][0] is module:
            _, parameter, data = kept.pop()
            parameter.data = data

    handles = [module.register_forward_pre_hook(widen) for module in model.modules()]
    handles += [module.register_forward_hook(narrow, always_call=True) for module in model.modules()]
    for module in packed:
        module.compute_dtype = torch.float32
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, dtype in packed.items():
            module.compute_dtype = dtype


def _exact(model: nn.Module) -> torch.dtype:
    return torch.promote_types(unwrapped(model).dtype, torch.float32)


def _rounds_inputs(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.int8 for parameter in model.parameters())


@torch.no_grad()
def differs(model: nn.Module, row: PackedTrees, attention: str, surest: str) -> bool:
    """Whether a backend's attention, on random states of the model's shape, is not that of the surest."""
    config, base = _text_config(unwrapped(model)), unwrapped(model)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    generator = torch.Generator(base.device).manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, row.tokens, width, generator=generator, device=base.device, dtype=base.dtype)
        for heads in (config.num_attention_heads, keys, keys)
    )
    windows = {None, getattr(config, "sliding_window", None)}
    softcap = getattr(config, "attn_logit_softcapping", None)
    for window in windows:
        shape = Shape(width**-0.5, window, softcap)
        try:
            found, wanted = (BACKENDS[name](query, key, value, row, shape).float() for name in (attention, surest))
        except Exception as error:  # a backend that a device cannot run may fail in any way
            logger.debug("%s: %s", attention, error)
            return True
        if not (found - wanted).norm() <= 0.01 * wanted.norm():
            return True
    return False


def _seconds(model: nn.Module, trees: Sequence[TokenTree], name: str) -> float:
    """Time of one forward and backward pass as in training, after one to warm up."""
    scorer = Scorer(model, 0, name)
    elapsed = 0.0
    base = unwrapped(model)
    for _ in range(2):
        started = time.perf_counter()
        with scorer.in_place(), torch.autocast(base.device.type, base.dtype, enabled=base.dtype.itemsize == 2):
            scorer.score(trees).tokens.sum().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
    model.zero_grad()
    return elapsed
