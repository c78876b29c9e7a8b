"""Mixed precision: genes stand for an ordinary quantized model, and its loss is theirs."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vit import TINY

from cptv_jax import InputError, Model, RecipeConfig, resolve
from cptv_jax.methods.registry import METHODS
from cptv_jax.mixed_precision.allocation import sensitivities
from cptv_jax.mixed_precision.widths import Widths, find_product_sites, loss_of_genes
from cptv_jax.models.architecture import sites_of
from cptv_jax.runtime.forward import forward
from cptv_jax.search import Evaluator, Objective

DEEPER = replace(TINY, config=replace(TINY.config, depth=2))
BITS = (2, 4, 8)
LOSS = Objective("kl", temperature=1.0)
IMAGES = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Model:
    rng = np.random.default_rng(0)
    return Model(
        DEEPER, jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), DEEPER.initialize(0))
    )


@pytest.fixture(scope="module")
def widths(model: Model) -> Widths:
    def at(bits: int) -> RecipeConfig:
        return RecipeConfig(weight_bits=bits, overrides={"head.fc.weight": {"bits": 8}})

    calibrate = METHODS["fq-vit"].quantize
    recipes = [resolve(at(bits), sites_of(DEEPER)) for bits in BITS]
    return Widths(tuple(calibrate(model, [jnp.asarray(IMAGES)], r, jax.random.key(0)) for r in recipes))


@pytest.fixture(scope="module")
def make_judge(model: Model, widths: Widths) -> Callable[[], Evaluator]:
    teacher = forward(model.stages(), IMAGES)
    return lambda: Evaluator(widths.stages(), [IMAGES], [teacher], LOSS, 4)


def test_only_sites_whose_width_differs_are_free(widths: Widths) -> None:
    assert len(widths.sites) == 1 + 2 * 4 and "head.fc.weight" not in widths.sites
    assert widths.bits == BITS


@pytest.mark.slow
def test_genes_have_the_loss_of_the_model_that_they_stand_for(
    model: Model, widths: Widths, make_judge: Callable[[], Evaluator]
) -> None:
    rng, judge, teacher = np.random.default_rng(1), make_judge(), forward(model.stages(), IMAGES)
    for _ in range(3):
        genes = {site: int(rng.integers(len(BITS))) for site in widths.sites}
        mixed = widths.model(genes)
        assert {site: mixed.recipe.sites[site].bits for site in genes} == {s: BITS[g] for s, g in genes.items()}
        expected = float(LOSS(forward(mixed.stages(), IMAGES), teacher))
        # Codes are the same; the loss sums floats in another order.
        assert loss_of_genes(judge, genes) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_sensitivities_are_the_losses_of_one_changed_site(widths: Widths, make_judge: Callable[[], Evaluator]) -> None:
    found = sensitivities(make_judge(), len(BITS))
    assert set(found) == set(widths.sites)
    judge = make_judge()
    for site in ("blocks.0.mlp.fc1.weight", "embed.proj.weight"):
        genes = widths.uniform(len(BITS) - 1)
        for choice in range(len(BITS)):
            assert found[site][choice] == pytest.approx(loss_of_genes(judge, {**genes, site: choice}), rel=1e-5)


def test_bytes_are_those_of_the_packed_codes(model: Model, widths: Widths) -> None:
    count = sum(np.size(model.layer(site.removesuffix(".weight"))["kernel"]) for site in widths.sites)
    for index, bits in enumerate(BITS):
        assert widths.bytes_of_weights().total(widths.uniform(index)) == count * bits / 8


@pytest.fixture(scope="module")
def all_widths(model: Model) -> Widths:
    """Weights, and the activations that products read, of a free width."""
    recipe = resolve(RecipeConfig(), sites_of(DEEPER))
    read = find_product_sites(model, recipe)
    models = []
    for bits in BITS:
        config = RecipeConfig(overrides={site: {"bits": bits} for site in read})
        recipe = resolve(config, sites_of(DEEPER))
        models.append(METHODS["fq-vit"].quantize(model, [jnp.asarray(IMAGES)], recipe, jax.random.key(0)))
    return Widths(tuple(models))


def test_activations_that_products_read_can_be_free_too(model: Model, all_widths: Widths) -> None:
    free = {site for site in all_widths.sites if not site.endswith(".weight")}
    block = {f"blocks.0.{name}" for name in ("norm1", "attn.qkv", "attn.softmax", "attn.context", "norm2", "mlp.gelu")}
    assert {site for site in free if site.startswith("blocks.0.")} == block
    assert free >= {"embed.input", "head.norm"} and "embed.sum" not in free
    rng, teacher = np.random.default_rng(1), forward(model.stages(), IMAGES)
    judge = Evaluator(all_widths.stages(), [IMAGES], [teacher], LOSS, 4)
    for _ in range(2):
        genes = {site: int(rng.integers(len(BITS))) for site in all_widths.sites}
        expected = float(LOSS(forward(all_widths.model(genes).stages(), IMAGES), teacher))
        assert loss_of_genes(judge, genes) == pytest.approx(expected, rel=1e-5)  # as above


def test_bit_operations_are_multiplications_times_both_widths(widths: Widths, all_widths: Widths) -> None:
    tokens, width, hidden, patch = 5, 16, DEEPER.config.hidden, 16 * 16 * 3
    block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens**2 * width
    whole = 4 * patch * width + 2 * block + 10 * width
    costs = all_widths.bit_operations()
    for index, bits in enumerate(BITS):
        assert costs.total(all_widths.uniform(index)) == whole * bits**2
    # One weight alone, of 8 bits instead of 4, with an input of 2.
    genes = {**all_widths.uniform(1), "blocks.0.norm2": 0}
    assert costs.extra(genes, "blocks.0.mlp.fc1.weight", 2) == tokens * width * hidden * 2 * (8 - 4)
    # Where only weights are free, what they read has 8 bits, and products of activations cost what they cost.
    free = whole - 2 * 2 * tokens**2 * width - 10 * width  # the head's weight is fixed
    assert widths.bit_operations().total(widths.uniform(0)) == free * 2 * 8


def test_an_operand_in_float_has_32_bits(model: Model) -> None:
    recipes = [resolve(RecipeConfig(weight_bits=bits, quantize_input=False), sites_of(DEEPER)) for bits in BITS]
    calibrate = METHODS["fq-vit"].quantize
    found = Widths(tuple(calibrate(model, [jnp.asarray(IMAGES)], r, jax.random.key(0)) for r in recipes))
    costs, patches = found.bit_operations(), 4 * 16 * 16 * 3 * 16
    assert set(costs.sites) == set(found.sites)  # no weight is left without a cost, and so without a gene
    assert costs.extra(found.uniform(0), "embed.proj.weight", 2) == patches * 32 * (8 - 2)


def test_models_that_differ_in_more_are_refused(model: Model, widths: Widths) -> None:
    changed = model.with_layers({"head.fc": {"bias": model.layer("head.fc")["bias"] + 1}})
    other = replace(widths.models[1], model=changed)
    with pytest.raises(InputError, match="a base method that leaves weights as they are"):
        Widths((widths.models[0], other))
    scaled = jax.tree.map(lambda leaf: leaf * 2, widths.models[1].quantizers["blocks.0.norm1"])
    other = replace(widths.models[1], quantizers={**widths.models[1].quantizers, "blocks.0.norm1": scaled})
    with pytest.raises(InputError, match=r"quantizer of blocks\.0\.norm1 depends on widths of other sites"):
        Widths((widths.models[0], other))


def test_models_that_differ_in_nothing_are_refused(widths: Widths) -> None:
    with pytest.raises(InputError, match=r"recipe\.overrides fix every width"):
        Widths((widths.models[0], widths.models[0]))
