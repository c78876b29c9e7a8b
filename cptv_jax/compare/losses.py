"""Files of kind `losses`: our objectives on recorded pairs of logits (step 5)."""

import re
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.compare.checks import LOSS_RELATIVE, Check
from cptv_jax.compare.interchange import Recording
from cptv_jax.errors import InputError
from cptv_jax.search.objective import cosine_distance, info_nce, kl_divergence, mean_squared_error

Logits = Float[Array, "images classes"]

GROUP = "5 losses"
NOTES = (
    "kl_dim0_batchmean (softmax over the batch) and cosine_argmax_dim0 (cosine of index vectors) are artefacts of the "
    "reference's evaluation script and have no counterpart here: not compared",
)
# A float32 sum of terms p log(p / q) carries this much noise, which shows where the divergence itself is tiny.
_KL_NOISE = 2e-7

# q is the student, k the teacher.
_TORCH_LOSSES: dict[str, Callable[[Logits, Logits], float]] = {
    "mse": lambda q, k: float(mean_squared_error(q, k, 1.0)),
    # torch's kl_div(log_softmax(q), softmax(k), "batchmean"): KL(teacher || student).
    "kl_dim1_batchmean": lambda q, k: float(kl_divergence(q, k, 1.0)),
    # A sum of similarities there, a mean distance here.
    "cosine_sum_dim1": lambda q, k: len(q) * (1.0 - float(cosine_distance(q, k, 1.0))),
}


_CONTRASTIVE = re.compile(r"contrastive_T(\d+(?:\.\d+)?)")


def compare_losses(recording: Recording) -> list[Check]:
    """Compares every loss of every pair of logits, `{group}/{pair}/{loss}`.

    Args:
        recording: The recording.

    Returns:
        One check per loss.

    Raises:
        InputError: If there are no pairs, or a pair has no contrastive loss.
    """
    pairs = [key.removesuffix("/q") for key in recording.arrays if key.endswith("/q")]
    if not pairs:
        raise InputError(f"{recording.path} holds no pairs '.../q' and '.../k' to compute losses of")
    found: list[Check] = []
    for pair in pairs:
        q = recording.array(f"{pair}/q", None, None)
        k = recording.array(f"{pair}/k", *q.shape)
        losses = dict(_TORCH_LOSSES)
        for name in recording.under(f"{pair}/"):
            match = _CONTRASTIVE.fullmatch(name)
            if match and float(match[1]) > 0:
                losses[name] = partial(_contrastive, temperature=float(match[1]))
        if len(losses) == len(_TORCH_LOSSES):
            raise InputError(f"{recording.path} lacks '{pair}/contrastive_T1' or another temperature's")
        found += [
            _check(
                name, f"{pair}/{name}", loss(jnp.asarray(q), jnp.asarray(k)), recording.scalar(f"{pair}/{name}"), len(q)
            )
            for name, loss in losses.items()
            if f"{pair}/{name}" in recording
        ]
    return found


def _contrastive(q: Logits, k: Logits, temperature: float) -> float:
    return float(info_nce(q, k, temperature))


def _check(name: str, key: str, ours: float, recorded: float, images: int) -> Check:
    difference = abs(ours - recorded)
    if name == "cosine_sum_dim1":  # similarities near zero cancel: judged as a mean, whose scale is one
        return Check(GROUP, key, difference / images, LOSS_RELATIVE, "of mean similarity", difference)
    if name == "kl_dim1_batchmean" and difference <= _KL_NOISE:
        remark = f"below {_KL_NOISE:g}, the noise of its float32 terms"
        return Check(GROUP, key, 0.0, LOSS_RELATIVE, "relative", difference, remark=remark)
    relative = difference / abs(recorded) if recorded else difference
    return Check(GROUP, key, relative, LOSS_RELATIVE, "relative", difference)
