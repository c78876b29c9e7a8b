"""The smallest ViT that every command takes, for images of digits."""

from dataclasses import replace

from cptv_jax.demo import DIGITS_VIT

TINY = replace(
    DIGITS_VIT, name="tiny_vit", config=replace(DIGITS_VIT.config, patch_size=16, width=16, depth=1, heads=2)
)
