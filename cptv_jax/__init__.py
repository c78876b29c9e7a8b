"""cptv_jax: post-training quantization of Vision Transformers in JAX, with CPT-V's contrastive evolutionary search.

`quantize(model, images, config)` is the whole pipeline; the other names are its parts. Each is imported when it is
first used, so that `import cptv_jax` alone is quick and does not start JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; tests hold it equal to the table below
    from cptv_jax.calibration.observers import register_fit, register_observer
    from cptv_jax.config.loading import load_config
    from cptv_jax.config.schema import (
        CalibrationConfig,
        ComputeConfig,
        JudgeConfig,
        QuantizeConfig,
        SearchConfig,
        SpaceConfig,
    )
    from cptv_jax.data import Images
    from cptv_jax.data import from_arrays as images_from_arrays
    from cptv_jax.data import load as load_images
    from cptv_jax.errors import InputError
    from cptv_jax.evaluation import Accuracy, evaluate
    from cptv_jax.methods.base import Abilities, Method
    from cptv_jax.methods.registry import METHODS, register_method
    from cptv_jax.models.architecture import Architecture
    from cptv_jax.models.family import Family, register_family
    from cptv_jax.models.preprocessing import Preprocessing
    from cptv_jax.models.zoo import ZOO, architecture_named
    from cptv_jax.pipeline.outcome import Quantization
    from cptv_jax.pipeline.quantize import quantize
    from cptv_jax.quantized.candidate import Space
    from cptv_jax.quantized.execution import Differentiable, FullPrecision, Simulated, Unrounded
    from cptv_jax.quantized.model import Model, QuantizedModel
    from cptv_jax.quantizers import Free
    from cptv_jax.quantizers.registry import register_quantizer
    from cptv_jax.recipe.presets import PRESETS
    from cptv_jax.recipe.resolve import RecipeConfig, resolve
    from cptv_jax.recipe.spec import Recipe, SiteSpec
    from cptv_jax.reconstruction.config import ReconstructionConfig
    from cptv_jax.runtime.forward import forward
    from cptv_jax.runtime.mesh import use_all_cores
    from cptv_jax.runtime.stages import Output, Stage
    from cptv_jax.search import (
        STRATEGIES,
        Defaults,
        Evaluator,
        EvolQ,
        Evosax,
        Generational,
        Guided,
        NoSearch,
        Objective,
        StageContext,
        Strategy,
        register_strategy,
    )
    from cptv_jax.storage.models import load_float_model, load_model, save_model

__version__ = "0.1.0"

# Where each public name comes from: a module, or "module:name" where it has another name there.
_EXPORTS = {
    "METHODS": "methods.registry",
    "PRESETS": "recipe.presets",
    "STRATEGIES": "search",
    "ZOO": "models.zoo",
    "Abilities": "methods.base",
    "Accuracy": "evaluation",
    "Architecture": "models.architecture",
    "CalibrationConfig": "config.schema",
    "ComputeConfig": "config.schema",
    "Defaults": "search",
    "Differentiable": "quantized.execution",
    "Evaluator": "search",
    "EvolQ": "search",
    "Evosax": "search",
    "Family": "models.family",
    "Free": "quantizers",
    "FullPrecision": "quantized.execution",
    "Generational": "search",
    "Guided": "search",
    "Images": "data",
    "InputError": "errors",
    "JudgeConfig": "config.schema",
    "Method": "methods.base",
    "Model": "quantized.model",
    "NoSearch": "search",
    "Objective": "search",
    "Output": "runtime.stages",
    "Preprocessing": "models.preprocessing",
    "Quantization": "pipeline.outcome",
    "QuantizeConfig": "config.schema",
    "QuantizedModel": "quantized.model",
    "Recipe": "recipe.spec",
    "RecipeConfig": "recipe.resolve",
    "ReconstructionConfig": "reconstruction.config",
    "SearchConfig": "config.schema",
    "Simulated": "quantized.execution",
    "SiteSpec": "recipe.spec",
    "Space": "quantized.candidate",
    "SpaceConfig": "config.schema",
    "Stage": "runtime.stages",
    "StageContext": "search",
    "Strategy": "search",
    "Unrounded": "quantized.execution",
    "architecture_named": "models.zoo",
    "evaluate": "evaluation",
    "forward": "runtime.forward",
    "images_from_arrays": "data:from_arrays",
    "load_config": "config.loading",
    "load_float_model": "storage.models",
    "load_images": "data:load",
    "load_model": "storage.models",
    "quantize": "pipeline.quantize",
    "register_family": "models.family",
    "register_fit": "calibration.observers",
    "register_method": "methods.registry",
    "register_observer": "calibration.observers",
    "register_quantizer": "quantizers.registry",
    "register_strategy": "search",
    "resolve": "recipe.resolve",
    "save_model": "storage.models",
    "use_all_cores": "runtime.mesh",
}

__all__ = [
    "METHODS",
    "PRESETS",
    "STRATEGIES",
    "ZOO",
    "Abilities",
    "Accuracy",
    "Architecture",
    "CalibrationConfig",
    "ComputeConfig",
    "Defaults",
    "Differentiable",
    "Evaluator",
    "EvolQ",
    "Evosax",
    "Family",
    "Free",
    "FullPrecision",
    "Generational",
    "Guided",
    "Images",
    "InputError",
    "JudgeConfig",
    "Method",
    "Model",
    "NoSearch",
    "Objective",
    "Output",
    "Preprocessing",
    "Quantization",
    "QuantizeConfig",
    "QuantizedModel",
    "Recipe",
    "RecipeConfig",
    "ReconstructionConfig",
    "SearchConfig",
    "Simulated",
    "SiteSpec",
    "Space",
    "SpaceConfig",
    "Stage",
    "StageContext",
    "Strategy",
    "Unrounded",
    "architecture_named",
    "evaluate",
    "forward",
    "images_from_arrays",
    "load_config",
    "load_float_model",
    "load_images",
    "load_model",
    "quantize",
    "register_family",
    "register_fit",
    "register_method",
    "register_observer",
    "register_quantizer",
    "register_strategy",
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
