"""Merge: the trained weights become a whole model, which is loaded back and compared."""

from __future__ import annotations

from prefold.device import choose_device, choose_dtype
from prefold.files import write_json
from prefold.models.merge import merge_adapter, merge_dtype, remarks
from prefold.models.provenance import provenance
from prefold.models.score_head import pad_apart
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import Model
from prefold.runs.context import Run
from prefold.runs.opened import compared_rows, head_seed_of, trained_logits
from prefold.terminal import say


def merge(run: Run) -> None:
    recipe, folder = run.recipe, run.folder
    rows = compared_rows(recipe, run.checked_data().train)
    tokenizer = tokenizer_of(recipe.model)  # not the run's, since its padding may change
    if recipe.algorithm.kind.scores:
        pad_apart(tokenizer, {row[-1] for row in rows})
    computed = choose_dtype(recipe.model.dtype, choose_device())
    dtype, seed = str(merge_dtype(recipe, computed)).removeprefix("torch."), head_seed_of(recipe)
    trains_all = recipe.lora == "none"
    base, adapter = (Model(name=str(folder / "trained")), None) if trains_all else (recipe.model, folder / "adapter")
    result = merge_adapter(base, adapter, folder / "merged", tokenizer, rows, dtype, seed, trained_logits(folder))
    for remark in remarks(result):
        say(f"  {remark}")
    write_json(folder / "merge.json", {**result, "provenance": provenance(recipe.model, recipe.data)})
