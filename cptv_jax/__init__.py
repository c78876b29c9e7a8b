"""cptv_jax: post-training quantization of Vision Transformers in JAX, with CPT-V's contrastive evolutionary search."""

__version__ = "0.1.0"
