"""Wrong input of every kind: one message with a place and a cure, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmdit_lora.cli import main as cli
from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import load_config
from mmdit_lora.layout import read_layouts
from tests.data_makers import annotation, dataset, line, make_image, objects, voc


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], *says: str) -> None:
    """`main(argv)` ends with 2 and one message that holds every one of `says`."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1, captured.err
    assert captured.err.splitlines()[-1].strip()
    assert "Traceback" not in captured.err
    for text in says:
        assert text in captured.err
    assert len(captured.err) < 4000


def refused_reader(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], read: Callable[[], Any], *says: str
) -> None:
    """As `refused`, for a reader that only verbs with a model call: it takes the app's place under the real `main`."""
    monkeypatch.setattr(cli, "app", lambda *_, **__: read())
    refused(capsys, [], *says)


# --- layout files: what stands in the file, and what the message says ------------------------------------------------

BOX = {"xyxy": [0.1, 0.1, 0.4, 0.5], "phrase": "a red circle"}


def layout(**changes: Any) -> str:
    return json.dumps({"caption": "c", "boxes": [BOX]} | changes)


def with_box(**changes: Any) -> str:
    return layout(boxes=[BOX, {key: value for key, value in (BOX | changes).items() if value is not ...}])


LAYOUT_FILES = {
    "no json": ("{", "is not JSON"),
    "empty": ("", 'is empty\n  hint: give a .json file of one layout or a .jsonl of many, e.g. {"caption"'),
    "blank": (" \n\n", "is empty"),
    "a key twice": ('{"caption": "a", "caption": "b"}', "layout.json: the key 'caption' stands twice"),
    "a key twice, in lines": ('{"caption": "a",\n "boxes": [],\n "caption": "b"}', "layout.json:3: the key 'caption'"),
    "a key twice in a box": (layout().replace('"phrase"', '"xyxy": [0, 0, 1, 1], "phrase"'), "the key 'xyxy' stands"),
    "a key twice in a list": (f'[{layout()},\n{{"caption": "a", "caption": "b"}}]', "layout.json:2: the key 'caption'"),
    "xyxy and bbox": (with_box(bbox=[0, 0, 1, 1]), "boxes[1]: holds both xyxy and bbox"),
    "empty list": ("[]", "holds no layout"),
    "a number": ("3", "not an object"),
    "no caption": ('{"boxes": []}', "'caption' is missing"),
    "caption is null": (layout(caption=None), "the caption is None"),
    "unknown key": (layout(captoin="c"), "did you mean 'caption'?"),
    "boxes is an object": (layout(boxes={}), "boxes: is dict"),
    "unknown key in a box": (with_box(bbox=1), "boxes[1]"),
    "no phrase": (with_box(phrase=...), "'phrase' is missing"),
    "phrase is blank": (with_box(phrase=" "), "boxes[1]: the phrase"),
    "three numbers": (with_box(xyxy=[0, 0, 1]), "boxes[1]"),
    "a string among the numbers": (with_box(xyxy=[0, 0, 1, "1"]), "not four finite numbers"),
    "NaN": (with_box(xyxy=[0, 0, 1, float("nan")]), "holds NaN"),
    "pixels": (with_box(xyxy=[10, 10, 200, 300]), "these look like pixels"),
    "inverted": (with_box(xyxy=[0.5, 0, 0.2, 1]), "inverted"),
    "no area": (with_box(xyxy=[0.5, 0, 0.5, 1]), "is empty: its width is 0"),
    "nested without end": ("[" * 100_000, "layout.json"),
}


@pytest.mark.parametrize("name", LAYOUT_FILES)
def test_layout_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, says = LAYOUT_FILES[name]
    path = tmp_path / "layout.json"
    path.write_text(text)
    refused_reader(monkeypatch, capsys, lambda: read_layouts(path), "layout.json", says)


def test_layout_lines_are_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text(f"{layout()}\n\n{with_box(phrase='')}\n")
    refused_reader(monkeypatch, capsys, lambda: read_layouts(path), "many.jsonl:3: boxes[1]")
    refused_reader(monkeypatch, capsys, lambda: read_layouts(tmp_path / "none.json"), "none.json: no such layout file")
    path.write_bytes(b"\xff\xfe{")
    refused_reader(monkeypatch, capsys, lambda: read_layouts(path), "many.jsonl", "UTF-16")
    twice = '{"caption": "a", "caption": "b"}'
    path.write_text(f"{layout()}\n{twice}\n")
    refused_reader(monkeypatch, capsys, lambda: read_layouts(path), "many.jsonl:2: the key 'caption' stands twice")
    path.write_bytes(f"{layout()}\r{layout()}\r".encode())
    refused_reader(monkeypatch, capsys, lambda: read_layouts(path), "many.jsonl:1", "its lines end in CR alone")
    path.write_bytes(f"{layout()}\r\n{layout()}\r\n".encode())
    assert len(read_layouts(path)) == 2
    for encoding in ("utf-32-le", "utf-32-be"):
        path.write_bytes(f"\ufeff{layout()}".encode(encoding))
        refused_reader(monkeypatch, capsys, lambda: read_layouts(path), "many.jsonl: is UTF-32 text", "-f UTF-32")
        path.rename(tmp_path / "one.json")
        refused_reader(monkeypatch, capsys, lambda: read_layouts(tmp_path / "one.json"), "one.json: is UTF-32 text")


# --- data sets: line 2 is wrong, and the message says so --------------------------------------------------------------

LINES: dict[str, tuple[dict[str, Any] | str, str]] = {
    "no json": ("{'file_name': 'a.png'}", "is not JSON"),
    "a list": ("[]", "is list, not an object"),
    "NaN": (json.dumps(line(objects=objects([[0, 0, float("nan"), 1]]))), "holds NaN"),
    "endless integer": (json.dumps(line()).replace("0.4", "9" * 400), "not four finite numbers"),
    "integer of too many digits": (json.dumps(line()).replace("0.4", "9" * 5000), "is not JSON"),
    "no file name": (line(file_name=...), "'file_name' is missing"),
    "no caption": (line(caption=...), "'caption' is missing"),
    "no objects": (line(objects=...), "'objects' is missing"),
    "caption is a list": (line(caption=["a"]), "caption: is"),
    "file name is a number": (line(file_name=7), "file_name: is 7"),
    "file name is blank": (line(file_name=""), "file_name is ''"),
    "leaves by dots": (line(file_name="../a.png"), "without '..'"),
    "leaves by dots inside": (line(file_name="x/../../a.png"), "without '..'"),
    "leaves by the root": (line(file_name="/etc/passwd"), "without '..'"),
    "leaves by a drive": (line(file_name="C:\\a.png"), "without '..'"),
    "holds a zero byte": (line(file_name="a\0.png"), "file_name is"),
    "a link to nothing": (line(file_name="dangling.png"), "is a link to a file that does not exist"),
    "a FIFO": (line(file_name="fifo.png"), "is a FIFO"),
    "a device": (line(file_name="zero.png"), "is a device"),
    "missing image": (line(file_name="c.png"), "does not exist"),
    "a folder": (line(file_name="folder"), "is a folder"),
    "too long a name": (line(file_name="a" * 5000), "cannot be opened"),
    "no image": (line(file_name="text.png"), "is no readable image"),
    "truncated image": (line(file_name="half.png"), "is no readable image"),
    "half a character": (line(caption="\ud800"), "half a character"),
    "objects is a list": (line(objects=[]), "objects is list"),
    "no phrases": (line(objects={"bbox": []}), "objects.phrase: is missing"),
    "bbox is null": (line(objects={"bbox": None, "phrase": []}), "objects.bbox: is NoneType"),
    "unknown key in objects": (line(objects=objects([]) | {"phrases": []}), "did you mean 'phrase'?"),
    "more boxes than phrases": (line(objects=objects([[0, 0, 1, 1]], [])), "1 boxes and 0 phrases"),
    "phrase is null": (line(objects=objects([[0, 0, 1, 1]], [None])), "objects.phrase[0]: is null"),
    "phrase is blank": (line(objects=objects([[0, 0, 1, 1]], [""])), "objects.bbox[0]: the phrase is ''"),
    "three numbers": (line(objects=objects([[0, 0, 1]])), "objects.bbox[0]: is [0, 0, 1]"),
    "a string among the numbers": (line(objects=objects([[0, 0, 1, "1"]])), 'objects.bbox[0]: is [0, 0, 1, "1"]'),
    "true among the numbers": (line(objects=objects([[0, 0, 1, True]])), "objects.bbox[0]: is [0, 0, 1, true]"),
    "pixels as relative": (line(objects=objects([[1, 1, 20, 10]])), '"bbox_units": "pixel"'),
    "outside in pixels": (
        line(objects=objects([[1, 1, 50, 10]]), bbox_units="pixel"),
        "(written as xyxy [1, 1, 50, 10])",
    ),
    "xywh as xyxy": (
        line(objects=objects([[0.5, 0.5, 0.2, 0.2]] * 2 + [[0, 0, 0.4, 0.4]])),
        "40.0% as xyxy (declared), 20.0% as xywh",
    ),
    "xywh for bbox": (
        line(objects={"xywh": [], "phrase": []}),
        'write the numbers under "bbox" and declare "bbox_format": "xywh" beside the caption',
    ),
    "a key twice": (json.dumps(line())[:-1] + ', "caption": "b"}', "metadata.jsonl:2: the key 'caption' stands twice"),
    "inverted": (line(objects=objects([[0.9, 0.1, 0.5, 0.4]])), "objects.bbox[0]"),
    "xyxy as xywh": (line(objects=objects([[0.5, 0.5, 0.9, 0.9]]), bbox_format="xywh"), "written as xywh"),
    "unknown format": (line(bbox_format="yxyx"), "give one of xyxy, xywh, cxcywh"),
    "unknown units": (line(bbox_units=None), "give one of relative, pixel"),
}


@pytest.mark.parametrize("name", LINES)
def test_data_set_lines(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, says = LINES[name]
    folder = dataset(tmp_path / "data", line(), wrong)
    whole = make_image(tmp_path / "elsewhere.png").read_bytes()
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo.png")
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "folder").mkdir()
    refused(capsys, ["data", "check", str(folder)], "metadata.jsonl:2", says)


DATA_SETS: dict[str, tuple[Callable[[Path], object] | None, str]] = {
    "no folder": (None, "no such data set folder"),
    "a file": (lambda d: d.write_text("x"), "no such data set folder"),
    "no metadata": (lambda d: d.mkdir(), "has no metadata.jsonl"),
    "a VOC folder": (lambda d: voc(d), "data convert --from voc"),
    "metadata is a folder": (lambda d: (d / "metadata.jsonl").mkdir(parents=True), "is a folder, not a metadata file"),
    "empty metadata": (lambda d: (dataset(d) / "metadata.jsonl").write_text(" \n\n"), "holds no image"),
    "metadata in UTF-16": (
        lambda d: (dataset(d) / "metadata.jsonl").write_text("{}", "utf-16"),
        "'file_name' is missing",
    ),
}


@pytest.mark.parametrize("verb", [["data", "check"], ["init"]], ids=" ".join)
@pytest.mark.parametrize("name", DATA_SETS)
def test_data_set_folders(name: str, verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, says = DATA_SETS[name]
    if make:
        make(tmp_path / "data")
    refused(capsys, [*verb, str(tmp_path / "data")], str(tmp_path / "data"), says)


# --- configs (test_config.py has the wrong values) --------------------------------------------------------------------

CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds nothing"),
    "a list": (b"- base\n", "holds list"),
    "no yaml": (b"base: [\n", "is not YAML"),
    "a tab": (b"base: b\ndata:\n\tpath: d\n", "config.yaml:3"),
    "two documents": (b"base: b\n---\ndata: d\n", "is not YAML"),
    "control characters": (b"base: \x07\n", "is not YAML"),
    "a NUL": (b"base: \x00\n", "holds a NUL in line 1"),
    "no text": (b"\xff\xfe\x00", "is not whole UTF-16 text"),
    "an object": (b"base: !!python/object/apply:os.getcwd []\ndata: d\n", "config.yaml:1: holds a YAML tag"),
    "a name": (b"base: b\ndata: !!python/name:os.system\n", "config.yaml:2: holds a YAML tag"),
    "a key twice": (b"base: b\ndata: d\nbase: c\n", "config.yaml:3: the key 'base' stands twice"),
    "an alias of itself": (b"base: b\ndata: &a [*a]\n", "config.yaml:2"),
    "an alias that is not": (b"base: *b\n", "config.yaml:1"),
    "a list as key": (b"base: b\n? [x]\n: 1\n", "config.yaml"),
    "unknown key": (b"base: b\ndata: d\nouput_dir: x\n", "did you mean 'output_dir'?"),
    "a key that is a number": (b"base: b\ndata: d\n3: x\n", "config.yaml:3: unknown key 3"),
    "nested without end": (b"base: " + b"[" * 2000, "is not YAML that can be read"),
    "no base": (b"data: d\n", "'base' is missing"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, says = CONFIGS[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    refused_reader(monkeypatch, capsys, lambda: load_config(path), "config.yaml", says)


# --- VOC folders ------------------------------------------------------------------------------------------------------

ANNOTATIONS = {
    "no xml": ("<annotation", "1.xml:1: is not XML"),
    "empty": ("", "1.xml:1: is not XML"),
    "another root": ("<kml/>", "its root is <kml>"),
    "a DTD": ("<!DOCTYPE annotation>" + annotation(), "has a DTD"),
    "a file by entity": (
        "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>" + annotation([("&x;", 1, 1, 9, 9)]),
        "DTD",
    ),
    "no name": (annotation().replace("RBC", ""), "object 1: has no <name>"),
    "no box": (annotation().replace("bndbox", "box"), "object 1: has no <bndbox>"),
    "no xmax": (annotation().replace("xmax", "xmay"), "<xmax> is missing"),
    "a word for a number": (annotation([("a", "one", 1, 9, 9)]), "<xmin> is 'one'"),  # type: ignore[list-item]
    "NaN": (annotation([("a", float("nan"), 1, 9, 9)]), "<xmin> is 'nan'"),
    "inverted": (annotation([("a", 9, 1, 3, 9)]), "is inverted"),
    "far outside": (annotation([("a", 1, 1, 400, 200)]), "leaves the image of 40 x 20 pixels"),
    "another size": (annotation(size=(80, 40)), "says 80 x 40 pixels"),
}


@pytest.mark.parametrize("verb", ["check", "convert"])
@pytest.mark.parametrize("name", ANNOTATIONS)
def test_voc_annotations(name: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, says = ANNOTATIONS[name]
    src = voc(tmp_path / "src", annotation(), text)
    argv = ["data", verb, "--from", "voc", str(src)] + (["--out", str(tmp_path / "out")] if verb == "convert" else [])
    refused(capsys, argv, "1.xml", says)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def without(name: str) -> Callable[[Path], object]:
    return lambda src: (src / name).rename(src / "moved")


VOC_FOLDERS: dict[str, tuple[Callable[[Path], object] | None, list[str], str]] = {
    "no folder": (lambda src: src.rename(src.parent / "moved"), [], "no such folder"),
    "no annotations": (without("Annotations"), [], "has no folder Annotations"),
    "no images": (without("JPEGImages"), [], "has no folder JPEGImages"),
    "no xml": (without("Annotations/0.xml"), [], "holds no .xml file"),
    "missing image": (without("JPEGImages/0.png"), [], "is not in JPEGImages"),
    "damaged image": (lambda src: (src / "JPEGImages/0.png").write_bytes(b"\x89PNG"), [], "is no readable image"),
    "no box anywhere": (
        lambda src: (src / "Annotations/0.xml").write_text(annotation([])),
        [],
        "holds no image with a box",
    ),
    "unknown split": (None, ["--split", "tset"], "did you mean 'test'?"),
    "a split of nothing": (
        lambda src: (src / "ImageSets/Main/test.txt").write_text("../0\n"),
        ["--split", "test"],
        "test.txt:1",
    ),
    "unknown placeholder": (None, ["--caption", "a {name}"], "{phrases}"),
    "a lone brace": (None, ["--caption", "a {"], "{phrases}"),
    "an attribute of a placeholder": (None, ["--caption", "{phrases.__class__}"], "{phrases}"),
    "a map without =": (None, ["--map", "RBC"], "--map"),
    "a map of an unknown class": (None, ["--map", "RBS=x"], "did you mean 'RBC'?"),
    "a holdout of all": (None, ["--holdout", "1"], "--holdout: is 1.0"),
    "a holdout of the only image": (None, ["--holdout", "0.5"], "single image"),
    "an unknown option": (None, ["--captoin", "x"], "--captoin"),
}


@pytest.mark.parametrize("name", VOC_FOLDERS)
def test_voc_folders_and_options(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, options, says = VOC_FOLDERS[name]
    src = voc(tmp_path / "src", test=["0"])
    if spoil:
        spoil(src)
    refused(capsys, ["data", "convert", "--from", "voc", str(src), "--out", str(tmp_path / "out"), *options], says)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


# --- the command line -------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "unknown verb": (["trian"], "'trian'"),
    "unknown verb of data": (["data", "chekc"], "'chekc'"),
    "no verb of data": (["data"], "Missing command"),
    "no data": (["data", "check"], "Missing argument"),
    "unknown option": (["data", "check", "x", "--jsn"], "--jsn"),
    "unknown format": (["data", "check", "x", "--from", "cooc"], "did you mean 'coco'?"),
    "unknown kind": (["data", "make", "cats", "--out", "OUT", "--count", "1"], "'shapes'"),
    "no count": (["data", "make", "shapes", "--out", "OUT"], "--count"),
    "count is a word": (["data", "make", "shapes", "--out", "OUT", "--count", "many"], "--count"),
    "count is 0": (["data", "make", "shapes", "--out", "OUT", "--count", "0"], "--count"),
    "negative seed": (["data", "make", "shapes", "--out", "OUT", "--count", "1", "--seed", "-1"], "--seed"),
    "unknown domain": (
        ["data", "make", "shapes", "--out", "OUT", "--count", "1", "--domain", "dence"],
        "did you mean 'dense'?",
    ),
    "no --from": (["data", "convert", "SRC", "--out", "OUT"], "--from"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, says = ARGUMENTS[name]
    monkeypatch.chdir(tmp_path)
    refused(capsys, argv, says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["make", "convert", "convert --holdout 0.5"])
@pytest.mark.parametrize("occupied", ["a file", "below a file", "a folder of other things", "a data set and more"])
def test_an_occupied_output_stays_as_it_is(
    occupied: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, out = voc(tmp_path / "src", annotation(), annotation()), tmp_path / "out"
    if occupied == "a data set and more":
        dataset(out)
    if "folder" in occupied or "more" in occupied:
        (out / "train").mkdir(parents=True)
        kept = out / "train" / "thesis.txt"
    else:
        kept = out
    kept.write_text("precious")
    before = sorted(path for path in tmp_path.rglob("*"))
    target = str(out / "deeper" if occupied == "below a file" else out)
    argv = ["data", *verb.split(), "--out", target]
    argv += ["shapes", "--count", "1"] if verb == "make" else ["--from", "voc", str(src)]
    refused(capsys, argv, "out")
    assert kept.read_text() == "precious"
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_init_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = dataset(tmp_path / "data"), tmp_path / "mine.yaml"
    out.write_text("mine")
    refused(capsys, ["init", str(folder), "--out", str(out)], "mine.yaml: exists already")
    refused(capsys, ["init", str(folder), "--out", str(out / "c.yaml")], "is a file, not a folder")
    assert out.read_text() == "mine"
