"""run.json: what a run was asked for, and the format of its directory."""

import json
from pathlib import Path
from typing import Any

from cptv_jax.errors import InputError

RUN_FILE = "run.json"
RUN_FORMAT = 2  # 1: configurations of flat fields, search states as checkpoints; its run.json has no number


def read_run_file(path: Path) -> dict[str, Any]:
    """Reads the run.json of a run.

    Args:
        path: The file.

    Returns:
        Its content, in the format of this cptv.

    Raises:
        InputError: The file is damaged, or of an older or newer format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        number = found.get("format", 1)
        complete = isinstance(found["identity"], dict) and isinstance(number, int)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise InputError(f"{path} is damaged; choose another --out")
    if number != RUN_FORMAT:
        raise InputError(
            f"{path} has run format {number}, but this cptv reads {RUN_FORMAT}; "
            "choose another --out, or continue the run with the cptv that began it"
        )
    return found


def refuse_config_of_other_format(config: Path) -> None:
    """Refuses the config.yaml of a run that another cptv made, because its fields differ.

    Args:
        config: A configuration file, of a run or not.

    Raises:
        InputError: The file lies next to a run.json of an older or newer format.
    """
    beside = config.parent / RUN_FILE
    if config.name != "config.yaml" or not beside.is_file():
        return
    try:
        number = json.loads(beside.read_text(encoding="utf-8")).get("format", 1)
    except (ValueError, AttributeError):
        return  # the configuration's own fields are then checked one by one
    if number != RUN_FORMAT:
        raise InputError(
            f"{config} belongs to a run of format {number}, but this cptv reads {RUN_FORMAT}; "
            "write it again from a shipped configuration (cptv configs lists them)"
        )
