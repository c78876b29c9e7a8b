"""Events of a search: lines of JSON under the names that log.jsonl has always had."""

import json

import pytest

from cptv_jax.search.events import Accepted, Event, PassEnd, Proposed, Start, from_record, to_record


@pytest.mark.parametrize(
    ("event", "record"),
    [
        (Start(1.5, None), {"event": "start", "loss": 1.5, "held_out": None}),
        (Proposed(1, 0.5, 1.25), {"event": "proposal", "pass": 1, "fraction": 0.5, "loss": 1.25}),
        (
            Proposed(2, 0.0, 1.25, (3.0, 2.0)),
            {"event": "proposal", "pass": 2, "fraction": 0.0, "loss": 1.25, "batch_losses": [3.0, 2.0]},
        ),
        (
            Accepted(1, "blocks.3", 2, 1.0),
            {"event": "accepted", "pass": 1, "stage": "blocks.3", "round": 2, "loss": 1.0},
        ),
        (
            PassEnd(1, 1.0, 2.0, 31),
            {"event": "pass", "pass": 1, "loss": 1.0, "held_out": 2.0, "evaluations": 31},
        ),
    ],
)
def test_an_event_is_a_line_and_back(event: Event, record: dict[str, object]) -> None:
    assert to_record(event) == record and list(to_record(event)) == list(record)
    assert from_record(json.loads(json.dumps(to_record(event)))) == event
