"""The form that configurations had before strategies and methods owned their options: told apart, and translated."""

from collections.abc import Mapping
from typing import Any

from cptv_jax.errors import InputError

_METHODS = {"ptq4vit": "ptq4vit", "repq_vit": "repq-vit", "erq": "erq", "aiqvit": "aiqvit"}  # sections of their options
_GROUPS = {
    "judge": ("objective", "on", "temperature", "teacher", "images", "holdout", "patience"),
    "space": ("sites", "offsets", "rounding"),
    "compute": (
        *("arithmetic", "race", "memory_gib", "images_at_once", "candidates_at_once", "population_devices"),
        "cache_gib",
    ),
}
_RENAMED = {
    "gradient_steps": "steps",
    "gradient_rate": "rate",
    "gradient_batch": "batch",
    "gradient_objective": "objective",
    "gradient_matching": "matching",
}
_OF_STRATEGIES = {
    "evol-q": ("passes", "rounds", "population", "samples", "step"),
    "generational": ("passes", "rounds", "children", "survivors", "sigma"),
    "evosax": ("passes", "rounds", "children", "sigma", "algorithm"),
    "guided": ("passes", "rounds", "children", "sigma", *_RENAMED, "mirror", "mixup"),
    "none": (),
}
_SEARCH = {
    **{name: f"search.{group}.{name}" for group, names in _GROUPS.items() for name in names},
    **{name: f"search.strategy.{_RENAMED.get(name, name)}" for names in _OF_STRATEGIES.values() for name in names},
}


def present_name(name: str) -> str | None:
    """Translates the name of a field of the older form.

    Args:
        name: Its dotted name, such as "search.gradient_steps" or "erq.flips".

    Returns:
        Its present dotted name; None if the older form had no such field.
    """
    section, _, field = name.partition(".")
    if section in _METHODS:
        return f"method.{field}" if field else "method"
    return _SEARCH.get(field) if section == "search" else None


def refuse_older(data: Mapping[str, Any], source: str) -> None:
    """Refuses a configuration of the older form.

    Args:
        data: The configuration as it was read.
        source: Where it comes from, for messages.

    Raises:
        InputError: If it has a field of the older form; the message gives the present name.
    """
    search = data.get("search")
    names = [name for name in data if name in _METHODS]
    names += [f"search.{name}" for name in (search if isinstance(search, Mapping) else ()) if name in _SEARCH]
    if names:
        where = present_name(names[0])
        if names[0] in _METHODS:
            where = f"{{name: {_METHODS[names[0]]}, ...}} under method"
        raise InputError(f"{source}: {names[0]} is of an older cptv, which sorted options otherwise; write {where}")


def is_older(data: Mapping[str, Any]) -> bool:
    """Tells whether a mapping has the older form.

    Args:
        data: A configuration as it was saved.

    Returns:
        True if it has a field that only the older form has.
    """
    try:
        refuse_older(data, "")
    except InputError:
        return True
    return False


def translate_search(search: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the `search` of a configuration of the older form.

    Args:
        search: Its fields.

    Returns:
        The same in the present form; null fields and those of other strategies are left out.
    """
    name = search.get("strategy", "evol-q")
    own = {_RENAMED.get(field, field): search.get(field) for field in _OF_STRATEGIES[name]}
    groups = {group: {name: search.get(name) for name in names} for group, names in _GROUPS.items()}
    return {
        "strategy": {"name": name, **_given(own)},
        **{group: _given(values) for group, values in groups.items() if _given(values)},
    }


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates a configuration of the older form, such as one saved with an earlier row of a bench.

    Args:
        config: The configuration as it was saved.

    Returns:
        The same configuration in the present form; options of other methods are left out.
    """
    name = config.get("method", "fq-vit")
    sections = [config[key] for key, method in _METHODS.items() if method == name and key in config]
    own: Mapping[str, Any] = sections[0] if sections else {}
    rest = {key: value for key, value in config.items() if key not in (*_METHODS, "method", "search")}
    return {"method": {"name": name, **_given(own)}, **rest, "search": translate_search(config.get("search", {}))}


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
