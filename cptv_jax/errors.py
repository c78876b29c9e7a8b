"""The exception for bad input as opposed to bugs, and endings for its messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], limit: int = 8) -> str:
    """Builds the end of a sentence that names the nearest known word, or lists the known words.

    Args:
        name: The unknown word.
        known: The known words.
        limit: At most this many are listed.

    Returns:
        Text that begins with a semicolon.
    """
    words = sorted(known)
    near = get_close_matches(name, words, 1)
    if near:
        return f"; did you mean '{near[0]}'?"
    shown = ", ".join(words[:limit]) + (", ..." if len(words) > limit else "")
    return f"; known: {shown}"


class InputError(ValueError):
    """Bad input from the user. The message is one sentence that names the file, key or option, and the remedy.

    The command line prints it without a traceback and exits with code 2.

    Example:
        >>> try:
        ...     architecture_named("deit_tny_patch16_224")
        ... except InputError as error:
        ...     print(error)
        unknown architecture 'deit_tny_patch16_224'; did you mean 'deit_tiny_patch16_224'?
    """


def one_line(error: Exception) -> str:
    """Turns an exception's text into a part of a sentence: on one line, without a full stop.

    Args:
        error: The exception.

    Returns:
        The text.
    """
    return " ".join(str(error).split()).rstrip(".")
