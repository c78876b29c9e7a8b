"""Sites know what linear layers and matmuls read, and find their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.interpreters import Capturing, Float, Tensor
from cptv_jax.models.architecture import Architecture, call_stage, sites_of, stage_graphs
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.quantized.model import Model

TINY = Architecture(
    "tiny", VIT, ViTConfig(image_size=16, patch_size=8, num_classes=5, width=8, depth=2, heads=2, distilled=True),
    Preprocessing(image_size=16),
)  # fmt: skip


def test_what_each_linear_layer_and_matmul_reads() -> None:
    reads = {site.name: site.reads for site in sites_of(TINY) if site.reads}
    block = {
        "attn.qkv.weight": ("norm1",),
        "attn.scores": ("attn.query", "attn.key"),
        "attn.context": ("attn.softmax", "attn.value"),
        "attn.proj.weight": ("attn.context",),
        "mlp.fc1.weight": ("norm2",),
        "mlp.fc2.weight": ("mlp.gelu",),
    }
    expected: dict[str, tuple[str, ...]] = {"embed.proj.weight": ("embed.input",)}
    for i in range(2):
        expected |= {f"blocks.{i}.{k}": tuple(f"blocks.{i}.{name}" for name in v) for k, v in block.items()}
    expected |= {"head.fc.weight": ("head.norm",), "head.fc_dist.weight": ("head.norm",)}
    assert reads == expected


def test_an_operand_knows_the_tensor_that_it_is_a_piece_of() -> None:
    sources = {site.name: site.source for site in sites_of(TINY) if site.kind == "operand"}
    assert sources == {
        f"blocks.{i}.attn.{k}": f"blocks.{i}.attn.qkv" for i in range(2) for k in ("query", "key", "value")
    }


def test_a_site_finds_its_weights_and_replaces_only_them() -> None:
    model = Model(TINY, TINY.initialize(0))
    for site in sites_of(TINY):
        if site.kind == "weight":
            assert model.layer(site.name.removesuffix(".weight"))["kernel"].shape == site.shape
        if site.kind == "layer_norm":
            assert set(model.layer(site.name)) == {"weight", "bias"}
    changed = model.with_layers({"blocks.1.mlp.fc1": {"bias": jnp.ones(32)}})
    differs = jax.tree.map(lambda a, b: not np.array_equal(a, b), model.weights, changed.weights)
    assert sum(jax.tree.leaves(differs)) == 1 and differs["blocks.1"]["mlp"]["fc1"]["bias"]
    with pytest.raises(KeyError, match="wieght"):
        model.with_layers({"blocks.1.norm1": {"wieght": jnp.ones(8)}})


def test_capturing_keeps_what_the_wanted_layers_read_and_produce() -> None:
    model = Model(TINY, TINY.initialize(0))
    x = Tensor(jax.random.normal(jax.random.key(1), (3, 6, 8)))
    graph = stage_graphs(TINY)["blocks.0"]
    ops = Capturing({}, ("mlp.fc1", "attn.scores"))
    output = call_stage(graph, ops, model.weights["blocks.0"], x)
    np.testing.assert_array_equal(output.values, call_stage(graph, Float(), model.weights["blocks.0"], x).values)
    assert set(ops.inputs) == set(ops.outputs) == {"mlp.fc1", "attn.scores"}
    layer = model.layer("blocks.0.mlp.fc1")
    (read,) = ops.inputs["mlp.fc1"]
    # One matmul of 8 terms in float32.
    np.testing.assert_allclose(ops.outputs["mlp.fc1"], read @ layer["kernel"] + layer["bias"], rtol=0, atol=1e-6)
    query, key = ops.inputs["attn.scores"]
    np.testing.assert_allclose(ops.outputs["attn.scores"], query @ key * 4**-0.5, rtol=0, atol=1e-6)
