"""What a quantization returns."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cptv_jax.config.schema import QuantizeConfig
from cptv_jax.data import Images
from cptv_jax.evaluation import Accuracy, evaluate
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.storage.models import save_model


@dataclass(frozen=True)
class Quantization:
    """The outcome of `quantize`.

    model: the quantized model after the search; base: before it; teacher: the float model. log: the search's records.
    results: accuracies (percent) and losses by name, as they were measured.
    """

    model: QuantizedModel
    base: QuantizedModel
    teacher: Model
    config: QuantizeConfig
    log: tuple[dict[str, Any], ...] = ()
    results: dict[str, Any] = field(default_factory=dict)

    def evaluate(self, images: Images, progress: bool = False) -> Accuracy:
        """Accuracy of the quantized model on labelled images."""
        return evaluate(self.model.stages(), images, progress)

    def save(self, path: str | Path) -> None:
        """Writes the quantized model as a checkpoint directory. Raises InputError when the path exists."""
        save_model(Path(path), self.model)

    def report(self, path: str | Path) -> Path:
        """Writes report.md and loss.png into a directory and returns the path of the former."""
        from cptv_jax.report.markdown import write_report

        return write_report(Path(path), self)
