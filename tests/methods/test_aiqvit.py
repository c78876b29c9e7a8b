"""AIQViT: what it attaches to RepQ-ViT's start, what it chooses, and that the result is an ordinary quantized model."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vit import images, recipe_of, small_model

from cptv_jax.errors import InputError
from cptv_jax.methods.aiqvit import AiqvitOptions, fit_focusing, quantize
from cptv_jax.methods.registry import METHODS
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import Focusing, Free, LowRank, OffsetUniform
from cptv_jax.reconstruction.blocks import reconstruct
from cptv_jax.reconstruction.config import ReconstructionConfig
from cptv_jax.runtime.forward import forward
from cptv_jax.storage.models import load_model, save_model

KEY = jax.random.key(0)
BITS = {"preset": "aiqvit", "weight_bits": 3, "activation_bits": 4}
OPTIONS = AiqvitOptions(images=16, search_images=32, search_steps=6, ranks=(1, 2, 4))


@lru_cache
def made(folder: Path, **fields: Any) -> QuantizedModel:
    """With terms of the largest rank."""
    options = replace(OPTIONS, search_steps=0)
    recipe = recipe_of(**{**BITS, **fields})
    return quantize(small_model(folder), [images(folder)[:32]], recipe, KEY, options=options)


def logits(model: QuantizedModel, folder: Path) -> np.ndarray:
    return np.asarray(forward(model.stages(), images(folder)[64:]).logits)


@pytest.mark.slow
def test_weights_get_terms_and_attention_focuses_on_an_interval(golden: Path) -> None:
    model = made(golden)
    for site, quantizer in model.quantizers.items():
        if site.endswith(".weight"):
            assert type(quantizer) is LowRank and quantizer.rank == 4, site
        elif site.endswith("softmax"):
            assert type(quantizer) is Focusing and quantizer.scale.shape == (4, 1, 1), site
        else:
            assert type(quantizer) is OffsetUniform, site
            np.testing.assert_array_equal(quantizer.zero_point, np.round(quantizer.zero_point))
    assert np.isfinite(logits(model, golden)).all()


def test_terms_bring_every_weight_nearer_to_the_float_one(golden: Path) -> None:
    """By what the best term of their rank takes away: the largest singular values of the rounding error."""
    model = made(golden)
    for site, quantizer in model.quantizers.items():
        if isinstance(quantizer, LowRank):
            kernel = model.model.layer(site.removesuffix(".weight"))["kernel"]
            error = np.float64(kernel) - np.float64(quantizer.base.values(quantizer.base.codes(kernel)))
            left = error - np.asarray(quantizer.down, np.float64) @ np.asarray(quantizer.up, np.float64)
            strengths = np.linalg.svd(error, compute_uv=False)
            # Terms are kept as float32.
            np.testing.assert_allclose(np.sum(left**2), np.sum(strengths[4:] ** 2), rtol=1e-5, err_msg=site)
            assert np.sum(left**2) < np.sum(error**2)


@pytest.mark.parametrize("per_head", [True, False])
def test_an_interval_has_the_least_error_of_the_product_of_all_that_are_tried(per_head: bool) -> None:
    rng = np.random.default_rng(0)
    sharp, flat = (rng.dirichlet(np.full(17, alpha), (6, 1, 17)) for alpha in (0.1, 2.0))
    attention = jnp.asarray(np.concatenate([sharp, flat], 1), jnp.float32)
    values = jnp.asarray(rng.normal(size=(6, 2, 17, 8)), jnp.float32)

    def errors(quantizer: Focusing) -> np.ndarray:
        """Of each head, in float64."""
        wrong = np.asarray(quantizer.values(quantizer.codes(attention)), np.float64) - np.asarray(attention, np.float64)
        return np.sum((wrong @ np.asarray(values, np.float64)) ** 2, (0, 2, 3))

    fitted = fit_focusing(attention, values, 3, per_head)
    assert fitted.scale.shape == fitted.start.shape == ((2, 1, 1) if per_head else ())
    tried = np.stack(
        [
            errors(Focusing(jnp.asarray((end - start) / 7), jnp.asarray(start), jnp.float32(7)))
            for heads in ([attention[:, :1], attention[:, 1:]] if per_head else [attention],)
            for start_at in (0.0, 0.1, 0.2, 0.3, 0.5)
            for end_at in 2.0 ** (-np.arange(0, 13) / 2)
            for start, end in [
                [
                    np.array([f(np.asarray(h)) for h in heads], np.float32).reshape((-1, 1, 1) if per_head else ())
                    for f in (lambda h, s=start_at: np.quantile(h, s), lambda h, e=end_at: h.max() * e)
                ]
            ]
            if np.all(end > start)
        ]
    )
    best = tried.min(0) if per_head else tried.sum(1).min()
    found = errors(fitted) if per_head else errors(fitted).sum()
    np.testing.assert_allclose(found, best, rtol=1e-4)  # the quantiles are interpolated in float32


@pytest.mark.slow
def test_ranks_are_chosen_among_the_candidates_and_follow_the_penalty(golden: Path) -> None:
    counted: list[tuple[int, int]] = []
    recipe = recipe_of(**BITS)
    model = quantize(
        small_model(golden), [images(golden)[:32]], recipe, KEY, lambda *count: counted.append(count), OPTIONS
    )
    stages = len(model.stages())
    assert counted == [(n, 7 * stages) for n in range(1, 7 * stages + 1)]  # each stage once, and six steps of each
    terms = [q for q in model.quantizers.values() if isinstance(q, LowRank)]
    assert all(type(term) is LowRank and int(term.rank) in OPTIONS.ranks for term in terms)
    assert any(int(term.rank) > 1 for term in terms)
    dear = quantize(
        small_model(golden), [images(golden)[:32]], recipe_of(**BITS), KEY,
        options=replace(OPTIONS, penalty=1e3),
    )  # fmt: skip
    assert all(int(term.rank) == 1 for term in dear.quantizers.values() if isinstance(term, LowRank))


@pytest.mark.slow
def test_reconstruction_learns_terms_and_intervals_and_leaves_an_ordinary_model(golden: Path, tmp_path: Path) -> None:
    start = made(golden)
    config = ReconstructionConfig(steps=6, batch=16, easy_first=0.3)
    model = reconstruct(small_model(golden), start, images(golden)[:32], config, KEY)
    for site in ("blocks.1.attn.softmax", "blocks.1.mlp.fc1.weight"):
        learned, before = model.quantizers[site], start.quantizers[site]
        for name in ("scale", "start", "down", "up"):
            if hasattr(learned, name):
                assert np.any(getattr(learned, name) != getattr(before, name)), (site, name)
    save_model(tmp_path / "saved", model)
    again = load_model(str(tmp_path / "saved"))
    assert isinstance(again, QuantizedModel)
    np.testing.assert_array_equal(logits(again, golden), logits(model, golden))
    scale = model.quantizers["blocks.1.attn.softmax"].scale
    assert np.any(
        logits(model.with_candidates({"blocks.1": {"attn.softmax": Free(scale * 2)}}), golden) != logits(model, golden)
    )


def test_what_cannot_work_is_named(golden: Path) -> None:
    aiqvit, repq = METHODS["aiqvit"].abilities, METHODS["repq-vit"].abilities
    assert aiqvit is not None and repq is not None
    aiqvit.check("aiqvit", recipe_of(**BITS))
    with pytest.raises(InputError, match=r"blocks\.0\.norm1: method aiqvit adds no low-rank term here"):
        aiqvit.check("aiqvit", recipe_of(**BITS, overrides={"blocks.0.norm1": {"low_rank": True}}))
    with pytest.raises(InputError, match="method repq-vit adds no low-rank term"):
        repq.check("repq-vit", recipe_of(preset="repq-vit", low_rank=True))
    focusing = {"quantizer": "focusing", "per_head": False}
    with pytest.raises(InputError, match=r"mlp\.gelu: a focusing quantizer is for attention maps"):
        recipe = recipe_of(**BITS, overrides={"blocks.0.mlp.gelu": focusing})
        quantize(small_model(golden), [images(golden)[:8]], recipe, KEY, options=OPTIONS)
    with pytest.raises(InputError, match=r"method repq-vit fits no uniform quantizer .* set per_head: false"):
        repq.check("repq-vit", recipe_of(preset="repq-vit", overrides={"*.attn.query": {"per_head": True}}))
    with pytest.raises(InputError, match=r"method aiqvit fits no focusing quantizer .* set .*parts: 1"):
        wrong = {"blocks.0.attn.softmax": {"quantizer": "focusing", "per_head": False, "parts": 17}}
        aiqvit.check("aiqvit", recipe_of(**BITS, overrides=wrong))
    with pytest.raises(InputError, match=r"ranks\.0 is 0; it must be at least 1"):
        replace(OPTIONS, ranks=(0, 4))


def test_its_reconstruction_is_on_by_default() -> None:
    assert METHODS["aiqvit"].reconstruction.steps
    assert not METHODS["repq-vit"].reconstruction.steps
