"""cptv_jax: post-training quantization of Vision Transformers in JAX, with CPT-V's contrastive evolutionary search.

`quantize(model, images, config)` is the whole pipeline; the other names are its parts.
"""

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
from cptv_jax.runtime.stages import Output, Stage
from cptv_jax.search import Evaluator, EvolQ, Generational, Objective
from cptv_jax.storage.models import load_float_model, load_model, save_model

__version__ = "0.1.0"

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
]
