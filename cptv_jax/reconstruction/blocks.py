"""Block reconstruction: stage by stage, a quantized model learns to give the float model's outputs.

As in BRECQ (Li et al. 2021) and QDrop (Wei et al. 2022), each stage is trained alone against the float stage's output
on float input, while its own input comes from the quantized stages before it. Block reconstruction follows any base
method, and its result is an ordinary quantized model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from cptv_jax.interpreters import Tensor
from cptv_jax.quantized.execution import Simulated
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.reconstruction.config import NO_RECONSTRUCTION, ReconstructionConfig, complete
from cptv_jax.reconstruction.importance import output_importance
from cptv_jax.reconstruction.training import (
    bind_learned,
    make_learnable,
    make_optimizer,
    price,
    relative_error,
    round_zero_point,
    train_step_program,
)
from cptv_jax.runtime.arithmetics import gradient_arithmetic
from cptv_jax.runtime.forward import apply_stage, array_of
from cptv_jax.runtime.mesh import DATA, local_mesh, place
from cptv_jax.runtime.stages import Stage

_bind_learned = jax.jit(bind_learned, static_argnums=0)
_relative_errors = jax.jit(jax.vmap(relative_error, (0, 0, None)))


@dataclass(frozen=True)
class Examples:
    """A tensor for every image, on the host.

    Attributes:
        stored: The values, or the codes where the tensor is quantized, [images, ...].
        scale: The tensor's scale, where it is quantized.
        zero: The tensor's zero, where it is quantized.
    """

    stored: np.ndarray
    scale: Array | None = None
    zero: Array | None = None

    def take(self, rows: Any, mesh: Mesh) -> Tensor:
        """Places some of the images on the devices, divided among them.

        Args:
            rows: The images' indices, or a slice of them.
            mesh: The devices.

        Returns:
            The tensor for these images.
        """
        return Tensor(_divide(mesh, self.stored[rows]), *place(mesh, (self.scale, self.zero)))


def _divide(mesh: Mesh, images: np.ndarray) -> PyTree:
    """Returns images on the devices: divided where they make equal parts, else all of them on each."""
    return place(mesh, images, None if len(images) % mesh.shape[DATA] else DATA)


def _fetch(tree: PyTree) -> PyTree:
    """Returns a pytree as NumPy arrays on the host."""
    return jax.tree.map(np.asarray, tree)


def _split_rows(count: int, size: int) -> list[slice]:
    """Returns slices of at most `size` rows."""
    return [slice(start, start + size) for start in range(0, count, size)]


def _run_stage(stage: Stage, inputs: Examples, size: int, mesh: Mesh) -> Examples:
    """Returns a stage's outputs, computed on `size` images at a time."""
    state = place(mesh, stage.state)
    parts = [
        _fetch(apply_stage(stage.function, state, inputs.take(rows, mesh)))
        for rows in _split_rows(len(inputs.stored), size)
    ]
    if isinstance(parts[0], Tensor):
        return Examples(np.concatenate([part.stored for part in parts]), parts[0].scale, parts[0].zero)
    return Examples(np.concatenate([array_of(part) for part in parts]))


def _measure_errors(outputs: Examples, targets: np.ndarray, importance: Array, size: int, mesh: Mesh) -> np.ndarray:
    """Returns squared error and squared target of every image, [images, 2]."""
    parts = [
        np.stack(_relative_errors(outputs.take(rows, mesh).values, _divide(mesh, targets[rows]), importance), -1)
        for rows in _split_rows(len(targets), size)
    ]
    return np.concatenate(parts).astype(np.float64)


def _pool_errors(errors: np.ndarray) -> float:
    """Returns the relative squared error over all images."""
    error, power = errors.sum(0)
    return float(error / power)


def _draw_batches(easiest_first: np.ndarray, config: ReconstructionConfig, key: Array) -> Iterator[np.ndarray]:
    """Draws the image indices of every step, without replacement, from the images that are easy enough by then.

    Yields:
        Image indices of a step.
    """
    assert config.steps is not None and config.easy_first is not None
    count, rng = len(easiest_first), np.random.default_rng(np.asarray(jax.random.key_data(key)))
    size = min(config.batch, count)
    for step in range(config.steps):
        share = min(1.0, config.easy_first + (1.0 - config.easy_first) * 2 * step / config.steps)
        yield easiest_first[rng.choice(max(size, round(share * count)), size, replace=False)]


def reconstruct(
    teacher: Model,
    model: QuantizedModel,
    images: np.ndarray,
    config: ReconstructionConfig,
    key: Array,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_stage: Callable[[int, QuantizedModel, float, float], None] = lambda index, model, before, after: None,
    start: int = 0,
) -> QuantizedModel:
    """Trains every stage of a quantized model to lower its output's error, see `training.make_learnable`.

    Host memory holds four activations of one stage for every image; device memory holds those of a batch, whose images
    are divided among this process's devices. The same key gives the same result on as many devices. A stage that
    training makes worse stays as it was, except that fractional zero points are rounded first.

    Args:
        teacher: The float model, as the base method got it.
        model: The base method's quantized model.
        images: Normalised calibration images, float32 [images, height, width, channels], of which the first
            `config.images` are used.
        config: The options.
        key: Random key of labels, batches and mixed inputs.
        on_progress: Called as on_progress(done, total), which count optimizer steps.
        on_stage: Called as on_stage(index, model so far, error before, error after) after each stage. Errors are
            squared, relative to the target, over all images, plus the price of ranks that are being chosen.
        start: The first stage to learn, where `model` has the stages before it already; the result is the same, bit for
            bit.

    Returns:
        The model with the learned parameters of every stage that training improved.
    """
    config = complete(config, NO_RECONSTRUCTION)
    mesh, arithmetic = local_mesh(config.batch), gradient_arithmetic()
    steps = config.steps
    assert steps is not None
    images = images[: config.images]
    model = replace(model, quantizers={site: round_zero_point(each) for site, each in model.quantizers.items()})
    targets = floats = inputs = Examples(images)
    float_stages = teacher.stages()
    label_key = jax.random.fold_in(key, len(float_stages))  # stages fold in their indices
    importance = output_importance(teacher, images, config.batch, label_key) if config.importance == "fisher" else {}
    for index, float_stage in enumerate(float_stages):
        name = float_stage.name
        floats, targets = targets, _run_stage(float_stage, targets, config.batch, mesh)
        stage = model.stage(name, Simulated(arithmetic))
        weighting = place(mesh, importance.get(name, jnp.ones(())))
        outputs = _run_stage(stage, inputs, config.batch, mesh)
        if index >= start:
            errors = _measure_errors(outputs, targets.stored, weighting, config.batch, mesh)
            before = _pool_errors(errors) + float(price(stage.state["quantizers"]))
            function, bind, learnable, parameters = make_learnable(model, name, config, arithmetic)
            learnable, parameters = place(mesh, learnable), place(mesh, parameters)
            optimizer_state = place(mesh, make_optimizer(config).init(parameters))
            order_key, mixing_key = jax.random.split(jax.random.fold_in(key, index))
            for step, rows in enumerate(_draw_batches(np.argsort(errors[:, 0], kind="stable"), config, order_key)):
                parameters, optimizer_state = train_step_program()(
                    function,
                    bind,
                    config,
                    learnable,
                    parameters,
                    optimizer_state,
                    inputs.take(rows, mesh),
                    _divide(mesh, floats.stored[rows]),
                    _divide(mesh, targets.stored[rows]),
                    weighting,
                    place(mesh, jax.random.fold_in(mixing_key, step)),
                )
                on_progress(index * steps + step + 1, len(float_stages) * steps)
            state = _fetch(_bind_learned(bind, learnable, parameters))
            learned = model.with_parts(name, state["weights"], state["quantizers"])
            learned_stage = learned.stage(name, Simulated(arithmetic))
            learned_outputs = _run_stage(learned_stage, inputs, config.batch, mesh)
            after = _pool_errors(_measure_errors(learned_outputs, targets.stored, weighting, config.batch, mesh))
            after += float(price(learned_stage.state["quantizers"]))
            if after < before:
                model, outputs = learned, learned_outputs
            on_stage(index, model, before, min(after, before))
        inputs = outputs
    return model
