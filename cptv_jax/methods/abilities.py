"""What a base method can carry out of a recipe: whatever it cannot is refused, not done otherwise."""

from collections.abc import Collection
from dataclasses import dataclass

from cptv_jax.errors import InputError
from cptv_jax.recipe import OBSERVERS, ObserverName, QuantizerName, Recipe, SiteSpec


@dataclass(frozen=True)
class Abilities:
    """The recipes that a method can carry out.

    weights, tensors: quantizers that it fits for weights and for activations. observers: where it takes parameters
    from. asymmetric_only: it fits unsigned codes with a zero point, and no bias correction. low_rank: it can add terms
    of low rank to weights. grouped: quantizers that it fits per head; then it fits none for parts of a tensor, and per
    channel only uniform ones. Null means any of these.
    """

    weights: tuple[QuantizerName, ...] = ("uniform",)
    tensors: tuple[QuantizerName, ...] = ("uniform",)
    observers: tuple[ObserverName, ...] = OBSERVERS
    asymmetric_only: bool = False
    low_rank: bool = False
    grouped: tuple[QuantizerName, ...] | None = None

    def check(self, method: str, recipe: Recipe) -> None:
        """Raises InputError for a site that the method, of this name, cannot quantize as the recipe says."""
        for name, spec in recipe.sites.items():
            fitted = self.weights if name.endswith(".weight") else self.tensors
            if spec.quantizer not in fitted:
                raise InputError(
                    f"{name}: method {method} fits no {spec.quantizer} quantizer here; set quantizer to {_any(fitted)}"
                )
            if spec.observer not in self.observers:
                raise InputError(
                    f"{name}: method {method} cannot use the observer {spec.observer}; "
                    f"set observer to {_any(self.observers)}"
                )
            if self.grouped is not None:
                self._check_granularity(method, name, spec)
            if spec.low_rank and not (self.low_rank and name.endswith(".weight")):
                raise InputError(f"{name}: method {method} adds no low-rank term here; leave out low_rank")
            if self.asymmetric_only and (spec.signed or spec.symmetric or spec.bias_correction):
                raise InputError(
                    f"{name}: method {method} fits unsigned codes with a zero point; "
                    "leave out signed, symmetric and bias_correction"
                )

    def _check_granularity(self, method: str, name: str, spec: SiteSpec) -> None:
        per_head = spec.per_head and spec.quantizer not in (self.grouped or ())
        per_channel = spec.per_channel and "uniform" not in spec.quantizer
        found = {"per_head: false": per_head, "parts: 1": spec.parts > 1, "per_channel: false": per_channel}
        wrong = [remedy for remedy, is_wrong in found.items() if is_wrong]
        if wrong:
            raise InputError(
                f"{name}: method {method} fits no {spec.quantizer} quantizer of this granularity; "
                f"set {' and '.join(wrong)}"
            )


def _any(names: Collection[str]) -> str:
    return " or ".join(names)
