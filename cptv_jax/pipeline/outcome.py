"""The outcome of a quantization."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cptv_jax.config.schema import QuantizeConfig
from cptv_jax.data import Images
from cptv_jax.evaluation import Accuracy, evaluate
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.search.events import Log
from cptv_jax.storage.models import save_model


@dataclass(frozen=True)
class Quantization:
    """The outcome of `quantize`.

    Attributes:
        model: The quantized model after the search.
        base: The quantized model before the search.
        teacher: The float model.
        config: The configuration, with every open field filled in.
        log: The events of the search.
        results: Accuracies of the "float", "base" and "final" model, if evaluation images were given.
        notes: Requests of the configuration that were not met, in sentences.

    Example:
        >>> outcome = quantize(model, images, config)
        >>> outcome.save("quantized")
        >>> print(outcome.evaluate(labelled_images))
    """

    model: QuantizedModel
    base: QuantizedModel
    teacher: Model
    config: QuantizeConfig
    log: Log = ()
    results: Mapping[str, Accuracy] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def evaluate(self, images: Images, progress: bool = False) -> Accuracy:
        """Evaluates the quantized model.

        Args:
            images: Labelled images.
            progress: Whether to show a bar.

        Returns:
            Its accuracy.
        """
        return evaluate(self.model.stages(), images, progress)

    def save(self, path: str | Path) -> None:
        """Writes the quantized model as a checkpoint directory.

        Args:
            path: The directory to create.

        Raises:
            InputError: If it exists already.
        """
        save_model(Path(path), self.model)

    def report(self, path: str | Path) -> Path:
        """Writes report.md and its plots.

        Args:
            path: The directory to write into.

        Returns:
            The path of report.md.
        """
        from cptv_jax.report.markdown import write_report

        return write_report(Path(path), self)
