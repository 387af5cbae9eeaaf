"""Overlap patterns as arcs: one for each flow pair, by span and weight, over the student's taps."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from made import Arm, write_study

from dfkt.analysis.arcs import Network, arcs, student_network, weighed_pairs
from dfkt.config import to_dict
from dfkt.errors import InputError, StudyError
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.fsp import Fsp
from dfkt.methods.kd import Kd
from dfkt.methods.patterns import flow_pairs
from dfkt.networks.taps import StudentTaps

DATA = {"title": "Blobs", "train": 90, "val": 10, "classes": 10, "channels": 1, "image_size": [8, 8]}
NAMES = ("stem", "layer1.0", "layer2.0", "layer3.0")
SMALL = Network(NAMES, StudentTaps(4, (0, 1, 2, 3)))


def meta(folder: Path, **changes: Any) -> dict[str, Any]:
    return write_study(folder / "made", [Arm("dfkt")], **{"data": DATA, **changes}).meta


def row(method: Any) -> dict[str, Any]:
    return {"number": 0, "settings": json.dumps(to_dict(method))}


def drawn(svg: str) -> list[tuple[str, str, float]]:
    """Return by arc what it tells, its colour and its width; also checks that it is whole XML."""
    root = ElementTree.fromstring(svg)
    paths = [(path.find("title"), path) for path in root.iter("path")]
    return [(str(title.text), path.attrib["stroke"], float(path.attrib["stroke-width"])) for title, path in paths]  # type: ignore[union-attr]


def test_every_flow_pair_is_an_arc_of_its_spans_colour() -> None:
    pairs = flow_pairs("dense", 4)
    found = drawn(arcs(dict.fromkeys(pairs, 1.0), NAMES))
    assert {text.partition(" ")[0] for text, _, _ in found} == {f"({i},{j})" for i, j in pairs}
    colours = {text.partition(" ")[0]: colour for text, colour, _ in found}
    assert colours["(0,1)"] == colours["(2,3)"]
    assert len({colours["(0,1)"], colours["(0,2)"], colours["(0,3)"]}) == 3


def test_a_heavier_pair_has_a_wider_arc() -> None:
    widths = {text[:5]: width for text, _, width in drawn(arcs({(0, 1): 0.1, (1, 2): 10.0, (2, 3): 0.0}, NAMES))}
    assert widths["(2,3)"] < widths["(0,1)"] < widths["(1,2)"]


def test_all_lies_within_the_drawing() -> None:
    for count in (2, 4, 28):
        svg = arcs(dict.fromkeys(flow_pairs("dense", count), 1.0), [f"tap{k}" for k in range(count)])
        width, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
        for path in re.findall(r'd="M([\d.]+) ([\d.]+)A([\d.]+) ([\d.]+) 0 0 1 ([\d.]+)', svg):
            left, base, _, tall, right = map(float, path)
            assert 0 < left < right < width
            assert base - tall > 0
            assert base < height


def test_few_taps_are_named_and_many_are_numbered() -> None:
    assert ">layer2.0</text>" in arcs({(0, 1): 1.0}, NAMES)
    many = arcs({(0, 1): 1.0}, [f"layer{k}" for k in range(28)])
    assert "layer3</text>" not in many
    assert re.findall(r">(\d+)</text>", many)[-1] == "27"


def test_names_of_taps_are_escaped() -> None:
    assert "<b>" not in arcs({(0, 1): 1.0}, ["<b>", "b"])


def test_pairs_and_weights_are_those_that_the_method_trains() -> None:
    method = Dfkt(pattern="dense-2", span_weights=(0.5, 2.0))
    assert weighed_pairs(row(method), SMALL, 4) == {
        (0, 1): 0.5, (0, 2): 2.0, (1, 2): 0.5, (1, 3): 2.0, (2, 3): 0.5,
    }  # fmt: skip
    assert set(weighed_pairs(row(Fsp()), SMALL, 4)) == {(0, 1), (1, 2), (2, 3)}
    assert weighed_pairs(row(Kd()), SMALL, 4) == {}
    deeper = replace(SMALL, taps=StudentTaps(4, (0, 1, 2, 3), (0, 1, 1, 2)))
    assert (1, 2) not in weighed_pairs(row(Dfkt()), deeper, 4)


def test_a_method_that_is_not_at_hand_is_an_error_of_ours() -> None:
    with pytest.raises(InputError, match=r"gone:Method"):
        weighed_pairs({"number": 0, "settings": '{"name": "gone:Method"}'}, SMALL, 4)


def test_a_studys_taps_are_those_of_its_student(tmp_path: Path) -> None:
    found = student_network(meta(tmp_path))
    assert found.names == NAMES
    assert (found.taps.count, found.taps.group_ends) == (4, (0, 1, 2, 3))
    assert found.taps.matched is not None


def test_a_teacher_that_cannot_be_built_leaves_the_students_taps(tmp_path: Path) -> None:
    said = meta(tmp_path)
    said["config"]["teacher"]["network"]["name"] = "gone.module:teacher"
    assert student_network(said).taps.matched is None


def test_taps_that_cannot_be_known_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="taps are not known"):
        student_network(meta(tmp_path / "a", data={"title": "Blobs"}))
    said = meta(tmp_path / "b")
    said["config"]["student"]["name"] = "gone.module:student"
    with pytest.raises(InputError, match=r"gone\.module:student"):
        student_network(said)
