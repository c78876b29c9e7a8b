"""The smallest ViT that every command takes, for images of digits.

Tests that calibrate it do so on batches of 8, and search among 4 children: each other number is compiled anew.
"""

from dataclasses import replace

from cptv_jax.demo import DIGITS_VIT

TINY = replace(
    DIGITS_VIT, name="tiny_vit", config=replace(DIGITS_VIT.config, patch_size=16, width=16, depth=1, heads=2)
)
