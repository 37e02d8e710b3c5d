"""The recipe file: strict sections, dotted overrides, resolved dump, JSON schema.

A recipe is YAML with one section per stage. Every field is declared once, here or beside the algorithm it belongs to,
with its type, bounds and meaning. An unknown field is an error that names the nearest one; nothing is accepted and then
ignored. Fields left out take the method's vetted default (`Algorithm.defaults`) or the one written here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from prefold.algorithms import ALGORITHMS, Algorithm
from prefold.data.where import Where
from prefold.errors import UserError
from prefold.files import without_home
from prefold.rollouts.rewards import REWARDS, OnError, settings_of


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Model(Section):
    name: str = Field(min_length=1)
    """Hub id, folder, GGUF file, or `pypi:PACKAGE==VERSION`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the device computes in it natively, float16 on older GPUs, float32 else."""
    attn_implementation: Literal["auto", "trees", "sdpa", "eager"] = "auto"
    """`auto`: trees (each prompt encoded once) if the self-check passes, else plain sdpa; `trees`: fail instead of
    falling back; `sdpa`, `eager`: the plain path with that attention."""
    device_map: str | dict[str, str | int] | None = None
    """As transformers takes it; unset: the whole model on the training device."""
    adapter: str | None = Field(None, min_length=1)
    """Folder of a LoRA adapter of this model, e.g. another run's `adapter/`: training goes on with it, and the
    reference is a frozen copy of it. It brings its own LoRA settings, so the section `lora` is left out."""
    chat_template: str | None = None
    """The chat format that a base model is to learn: `chatml`, or a file FILE.jinja with a template whose tokens the
    tokenizer has. The rows of its tokens in the embeddings are trained. Unset: the tokenizer's own template."""
    load_in_4bit: bool = False
    """Train over weights that are held in 4 bits (QLoRA). The adapter is merged into the unquantised weights, and they
    are what is evaluated."""
    load_in_8bit: bool = False
    """The same in 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    """Number format of 4-bit weights; unset: `nf4`. Beware that transformers' own default is `fp4`."""
    bnb_4bit_use_double_quant: bool | None = None
    """Quantise the scales of 4-bit weights as well, which saves 0.4 bits per weight; unset: `false`."""
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """What 4-bit weights are unpacked to for each product; unset: `auto`, that of `dtype`."""

    @model_validator(mode="before")
    @classmethod
    def four_bits_are_spelt_out(cls, values: Any) -> Any:
        """With 4-bit weights the unset settings take their values here, so that the resolved recipe names them."""
        if not isinstance(values, dict) or not values.get("load_in_4bit"):
            return values
        given = {name: value for name, value in values.items() if value is not None or name not in FOUR_BITS}
        return {**FOUR_BITS, **given}

    @model_validator(mode="after")
    def settings_are_used(self) -> Model:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("give either `load_in_4bit` or `load_in_8bit`, not both")
        idle = [name for name in FOUR_BITS if getattr(self, name) is not None]
        if idle and not self.load_in_4bit:
            raise ValueError(f"`{idle[0]}` would be ignored without `load_in_4bit: true`")
        if self.chat_template not in (None, "chatml") and not str(self.chat_template).endswith(".jinja"):
            raise ValueError(f"`chat_template` is `{self.chat_template}`; write `chatml`, or name a file FILE.jinja")
        return self

    def whole(self, folder: Path) -> Model:
        """These settings for what has become of the model: whole weights in a folder, with their chat format."""
        kept = ("dtype", "attn_implementation", "device_map")
        return Model(name=str(folder), **{name: getattr(self, name) for name in kept})


FOUR_BITS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "auto"}
"""What the settings of 4-bit weights are where they are left out."""


class Lora(Section):
    """Field names and meanings are those of peft's `LoraConfig`."""

    r: int = Field(16, gt=0)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    """`all-linear`, a regular expression, or a list of module names."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r, so that high ranks learn as fast as low ones."""
    use_dora: bool = False
    """Train the length of every output's weights beside their direction (DoRA): slower, often better at low ranks."""
    modules_to_save: list[str] = []
    """Modules that are trained and saved whole beside LoRA, by name, e.g. `[lm_head]`."""


class Rows(Section):
    """Where rows are read from, and which of them."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .json, .csv, .parquet; the first three also .gz, .bz2, .xz or .zst), a folder or a glob of files,
    a built-in set (`builtin:plain_words`), or a data set of the Hub (`org/name`)."""
    name: str | None = None
    """Configuration of a Hub data set, where it has several."""
    split: str | None = None
    """Split of a built-in set or Hub data set, `all` for all of a Hub data set; unset: `train`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    streaming: bool = False
    """Read a Hub data set over the network without storing it; `count` then takes its first rows."""
    where: str | None = None
    """Condition on a row's own columns, e.g. `rating >= 5 and in_gsm8k_train == false`; other rows are left out."""

    @field_validator("where")
    @classmethod
    def condition_can_be_read(cls, value: str | None) -> str | None:
        if value is not None:
            Where(value)
        return value


class Source(Rows):
    columns: dict[str, str] | None = None
    """Columns that have other names than those of a known shape: `{prompt: question}`."""
    weight: float | None = Field(None, gt=0)
    """Share of the rows, relative to the other sources that have a weight. The mixture is the largest one that keeps
    these proportions without repeating a row; the rows are drawn by `train.seed`."""
    count: int | None = Field(None, gt=0)
    """Number of rows, drawn by `train.seed`."""

    @model_validator(mode="after")
    def one_way_to_choose_rows(self) -> Source:
        if self.weight and self.count:
            raise ValueError("give either `weight` or `count`, not both")
        if self.weight and self.streaming:
            raise ValueError("`weight` needs the number of rows, which is unknown with `streaming`; give `count`")
        return self


class Benchmark(Rows):
    column: str = Field(min_length=1)
    """The column that holds the text, e.g. `question`."""


class Data(Section):
    train: list[Source] = Field(min_length=1)
    """Where the training pairs come from."""
    eval: list[Source] = []
    """Where the held-out pairs come from; or set `eval_fraction`."""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the training rows to hold out, equal prompts on one side. 0.1 where neither this nor `eval` is given."""
    shuffle: bool = False
    """Shuffle the examples of all sources together by `train.seed`. Each epoch of training draws an order anyway."""
    duplicates: Literal["keep", "drop_exact", "drop_near"] = "keep"
    """What happens to a pair that was there before: `drop_exact` leaves out those that are the same word for word,
    `drop_near` also those whose prompt, chosen and rejected each share 0.8 of their runs of 5 words with an earlier
    pair's."""
    decontaminate: list[Benchmark] = []
    """Texts to be evaluated on: training pairs that hold 13 words of one in a row, or a shorter one whole, are left
    out."""
    system: str | None = None
    """System message put before each prompt; a row that brings another one is left out."""
    template: Literal["chat", "none"] = "chat"
    """How messages become text: by the model's chat template, or `none`: a prompt and its answer as they are, with the
    tokenizer's BOS token before and its EOS token behind them."""
    max_length: int = Field(1024, gt=1)
    """Tokens of prompt and completion together; of the prompt alone where completions are sampled."""
    max_prompt_length: int | None = Field(None, gt=0)
    """Tokens that `overlong: truncate_prompt` leaves of a prompt; unset: what fits beside the longer completion."""
    overlong: Literal["drop", "truncate_prompt", "error"] = "drop"
    """What happens to a pair that is longer than `max_length`."""
    bad_rows: Literal["drop", "error"] = "drop"
    """What happens to a row that is broken, empty, not text, or for which `where` cannot be evaluated."""

    @model_validator(mode="after")
    def one_way_to_hold_out(self) -> Data:
        if self.eval and self.eval_fraction:
            raise ValueError("give either `eval` or `eval_fraction`, not both")
        if self.max_prompt_length and self.overlong != "truncate_prompt":
            raise ValueError("`max_prompt_length` is used by `overlong: truncate_prompt` only")
        return self


class Train(Section):
    """Field names and meanings are those of transformers' `TrainingArguments`, but for `batch_size` and
    `max_tokens`."""

    learning_rate: float = Field(5e-5, gt=0)
    batch_size: int = Field(16, gt=0)
    """Pairs (or prompts) per optimizer step, over all devices."""
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, gt=0)
    """Optimizer steps; overrides `num_train_epochs`."""
    max_tokens: int | Literal["auto"] = "auto"
    """Token budget of a micro-batch: how much is computed at once. It changes speed and memory, never the numbers."""
    warmup_steps: int = Field(0, ge=0)
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = {}
    optim: str = "adamw_torch"
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    fsdp: bool = False
    """Shard the model over all processes (FSDP2): each holds a part of every weight, and fetches the others' while it
    computes. For models of which a device cannot hold a copy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = Field(42, ge=0)
    """Of the data order, the initialisation of LoRA and of a reward model's head, and dropout."""
    save_steps: int = Field(50, gt=0)
    """Optimizer steps between checkpoints."""
    save_total_limit: int = Field(2, gt=0)
    """Checkpoints kept."""
    eval_steps: int | float | None = Field(None, gt=0)
    """Optimizer steps between measurements of the held-out data while training, or below 1 their share of all steps;
    unset: none are made."""
    metric_for_best_model: str | None = None
    """A held-out metric, such as `loss` or `rewards/margins`, by which checkpoints are told apart."""
    greater_is_better: bool | None = None
    """Unset: yes, unless the metric's name ends in `loss`."""
    load_best_model_at_end: bool = False
    """Go on with the best checkpoint instead of the last; `loss` decides unless `metric_for_best_model` is given."""
    early_stopping_patience: int | None = Field(None, gt=0)
    """Measurements in a row without a better metric after which training ends."""
    report_to: list[Literal["wandb", "tensorboard"]] = []
    """Trackers that get every step's metrics."""
    project: str = "prefold"
    """W&B project."""
    run_name: str | None = None
    """Name of the run in the trackers; unset: the name of the run folder."""

    @field_validator("optim", "lr_scheduler_type")
    @classmethod
    def known_to_transformers(cls, value: str, info: ValidationInfo) -> str:
        from transformers.trainer_utils import SchedulerType
        from transformers.training_args import OptimizerNames

        # Those two schedulers follow an evaluation metric that training on steps does not have.
        schedulers = {scheduler.value for scheduler in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
        known = (
            schedulers if info.field_name == "lr_scheduler_type" else {optimizer.value for optimizer in OptimizerNames}
        )
        if value not in known:
            near = difflib.get_close_matches(value, sorted(known), n=3)
            raise ValueError(
                f"`{value}` is unknown; " + (f"did you mean `{near[0]}`?" if near else ", ".join(sorted(known)))
            )
        return value

    @model_validator(mode="after")
    def metrics_are_measured(self) -> Train:
        wanted = ("metric_for_best_model", "greater_is_better", "load_best_model_at_end", "early_stopping_patience")
        given = [name for name in wanted if getattr(self, name)]
        if given and self.eval_steps is None:
            raise ValueError(f"`{given[0]}` needs held-out metrics while training; set `eval_steps`")
        if self.early_stopping_patience and not (self.metric_for_best_model or self.load_best_model_at_end):
            raise ValueError("`early_stopping_patience` needs a `metric_for_best_model`")
        if isinstance(self.eval_steps, float) and self.eval_steps >= 1:
            raise ValueError("`eval_steps` is a whole number of steps, or a share of all steps below 1")
        return self


Warns = Literal["off", "warn"]
Stops = Literal["off", "warn", "stop"]
Acts = Literal["off", "warn", "stop", "roll_back", "lower_rate"]


class Guards(Section):
    """What follows when training goes wrong: `off`: not looked for; `warn`: said once, and reported; `stop`: the run
    ends and keeps its checkpoints; `roll_back`: back to the last checkpoint, and on at half the rate; `lower_rate`: on
    at half the rate. May be changed while a run is under way."""

    not_finite: Literal["stop", "roll_back"] = "stop"
    """Loss or gradient is NaN or infinite; the rows of the step are shown."""
    no_gradient: Stops = "warn"
    """The gradient is 0 step after step."""
    stuck_at_start: Stops = "warn"
    """The loss stays at ln 2, where DPO starts, although the rate has risen."""
    chosen_falling: Acts = "warn"
    """Log-probs of the chosen answers collapse while the margin grows."""
    too_easy: Stops = "warn"
    """Every pair is told right after a few steps."""
    held_out_falling: Acts = "warn"
    """The margin on held-out pairs falls (with `train.eval_steps`)."""
    kl_running_off: Acts = "warn"
    """Completions go far away from the reference."""
    equal_rewards: Stops = "warn"
    """All completions of each prompt get the same reward."""
    cut_off: Stops = "warn"
    """Nearly all completions reach the longest length."""
    undertrained: Warns = "warn"
    """At the end, pairs are hardly told apart."""

    @property
    def actions(self) -> dict[str, str]:
        """By the name of the guard."""
        return dict(self.model_dump())


class Merge(Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: the dtype that was trained in."""


class Evaluate(Section):
    tasks: list[str] = []
    """What to ask before and after: suites (`open_llm_leaderboard`, `nous`), tasks and groups of
    lm-evaluation-harness, the built-in `everyday_facts`, and tasks of your own, all by name."""
    include_path: str | None = Field(None, min_length=1)
    """Folder of YAML files in the harness's format, with tasks of your own."""
    limit: int | None = Field(None, gt=0)
    """Questions of each task, the first ones; unset: all."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question, for tasks that are not named by a suite and have no fixed number; unset: each
    task's own."""
    apply_chat_template: bool = False
    """Ask the tasks as chat messages; off, as most published scores are."""
    prompts: int | list[str] = 8
    """How many held-out prompts are answered before and after, or the prompts themselves."""
    system: str | None = None
    """System message put before each of them; unset: what the prompt or the chat template brings."""
    max_new_tokens: int = Field(96, gt=0)
    num_answers: int = Field(1, gt=0)
    """Answers per prompt and model."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0: off."""
    min_p: float = Field(0.0, ge=0, le=1)
    """0: off."""
    compare_with: list[str] = []
    """Other models, by any name that `model.name` can have, and run folders, that are asked the tasks as well. They are
    compared with the model before training."""
    win_rate: WinRate | None = None
    """Have a judge say which answer to each prompt is better, the one before or the one after."""
    seed: int = Field(42, ge=0)

    @model_validator(mode="after")
    def tasks_are_asked(self) -> Evaluate:
        for name in ("include_path", "limit", "num_fewshot", "apply_chat_template"):
            if not self.tasks and getattr(self, name) not in (None, False):
                raise ValueError(f"`{name}` is for `tasks`, and there are none")
        return self

    @model_validator(mode="after")
    def sampling_is_used(self) -> Evaluate:
        if isinstance(self.prompts, int) and self.prompts < 0:
            raise ValueError("`prompts` must be a count of 0 or more, or a list of prompts")
        if self.temperature == 0:
            idle = [
                name
                for name in ("top_p", "top_k", "min_p")
                if getattr(self, name) != type(self).model_fields[name].default
            ]
            if idle or self.num_answers > 1:
                what = ", ".join(f"`{name}`" for name in [*idle, *(["num_answers"] if self.num_answers > 1 else [])])
                raise ValueError(f"{what} would change nothing at temperature 0; set `temperature`")
        return self

    @model_validator(mode="after")
    def there_is_something_to_judge(self) -> Evaluate:
        if self.win_rate and not self.prompts:
            raise ValueError("`win_rate` judges the answers to `prompts`, and there are none")
        return self

    @model_validator(mode="after")
    def others_are_asked_something(self) -> Evaluate:
        if self.compare_with and not self.tasks:
            raise ValueError("`compare_with` asks other models the `tasks`, and there are none")
        return self


GgufKind = Literal["F16", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"]
HUB_MODEL_ID = r"[A-Za-z0-9][\w.-]{0,94}/[A-Za-z0-9][\w.-]{0,94}"


class Publish(Section):
    """Where the result goes. The token of the Hub is never written here: `hf auth login` or HF_TOKEN."""

    hub_model_id: str | None = Field(None, pattern=f"^{HUB_MODEL_ID}$")
    """The repository to push to, NAME/MODEL; made if there is none."""
    to: str | None = Field(None, min_length=1)
    """A folder to put the files into, instead or as well."""
    what: list[Literal["merged", "adapter", "gguf"]] = Field(["merged"], min_length=1)
    """`merged`: the whole model; `adapter`: the LoRA weights; `gguf`: files for llama.cpp."""
    gguf: list[GgufKind] | None = Field(None, min_length=1)
    """Which GGUF files, e.g. `[F16, Q4_K_M]`; the kinds with a K need llama.cpp's `llama-quantize`. Unset: `[Q8_0]`."""
    private: bool = True
    """Whether a repository that is made is private. One that is public already is not pushed to while this is set."""
    tags: list[str] = []
    """Tags of the model card, beside its own."""
    branch: str | None = Field(None, min_length=1)
    """Branch to push to, made if there is none; unset: `main`."""
    create_pr: bool = False
    """Open a pull request instead of pushing to `main`."""
    commit_message: str | None = Field(None, min_length=1)
    """Unset: which method and which base."""
    checkpoints: bool = False
    """Push the weights of every checkpoint as well, to the repository's branch `checkpoints`; training waits meanwhile. A
    push that fails is said, and the run goes on."""

    @model_validator(mode="before")
    @classmethod
    def kinds_are_spelt_out(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("gguf") is not None or "gguf" not in (values.get("what") or ()):
            return values
        return {**values, "gguf": ["Q8_0"]}

    @model_validator(mode="after")
    def settings_are_used(self) -> Publish:
        if not (self.hub_model_id or self.to):
            raise ValueError("give `hub_model_id`, the Hub repository to push to, or `to`, a folder")
        if self.gguf and "gguf" not in self.what:
            raise ValueError("`gguf` would be ignored: `what` does not have `gguf`")
        idle = [name for name in ("branch", "create_pr", "commit_message", "checkpoints") if getattr(self, name)]
        if idle and not self.hub_model_id:
            raise ValueError(f"`{idle[0]}` would be ignored without `hub_model_id`")
        if self.branch and self.create_pr:
            raise ValueError("a pull request is opened against `main`; remove `branch` or `create_pr`")
        return self


class RewardBase(Section):
    name: str = Field(min_length=1)
    """A built-in reward; or, with `file`, the function of that name in it."""
    file: str | None = Field(None, min_length=1)
    """A Python file with a reward function."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """What its numbers are multiplied with before those of all rewards are added."""
    on_error: OnError = "stop"
    """What an exception, or anything but a finite number or None, does: `stop` the run and show the completion, or
    `skip`: the completion has no score of this reward, and is counted."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is given of the built-in reward's own settings."""
        return {
            name: value
            for name in type(self).model_fields
            if name not in RewardBase.model_fields and (value := getattr(self, name)) is not None
        }

    @model_validator(mode="before")
    @classmethod
    def only_its_own_settings(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(name := values.get("name"), str):
            return values
        own = [] if values.get("file") else list(settings_of(name))
        known = [*own, *RewardBase.model_fields]
        for key, value in values.items():
            # A resolved recipe holds the settings of all rewards, empty where they are not this one's.
            if key not in known and (value is not None or key not in cls.model_fields):
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else "it has " + (", ".join(own) or "none")
                raise ValueError(f"`{key}` is not a setting of `{name}`; {hint}")
        return values

    @model_validator(mode="after")
    def can_be_made(self) -> RewardBase:
        if self.file is None:
            missing = [name for name, needed in settings_of(self.name).items() if needed and name not in self.settings]
            if missing:
                raise ValueError(f"`{self.name}` needs `{missing[0]}`")
            REWARDS[self.name](**self.settings)
        return self


def _reward_settings() -> dict[str, Any]:
    """The settings of all built-in rewards as optional fields, with the meanings that stand below them."""
    found: dict[str, Any] = {}
    for reward in REWARDS.values():
        meanings, types = TypeAdapter(reward).json_schema()["properties"], get_type_hints(reward)
        for name in (field.name for field in fields(reward)):
            found[name] = (types[name] | None, Field(None, description=meanings[name].get("description")))
    return found


Reward: type[RewardBase] = create_model(
    "Reward", __base__=RewardBase, __doc__="One reward: built in, or a function of a Python file.", **_reward_settings()
)


class EndpointJudge(Section):
    """A chat model behind an OpenAI-compatible endpoint. It is shown both orders of every two answers."""

    endpoint: str = Field(min_length=1)
    """Its address, e.g. `http://localhost:8000/v1`. A key is read from the environment variable OPENAI_API_KEY."""
    model: str = Field(min_length=1)
    """The model's name there."""
    timeout: float = Field(300.0, gt=0)
    """Seconds that a reply may take."""
    concurrency: int = Field(8, gt=0)
    """Requests at a time."""


def _kind_of_judge(value: Any) -> str:
    of_endpoint = isinstance(value, EndpointJudge) or (isinstance(value, dict) and "endpoint" in value)
    return "judge:endpoint" if of_endpoint else "judge:reward"


class WinRate(Section):
    judge: Annotated[
        Annotated[EndpointJudge, Tag("judge:endpoint")] | Annotated[Reward, Tag("judge:reward")],
        Discriminator(_kind_of_judge),
    ]
    """Who judges: a reward as in `rewards`, e.g. `{name: reward_model, model: NAME}`, which prefers the answer that it
    gives more; or a chat model, `{endpoint: URL, model: NAME}`."""


Evaluate.model_rebuild()


class RecipeBase(Section):
    method: Literal[tuple(ALGORITHMS)]  # type: ignore[valid-type]
    """How to align."""
    model: Model
    lora: Lora | Literal["none"] | None = Lora()
    """LoRA settings, or `none` for full fine-tuning; empty only beside `model.adapter`, which brings its own."""
    data: Data
    rewards: list[Reward] = []
    """What scores completions, for methods that train on the model's own."""
    train: Train = Train()
    guards: Guards = Guards()
    merge: Merge = Merge()
    evaluate: Evaluate = Evaluate()
    publish: Publish | None = None
    output_dir: str = Field(min_length=1)
    """The run folder."""

    @property
    def algorithm(self) -> Algorithm:
        chosen: Algorithm = getattr(self, self.method)
        return chosen

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir).expanduser()

    @model_validator(mode="before")
    @classmethod
    def an_adapter_brings_its_own_settings(cls, values: Any) -> Any:
        model = values.get("model") if isinstance(values, dict) else None
        if not isinstance(model, dict) or not model.get("adapter"):
            return values
        if values.get("lora") is not None:
            raise ValueError("a section `lora` beside `model.adapter` would be ignored; remove one of them")
        return {**values, "lora": None}

    @model_validator(mode="after")
    def the_model_fits_the_rest(self) -> RecipeBase:
        if self.lora is None and not self.model.adapter:
            raise ValueError("`lora` is empty; give its fields, `none` for full fine-tuning, or leave it out")
        if self.lora == "none" and (self.model.load_in_4bit or self.model.load_in_8bit):
            raise ValueError("`lora: none` trains all weights, which quantised ones cannot be; remove one of them")
        if self.publish and "adapter" in self.publish.what and self.lora == "none":
            raise ValueError("`publish.what` has `adapter`, and `lora: none` leaves none; remove one of them")
        if self.data.template == "none" and self.model.chat_template:
            raise ValueError("`model.chat_template` would be ignored beside `data.template: none`; remove one of them")
        return self

    @model_validator(mode="after")
    def can_be_sharded(self) -> RecipeBase:
        lora = self.lora if isinstance(self.lora, Lora) else Lora()
        barred = {
            "model.load_in_4bit": self.model.load_in_4bit,
            "model.load_in_8bit": self.model.load_in_8bit,
            "model.device_map": self.model.device_map,
            "model.chat_template": self.model.chat_template,
            "lora.use_dora": lora.use_dora,
            "lora.modules_to_save": lora.modules_to_save,
            f"method: {self.method}": ALGORITHMS[self.method].data == "prompts"
            or ALGORITHMS[self.method].scores_sequences,
        }
        given = [name for name, value in barred.items() if value]
        if self.train.fsdp and given:
            raise ValueError(f"`train.fsdp` does not go with `{given[0]}`; remove one of them")
        return self

    @model_validator(mode="after")
    def measured_while_training(self) -> RecipeBase:
        if self.train.eval_steps and ALGORITHMS[self.method].data == "prompts":
            raise ValueError(
                f"`train.eval_steps` measures the loss of held-out pairs, and `{self.method}` has none; remove it"
            )
        return self

    @model_validator(mode="after")
    def only_the_methods_own_section(self) -> RecipeBase:
        for name in ALGORITHMS:
            if name != self.method and getattr(self, name) is not None:
                raise ValueError(
                    f"a section `{name}` beside `method: {self.method}` would be ignored; remove one of them"
                )
        return self

    @model_validator(mode="after")
    def rewards_where_they_are_used(self) -> RecipeBase:
        samples = self.algorithm.data == "prompts"
        if samples and not self.rewards:
            raise ValueError(f"`method: {self.method}` needs `rewards`, e.g. `rewards: [{{name: length, target: 50}}]`")
        if self.rewards and not samples:
            raise ValueError(f"`rewards` would be ignored by `method: {self.method}`; remove them")
        if samples and self.algorithm.needs_reference and self.lora == "none":
            raise ValueError(
                f"`{self.method}.beta` compares with the model before training, which full fine-tuning does not keep; "
                f"set `{self.method}.beta: 0`, or train LoRA"
            )
        return self

    @model_validator(mode="after")
    def answered_where_something_answers(self) -> RecipeBase:
        unset = Evaluate()
        idle = [name for name, value in self.evaluate if value != getattr(unset, name)]
        if idle and self.algorithm.scores_sequences:
            what = f"would be ignored by `method: {self.method}`, whose model scores answers and gives none; remove it"
            raise ValueError(f"`evaluate.{idle[0]}` {what}")
        return self


Recipe: type[RecipeBase] = create_model(
    "Recipe",
    __base__=RecipeBase,
    __doc__="One model, one method, one run folder.",
    **{name: (algorithm | None, None) for name, algorithm in ALGORITHMS.items()},  # type: ignore[call-overload]
)

EVAL_FRACTION = 0.1
"""Held out where a recipe says nothing: no run ends without a comparison."""

HINTS = {
    "per_device_train_batch_size": "`train.batch_size` is pairs per optimizer step over all devices: write the "
    "product of per_device_train_batch_size, gradient_accumulation_steps and the number of devices{product}",
    "model_name_or_path": "write `model: {{name: ...}}`",
    "max_prompt_length": "it belongs in the section `data`",
    "max_length": "it belongs in the section `data`",
    "beta": "it belongs in the section of the method, e.g. `dpo: {{beta: 0.1}}`",
    "loss_type": "each loss is a `method` of its own",
    "warmup_ratio": "write `warmup_steps`, the number of steps",
    "fp16": "write `model: {{dtype: float16}}`",
    "bf16": "write `model: {{dtype: bfloat16}}`",
    "push_to_hub": "write `publish: {{hub_model_id: NAME/MODEL}}`",
    "hub_private_repo": "write `publish: {{private: true}}`",
}
HINTS["gradient_accumulation_steps"] = HINTS["per_device_train_batch_size"]


# ---- reading ----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `5e-5` is a number and a repeated key is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _no_repeated_keys(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_repeated_keys)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"not valid YAML: {getattr(error, 'problem', error)}", where=f"{where}{line}") from None


def builtin_recipes() -> list[str]:
    return sorted(
        entry.name[:-5] for entry in resources.files("prefold.recipes").iterdir() if entry.name.endswith(".yaml")
    )


def read_text(name: str) -> tuple[str, str]:
    """The YAML text of a recipe file, run folder or built-in recipe, and the name to call it by in messages."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "recipe.yaml"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read: {error}", where=name, expected="a recipe in YAML, UTF-8") from None
    if name in builtin_recipes():
        return (resources.files("prefold.recipes") / f"{name}.yaml").read_text(encoding="utf-8"), name
    near = difflib.get_close_matches(name, builtin_recipes(), n=1)
    raise UserError(
        "no such recipe",
        where=name,
        expected="a YAML file, a run folder, or one of the built-in recipes: " + ", ".join(builtin_recipes()),
        advice=f"did you mean `{near[0]}`?" if near else "`prefold recipes` lists the built-in ones",
    )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> RecipeBase:
    """Read a recipe, apply `section.field=value` overrides, fill in the method's defaults and check everything.

    Raises:
        UserError: for the first thing that is wrong, with its field and line.
    """
    text, where = read_text(name)
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise UserError(
            "the recipe is empty" if values is None else "the recipe is not a mapping of sections", where=where
        )
    for override in overrides:
        apply_override(values, override)
    return make_recipe(values, where, lines=None if overrides else field_lines(text))


def make_recipe(values: dict[str, Any], where: str = "recipe", lines: dict[str, int] | None = None) -> RecipeBase:
    """Check the values of a recipe that is already in memory."""
    algorithm = ALGORITHMS.get(str(values.get("method")))
    if algorithm is not None:
        values = with_defaults(values, str(values["method"]), algorithm)
    try:
        # In JSON mode a strict model still builds the algorithm's dataclass from a mapping.
        return Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise describe(error.errors(), values, where, lines or {}) from None


def with_defaults(values: dict[str, Any], method: str, algorithm: type[Algorithm]) -> dict[str, Any]:
    """A copy of `values` in which silent fields have the method's vetted defaults."""
    filled = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    data = filled.get("data")
    if isinstance(data, dict) and not data.get("eval"):
        data.setdefault("eval_fraction", EVAL_FRACTION)
    if filled.get(method) is None:
        filled[method] = {}
    for dotted, default in algorithm.defaults.items():
        section, field = dotted.split(".")
        if isinstance(filled.setdefault(section, {}), dict):
            filled[section].setdefault(field, default)
    return filled


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` in place; numbers in the path are places in a list."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError("not an override", where=override, expected="section.field=value, e.g. `train.max_steps=10`")
    *parents, last = dotted.split(".")
    here: Any = values
    for part in parents:
        here = here.setdefault(part, {}) if isinstance(here, dict) else _list_item(here, part, override)
    value = parse_yaml(text, override)
    if isinstance(here, dict):
        here[last] = value
    else:
        _list_item(here, last, override)
        here[int(last)] = value


def _list_item(here: Any, part: str, override: str) -> Any:
    if isinstance(here, list) and part.isdigit() and int(part) < len(here):
        return here[int(part)]
    raise UserError(
        f"there is no `{part}` to set", where=override, expected="the path of a field that the recipe can have"
    )


# ---- explaining what is wrong -----------------------------------------------------------------------------------


def field_lines(text: str) -> dict[str, int]:
    """1-based line of every field of a YAML text, by dotted path."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = f"{path}.{key.value}" if path else str(key.value)
                lines[inner] = key.start_mark.line + 1
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for place, value in enumerate(node.value):
                walk(value, f"{path}.{place}")

    walk(yaml.compose(text, Loader=_Loader), "")
    return lines


def describe(errors: Sequence[ErrorDetails], values: dict[str, Any], where: str, lines: dict[str, int]) -> UserError:
    """Turn pydantic's first finding into one message with field, line, what was expected and what to do."""
    error = errors[0]
    path = _field_path(error)
    dotted = ".".join(path)
    place = f"{where}, line {lines[dotted]}" if dotted in lines else where
    kind = error["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return UserError(f"`{dotted}` is not a field", where=place, advice=_nearest(path, values))
    if kind == "missing" or kind == "missing_argument":
        return UserError(f"`{dotted}` is missing", where=place, expected=_meaning(path))
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return UserError(f"`{dotted}`: {message}" if dotted else message, where=place)
    # A field of several types has one finding for each of them.
    expected = dict.fromkeys(_expected(other["msg"]) for other in errors if _field_path(other) == path)
    got = error["input"]
    return UserError(
        f"`{dotted}` is {_shown(got)}", where=place, expected=" or ".join(expected), advice=_number_hint(got)
    )


def _field_path(error: ErrorDetails) -> list[str]:
    return [str(part) for part in error["loc"] if not _is_union_branch(str(part))]


def _expected(message: str) -> str:
    message = message.removeprefix("Input should be ").removeprefix("a valid ")
    if "object" in message or "dictionary" in message:
        return "a section: fields below it, or {field: value}"
    return message.replace("array", "list")


def _shown(value: Any) -> str:
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number_hint(got: Any) -> str:
    try:
        float(got)
    except (TypeError, ValueError):
        return ""
    return "write the number without quotes" if isinstance(got, str) else ""


_BRANCHES = {"Lora", "int", "str", "float", "none", "bool"}


def _is_union_branch(part: str) -> bool:
    return part in _BRANCHES or part.startswith(("literal[", "list[", "dict[", "function-", "judge:"))


def section_fields(path: Sequence[str]) -> dict[str, str]:
    """Names and meanings of the fields of the section at `path`."""
    here: Any = Recipe
    for part in path:
        if part.isdigit():
            continue
        here = _section_class(here.model_fields[part].annotation) if part in getattr(here, "model_fields", ()) else None
        if here is None:
            return {}
    if issubclass(here, BaseModel):
        return {name: (field.description or "") for name, field in here.model_fields.items()}
    return {field.name: "" for field in fields(here)}


def _section_class(annotation: Any) -> Any:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel | Algorithm):
            return candidate
        if inner := (_section_class(candidate) if get_args(candidate) and candidate is not annotation else None):
            return inner
    return None


def _meaning(path: Sequence[str]) -> str:
    return section_fields(path[:-1]).get(path[-1], "").replace("\n", " ")


def _nearest(path: Sequence[str], values: dict[str, Any]) -> str:
    name = path[-1]
    if name in HINTS:
        train = values.get("train")
        train = train if isinstance(train, dict) else {}
        factors = [train.get("per_device_train_batch_size"), train.get("gradient_accumulation_steps")]
        numbers = [factor for factor in factors if isinstance(factor, int)]
        product = (
            f", on one device `batch_size: {numbers[0] * (numbers[1] if len(numbers) > 1 else 1)}`" if numbers else ""
        )
        return HINTS[name].format(product=product)
    known = list(section_fields(path[:-1]))
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean `{near[0]}`?"
    elsewhere = [dotted for dotted in all_fields() if dotted.split(".")[-1] == name]
    if elsewhere:
        return f"it is a field of another section: `{elsewhere[0]}`"
    return "the fields here are: " + ", ".join(known)


def all_fields() -> Iterator[str]:
    """Every field of a recipe by its dotted path, sections included."""

    def walk(prefix: list[str]) -> Iterator[str]:
        for name in section_fields(prefix):
            yield ".".join([*prefix, name])
            yield from walk([*prefix, name])

    yield from walk([])


# ---- writing ----------------------------------------------------------------------------------------------------


def as_dict(recipe: RecipeBase) -> dict[str, Any]:
    """The resolved recipe as plain values, without sections that the method does not use and without the user's home
    path."""
    values = recipe.model_dump(mode="json")
    values[recipe.method] = asdict(recipe.algorithm)
    values["rewards"] = [reward.model_dump(mode="json", exclude_none=True) for reward in recipe.rewards]
    if judged := recipe.evaluate.win_rate:
        values["evaluate"]["win_rate"] = judged.model_dump(mode="json", exclude_none=True)
    idle = {*ALGORITHMS, "rewards"} - {recipe.method, "rewards" if recipe.rewards else ""}
    idle |= {"publish"} if recipe.publish is None else set()
    return {key: _homeless(value) for key, value in values.items() if key not in idle}


def _homeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _homeless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_homeless(item) for item in value]
    return without_home(value) if isinstance(value, str) else value


def dump_recipe(recipe: RecipeBase) -> str:
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """Of a recipe, with what every setting of an algorithm means."""
    schema: dict[str, Any] = Recipe.model_json_schema()
    for algorithm in ALGORITHMS.values():
        settings = schema["$defs"][algorithm.__name__]["properties"]
        # pydantic reads the docstrings of a dataclass's own fields only.
        for ancestor in filter(is_dataclass, algorithm.__mro__[1:]):
            inherited = create_model("One", __base__=Section, one=(ancestor, ...)).model_json_schema()["$defs"]
            for name, found in inherited[ancestor.__name__].get("properties", {}).items():
                settings[name] = {**found, **settings[name]}
    return schema


def first_comment(name: str) -> str:
    """What a built-in recipe says of itself in its first line."""
    return read_text(name)[0].splitlines()[0].lstrip("# ")
