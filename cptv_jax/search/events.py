"""Events that a search reports, in order; each is a line of JSON in log.jsonl."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

EVERY_STAGE = "all"  # where a proposal was accepted


@dataclass(frozen=True)
class Start:
    """The losses that a search begins with.

    Attributes:
        loss: Loss on the images that judge candidates.
        held_out: Loss on the held-out images; None if no images are held out.
    """

    event: ClassVar[str] = "start"
    loss: float
    held_out: float | None


@dataclass(frozen=True)
class Proposed:
    """A proposal for all stages, and how much of it was taken.

    Attributes:
        number: The pass, from 1 on.
        fraction: The part of the proposal that was taken; 0 if none was.
        loss: The loss afterwards.
        batch_losses: Mean losses of the batches that the proposal was made from, in order.
    """

    event: ClassVar[str] = "proposal"
    number: int
    fraction: float
    loss: float
    batch_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Accepted:
    """A step that lowered the loss.

    Attributes:
        number: The pass, from 1 on.
        stage: The stage; EVERY_STAGE for a proposal.
        round: The round of evolution, from 1 on; 0 for a proposal.
        loss: The loss afterwards.
    """

    event: ClassVar[str] = "accepted"
    number: int
    stage: str
    round: int
    loss: float


@dataclass(frozen=True)
class PassEnd:
    """The end of a pass.

    Attributes:
        number: The pass, from 1 on.
        loss: Loss on the images that judge candidates.
        held_out: Loss on the held-out images; None if no images are held out.
        evaluations: Candidates evaluated since the search began.
    """

    event: ClassVar[str] = "pass"
    number: int
    loss: float
    held_out: float | None
    evaluations: int


Event = Start | Proposed | Accepted | PassEnd
Log = tuple[Event, ...]

_BY_NAME: dict[str, type[Event]] = {kind.event: kind for kind in (Start, Proposed, Accepted, PassEnd)}


def to_record(event: Event) -> dict[str, Any]:
    """Turns an event into plain data.

    Args:
        event: The event.

    Returns:
        Its fields as log.jsonl has them: `number` is called "pass" there, and empty batch losses are left out.
    """
    record: dict[str, Any] = {"event": event.event}
    for name, value in vars(event).items():
        if name == "batch_losses":
            record |= {name: list(value)} if value else {}
        else:
            record["pass" if name == "number" else name] = value
    return record


def from_record(record: Mapping[str, Any]) -> Event:
    """Reads a record that `to_record` made.

    Args:
        record: A line of log.jsonl.

    Returns:
        The event.
    """
    kind = _BY_NAME[record["event"]]
    values = {"number" if name == "pass" else name: value for name, value in record.items() if name != "event"}
    if "batch_losses" in values:
        values["batch_losses"] = tuple(values["batch_losses"])
    return kind(**values)


def log_from(records: Iterable[Mapping[str, Any]]) -> Log:
    """Reads a whole log.

    Args:
        records: Lines of log.jsonl.

    Returns:
        The events, in their order.
    """
    return tuple(from_record(record) for record in records)
