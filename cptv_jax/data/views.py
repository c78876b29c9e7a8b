"""Other views of images, for gradients to learn from: without labels, few photographs go further in several views."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cptv_jax.data.images import Images

_CLOSEST = 4 / 3  # how far a view zooms in
_AT_ONCE = 50  # images


@jax.jit
def _zoomed(pixels: Float[Array, "images height width channels"], keys: Array) -> Array:
    """A random part of every image, as large as the image, and mirrored or not."""

    def one(image: Array, key: Array) -> Array:
        zoom_key, place_key, mirror_key = jax.random.split(key, 3)
        zoom = jax.random.uniform(zoom_key, minval=1.0, maxval=_CLOSEST)
        size = jnp.asarray(image.shape[:2], jnp.float32)
        corner = jax.random.uniform(place_key, (2,)) * (size - size / zoom)
        resized = jax.image.scale_and_translate(
            image, image.shape, (0, 1), jnp.stack([zoom, zoom]), -corner * zoom, "cubic"
        )
        return jnp.where(jax.random.bernoulli(mirror_key), resized[:, ::-1], resized)

    return jax.vmap(one)(pixels, keys)


def zoomed(images: Images, key: Array) -> Images:
    """A view of every image: a random part of it, at least 3/4 as wide and high, resized, and mirrored by chance.

    The same images and key give the same views. uint8 pixels stay uint8.
    """
    keys = jax.random.split(key, len(images))
    pixels = np.empty_like(images.pixels, order="C")
    for start in range(0, len(images), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        found = np.asarray(_zoomed(images.pixels[rows].astype(np.float32), keys[rows]))
        pixels[rows] = found if pixels.dtype == np.float32 else np.clip(np.round(found), 0, 255)
    return Images(pixels, images.labels, images.names, images.mean, images.std)


def views(images: Images, count: int, key: Array) -> list[Images]:
    """So many views of every image: the image, its mirror image, and then zoomed ones."""
    zooms = [zoomed(images, jax.random.fold_in(key, number)) for number in range(2, count)]
    return [images, images.mirrored(), *zooms][:count]
