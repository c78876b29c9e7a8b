"""What a quantization returns."""

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
        config: The configuration, with everything filled in that was left open.
        log: What the search tells of its course.
        results: Accuracies of the "float", "base" and "final" model, where evaluation images were given.
        notes: What the configuration asked for and did not get, in sentences.
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
            InputError: Where it exists.
        """
        save_model(Path(path), self.model)

    def report(self, path: str | Path) -> Path:
        """Writes report.md and its pictures.

        Args:
            path: The directory to write into.

        Returns:
            The path of report.md.
        """
        from cptv_jax.report.markdown import write_report

        return write_report(Path(path), self)
