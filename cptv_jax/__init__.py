"""cptv_jax: post-training quantization of Vision Transformers in JAX, with CPT-V's contrastive evolutionary search.

`quantize(model, images, config)` is the whole pipeline; the other names are its parts. Each is imported when it is
first used, so that `import cptv_jax` alone is quick and does not start JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; tests hold it equal to the table below
    from cptv_jax.config.loading import load_config
    from cptv_jax.config.schema import CalibrationConfig, QuantizeConfig, SearchConfig
    from cptv_jax.data import Images
    from cptv_jax.data import from_arrays as images_from_arrays
    from cptv_jax.data import load as load_images
    from cptv_jax.errors import InputError
    from cptv_jax.evaluation import Accuracy, evaluate
    from cptv_jax.models.architecture import Architecture
    from cptv_jax.models.zoo import ZOO, architecture_named
    from cptv_jax.pipeline.outcome import Quantization
    from cptv_jax.pipeline.quantize import quantize
    from cptv_jax.quantized.model import Model, QuantizedModel
    from cptv_jax.recipe.presets import PRESETS
    from cptv_jax.recipe.resolve import RecipeConfig, resolve
    from cptv_jax.recipe.spec import Recipe, SiteSpec
    from cptv_jax.reconstruction.config import ReconstructionConfig
    from cptv_jax.runtime.forward import forward
    from cptv_jax.runtime.mesh import use_all_cores
    from cptv_jax.runtime.stages import Output, Stage
    from cptv_jax.search import Evaluator, EvolQ, Generational, Objective
    from cptv_jax.storage.models import load_float_model, load_model, save_model

__version__ = "0.1.0"

# Where each public name comes from: a module, or "module:name" where it has another name there.
_EXPORTS = {
    "PRESETS": "recipe.presets",
    "ZOO": "models.zoo",
    "Accuracy": "evaluation",
    "Architecture": "models.architecture",
    "CalibrationConfig": "config.schema",
    "Evaluator": "search",
    "EvolQ": "search",
    "Generational": "search",
    "Images": "data",
    "InputError": "errors",
    "Model": "quantized.model",
    "Objective": "search",
    "Output": "runtime.stages",
    "Quantization": "pipeline.outcome",
    "QuantizeConfig": "config.schema",
    "QuantizedModel": "quantized.model",
    "Recipe": "recipe.spec",
    "RecipeConfig": "recipe.resolve",
    "ReconstructionConfig": "reconstruction.training",
    "SearchConfig": "config.schema",
    "SiteSpec": "recipe.spec",
    "Stage": "runtime.stages",
    "architecture_named": "models.zoo",
    "evaluate": "evaluation",
    "forward": "runtime.forward",
    "images_from_arrays": "data:from_arrays",
    "load_config": "config.loading",
    "load_float_model": "storage.models",
    "load_images": "data:load",
    "load_model": "storage.models",
    "quantize": "pipeline.quantize",
    "resolve": "recipe.resolve",
    "save_model": "storage.models",
    "use_all_cores": "runtime.mesh",
}

__all__ = [
    "PRESETS",
    "ZOO",
    "Accuracy",
    "Architecture",
    "CalibrationConfig",
    "Evaluator",
    "EvolQ",
    "Generational",
    "Images",
    "InputError",
    "Model",
    "Objective",
    "Output",
    "Quantization",
    "QuantizeConfig",
    "QuantizedModel",
    "Recipe",
    "RecipeConfig",
    "ReconstructionConfig",
    "SearchConfig",
    "SiteSpec",
    "Stage",
    "architecture_named",
    "evaluate",
    "forward",
    "images_from_arrays",
    "load_config",
    "load_float_model",
    "load_images",
    "load_model",
    "quantize",
    "resolve",
    "save_model",
    "use_all_cores",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own_name = _EXPORTS[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), own_name or name)
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
