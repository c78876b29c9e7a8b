"""No search: the base method's model is the result."""

from typing import ClassVar

from cptv_jax.options import options
from cptv_jax.search.strategies.base import Strategy


@options
class NoSearch(Strategy):
    """No search; the base method's model is the result.

    Example:
        >>> config = QuantizeConfig(search=SearchConfig(strategy=NoSearch()))
    """

    name: ClassVar[str] = "none"
    passes: ClassVar[int] = 0  # type: ignore[misc]
    rounds: ClassVar[int] = 0  # type: ignore[misc]
