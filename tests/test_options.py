"""Options are checked when they are built: words, types, bounds, names; from Python as from mappings."""

import dataclasses
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from cptv_jax.errors import InputError
from cptv_jax.options import Names, from_mapping, one_of, options, to_mapping
from cptv_jax.registry import Registry


@options
class Walk:
    """Going on foot."""

    name: ClassVar[str] = "walk"
    steps: int = Field(default=400, ge=1)
    """How many steps to take."""
    stride: float = Field(default=0.5, gt=0)
    over: Literal["hill", "dale"] = "hill"


@options
class Ride:
    name: ClassVar[str] = "ride"
    horses: int = 1


WAYS: Registry[type[Any]] = Registry("way")
WAYS.register("walk", Walk)
WAYS.register("ride", Ride)


@options
class Journey:
    way: one_of(WAYS) = Walk()  # type: ignore[valid-type]
    stops: Names | None = None
    label: str | None = None


@options
class Plan:
    journey: Journey = Journey()
    seed: int = 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": "3"}, "steps is '3'; it must be a whole number"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"steps": 3.0}, "steps is 3.0; it must be a whole number"),
        ({"stride": 0}, "stride is 0; it must be greater than 0"),
        ({"over": "hil"}, "over is 'hil'; did you mean 'hill'?"),
        ({"step": 3}, "unknown field 'step'; did you mean 'steps'?"),
    ],
)
def test_a_wrong_field_is_refused_when_options_are_built(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        Walk(**fields)
    assert str(caught.value) == says
    with pytest.raises(InputError) as caught:
        from_mapping(Plan, {"journey": {"way": {"name": "walk", **fields}}}, "file.yaml")
    assert str(caught.value) == "file.yaml: " + says.replace(next(iter(fields)), f"journey.way.{next(iter(fields))}", 1)


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(InputError, match="steps is -1; it must be at least 1"):
        dataclasses.replace(Walk(), steps=-1)


def test_a_tag_chooses_the_class_and_a_name_alone_its_defaults() -> None:
    assert from_mapping(Journey, {"way": "ride"}, "x") == Journey(way=Ride())
    assert from_mapping(Journey, {"way": {"name": "ride", "horses": 2}}, "x") == Journey(way=Ride(horses=2))


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("rid", "x: journey.way is 'rid'; did you mean 'ride'?"),
        ({"name": "swim"}, "x: journey.way is 'swim'; known: ride, walk"),
        ({"horses": 2}, "x: journey.way must be a way, or a mapping with its name; known: ride, walk"),
        ({"name": "ride", "steps": 2}, "x: unknown field 'journey.way.steps'; known: horses"),
    ],
)
def test_an_unknown_tag_is_refused(way: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        from_mapping(Plan, {"journey": {"way": way}}, "x")
    assert str(caught.value) == says


def test_a_registered_class_of_a_user_is_a_choice_too() -> None:
    ways: Registry[type[Any]] = Registry("way")

    @options
    class Sail:
        name: ClassVar[str] = "sail"
        masts: int = 2

    annotation = one_of(ways)

    @options
    class Voyage:
        way: annotation = None  # type: ignore[valid-type]

    ways.register("sail", Sail)
    assert from_mapping(Voyage, {"way": {"name": "sail", "masts": 3}}, "x").way == Sail(masts=3)


def test_plain_data_give_the_same_options_back() -> None:
    plan = Plan(journey=Journey(way=Ride(horses=3), stops=("inn",)), seed=7)
    data = to_mapping(plan)
    assert data == {
        "journey": {"way": {"name": "ride", "horses": 3}, "stops": ["inn"], "label": None},
        "seed": 7,
    }
    assert from_mapping(Plan, data, "x") == plan


def test_a_word_and_a_list_count_as_a_tuple_of_words_but_an_empty_one_is_refused() -> None:
    assert Journey(stops="inn").stops == Journey(stops=["inn"]).stops == ("inn",)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"stops is \(\); it must be a list that is not empty"):
        Journey(stops=())


@pytest.mark.parametrize("data", [3, "text", ["a"]])
def test_what_is_no_mapping_is_refused(data: Any) -> None:
    with pytest.raises(InputError, match=r"x: the configuration must be a mapping of fields"):
        from_mapping(Plan, data, "x")


def test_a_name_is_never_given_a_second_meaning() -> None:
    with pytest.raises(InputError, match="there is a way 'walk' already; register yours under another name"):
        WAYS.register("walk", Ride)
    assert WAYS.register("walk", Walk) is Walk
    with pytest.raises(InputError, match="place is 'wal'; did you mean 'walk'"):
        WAYS.find("wal", "place")
