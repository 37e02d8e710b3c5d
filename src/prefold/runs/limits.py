"""Whether a recipe fits its model, its data, its number of steps and the memory at hand.

What cannot be computed is refused; what can be, but is hardly intended, becomes a finding.
"""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError

from prefold import memory
from prefold.data.chat import render
from prefold.data.findings import ROWS_SHOWN, Finding
from prefold.data.preference import Unfit
from prefold.device import choose_device
from prefold.errors import UserError, counted, first_line
from prefold.files import read_json
from prefold.models.gate import beyond_rows, require_positions, rotary_positions
from prefold.plan.machine import Machine
from prefold.plan.plan import Plan
from prefold.plan.planner import make_plan
from prefold.runs.context import Run
from prefold.runs.measuring import evaluation_prompts
from prefold.runs.opened import order_of
from prefold.runs.remembered import ENOUGH
from prefold.training.loop import StepOrder
from prefold.trees.attention import unwrapped
from prefold.trees.logprobs import router_coefficient


def findings_of(run: Run, shapes: Any, order: StepOrder) -> list[Finding]:
    """Findings about model, data and recipe together; `shapes` is the model without its weights.

    Raises:
        UserError: the data hold tokens or lengths that the model has no embeddings for, or the chat template refuses a
            prompt of `evaluate`.
    """
    prepared, model = run.prepared, unwrapped(shapes)
    for examples in (prepared.train, prepared.held_out):
        (token, index), rows = examples.largest_token(), model.config.get_text_config().vocab_size
        if token >= rows:
            raise beyond_rows(token, run.tokenizer, rows, str(examples.origins[index]))
    about_model = [*_about_positions(run, model), *_about_objective(run, model)]
    return [*about_model, *_about_steps(run, len(order)), *_about_rounds(run)]


PHASES = {
    "train": ("load", "self-check", "train", "rollouts"),
    "merge": ("merge",),
    "evaluate": ("evaluate",),
}
"""Phases of the plan, by the stage that they belong to."""


def plan_of(run: Run, device_memory: int | None = None, measure: bool = False) -> Plan:
    train, held_out = run.prepared.train.lengths, run.prepared.held_out.lengths
    return make_plan(run.recipe, train, held_out, order_of(run.recipe, len(train)), device_memory, measure)


def evaluated_in_16_bits(run: Run) -> bool:
    """Whether weights stay in 16 bits while this run's models are evaluated, since float32 does not fit."""
    return not _is_ample(run) and plan_of(run).in_16_bits


def _is_ample(run: Run) -> bool:
    """Whether memory is so ample by the plan that the run began with that no new plan is needed."""
    path = run.folder / "data.json"
    plan = read_json(path).get("plan") if path.is_file() else None
    machine = Machine.here(choose_device().type)
    return plan is not None and plan["device"] == machine.device and machine.memory >= ENOUGH * plan["peak"]


def require_memory(run: Run, stage: str) -> None:
    """Raises UserError: the stage needs more memory than is at hand now. A model spread over several devices is not
    checked, as their memory is not known well enough."""
    if stage not in PHASES or _is_ample(run):
        return
    plan = plan_of(run)
    needed = max(size for phase, size in plan.peaks.items() if phase in PHASES[stage])
    if not plan.spread:
        where = f"{run.recipe.output_dir}, `{stage}`"
        memory.require(where, needed, plan.at_hand, plan.advice())
        memory.require(where, plan.host, memory.available())


def _about_positions(run: Run, model: Any) -> list[Finding]:
    """Compare the length of every sequence that will be computed with the positions of the model."""
    recipe, (sampled, drawn, _) = run.recipe, run.recipe.sampled
    limit, beyond, longest = rotary_positions(model.config), [], 0
    for examples in (run.prepared.train, run.prepared.held_out):
        lengths = [prompt + max(completions, default=drawn) for prompt, *completions in examples.lengths]
        if lengths:
            index = max(range(len(lengths)), key=lengths.__getitem__)
            what = f"the prompt and `{sampled.rpartition('.')[2]}`" if sampled else "prompt and completion"
            advice = f"lower `{sampled or 'data.max_length'}`"
            require_positions(model, lengths[index], f"{examples.origins[index]}, {what}", advice)
        beyond += [examples.origins[i] for i, length in enumerate(lengths) if limit and length > limit]
        longest = max(longest, *lengths, 0)
    for number, prompt in enumerate(_questions(run), 1):
        length, what = len(prompt) + recipe.evaluate.max_new_tokens, f"prompt {number} of `evaluate` and its answer"
        require_positions(model, length, what, "lower `evaluate.max_new_tokens`")
        longest = max(longest, length)
    if not limit or longest <= limit:
        return []
    message = f"sequences of up to {longest:,} tokens, and the model is made for {limit:,} positions, scaling included"
    advice = "lower `data.max_length`, or take a model for longer texts: beyond them it has learnt nothing"
    return [Finding("beyond_positions", "warning", len(beyond), tuple(beyond[:ROWS_SHOWN]), message, advice)]


def _questions(run: Run) -> list[list[int]]:
    """The token ids of the prompts that will be answered before and after."""
    recipe = run.recipe
    if recipe.algorithm.kind.scores:
        return []
    prompts, given = evaluation_prompts(recipe, run.prepared.held_out)
    arguments = given or [{}] * len(prompts)
    ids = []
    for number, (prompt, of_template) in enumerate(zip(prompts, arguments, strict=True), 1):
        try:
            ids.append(render(prompt, run.tokenizer, recipe.data.template, of_template))
        except (TemplateError, TypeError, ValueError, Unfit) as error:
            what, where = f"the chat template refuses it: {first_line(error)}", f"prompt {number} of `evaluate`"
            raise UserError(what, where=where, advice="change the prompt, or leave it out") from None
    return ids


def _about_steps(run: Run, steps: int) -> list[Finding]:
    settings, findings = run.recipe.train, []
    warmup = settings.warmup_steps
    if warmup and settings.lr_scheduler_type == "constant":
        message = f"`train.warmup_steps: {warmup}` has no effect: `lr_scheduler_type: constant` starts at the full rate"
        advice = "take `constant_with_warmup`, or remove `train.warmup_steps`"
        findings.append(Finding("warmup_ignored", "warning", 1, (), message, advice))
    elif warmup >= max(1, steps):
        message = f"the warm-up takes {warmup:,.0f} steps and the run has {steps:,}: the full rate is never reached"
        advice = f"lower `train.warmup_steps`, to a tenth of the steps or so ({max(1, steps // 10)})"
        findings.append(Finding("warmup_too_long", "warning", 1, (), message, advice))
    return findings


def _about_rounds(run: Run) -> list[Finding]:
    rounds, prompts, held_out = run.recipe.rounds, len(run.prepared.train), len(run.prepared.held_out)
    if rounds is None:
        return []
    message = (
        f"at most {counted(rounds.number, 'round')}, each with {rounds.num_completions} answers to {prompts:,} prompts "
        f"and to {held_out:,} held-out ones, and at most {counted(prompts, 'pair')}: the plan is of one of them, "
        "without its sampling"
    )
    return [Finding("rounds", "note", rounds.number, (), message, "")]


def _about_objective(run: Run, model: Any) -> list[Finding]:
    findings = []
    if remark := run.recipe.algorithm.remark:
        findings.append(Finding("objective", "warning", 1, (), *remark))
    if coefficient := router_coefficient(model):
        message = f"the loss that balances experts is trained as well, times {coefficient:g}, as config.json asks"
        advice = "`output_router_logits: false` in it leaves that loss out, and lets trees be packed"
        findings.append(Finding("router_loss", "note", 1, (), message, advice))
    return findings
