"""From a float model to a quantized one: plan, base method, search, evaluation."""
