"""A weighted sum of losses, as in Mixed Preference Optimization, arXiv 2411.10442.

    losses: [{name: dpo, weight: 0.8, beta: 0.1}, {name: sft, weight: 0.2}]

Each entry is the name of another method on pairs, its weight (unset: 1) and its settings; the loss of the step is the
sum of weight * loss, each loss a mean of its own. Unset, mixture and weights are the paper's: DPO for the preference,
BCO for the quality, supervised fine-tuning for the generation.
Left out: metrics of each part. If several parts have a metric, it is that of the first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from prefold.algorithms.base import NO_STATE, Algorithm, LossOutput, Metric, State, Tensor, TokenTree, TreeLogprobs


def of_any_part(need: str) -> Any:
    return property(lambda mixed: any(getattr(part, need) for _, part in mixed.parts))


@dataclass(frozen=True)
class Mixed(Algorithm):
    """A weighted sum of other losses of pairs; Mixed Preference Optimization by default"""

    losses: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"name": "dpo", "weight": 0.8, "beta": 0.1},
            {"name": "bco", "weight": 0.2, "beta": 0.1},
            {"name": "sft", "weight": 1.0},
        ]
    )
    """The losses: `name` of another method on pairs, `weight`, and that method's settings."""

    paper = "2411.10442"
    oracle = "`DPOTrainer`, several `loss_type` with `loss_weights`"
    of_pairs: ClassVar[Mapping[str, type[Algorithm]]] = {}
    """The methods that can be mixed, which the registry fills in."""
    needs_reference = of_any_part("needs_reference")
    scores_prompt = of_any_part("scores_prompt")
    needs_statistics = of_any_part("needs_statistics")
    couples_step = of_any_part("couples_step")

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("losses must name at least one loss")

    @cached_property
    def parts(self) -> list[tuple[float, Algorithm]]:
        """The losses with their weights."""
        return [part_of(entry) for entry in self.losses]

    @property
    def reward_scale(self) -> float:
        """The scale of the first loss that compares with the reference, or of the first loss."""
        parts = [part for _, part in self.parts]
        return next((part for part in parts if part.needs_reference), parts[0]).reward_scale

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        return {unit: count for _, part in self.parts for unit, count in part.units(trees).items()}

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        totals: dict[str, Tensor] = {}
        metrics: dict[str, Metric] = {}
        states: dict[str, float] = {}
        for index, (weight, part) in enumerate(self.parts):
            prefix = f"{index}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            output = part.loss(policy, reference if part.needs_reference else None, own)
            for unit, total in output.loss.items():
                totals[unit] = weight * total + totals[unit] if unit in totals else weight * total
            metrics = {**output.metrics, **metrics}
            states |= {prefix + name: value for name, value in output.state.items()}
        return LossOutput(totals, metrics, states)


def part_of(entry: dict[str, Any]) -> tuple[float, Algorithm]:
    """Weight and algorithm of an entry of `losses`.

    Raises:
        ValueError: it names no method on pairs, a setting that this method does not have, or a value that does not fit.
    """
    settings = dict(entry)
    name, weight = settings.pop("name", None), settings.pop("weight", 1.0)
    if name not in Mixed.of_pairs:
        raise ValueError(f"`{name}` is not the name of a loss of pairs; they are {', '.join(Mixed.of_pairs)}")
    if not fits(weight, float) or not weight > 0:
        raise ValueError(f"the weight of `{name}` must be a number greater than 0, got {weight!r}")
    kind = Mixed.of_pairs[name]
    hints = get_type_hints(kind)
    own = [setting.name for setting in fields(kind)]
    for setting, value in settings.items():
        if setting not in own:
            raise ValueError(f"`{setting}` is not a setting of `{name}`; its settings: {', '.join(own) or 'none'}")
        if not fits(value, hints[setting]):
            raise ValueError(f"`{setting}` of `{name}` cannot be {value!r}")
    return float(weight), kind(**settings)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from a file has the type of a setting."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):
        return any(fits(value, choice) for choice in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint)
