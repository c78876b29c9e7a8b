"""Did-you-mean endings for messages about unknown names."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], limit: int = 8) -> str:
    """The end of a sentence that names the nearest known word, or lists the known ones."""
    words = sorted(known)
    near = get_close_matches(name, words, 1)
    if near:
        return f"; did you mean '{near[0]}'?"
    shown = ", ".join(words[:limit]) + (", ..." if len(words) > limit else "")
    return f"; known: {shown}"
