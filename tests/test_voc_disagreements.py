"""Pascal VOC folders whose parts disagree: a warning that says what was taken instead, or one error; never silence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmdit_lora.cli.main import app
from mmdit_lora.data.formats import Source, read_format
from mmdit_lora.errors import InputError
from tests.data_makers import annotation, make_image, voc

SIZE = "<size><width>40</width><height>20</height></size>"


def scan(src: Path, **options: object) -> Source:
    return read_format("voc", src, **options)  # type: ignore[arg-type]


def test_a_folder_that_agrees_gives_no_warning(tmp_path: Path) -> None:
    whole = voc(tmp_path / "a", annotation(), annotation(filename="1.png"), train=["0", "1"])
    assert scan(whole).warnings == []
    assert scan(voc(tmp_path / "b", annotation(filename="0"), annotation(filename=""))).warnings == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (annotation(filename="cat.png"), "its <filename> is 'cat.png', which is not there; 0.png was taken"),
        (annotation(filename="0.jpg"), "its <filename> is '0.jpg', which is not there; 0.png was taken"),
        (annotation(size=(0, 0)), "states a <size> of 0 x 0; that of 0.png was taken, 40 x 20"),
        (annotation().replace(SIZE, ""), "states no <size>; that of 0.png was taken, 40 x 20"),
    ],
)
def test_what_disagrees_and_can_be_read_is_warned_of(tmp_path: Path, text: str, expected: str) -> None:
    src = voc(tmp_path, text)
    found = scan(src)
    assert found.warnings == [f"{src / 'Annotations' / '0.xml'}: {expected}"]
    assert [record.image.name for record in found.records] == ["0.png"]


@pytest.mark.parametrize("there", ["0.jpeg", "0.JPG", "0.png"])
def test_another_extension_on_disk(tmp_path: Path, there: str) -> None:
    src = voc(tmp_path, annotation(filename="0.jpg"))
    (src / "JPEGImages" / "0.png").rename(src / "JPEGImages" / there)
    found = scan(src)
    assert found.records[0].image.name == there
    assert f"{there} was taken" in found.warnings[0]


def test_of_two_images_of_one_stem_the_named_one_is_taken(tmp_path: Path) -> None:
    src = voc(tmp_path, annotation(filename="0.png"))
    make_image(src / "JPEGImages" / "0.jpg")
    found = scan(src)
    assert found.records[0].image.name == "0.png"
    assert found.warnings == [f"{src / 'JPEGImages' / '0.jpg'}: has no annotation; it was left out"]


def test_a_named_image_that_is_another_annotations(tmp_path: Path) -> None:
    found = scan(voc(tmp_path, annotation(filename="1.png"), annotation(filename="1.png")))
    assert [record.image.name for record in found.records] == ["0.png", "1.png"]
    assert len(found.warnings) == 1
    assert found.warnings[0].endswith("its <filename> is '1.png', which is there too; 0.png was taken")


def test_two_annotations_of_one_image(tmp_path: Path) -> None:
    src = voc(tmp_path, annotation())
    (src / "Annotations" / "b.xml").write_text(annotation(filename="0.png"))
    found = scan(src)
    assert [record.image.name for record in found.records] == ["0.png", "0.png"]
    assert found.warnings == [
        f"{src / 'Annotations' / 'b.xml'}: no image has its own name; the one of its <filename> was taken, 0.png",
        f"{src / 'Annotations' / 'b.xml'}: annotates 0.png, as 0.xml does; both were read, each as a layout of its own",
    ]


@pytest.mark.parametrize(
    ("size", "message"),
    [((30, 20), r"0\.xml: says 30 x 20 .* 40 x 20 \(upright\)"), ((20, 40), "width and height are swapped")],
)
def test_another_size_is_an_error(tmp_path: Path, size: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError) as caught:
        scan(voc(tmp_path, annotation(size=size)))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert ("swapped" in str(caught.value)) == (size == (20, 40))


def test_an_annotation_without_image_is_an_error_or_left_out(tmp_path: Path) -> None:
    src = voc(tmp_path, annotation(), annotation(filename="1.png"))
    (src / "JPEGImages" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1\.xml: its image '1\.png' is not in JPEGImages"):
        scan(src)
    assert scan(src, skip_missing=True).left_out == {"records whose image is not there": 1}


def test_names_of_splits_without_annotation(tmp_path: Path) -> None:
    src = voc(tmp_path, annotation(), train=["0", "gone"], cat_train=["gone -1"])
    assert scan(src).warnings == [
        f"{src / 'ImageSets' / 'Main' / 'train.txt'}:2: names 'gone', which has no annotation; the line was passed over"
    ]
    with pytest.raises(InputError, match=r"train\.txt:2: names 'gone', which has no annotation"):
        scan(src, split="train")


def test_the_image_of_a_damaged_annotation_is_not_called_unannotated(tmp_path: Path) -> None:
    found = scan(voc(tmp_path, annotation(), "<annotation>"), collect_errors=True)
    assert (len(found.errors), found.warnings) == (1, [])


def test_the_command_line_sums_up_and_exits_0(tmp_path: Path) -> None:
    src = voc(tmp_path / "voc", *[annotation(filename=f"{n}.png", size=(0, 0)) for n in range(6)])
    make_image(src / "JPEGImages" / "alone.png")
    result = CliRunner().invoke(
        app, ["data", "convert", "--from", "voc", str(src), "--out", str(tmp_path / "out"), "--json"]
    )
    assert result.exit_code == 0, result.output
    warnings = json.loads(result.stdout)["warnings"]
    assert len(warnings) == 5
    assert warnings[3:] == [
        "3 more annotations that state no size (6 in all)",
        f"{src / 'JPEGImages' / 'alone.png'}: has no annotation; it was left out",
    ]
    assert all(f"warning: {line}" in result.stderr for line in warnings)
    checked = CliRunner().invoke(app, ["data", "check", "--from", "voc", str(src), "--json"])
    assert checked.exit_code == 0
    assert json.loads(checked.stdout)["warnings"][:5] == warnings


@pytest.mark.parametrize("leaks", [True, False])
def test_check_against_a_set_of_any_format(tmp_path: Path, leaks: bool) -> None:
    src = voc(tmp_path / "voc", annotation())
    other = voc(tmp_path / "other", annotation(size=(40, 20) if leaks else (20, 40)))
    if not leaks:
        make_image(other / "JPEGImages" / "0.png", (20, 40))
    own = tmp_path / "own"
    assert CliRunner().invoke(app, ["data", "convert", "--from", "voc", str(src), "--out", str(own)]).exit_code == 0
    for arguments in (
        ["--from", "voc", str(src), "--against", str(other)],
        [str(own), "--against", str(other), "--against-from", "voc"],
    ):
        result = CliRunner().invoke(app, ["data", "check", *arguments, "--json"])
        names = [found["name"] for found in json.loads(result.stdout)["findings"]]
        assert any("leak" in name for name in names) == leaks, names
    alone = CliRunner().invoke(app, ["data", "check", str(own), "--against-from", "voc"])
    assert alone.exit_code != 0
