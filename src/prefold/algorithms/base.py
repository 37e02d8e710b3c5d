"""The interface of algorithms: settings, needs, and a loss that returns sums.

An algorithm never divides its loss. It returns sums over its batch, named by what they are to be divided by (`pairs`,
...); the training step divides by the count over the whole optimizer step. So splitting a step into micro-batches, or
over processes, changes nothing. A loss that couples the completions of a step says so (`couples_step`) and gets all of
them at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor as Tensor

    from prefold.trees.logprobs import TreeLogprobs as TreeLogprobs
    from prefold.trees.packing import TokenTree as TokenTree
else:  # a recipe imports the losses, long before torch and the engine
    Tensor = TreeLogprobs = TokenTree = Any

State = Mapping[str, float]
"""An algorithm's state between steps: numbers by name, saved in the checkpoint."""
NO_STATE: State = {}

# A learning rate of 5e-5 and rank 16 on all linear layers are what the QLoRA DPO recipes in the field settled on;
# full fine-tuning wants about a hundredth of that rate.
ADAPTER_DEFAULTS: dict[str, Any] = {
    "train.learning_rate": 5e-5,
    "train.gradient_checkpointing": False,
    "data.max_length": 1024,
}


class Mean(NamedTuple):
    """A part of a metric that is a mean: the sum of its values and their number."""

    total: Tensor
    number: int


class Extreme(NamedTuple):
    """A part of a metric that is the least or the greatest of its values: `pick` is `min` or `max`."""

    value: Tensor
    pick: Callable[[Iterable[float]], float]


Metric = Mean | Extreme


@dataclass(frozen=True)
class LossOutput:
    """`loss`: scalar sums by the unit that each is divided by; `metrics`: by TRL's names; `state`: the argument of the
    next step's `loss`; `kept`: values of tokens by name, which further steps on the same trees get as extras (only from
    a loss that does not couple the step)."""

    loss: dict[str, Tensor]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    state: State = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """What a method trains on and produces, for the recipe, the stages, the plan and the importer.

    `data`: records of a chosen and a rejected completion; of completions with a label each; or prompts alone.
    `samples`: whether the model writes the completions while it trains, and rewards score them. `scores`: whether the
    model has a score head in place of the vocabulary's: it gives each conversation one score and writes nothing, and
    `TreeLogprobs.tokens` are the scores, one per completion. `measured`: the file in the run folder's `evaluation/`
    that compares before with after on held-out data.
    """

    data: Literal["pairs", "unpaired", "prompts"]
    samples: bool = False
    scores: bool = False
    measured: Literal["heldout", "rewards"] = "heldout"


PAIRED = Kind("pairs")
UNPAIRED = Kind("unpaired")
SAMPLED = Kind("prompts", samples=True, measured="rewards")
SCORING = Kind("pairs", scores=True)


class Draws(NamedTuple):
    """How a method samples the completions of a prompt: their number, their maximum length in tokens, the parameters of
    sampling, and how many times at most a group without advantages is sampled again."""

    num_generations: int
    max_completion_length: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    resample: int


class Bound(NamedTuple):
    """A bound on the values of a setting, in the `Annotated` of its type; None is always allowed."""

    holds: Callable[[float], bool]
    text: str


def logsigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), any shape."""
    from torch.nn import functional

    return functional.logsigmoid(x)


POSITIVE = Bound(lambda value: value > 0, "greater than 0")
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, Bound(lambda value: value >= 0, "0 or more")]
Smoothing = Annotated[float, Bound(lambda share: 0 <= share < 0.5, "at least 0 and less than 0.5")]


@dataclass(frozen=True)
class Algorithm(ABC):
    """A method: its settings as fields, with bounds in their types; what it needs as class attributes, or as properties
    if a setting decides."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True, "use_attribute_docstrings": True}

    paper: ClassVar[str]
    """arXiv number."""
    oracle: ClassVar[str]
    """What the tests compare the loss with: that of TRL 1.16, or something else if TRL has no such loss."""
    kind: ClassVar[Kind] = PAIRED
    defaults: ClassVar[dict[str, Any]] = ADAPTER_DEFAULTS
    """This method's defaults of recipe fields, by dotted name."""
    record_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of a record, with a value for each completion, that the loss gets in `TreeLogprobs.extras`."""
    needs_reference: ClassVar[bool] = False
    """Whether the loss compares with the log-probs of the model before training."""
    scores_prompt: ClassVar[bool] = False
    """Whether the loss needs `TreeLogprobs.prompts`."""
    needs_statistics: ClassVar[bool] = False
    """Whether the loss needs `TreeLogprobs.statistics` of the policy."""
    couples_step: ClassVar[bool] = False
    """Whether the loss of one completion depends on the others of its step, so that all must come at once."""
    iterations: ClassVar[int] = 1
    """Optimizer steps in a row on the same trees."""
    draws: ClassVar[Draws | None] = None
    """How completions are sampled, if the method's kind `samples`."""
    needs_advantages: ClassVar[bool] = False
    """Whether completions whose advantages are 0 add nothing to the loss and its gradient."""
    for_servers: ClassVar[tuple[str, ...]] = ()
    """Settings that apply to completions from servers alone."""
    remark: ClassVar[tuple[str, str] | None] = None
    """If the settings are not the objective that their name is known for: the difference, and what to do."""

    def __post_init__(self) -> None:
        """Raises ValueError, naming the setting, for a value that the type of the setting does not allow."""
        hints = get_type_hints(type(self), include_extras=True)
        for setting in fields(self):
            value, hint = getattr(self, setting.name), hints[setting.name]
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{setting.name} must be one of {', '.join(get_args(hint))}, got {value}")
            for bound in getattr(hint, "__metadata__", ()):
                if value is not None and not bound.holds(value):
                    raise ValueError(f"{setting.name} must be {bound.text}, got {value}")

    @property
    def reward_scale(self) -> float:
        """Factor from the log-ratio of policy and reference to the implicit reward of this method."""
        return float(getattr(self, "beta", 1.0))

    def advantages(self, rewards: Tensor, each: Sequence[tuple[float, Tensor]] = ()) -> Tensor:
        """`[B, G]`, if the method's kind `samples`: how much better each completion is than the others of its group.

        Args:
            rewards: `[B, G]`, the weighted sums; NaN where no reward has a score.
            each: weight and scores `[B, G]` of each reward; NaN where it has no score.
        """
        raise NotImplementedError

    def trains_on(self, finished: bool) -> bool:
        """Whether a sampled completion is trained on; `finished`: whether it was not cut off."""
        return True

    def further_trees(self, trees: Sequence[TokenTree]) -> dict[str, list[TokenTree]]:
        """By name, trees of one completion each, made from those of a whole step: a loss that couples the step gets
        their summed log-probs, without gradient, in the `extras` of policy and reference."""
        return {}

    @abstractmethod
    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        """The count of each unit in the trees, known before any forward pass. A unit is named by what it counts, so two
        losses that share a name share the count."""

    @abstractmethod
    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        """Loss sums and metrics of a batch of trees.

        Args:
            policy: with gradients.
            reference: of the same trees; None unless `needs_reference`.
            state: as the previous optimizer step returned it, empty at the first. It is never changed in place, so a
                step can be repeated.
        """
