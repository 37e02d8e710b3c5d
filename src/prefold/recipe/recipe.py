"""The whole recipe, with the checks across its sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model, model_validator

from prefold.algorithms import ALGORITHMS, Algorithm
from prefold.algorithms.base import PAIRED
from prefold.recipe.rewards import Reward
from prefold.recipe.section import Section
from prefold.recipe.sections import Data, Evaluate, Generation, Guards, Lora, Merge, Model, Publish, Rounds, Train


def _spelt_out(rounds: Any) -> Any:
    """`rounds: 3` is `rounds: {number: 3}`."""
    return {"number": rounds} if isinstance(rounds, int) and not isinstance(rounds, bool) else rounds


class RecipeBase(Section):
    method: Literal[tuple(ALGORITHMS)]  # type: ignore[valid-type]
    """The method of alignment."""
    description: str | None = Field(None, min_length=1)
    """What the model is taught, in a sentence: shown in the terminal, the report and the model card."""
    model: Model
    lora: Lora | Literal["none"] | None = Lora()
    """LoRA settings, or `none` for full fine-tuning. Leave it out with `model.adapter`, which brings its own."""
    data: Data
    rewards: list[Reward] = []
    """What scores completions, for methods that sample them, and for `rounds`."""
    rounds: Annotated[Rounds | None, BeforeValidator(_spelt_out, json_schema_input_type=int | Rounds | None)] = None
    """Make the pairs from the model's own answers to the prompts of `data`, in this many rounds."""
    generation: Generation = Generation()
    """What samples the completions, for methods that train on the model's own."""
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

    @property
    def data_kind(self) -> Literal["pairs", "unpaired", "prompts"]:
        """What the rows of `data` have to hold."""
        return "prompts" if self.rounds else self.algorithm.kind.data

    @property
    def sampled(self) -> tuple[str, int, int]:
        """(field, length, number) where the run samples completions: the field that limits their length, the limit in
        tokens, and the most completions of a prompt that are trained on; otherwise ("", 0, 0)."""
        if draws := self.algorithm.draws:
            return f"{self.method}.max_completion_length", draws.max_completion_length, draws.num_generations
        return ("rounds.max_new_tokens", self.rounds.max_new_tokens, 2) if self.rounds else ("", 0, 0)

    @property
    def _beyond_plain_lora(self) -> dict[str, Any]:
        """By field, what is trained besides the two factors of each LoRA layer."""
        lora = self.lora if isinstance(self.lora, Lora) else Lora()
        return {
            "model.chat_template": self.model.chat_template,
            "lora.use_dora": lora.use_dora,
            "lora.modules_to_save": lora.modules_to_save,
        }

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
            raise ValueError("`lora: none` trains all weights, and quantised weights cannot be; remove one of them")
        if self.publish and "adapter" in self.publish.what and self.lora == "none":
            raise ValueError("`publish.what` has `adapter`, and `lora: none` leaves none; remove one of them")
        for name in ("chat_template", "chat_template_kwargs"):
            if self.data.template == "none" and getattr(self.model, name):
                raise ValueError(f"`model.{name}` would be ignored beside `data.template: none`; remove one of them")
        return self

    @model_validator(mode="after")
    def can_be_sharded(self) -> RecipeBase:
        kind = self.algorithm.kind
        barred = {
            "model.load_in_8bit": self.model.load_in_8bit,
            "model.device_map": self.model.device_map,
            **self._beyond_plain_lora,
            f"method: {self.method}` without servers in `generation": kind.samples and not self.generation.by_servers,
        }
        if self.train.fsdp and (given := next((name for name, value in barred.items() if value), None)):
            raise ValueError(f"`train.fsdp` does not go with `{given}`; remove one of them")
        return self

    @model_validator(mode="after")
    def servers_can_be_given_the_weights(self) -> RecipeBase:
        settings = self.algorithm
        if not self.generation.by_servers:
            ignored = [
                name for name in settings.for_servers if getattr(settings, name) != getattr(type(settings), name)
            ]
            if ignored:
                raise ValueError(f"`{self.method}.{ignored[0]}` is for servers, and there are none in `generation`")
            return self
        if not settings.kind.samples:
            what = f"`generation` would be ignored by `method: {self.method}`, which samples nothing"
            raise ValueError(f"{what}; remove it")
        barred = {"lora: none": self.lora == "none", **self._beyond_plain_lora}
        if given := next((name for name, value in barred.items() if value), None):
            what = f"`{given}` does not go with `generation.engine: vllm`"
            raise ValueError(f"{what}: servers are given the weights of plain LoRA layers; remove one of them")
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
    def the_method_uses_the_rest(self) -> RecipeBase:
        samples, method = self.algorithm.kind.samples, f"`method: {self.method}`"
        if self.train.eval_steps and samples:
            raise ValueError(
                f"`train.eval_steps` measures the loss of held-out pairs, and `{self.method}` has none; remove it"
            )
        if samples and not self.rewards:
            raise ValueError(f"{method} needs `rewards`, e.g. `rewards: [{{name: length, target: 50}}]`")
        if self.rewards and not (samples or self.rounds):
            raise ValueError(f"`rewards` would be ignored by {method} without `rounds`; remove them")
        if self.model.reference and not self.algorithm.needs_reference:
            raise ValueError(f"`model.reference` would be ignored by {method}, which has no reference; remove it")
        if samples and self.algorithm.needs_reference and self.lora == "none":
            raise ValueError(
                f"`{self.method}.beta` compares with the model before training, which full fine-tuning does not keep; "
                f"set `{self.method}.beta: 0`, or train LoRA"
            )
        ignored = self.evaluate.changed(*Evaluate.model_fields)
        if ignored and self.algorithm.kind.scores:
            what = f"would be ignored by {method}, whose model scores answers and gives none; remove it"
            raise ValueError(f"`evaluate.{ignored[0]}` {what}")
        return self

    @model_validator(mode="after")
    def rounds_can_be_made(self) -> RecipeBase:
        rounds = self.rounds
        if rounds is None:
            return self
        if self.algorithm.kind != PAIRED:
            raise ValueError(f"`rounds` make pairs, which `method: {self.method}` does not train on; use dpo instead")
        if bool(self.rewards) == bool(rounds.judge):
            what = "`rounds` need something that scores answers" if rounds.judge is None else "answers are scored twice"
            raise ValueError(f"{what}; give `rewards`, or a `judge` in `rounds`")
        if rounds.reference == "base" and not self.algorithm.needs_reference:
            raise ValueError(f"`rounds.reference` would be ignored by `{self.method}`, which has none; remove it")
        if rounds.votes and (ignored := rounds.changed("min_margin", "max_length_ratio")):
            raise ValueError(f"`rounds.{ignored[0]}` would be ignored beside `votes`, which make the pairs; remove it")
        barred = {
            "publish": self.publish and "every round would be published to the same place; publish the best at the end",
            "train.fsdp": self.train.fsdp and "answers are sampled in one process",
            "data.template: none": self.data.template == "none" and "answers are sampled in a chat format",
            "data.overlong: truncate_prompt": self.data.overlong == "truncate_prompt" and "whole prompts are answered",
            "model.reference": self.model.reference and "`rounds.reference` says what each round is compared with",
            "rounds.reference: base": rounds.reference == "base"
            and (
                (self.lora == "none" and "full fine-tuning does not keep the base")
                or (self.model.adapter and "the base would lack the adapter that the first round starts from")
            ),
        }
        if given := next((f"`{name}` does not go with `rounds`: {why}" for name, why in barred.items() if why), None):
            raise ValueError(given)
        return self


Recipe: type[RecipeBase] = create_model(
    "Recipe",
    __base__=RecipeBase,
    __doc__="One model, one method, one run folder.",
    **{name: (algorithm | None, None) for name, algorithm in ALGORITHMS.items()},  # type: ignore[call-overload]
)
