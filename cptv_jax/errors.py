"""The one exception that means "your input, not our bug"."""


class InputError(ValueError):
    """Bad input from the user: one sentence naming the file, key or option, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
