import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from minivlm import older_names
from minivlm.config import alternatives, coerce, complete, describe, field_types, from_dict, to_dict
from minivlm.errors import UserError


@dataclass(frozen=True)
class Circle:
    radius: float


@dataclass(frozen=True)
class Square:
    side: int
    filled: bool = False

    def __post_init__(self):
        if self.side < 0:
            raise ValueError(f"side is {self.side}, but must not be negative")


@dataclass(frozen=True, kw_only=True)
class Scene:
    shape: Circle | Square
    frame: Square = Square(3)
    name: str | None = None
    blend: Literal["over", "under"] = "over"
    size: tuple[int, int] = (2, 3)
    weights: tuple[float, ...] = ()
    extra: Circle | None = field(default=None)


SCENES = [
    Scene(shape=Circle(1.5)),
    Scene(shape=Square(2, filled=True), name="a", blend="under", size=(7, 8), weights=(0.5, 1.0), extra=Circle(2.0)),
]


@pytest.mark.parametrize("scene", SCENES)
def test_through_json_and_back(scene):
    assert from_dict(Scene, json.loads(json.dumps(to_dict(scene)))) == scene


def test_the_json_says_which_class_each_dictionary_is():
    assert to_dict(SCENES[0]) == {
        "type": "Scene",
        "shape": {"type": "Circle", "radius": 1.5},
        "frame": {"type": "Square", "side": 3, "filled": False},
        "name": None,
        "blend": "over",
        "size": [2, 3],
        "weights": [],
        "extra": None,
    }


def values(**changes):
    return {**to_dict(SCENES[0]), **changes}


def test_whole_numbers_serve_as_floats_and_stay_floats():
    scene = from_dict(Scene, values(shape={"type": "Circle", "radius": 2}, weights=[1]))
    assert (type(scene.shape.radius), type(scene.weights[0])) == (float, float)


def test_the_type_may_be_left_out_where_only_one_is_possible():
    assert from_dict(Scene, values(frame={"side": 4, "filled": True})).frame == Square(4, True)
    assert from_dict(Square, {"side": 4, "filled": True}) == Square(4, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sise": 1}, r"config has an unknown field 'sise' for Scene\. Did you mean size"),
        ({"zzz": 1}, r"config has an unknown field 'zzz' for Scene\. There are: blend, extra, frame"),
        ({"type": "Picture"}, r"config\.type is 'Picture', but a Scene belongs there"),
        ({"name": 3}, r"config\.name is 3, but must be str or None"),
        ({"blend": "through"}, r"config\.blend is 'through', but must be one of over, under"),
        ({"size": [1, 2, 3]}, r"config\.size is \[1, 2, 3\], but must be"),
        ({"size": [1, "2"]}, r"config\.size\[1\] is '2', but must be int"),
        ({"weights": [1.0, None]}, r"config\.weights\[1\] is None, but must be float"),
        ({"shape": None}, r"config\.shape is None, but must be Circle or Square"),
        ({"shape": {"radius": 1.0}}, r"config\.shape is .* but must be Circle or Square"),
        ({"shape": {"type": "Circle", "radius": True}}, r"config\.shape\.radius is True, but must be float"),
        ({"shape": {"type": "Circle"}}, r"config\.shape lacks radius, which Circle needs"),
        ({"frame": {"type": "Square", "side": 2.0, "filled": False}}, r"config\.frame\.side is 2\.0, but must be int"),
        ({"frame": {"type": "Square", "side": True, "filled": False}}, r"config\.frame\.side is True, but must be int"),
        ({"frame": {"type": "Square", "side": 2, "filled": 1}}, r"config\.frame\.filled is 1, but must be bool"),
        ({"frame": {"type": "Square", "side": -2, "filled": False}}, r"config\.frame: side is -2, .* negative\."),
    ],
)
def test_one_sentence_names_what_is_wrong(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(Scene, values(**changes))


def test_fields_are_not_filled_in_even_where_they_have_a_default():
    incomplete = values()
    del incomplete["blend"], incomplete["name"]
    with pytest.raises(UserError, match="config lacks name, blend, which Scene needs"):
        from_dict(Scene, incomplete)


def test_where_it_stands_can_be_said():
    with pytest.raises(UserError, match=r"^out/clip/config\.json\.side is 'x'"):
        from_dict(Square, {"side": "x", "filled": False}, where="out/clip/config.json")


def test_reading_leaves_the_dictionary_as_it_is():
    given = values()
    before = json.dumps(given)
    from_dict(Scene, given)
    assert json.dumps(given) == before


def test_annotations():
    assert field_types(Square) == {"side": int, "filled": bool}
    assert alternatives(int | None) == (int, type(None)) and alternatives(int) == (int,)
    assert describe(int | None) == "int or None" and describe(Literal["a", 1]) == "one of a, 1"
    assert coerce(tuple[int, ...], [1, 2], "x") == (1, 2)
    assert coerce(int | str, "8", "x") == "8"


def test_what_an_older_version_wrote_is_completed_with_defaults_and_nothing_else():
    whole = to_dict(Scene(shape=Square(2)))
    older = {**whole, "shape": {"type": "Square", "side": 2}}
    del older["name"]
    assert complete(Scene, older) == whole
    del older["shape"]["side"]  # without a default: still missing
    with pytest.raises(UserError, match=r"config\.shape lacks side"):
        from_dict(Scene, complete(Scene, older))


@dataclass(frozen=True, kw_only=True)
class Newer:
    bend: str = field(default="relu", metadata={"before": "gelu"})
    wide: bool = True


@dataclass(frozen=True, kw_only=True)
class Holder:
    inner: Newer | Square | None


def test_what_an_older_version_did_before_there_was_a_choice_it_does_still():
    assert complete(Newer, {"type": "Newer"}) == {"type": "Newer", "bend": "gelu", "wide": True}
    assert complete(Newer, {"type": "Newer", "bend": "silu"})["bend"] == "silu"
    assert complete(Holder, {"inner": {"type": "Newer"}})["inner"]["bend"] == "gelu"
    assert Newer().bend == "relu"


@dataclass(frozen=True, kw_only=True)
class Renamed:
    block_indices: int = field(default=1, metadata={"was": "places"})
    inner: Newer | None = field(default=None, metadata={"was": "within"})


def test_a_field_that_an_older_version_called_otherwise_is_found_by_its_older_name():
    older = {"type": "Renamed", "places": 2, "within": {"type": "Newer", "wide": False}}
    new = from_dict(Renamed, complete(Renamed, older))
    assert new == Renamed(block_indices=2, inner=Newer(bend="gelu", wide=False))
    assert complete(Renamed, to_dict(new)) == to_dict(new)
    with pytest.raises(UserError, match="has an unknown field 'places' for Renamed"):
        from_dict(Renamed, {**to_dict(new), "places": 3})


def test_a_class_that_an_older_version_called_otherwise_is_found_at_every_level(monkeypatch):
    monkeypatch.setitem(older_names.TYPES, "Older", "Newer")
    monkeypatch.setitem(older_names.TYPES, "Carrier", "Holder")
    assert complete(Newer, {"type": "Older", "bend": "silu"})["type"] == "Newer"
    older = {"type": "Carrier", "inner": {"type": "Older"}}
    assert from_dict(Holder, complete(Holder, older)) == Holder(inner=Newer(bend="gelu"))
    with pytest.raises(UserError, match="type is 'Older'"):  # nobody but an older version writes it
        from_dict(Newer, {"type": "Older", "bend": "silu", "wide": True})


@pytest.mark.parametrize(
    "inner", [{"type": "Square", "side": 2}, {"type": "Cube"}, {"bend": "gelu"}, None, [1], "Newer"]
)
def test_only_what_is_of_a_kind_is_completed_as_that_kind(inner):
    """The rest is refused by name when it is read, not here."""
    completed = complete(Holder, {"inner": inner})["inner"]
    assert completed == (
        inner | {"filled": False} if isinstance(inner, dict) and inner.get("type") == "Square" else inner
    )
    assert complete(Holder, inner) == inner or isinstance(inner, dict)
