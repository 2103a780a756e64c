"""A document that is no recipe is read by the same machinery: places, findings, overrides, suggestions, recovery."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, BeforeValidator, Field

from finetune.diagnostics.findings import Finding
from finetune.diagnostics.parse import parse, parse_section
from finetune.diagnostics.schema import Schema
from finetune.diagnostics.section import Section
from finetune.diagnostics.values import Count, Name, OneOrMany, as_tuple
from finetune.errors import UserError


class Bed(Section):
    """Where something grows."""

    plant: Name = Field(description="what grows there")
    rows: Count = Field(default=1, description="how many rows")


class Water(Section):
    """How the garden is watered."""

    source: Literal["well", "rain"] = Field(description="where the water comes from")
    litres: Annotated[float, Field(gt=2.5)] = Field(description="litres for each bed")


class Garden(Section):
    """A garden."""

    water: Water
    beds: Annotated[tuple[Bed, ...], OneOrMany("plant", "a plant, or a list of beds")] = Field(min_length=1)
    tools: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    notes: dict[str, str] = Field(default_factory=dict, description="anything")


GARDEN = Schema(
    Garden,
    noun="a garden",
    other_names={"irrigation": "water"},
    example_override="beds.0.rows=3",
    how_to_start="copy garden.yaml",
)
GOOD = "water:\n  source: well\n  litres: 4\nbeds: [leek, {plant: kale, rows: 2}]\n"


SOURCE = ("water", "source")


def check(garden: Garden) -> list[Finding]:
    """A well gives at most 10 litres for each bed."""
    if garden.water.source == "well" and garden.water.litres > 10:
        return [
            Finding(
                ("water", "litres"), "is more than a well gives", "write 10", garden.water.litres, with_paths=(SOURCE,)
            )
        ]
    return []


def read(text: str, *overrides: str) -> Garden:
    return parse(text, "g.yaml", GARDEN, overrides, check=check, error=UserError)


def told(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read(text, *overrides)
    return str(caught.value)


def test_a_document_with_shorthands_and_overrides():
    garden = read(GOOD, "beds.1.rows=5", "water.source=rain", "notes.soil=clay")
    assert garden.beds == (Bed(plant="leek"), Bed(plant="kale", rows=5))
    assert (garden.water.source, garden.notes) == ("rain", {"soil": "clay"})
    assert read(GOOD, "beds=leek").beds == (Bed(plant="leek"),)


def test_every_mistake_is_told_at_its_place_with_what_was_meant():
    water = "irrigation: {source: well}\nwater:\n  source: wel\n  litres: 2\n"
    text = water + "beds:\n- plnt: kale\n- {plant: leek, rows: 0}\n"
    assert told(text, "tols=spade", "beds") == (
        "error: g.yaml:1: irrigation: is unknown\nhint: did you mean water? a garden has water, beds, tools, notes\n"
        "error: g.yaml:3: water.source: is none of the choices, got 'wel'\n"
        "hint: did you mean well? water.source takes one of well, rain (where the water comes from)\n"
        "error: g.yaml:4: water.litres: must be above 2.5, got 2\n"
        "hint: water.litres takes a number above 2.5 (litres for each bed)\n"
        "error: g.yaml:6: beds.0.plant: is required and missing\n"
        "hint: add it: beds.0.plant takes text (what grows there)\n"
        "error: g.yaml:6: beds.0.plnt: is unknown\nhint: did you mean plant? beds.0 has plant, rows\n"
        "error: g.yaml:7: beds.1.rows: must be at least 1, got 0\n"
        "hint: beds.1.rows takes a whole number at least 1 (how many rows)\n"
        "error: override tols=spade: is unknown\nhint: did you mean tools? a garden has water, beds, tools, notes\n"
        "error: override beds: is not an override\n"
        "hint: write section.field=value, such as beds.0.rows=3 (no spaces around =)"
    )


def test_what_can_be_read_of_a_broken_document_is_checked():
    """Placeholders for what is missing: a source among its choices, beds, none of which is told of."""
    found = told("water: {source: well, litres: 11}\ntols: [spade]\n")
    assert "g.yaml: beds: is required and missing" in found
    assert "is more than a well gives, got 11.0" in found
    assert found.count("error: ") == 3
    assert "well gives" not in told("water: {litres: 11}\nbeds: leek\n")  # whether it is a well is not known
    assert told("beds: leek\n").count("error: ") == 1


@pytest.mark.parametrize(("text", "what"), [("", "is empty"), ("- leek", "must be sections such as water:, beds:")])
def test_what_is_no_document_of_sections(text, what):
    assert told(text) == f"error: g.yaml: {what}\nhint: copy garden.yaml"


def test_a_section_by_itself_is_told_of_as_in_the_document():
    assert parse_section(Water, {"source": "rain", "litres": 3.0}, "water", GARDEN, UserError).litres == 3.0
    with pytest.raises(UserError) as caught:
        parse_section(Water, {"source": "rain", "liters": 3.0}, "water", GARDEN, UserError)
    assert [problem.where for problem in caught.value.problems] == ["water.litres", "water.liters"]


def test_values_of_every_kind_are_put_in_words():
    class Anything(BaseModel):
        texts: list[str]
        table: dict[str, int]
        either: int | str | None
        number: Annotated[int, Field(ge=2)]

    schema = Schema(Anything)
    words = {path: kind.in_words() for path, kind in schema.all_fields()}
    assert words == {
        ("texts",): "a list",
        ("table",): "a section",
        ("either",): "a whole number, or text, or null",
        ("number",): "a whole number at least 2",
    }
    placeholders = {path[0]: kind.placeholder() for path, kind in schema.all_fields()}
    assert Anything.model_validate(placeholders).number == 2


def test_the_shorthand_is_in_the_json_schema():
    beds = Garden.model_json_schema()["properties"]["beds"]["anyOf"]
    bed = [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/Bed"}]
    assert beds == [*bed, {"type": "array", "minItems": 1, "items": {"anyOf": bed}}]
