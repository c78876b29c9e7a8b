"""Run by test_mesh.py in processes of its own: losses of candidates on several meshes, printed as hexadecimal floats.

    python mesh_child.py GOLDEN MESH... [--process I OF N PORT]

MESH is POPULATIONxDATA.
"""

import sys
from pathlib import Path

import jax

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[2] / ".jax_cache"))
arguments = sys.argv[1:]
if "--process" in arguments:
    at = arguments.index("--process")
    process, _, processes, port = arguments[at + 1 : at + 5]
    arguments = arguments[:at]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from cptv_jax.methods.registry import METHODS  # noqa: E402
from cptv_jax.models.architecture import Architecture, sites_of  # noqa: E402
from cptv_jax.models.preprocessing import Preprocessing  # noqa: E402
from cptv_jax.models.timm_weights import from_timm  # noqa: E402
from cptv_jax.models.vit import ViTConfig  # noqa: E402
from cptv_jax.models.vit_family import VIT  # noqa: E402
from cptv_jax.quantized.candidate import Space  # noqa: E402
from cptv_jax.quantized.model import Model  # noqa: E402
from cptv_jax.recipe.resolve import RecipeConfig, resolve  # noqa: E402
from cptv_jax.runtime.forward import compute_outputs  # noqa: E402
from cptv_jax.runtime.mesh import make_mesh  # noqa: E402
from cptv_jax.search import Evaluator, Generational, Objective  # noqa: E402

folder, meshes = Path(arguments[0]), arguments[1:]
config = ViTConfig(image_size=32, patch_size=8, num_classes=10, width=64, depth=3, heads=4)
architecture = Architecture("small", VIT, config, Preprocessing(image_size=32))
with np.load(folder / "model.npz") as file:
    model = Model(architecture, from_timm(dict(file), architecture, "model.npz"))
with np.load(folder / "data.npz") as file:
    images = np.ascontiguousarray(file["calib_images"].transpose(0, 2, 3, 1)[:48])
recipe = resolve(RecipeConfig(weight_bits=4, activation_observer="minmax"), sites_of(architecture))
quantized = METHODS["fq-vit"].quantize(model, [jnp.asarray(images[:16])], recipe, jax.random.key(0))
stages = quantized.stages(
    space=Space([site for site in quantized.quantizers if site.endswith(("attn.qkv.weight", "attn.proj.weight"))])
)
batches = [images[:24], images[24:]]
teacher = [
    compute_outputs(model.stages(), lambda start, stop: batch[start:stop], len(batch))  # noqa: B023
    for batch in batches
]
strategy = Generational(sigma=0.05, children=8)
for name in meshes:
    evaluator = Evaluator(stages, batches, teacher, Objective(), 16, 4, make_mesh(*map(int, name.split("x"))))
    values = []
    for index in (3, 2):
        candidate = jax.tree.map(np.asarray, evaluator.stages[index].candidate)
        population = jax.tree.map(np.asarray, strategy.ask(strategy.init(candidate, 0.0), jax.random.key(index))[0])
        losses = evaluator.losses(index, population)
        evaluator.accept(index, jax.tree.map(lambda leaf: leaf[int(np.argmin(losses))], population))  # noqa: B023
        values += [float(loss).hex() for loss in losses]
    print(name, *values, flush=True)
