"""What a descent on quantizers makes of gradients that are no numbers."""

import jax.numpy as jnp
import numpy as np
import optax

from cptv_jax.finite import finite_gradients


def test_a_gradient_that_is_no_number_moves_nothing_and_spoils_no_later_step() -> None:
    descent = optax.chain(finite_gradients(), optax.adam(0.1))
    parameters = {"scale": jnp.ones(4)}
    moments = descent.init(parameters)
    for gradient in ([jnp.nan, jnp.inf, -jnp.inf, 1.0], [1.0, 1.0, 1.0, 1.0]):
        updates, moments = descent.update({"scale": jnp.asarray(gradient)}, moments, parameters)
        moved = np.asarray(updates["scale"])
        assert np.isfinite(moved).all()
        assert np.array_equal(moved[:3] != 0, [gradient[0] == 1.0] * 3) and moved[3] < 0
