"""What a base method is, and which recipes it can carry out."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from cptv_jax.errors import InputError
from cptv_jax.models.architecture import Architecture
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.recipe.spec import OBSERVER_RULES, ObserverName, QuantizerName, Recipe, SiteSpec
from cptv_jax.reconstruction.config import NO_RECONSTRUCTION, ReconstructionConfig


@dataclass(frozen=True)
class Abilities:
    """The recipes that a method can carry out.

    Attributes:
        weights: The quantizers that it fits for weights; a registry here includes users' own.
        tensors: The quantizers that it fits for activations; a registry here includes users' own.
        observers: Where it takes parameters from.
        asymmetric_only: It fits unsigned codes with a zero point, and no bias correction.
        low_rank: It can add terms of low rank to weights.
        grouped: The quantizers that it fits per head; it then fits none for parts of a tensor, and only uniform ones
            per channel. None means any of these.

    Example:
        >>> Abilities(tensors=("uniform", "log-sqrt2"), observers=("method",), asymmetric_only=True)
    """

    weights: Collection[QuantizerName] = ("uniform",)
    tensors: Collection[QuantizerName] = ("uniform",)
    observers: Collection[ObserverName] = field(default_factory=lambda: OBSERVER_RULES)
    asymmetric_only: bool = False
    low_rank: bool = False
    grouped: Collection[QuantizerName] | None = None

    def check(self, method: str, recipe: Recipe) -> None:
        """Checks that the method can carry out a recipe.

        Args:
            method: The method's name.
            recipe: What it is asked for.

        Raises:
            InputError: The method cannot quantize a site as the recipe says.
        """
        for name, spec in recipe.sites.items():
            is_weight = recipe.places[name].role == "weight"
            fitted = self.weights if is_weight else self.tensors
            if spec.quantizer not in fitted:
                raise InputError(
                    f"{name}: method {method} fits no {spec.quantizer} quantizer here; set quantizer to {_join(fitted)}"
                )
            if spec.observer not in self.observers:
                raise InputError(
                    f"{name}: method {method} cannot use the observer {spec.observer}; "
                    f"set observer to {_join(self.observers)}"
                )
            if self.grouped is not None:
                self._check_granularity(method, name, spec)
            if spec.low_rank and not (self.low_rank and is_weight):
                raise InputError(f"{name}: method {method} adds no low-rank term here; leave out low_rank")
            if self.asymmetric_only and (spec.signed or spec.symmetric or spec.bias_correction):
                raise InputError(
                    f"{name}: method {method} fits unsigned codes with a zero point; "
                    "leave out signed, symmetric and bias_correction"
                )

    def _check_granularity(self, method: str, name: str, spec: SiteSpec) -> None:
        """Checks a site's granularity.

        Raises:
            InputError: The method does not fit the site's groups.
        """
        per_head = spec.per_head and spec.quantizer not in (self.grouped or ())
        per_channel = spec.per_channel and "uniform" not in spec.quantizer
        found = {"per_head: false": per_head, "parts: 1": spec.parts > 1, "per_channel: false": per_channel}
        wrong = [remedy for remedy, is_wrong in found.items() if is_wrong]
        if wrong:
            raise InputError(
                f"{name}: method {method} fits no {spec.quantizer} quantizer of this granularity; "
                f"set {' and '.join(wrong)}"
            )


def _join(names: Collection[str]) -> str:
    """Returns names as alternatives in a sentence."""
    return " or ".join(names)


@dataclass(frozen=True)
class Method:
    """A base method: it makes a first quantized model from a float one.

    Attributes:
        options: The class of its options (see `cptv_jax.options.options`); its `name` is the method's.
        carry_out: Called as carry_out(float model, calibration batches, recipe, key, on_progress, options=options);
            returns the quantized model.
        presets: The recipes that belong to it; the first is the default.
        abilities: Which recipes it accepts; None means any.
        reconstruction: What null fields of the reconstruction's configuration mean.
        first_images: It reads only the first calibration images, as many as its option `images` says.
        rewrites_weights: The quantized model has other weights than the float one.
        couples_widths: The scales of one site depend on the widths of others.
        check: Called as check(architecture, recipe, options); raises InputError for whatever else is wrong.

    Example:
        >>> @options
        ... class CoarseOptions:
        ...     name: ClassVar[str] = "coarse"
        ...     stretch: float = Field(default=1.0, gt=0)
        >>> register_method(Method(CoarseOptions, quantize_coarsely, presets=("omse",)))
    """

    options: type[Any]
    carry_out: Callable[..., QuantizedModel]
    presets: tuple[str, ...]
    abilities: Abilities | None = None
    reconstruction: ReconstructionConfig = NO_RECONSTRUCTION
    first_images: bool = False
    rewrites_weights: bool = False
    couples_widths: bool = False
    check: Callable[[Architecture, Recipe, Any], None] = lambda architecture, recipe, options: None

    @property
    def name(self) -> str:
        """The method's name in configurations."""
        return str(self.options.name)

    def quantize(self, model: Model | QuantizedModel, *arguments: Any, **options: Any) -> QuantizedModel:
        """Carries the method out on a float model.

        Args:
            model: The float model.
            *arguments: See `carry_out`.
            **options: See `carry_out`.

        Returns:
            The quantized model.

        Raises:
            InputError: The model is quantized already.
        """
        return self.carry_out(require_float(model), *arguments, **options)


def require_float(model: Model | QuantizedModel) -> Model:
    """Returns a float model unchanged, and refuses a quantized one: every base method starts from float weights.

    Args:
        model: The model.

    Returns:
        The model itself.

    Raises:
        InputError: The model is quantized already.
    """
    if isinstance(model, QuantizedModel):
        raise InputError(
            f"the model is quantized already (recipe {model.recipe.name}); give the float model that it was made from"
        )
    return model
