"""Calibration and evaluation images: from folders, tensorflow-datasets, scikit-learn's digits, generators or arrays."""

from cptv_jax.data.digits import load_digits
from cptv_jax.data.folder import load_folder
from cptv_jax.data.images import Images, from_arrays
from cptv_jax.data.preprocessing import preprocess
from cptv_jax.data.source import load
from cptv_jax.data.synthetic import load_synthetic
from cptv_jax.data.tfds import load_tfds

__all__ = ["Images", "from_arrays", "load", "load_digits", "load_folder", "load_synthetic", "load_tfds", "preprocess"]
