"""Float execution that collects calibration statistics along the way."""

from collections.abc import Mapping
from typing import Any, Protocol

from jaxtyping import Array

from cptv_jax.interpreters.fake_quant import FakeQuant, Weight
from cptv_jax.interpreters.integer_functions import log_int_softmax_exponents
from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.quantizers import Log2, Quantizer, true_divide
from cptv_jax.recipe.sites import weight_site
from cptv_jax.recipe.spec import SiteSpec


class Observer(Protocol):
    """Statistics of a site over calibration batches, and the quantizer that follows from them."""

    def update(self, spec: SiteSpec, previous: Any | None, x: Array) -> Any:
        """Adds one batch to a site's statistics.

        Args:
            spec: The site's specification.
            previous: Its statistics so far; None for the first batch.
            x: Its values in this batch.

        Returns:
            The statistics with this batch included, a pytree of arrays.
        """

    def fit(self, spec: SiteSpec, found: Any, x: Array) -> Quantizer:
        """Fits a site's quantizer to its statistics.

        Args:
            spec: The site's specification.
            found: Its statistics over all batches.
            x: Its values in the last batch.

        Returns:
            The quantizer.
        """


class Observing(FakeQuant):
    """Runs one calibration batch in float and collects statistics.

    Args:
        observer: Measures and fits.
        specs: The sites to observe, relative to the stage.
        ranges: Their statistics so far (empty on the first batch).
        fit: Whether this is the last batch, so that quantizers are fitted as their sites are reached.
        log_int_softmax: Whether to reproduce FQ-ViT's calibration: its integer softmax acts as soon as its input has a
            scale, which is from the last batch on, so that later sites of that batch see its output.

    Attributes:
        ranges: By site, the statistics with this batch included.
        fitted: By site, the quantizers, if this is the last batch.
    """

    def __init__(
        self,
        observer: Observer,
        specs: Mapping[str, SiteSpec],
        ranges: Mapping[str, Any],
        *,
        fit: bool,
        log_int_softmax: bool = False,
    ) -> None:
        super().__init__({}, rounding=False, all_tokens=True)
        self.observer = observer
        self.specs = specs
        self.ranges = dict(ranges)
        self.fitted: dict[str, Quantizer] = {}
        self.fit = fit
        self.tag_scores = fit and log_int_softmax

    def emit(self, site: str, kind: str, x: Tensor) -> Tensor:
        """Returns an operation's float result and observes it; see `FakeQuant.emit`."""
        values = x.values
        quantizer = self._observe(site, values)
        if quantizer is not None and self.tag_scores and kind == "matmul":
            return Tensor(true_divide(values, quantizer.scale), quantizer.scale)
        return Tensor(values)

    def operand(self, site: str, x: Tensor) -> Tensor:
        """Returns an operand in float and observes it; see `Operations.operand`."""
        self._observe(site, x.values)
        return x

    def weight(self, layer: str, kernel: Array) -> Weight:
        """Returns a linear layer's float weight and observes it; see `FakeQuant.weight`."""
        self._observe(weight_site(layer), kernel)
        return Weight(Tensor(kernel))

    def softmax(self, site: str, x: Tensor) -> Tensor:
        """Returns a softmax's float result and observes it; see `Operations.softmax`."""
        spec = self.specs.get(site)
        if not self.tag_scores or x.scale is None or spec is None or spec.quantizer != "log2":
            return super().softmax(site, x)
        quantizer = self._observe(site, x.values)
        assert isinstance(quantizer, Log2)
        return Tensor(quantizer.values(quantizer.clip_exponents(log_int_softmax_exponents(x.steps, x.scale))))

    def _observe(self, site: str, values: Array) -> Quantizer | None:
        spec = self.specs.get(site)
        if spec is None:
            return None
        self.ranges[site] = self.observer.update(spec, self.ranges.get(site), values)
        if self.fit:
            self.fitted[site] = self.observer.fit(spec, self.ranges[site], values)
        return self.fitted.get(site)
