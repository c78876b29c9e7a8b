"""The one exception that means "your input, not our bug", and endings for its sentences."""

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


class InputError(ValueError):
    """Bad input from the user: one sentence naming the file, key or option, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


def one_line(error: Exception) -> str:
    """An exception's text as part of a sentence: on one line, without a full stop."""
    return " ".join(str(error).split()).rstrip(".")
