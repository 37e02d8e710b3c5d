"""The backends of CUDA as far as a CPU can tell: what they compute, by stand-ins for their kernels; what becomes of
those that fail; what they keep and how often they are compiled."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from dense import assert_same, dense_logprobs, exactly, outcome
from emulated_kernels import flash
from families import checkpointed, family
from tiny import random_trees, tiny_llama, with_lora
from torch import Tensor
from torch.nn.attention import flex_attention, varlen

from prefold.errors import StageError
from prefold.generation import engine
from prefold.plan.passes import AllocatedBytes
from prefold.runs import train
from prefold.trees import attention, scorer, self_check
from prefold.trees.attention import BACKENDS, Shape, block_mask, candidates, flex_mask, segments
from prefold.trees.forest import Text, pack_forest
from prefold.trees.packing import PackedTrees, TokenTree, pack
from prefold.trees.reader import Reader, choose_reader
from prefold.trees.scorer import Scorer, choose_scorer
from prefold.trees.self_check import _attended, _trials, choose_attention

VARIABLE, BLOCKS, SEGMENTS = CUDA = ["prefold_variable_length", "prefold_block_mask", "prefold_segments"]
POSITIONS = {"max_position_embeddings": 4096}


def long_tree(prompt: int, *completions: int) -> TokenTree:
    return TokenTree(tuple(i % 90 for i in range(prompt)), tuple((i,) * length for i, length in enumerate(completions)))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "prefold"]


# ---- stand-ins for kernels --------------------------------------------------------------------------------------


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Variable-length attention by `flash`, FlexAttention unfused, which has a backward pass on a CPU then. How often
    the latter was compiled is how long the list is."""
    compiled: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph

    monkeypatch.setattr(varlen, "varlen_attn", flash)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *states: None)
    monkeypatch.setattr(attention, "COMPILER", count)
    attention._compiled.cache_clear()
    yield compiled
    attention._compiled.cache_clear()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "starcoder2", "gemma3_text", "smollm3", "phi"])
def test_variable_length(name: str, emulated: list[int]) -> None:
    with exactly(torch.float64):
        model = with_lora(family(name, torch.float64))
        trees = random_trees(6)
        wanted = outcome(model, lambda: dense_logprobs(model, trees))
        assert_same(outcome(model, lambda: Scorer(model, 64, VARIABLE).score(trees).tokens), wanted, 1e-10)


def test_variable_length_of_torch_2_11(emulated: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no keyword for grouped heads, and takes them."""
    monkeypatch.setattr(attention, "NAMES_GROUPED_HEADS", False)
    test_variable_length("llama", emulated)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3", "gemma3_text", "cohere2"])
def test_block_mask(name: str, emulated: list[int]) -> None:
    model = with_lora(family(name))
    trees = random_trees(5)
    wanted = outcome(model, lambda: dense_logprobs(model, trees))
    assert_same(outcome(model, lambda: Scorer(model, 64, BLOCKS).score(trees).tokens), wanted, 1e-5)
    assert emulated


@pytest.mark.parametrize("backend", [VARIABLE, BLOCKS])
def test_with_checkpointing(backend: str, emulated: list[int]) -> None:
    model = with_lora(family("mistral"))
    trees = random_trees(4, seed=2)
    wanted = outcome(model, lambda: dense_logprobs(model, trees))
    found = Scorer(checkpointed(model), 64, backend)
    with found.in_place():
        assert_same(outcome(model, lambda: found.score(trees).tokens), wanted, 1e-5)


@pytest.mark.parametrize("backend", [VARIABLE, BLOCKS])
def test_forests(backend: str, emulated: list[int]) -> None:
    model, texts = family("mistral"), [Text((1, 2, 3, *range(i, 9), 5, i, 7), 3) for i in range(4, 8)]
    [[(row, found)], plain] = (list(Reader(model, 512, name).read(texts)) for name in (backend, None))
    wanted = {i: likelihood for own, of in plain for i, likelihood in zip(own, of, strict=True)}
    for i, likelihood in zip(row, found, strict=True):
        assert likelihood.logprob == pytest.approx(wanted[i].logprob, abs=1e-4)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("backend", [VARIABLE, BLOCKS, SEGMENTS])
@pytest.mark.parametrize("window", [None, 150])
def test_head_widths_in_half_precision(
    width: int, backend: str, window: int | None, emulated: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """None is refused for its rounding."""
    model = tiny_llama(torch.bfloat16, head_dim=width, sliding_window=window, layer_types=["sliding_attention"] * 3)
    names, row = [backend, SEGMENTS], pack([long_tree(160, 32, 20)])
    assert choose_attention(model, names, [row], torch.bfloat16) in (names if backend == BLOCKS else [backend])
    assert not said(caplog)


# ---- the mask of FlexAttention ----------------------------------------------------------------------------------


def rows() -> list[PackedTrees]:
    texts = [Text(tuple(range(200)) + (i,) * 90 + (7,) * length, 5) for i in (1, 2) for length in (10, 130, 300)]
    return [
        pack(random_trees(3)),
        pack([long_tree(300, 10, 128, 40), long_tree(128, 128), long_tree(5, 260, 1)]),
        pack([long_tree(1000, *[8] * 40)]),
        pack_forest(texts),
    ]


def blocks_of(numbers: Tensor, listed: Tensor) -> Tensor:
    """Of a block mask, the blocks that each row of blocks lists: the first `numbers[i]` of `listed[i]`."""
    blocks = torch.zeros(listed.shape, dtype=torch.bool)
    for row, number in enumerate(numbers.tolist()):
        blocks[row, listed[row, :number].long()] = True
    return blocks


@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize("index", range(len(rows())))
def test_blocks_are_those_of_the_spans(index: int, window: int | None) -> None:
    row = rows()[index]
    mask = flex_mask(row, window, row.input_ids.device)
    length = mask.shape[-1]
    assert length % 128 == 0 and row.tokens <= length < row.tokens + 256
    wanted = torch.zeros(length, length, dtype=torch.bool)
    positions = [*row.positions[0].tolist(), *range(length - row.tokens)]
    for own, above, _ in [*row.nodes, ((row.tokens, length), (), ())]:
        for span in (*above, own):
            wanted[slice(*own), slice(*span)] = True
    position = torch.tensor(positions)
    wanted &= torch.ones_like(wanted).tril()
    if window is not None:
        wanted &= position[:, None] - position[None] < window
    each = torch.arange(length)
    inside = mask.mask_mod(None, None, each[:, None], each[None])
    partial, full = (
        blocks_of(number[0, 0], listed[0, 0])
        for number, listed in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    )
    assert not (partial & full).any()
    partial, full = (blocks.repeat_interleave(128, 0).repeat_interleave(128, 1) for blocks in (partial, full))
    assert torch.equal(full | (partial & inside), wanted)
    if window is None:  # none is computed in vain, and none masked in vain
        blocks = wanted.view(length // 128, 128, -1, 128).sum((1, 3))
        assert torch.equal((partial | full)[::128, ::128], blocks > 0)
        assert torch.equal(full[::128, ::128], blocks == 128 * 128)


@pytest.mark.parametrize("window", [None, 4096])
def test_the_mask_of_a_long_row_takes_little(window: int | None) -> None:
    row = pack([long_tree(2000, *[256] * 8)] * 8)
    assert row.tokens > 32_000
    with AllocatedBytes([row.input_ids, row.positions]) as allocated:
        mask = flex_mask(row, window, row.input_ids.device)
    assert mask.shape[-1] >= row.tokens
    assert allocated.now <= 64 * row.tokens and allocated.peak <= 256 * row.tokens


@torch._dynamo.config.patch(recompile_limit=1)
def test_each_kind_of_call_is_compiled_once(emulated: list[int]) -> None:
    """Each kind of call once, whatever the lengths of its rows and with autocast or without; what goes beyond is
    refused."""
    kinds = [(None, None, ()), (None, 5.0, (0, 1, 2)), (50, None, (0,)), (50, 5.0, ()), (50, 5.0, (0, 1, 2))]
    for window, softcap, needed in kinds:
        for count, autocast in ((1, False), (30, True), (8, False), (60, True)):
            row = pack(random_trees(count, seed=count))
            states = [torch.randn(1, heads, row.tokens, 8) for heads in (6, 3, 3)]
            for i in needed:
                states[i].requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = block_mask(states[0], states[1], states[2], row, Shape(0.25, window, softcap))
            if needed:
                out.sum().backward()
    assert len(emulated) == len(kinds)


# ---- the choice -------------------------------------------------------------------------------------------------

Backend = Callable[..., Tensor]


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, error: Exception | None) -> Tensor:
        ctx.error = error
        return states.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.error:
            raise ctx.error
        return 1.05 * gradients[0], None


def forward_fails(error: Exception) -> Backend:
    def backend(*given: Any) -> Tensor:
        raise error

    return backend


def backward_fails(error: Exception | None) -> Backend:
    def backend(query: Tensor, key: Tensor, value: Tensor, *given: Any) -> Tensor:
        return segments(query, FailsBackward.apply(key, error), value, *given)

    return backend


def window_off_by(more: int) -> Backend:
    def backend(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
        window = shape.window and shape.window + more
        return segments(query, key, value, trees, shape._replace(window=window))

    return backend


def sibling_in_sight(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    nodes = [node._replace(above=(*node.above, (node.own[0] - 1, node.own[0]))) for node in trees.nodes[2:3]]
    row = PackedTrees(**{**vars(trees), "nodes": (*trees.nodes[:2], *nodes, *trees.nodes[3:]), "scratch": {}})
    return segments(query, key, value, row, shape)


SHARED = "out of resource: shared memory, Required: 114688, Hardware limit: 101376"
FAILING = {
    "forward": (forward_fails(RuntimeError("no kernel image")), "no kernel image"),
    "forward, out of memory": (forward_fails(torch.OutOfMemoryError("CUDA out of memory")), "out of memory"),
    "backward": (backward_fails(RuntimeError(SHARED)), "shared memory"),
    "backward, out of memory": (backward_fails(torch.OutOfMemoryError("CUDA out of memory")), "out of memory"),
    "gradient": (backward_fails(None), "its dk, window None, is off by 0.0"),
    "window too wide": (window_off_by(1), "window 300"),
    "window too narrow": (window_off_by(-1), "window 300"),
    "sibling": (sibling_in_sight, "its output"),
}


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "candidates", lambda device, *given: candidates(torch.device("cuda"), *given))


@pytest.mark.parametrize("failing", FAILING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_backend_that_fails_is_left_out(
    failing: str,
    dtype: torch.dtype,
    as_on_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend, why = FAILING[failing]
    for name in (VARIABLE, BLOCKS):
        monkeypatch.setitem(BACKENDS, name, backend)
    model = with_lora(family("gemma3_text", dtype, sliding_window=300, **POSITIONS))
    trees = [long_tree(400, 60, 50), long_tree(170, 30, 20)]
    found = choose_scorer(model, trees, 1024)
    assert found.attention == SEGMENTS
    assert len(said(caplog)) == (2 if dtype == torch.bfloat16 else 1)
    assert all("is not used" in line and why in line and "\n" not in line for line in said(caplog))


def test_where_none_works_the_plain_path_is_taken(
    as_on_cuda: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last one is right in float32, by which it is checked against the plain path, and fails in half precision."""

    def only_float32(query: Tensor, *given: Any) -> Tensor:
        if query.dtype != torch.float32:
            raise RuntimeError("no kernel")
        return segments(query, *given)

    for name in CUDA:
        monkeypatch.setitem(BACKENDS, name, only_float32)
    found = choose_scorer(tiny_llama(torch.bfloat16), random_trees(3), 64)
    assert not found.packed and "no attention" in found.reason
    assert len(said(caplog)) == 4


def test_variable_length_is_taken_unseen_of_others(
    as_on_cuda: None, emulated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled and nothing timed where the first is right."""
    assert choose_scorer(tiny_llama(torch.bfloat16), random_trees(3), 64).attention == VARIABLE
    assert not emulated


def test_flex_attention_for_soft_caps_and_float32_where_it_is_faster(
    as_on_cuda: None, emulated: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trees = random_trees(3)
    for slower, faster in ((SEGMENTS, BLOCKS), (BLOCKS, SEGMENTS)):
        monkeypatch.setattr(self_check, "_seconds", lambda name, trial, slower=slower: float(name == slower))
        for model in (family("gemma2", torch.bfloat16), tiny_llama()):
            assert choose_scorer(model, trees, 64).attention == faster
    assert not said(caplog)


def test_what_computes_decides_not_what_the_weights_are_kept_in(
    as_on_cuda: None, emulated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full fine-tuning: float32 weights under autocast."""
    given: set[torch.dtype] = set()

    def kernel(query: Tensor, *rest: Any, **how: Any) -> Tensor:
        given.add(query.dtype)
        return flash(query, *rest, **how)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    found = choose_scorer(tiny_llama(), random_trees(3), 64, dtype=torch.bfloat16)
    assert found.attention == VARIABLE and given == {torch.bfloat16}


def test_training_computes_in_the_dtype_of_its_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.dtype] = []

    def scorer_of(recipe: Any, model: Any, examples: Any, dtype: torch.dtype) -> None:
        given.append(dtype)
        raise InterruptedError

    monkeypatch.setattr(train, "policy_of", lambda recipe: tiny_llama())
    monkeypatch.setattr(train, "scorer_of", scorer_of)
    recipe: Any = SimpleNamespace(model=SimpleNamespace(dtype="bfloat16"), algorithm=None, run_folder=None)
    with pytest.raises(InterruptedError):
        train._train(recipe, cast(Any, SimpleNamespace(train=None)))
    assert given == [torch.bfloat16]


# ---- memory -----------------------------------------------------------------------------------------------------


def with_memory_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Packed passes of the self-check over longer rows run out of memory. The rows that there were, in tokens."""
    seen: list[int] = []
    packed = self_check.packed_logprobs

    def limited(model: Any, row: PackedTrees, *given: Any) -> Any:
        seen.append(row.tokens)
        if row.tokens > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return packed(model, row, *given)

    monkeypatch.setattr(self_check, "packed_logprobs", limited)
    return seen


def test_out_of_memory_in_the_self_check_is_no_reason_for_the_plain_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trees = [long_tree(200, 40, 30), long_tree(150, 40, 30), long_tree(100, 20, 30)]
    seen = with_memory_for(250, monkeypatch)
    assert choose_scorer(tiny_llama(), trees, 1024).packed
    assert max(seen) > 250 and sum(tokens <= 250 for tokens in seen) >= 2
    assert said(caplog) == ["out of memory: the self-check of 3 trees goes on with half of them at a time"]
    with_memory_for(10, monkeypatch)
    with pytest.raises(StageError, match=r"out of memory in the self-check with \d+ tokens; take"):
        choose_scorer(tiny_llama(), trees, 1024)


def test_out_of_memory_is_said_before_reading_and_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory_for(0, monkeypatch)
    with pytest.raises(StageError, match="out of memory with a text of"):
        choose_reader(tiny_llama(), [Text(tuple(range(40)), 4)])
    monkeypatch.setattr(engine, "failed_check", forward_fails(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(StageError, match="out of memory with a single prompt"):
        engine.why_not_shared(tiny_llama(), [1, 2, 3], 4)


def test_masks_go_with_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[weakref.ref[Tensor]] = []
    lower_right = attention.lower_right

    def recorded(*given: Any) -> Tensor:
        mask = lower_right(*given)
        masks.append(weakref.ref(mask))
        return mask

    monkeypatch.setattr(attention, "lower_right", recorded)
    trees = random_trees(4)
    Scorer(family("gemma2"), 64, SEGMENTS).score(trees).tokens.sum().backward()
    gc.collect()
    shapes = {(len(tree.prompt), len(ids)) for tree in trees for ids in tree.completions}
    assert 0 < len(masks) <= 2 * (len(shapes) + len(trees))  # once for all layers of a kind
    assert all(mask() is None for mask in masks)


def test_a_token_by_itself_is_no_fault(emulated: list[int]) -> None:
    """The gradients of its query and key are 0."""
    row = pack_forest([Text((5, 7), 1)])
    assert choose_attention(tiny_llama(), [VARIABLE, SEGMENTS], [row], torch.float16) == VARIABLE


def test_segments_are_right_enough_in_half_precision_with_a_soft_cap() -> None:
    """The last resort must not be refused for its rounding."""
    row = pack([long_tree(160, 32, 24), long_tree(80, 32, 24)])
    model = family("gemma2", torch.bfloat16, head_dim=64)
    assert choose_attention(model, [SEGMENTS, SEGMENTS], [row], torch.bfloat16) == SEGMENTS
    [trial, *_] = _trials(model, row, torch.float16)
    assert all(states.dtype == torch.float16 for states in _attended(SEGMENTS, trial))
