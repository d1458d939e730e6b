"""`data check`: every planted fault is found at its record and nowhere else; nothing is found where nothing is."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmdit_lora import Box, Layout
from mmdit_lora.cli.main import main
from mmdit_lora.data.buckets import Buckets, make_buckets, one_size
from mmdit_lora.data.check import CheckReport, check_dataset, clip_tokens, quick_check, read_written
from mmdit_lora.data.check.findings import Example, Finding, Findings
from mmdit_lora.data.check.images import ImageFacts, inspect_image
from mmdit_lora.data.check.page import by_powers, thumbnail
from mmdit_lora.data.check.sizes import size_findings
from mmdit_lora.data.check.texts import CLIP_TOKENS, estimate_tokens
from mmdit_lora.data.formats import read_format
from mmdit_lora.data.records import METADATA, Record, read_dataset, scan_dataset
from mmdit_lora.data.shapes import DOMAINS, write_dataset
from mmdit_lora.data.transforms import prepare
from mmdit_lora.errors import InputError
from mmdit_lora.outputs import MARKER
from mmdit_lora.visual.charts import columns, heat, rows
from tests.data_makers import annotation, dataset, make_image, voc

ROOT = Path(__file__).resolve().parent.parent
WHOLE = [0.2, 0.2, 0.7, 0.7]


def scene(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """An image like no other: soft coloured noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def declared_png(width: int, height: int) -> bytes:
    """A PNG whose header says so many pixels, and that holds none of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class Planted:
    """A data set folder that grows by lines, and remembers which finding each line must give."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.expected: defaultdict[str, set[int]] = defaultdict(set)
        folder.mkdir()

    def add(self, *names: str, file: str | None = None, save: Any = None, **changes: Any) -> str:
        """One line (right but for `changes`), its image saved by `save(path)` where a noise image is not meant."""
        number = len(self.lines) + 1
        file = file or f"{number}.png"
        if callable(save):
            save(self.folder / file)
        elif save is None:
            scene(number).save(self.folder / file)
        right = {"file_name": file, "caption": "a scene", "objects": {"bbox": [WHOLE], "phrase": ["a red ball"]}}
        self.lines.append(json.dumps(right | changes))
        for name in names:
            self.expected[name].add(number)
        (self.folder / METADATA).write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        return file

    def check(self, **options: Any) -> CheckReport:
        records, errors = scan_dataset(self.folder)
        written = read_written(self.folder, bbox_format="xyxy", bbox_units="relative")
        return check_dataset(records, errors=errors, written=written, **options)


def boxes(*bbox: list[float], phrases: list[str] | None = None) -> dict[str, Any]:
    return {"bbox": list(bbox), "phrase": phrases or ["a red ball"] * len(bbox)}


def plant_everything(folder: Path) -> Planted:
    """Every fault of a single set, each in a line of its own (or with the line that it repeats)."""
    planted = Planted(folder)
    add = planted.add
    first = add()
    add()
    # images
    add("empty-file", save=lambda p: p.write_bytes(b""))
    add("decompression-bomb", save=lambda p: p.write_bytes(declared_png(20_000, 20_000)))
    add("decompression-bomb", save=lambda p: p.write_bytes(declared_png(10_000, 10_000)))

    def truncated(path: Path) -> None:
        scene(100).save(path)
        path.write_bytes(path.read_bytes()[:-3000])

    add("undecodable", save=truncated)
    exif = Image.Exif()
    exif[0x0112] = 6
    add("exif-rotation", file="turned.jpg", save=lambda p: scene(101).save(p, exif=exif))
    add("cmyk", file="cmyk.jpg", save=lambda p: scene(102).convert("CMYK").save(p))
    add("palette-transparency", save=lambda p: scene(103).quantize(16).save(p, transparency=3))
    add("transparency", save=lambda p: scene(104).convert("RGBA").save(p))
    deep = Image.fromarray(np.asarray(scene(105).convert("L")).astype(np.uint16) * 257)
    add("16-bit", save=deep.save)
    frames = [scene(106), scene(107)]
    add("animated", file="moving.gif", save=lambda p: frames[0].save(p, save_all=True, append_images=frames[1:]))
    add("small-images", save=lambda p: scene(108, (40, 40)).save(p))
    # boxes
    add("tiny-boxes", objects=boxes(WHOLE, [0.5, 0.5, 0.505, 0.9]))
    add("duplicate-boxes", objects=boxes(WHOLE, WHOLE))
    add("near-identical-boxes", objects=boxes(WHOLE, [0.2, 0.2, 0.7, 0.71]))
    add("same-box-other-phrase", objects=boxes(WHOLE, WHOLE, phrases=["a red ball", "a blue cup"]))
    add(objects=boxes(WHOLE, [0.2, 0.2, 0.7, 0.75]))  # the complement: IoU 0.91
    wide = add(
        "cropped-boxes", save=lambda p: scene(109, (192, 96)).save(p), objects=boxes(WHOLE, [0.01, 0.2, 0.28, 0.8])
    )
    assert wide
    add("no-boxes", objects=boxes())
    add("inverted-boxes", objects=boxes([0.7, 0.2, 0.2, 0.9]))
    add("outside-boxes", objects=boxes([0.2, 0.2, 0.7, 1.3]))
    # lines
    add("empty-phrases", objects=boxes(WHOLE, phrases=[" "]))
    add("missing-images", save=False)
    add("unreadable-lines", caption=7)
    add("declared-size", width=640, height=480)
    add(width=96, height=96)
    # texts
    add("empty-captions", caption=" ")
    add("long-captions", caption="a scene of words " * 30)
    add("long-phrases", objects=boxes(WHOLE, phrases=["a red ball of words " * 20]))
    add("caption-without-box", caption="a red ball and a blue cup")
    add(
        "box-without-caption",
        caption="a red ball",
        objects=boxes(WHOLE, [0.1, 0.75, 0.4, 0.95], phrases=["a red ball", "a blue cup"]),
    )
    add(caption="Red  balls, a blue cup", objects=boxes(WHOLE, [0, 0, 0.1, 0.1], phrases=["a red ball", "blue cup"]))
    # the set
    copy = (folder / first).read_bytes()
    add("duplicate-records", file=first, save=False)
    add("duplicate-images", save=lambda p: p.write_bytes(copy), objects=boxes([0.1, 0.1, 0.5, 0.5]))
    planted.expected["duplicate-images"].add(1)  # shown beside it
    add("near-duplicate-images", file="anew.jpg", save=lambda p: scene(2).resize((80, 80)).save(p, quality=85))
    planted.expected["near-duplicate-images"].add(2)
    return planted


def found_lines(report: CheckReport) -> dict[str, set[int]]:
    def line(location: str) -> int:
        match = re.search(r"metadata\.jsonl:(\d+)", location)
        assert match, location
        return int(match[1])

    return {f.name: {line(example.location) for example in f.examples} for f in report.findings}


def test_every_planted_fault_is_found_at_its_record_and_nothing_else_is(tmp_path: Path) -> None:
    planted = plant_everything(tmp_path / "set")
    report = planted.check(buckets=one_size((64, 64)))
    assert found_lines(report) == planted.expected
    assert len(planted.expected) == 30
    errors = {f.name for f in report.findings if f.severity == "error"}
    assert errors == {
        "empty-file",
        "decompression-bomb",
        "undecodable",
        "inverted-boxes",
        "outside-boxes",
        "empty-phrases",
        "missing-images",
        "unreadable-lines",
    }
    assert len(report.errors) == len(errors) + 1  # two images are too large
    assert not report.ok
    shown = {f.name: f for f in report.findings}
    assert shown["cropped-boxes"].count == 1
    assert shown["duplicate-images"].count == 1
    assert shown["cropped-boxes"].examples[0].at_fault == ((0.01, 0.2, 0.28, 0.8),)
    assert shown["outside-boxes"].examples[0].at_fault == ((0.2, 0.2, 0.7, 1.3),)
    assert all(f.hint and "{" not in f.message for f in report.findings)


@pytest.mark.parametrize("domain", DOMAINS)
def test_nothing_is_found_in_a_clean_set(domain: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", DOMAINS[domain], count=40, seed=5)
    write_dataset(tmp_path / "other", DOMAINS[domain], count=40, seed=6)
    report = check_dataset(
        read_dataset(tmp_path / "set"),
        written=read_written(tmp_path / "set", bbox_format="xyxy", bbox_units="relative"),
        against=read_dataset(tmp_path / "other"),
        buckets=one_size((64, 64)),
    )
    assert report.findings == []
    assert report.ok
    assert "0.0% as xyxy (declared)" in report.notes[0]


def test_leakage_is_told_from_likeness(tmp_path: Path) -> None:
    train, validation = Planted(tmp_path / "train"), Planted(tmp_path / "validation")
    for _ in range(4):
        train.add()
    validation.add(save=lambda p: p.write_bytes((train.folder / "2.png").read_bytes()))
    validation.add(file="x.jpg", save=lambda p: scene(3).resize((70, 70)).save(p, quality=80))
    validation.add(save=lambda p: scene(50).save(p))
    report = train.check(against=read_dataset(validation.folder))
    pairs = {f.name: [(e.location.split("/")[-2], e.location[-1]) for e in f.examples] for f in report.findings}
    assert pairs == {
        "leakage": [("train", "2"), ("validation", "1")],
        "near-leakage": [("train", "3"), ("validation", "2")],
    }
    assert [f.count for f in report.findings] == [1, 1]
    assert [f.severity for f in report.findings] == ["error", "warning"]
    assert train.check().findings == []


def test_one_image_in_other_colours_is_another_image(tmp_path: Path) -> None:
    planted = Planted(tmp_path / "set")
    planted.add(save=lambda p: scene(1).save(p))
    planted.add(save=lambda p: Image.merge("RGB", scene(1).split()[::-1]).save(p))
    assert planted.check().findings == []


@pytest.mark.parametrize("meant", ["xywh", "cxcywh", "xyxy"])
def test_boxes_of_another_format_are_told_by_the_shares_that_leave_the_image(meant: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    planted = Planted(tmp_path / "set")
    for _ in range(20):
        (x0, x1), (y0, y1) = (np.sort(rng.uniform(0, 1, 2)) for _ in range(2))
        four = {
            "xyxy": [x0, y0, x1, y1],
            "xywh": [x0, y0, x1 - x0, y1 - y0],
            "cxcywh": [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0],
        }[meant]
        planted.add(objects=boxes([float(v) for v in four]))
    report = planted.check()
    names = {f.name for f in report.findings}
    assert f"0.0% as {meant}" in report.notes[0]
    if meant == "xyxy":
        assert not names & {"box-format", "inverted-boxes", "outside-boxes"}
    else:
        (found,) = (f for f in report.findings if f.name == "box-format")
        assert f"probably {meant}" in found.message
        assert "inverted-boxes" in names
        assert found.examples[0].others != found.examples[0].at_fault


def test_uneven_phrases(tmp_path: Path) -> None:
    def imbalance(rare: int) -> list[str]:
        many = [Box(tuple(WHOLE), "a red ball")] * 60  # type: ignore[arg-type]
        few = [Box(tuple(WHOLE), "a blue cup")] * rare  # type: ignore[arg-type]
        records = [Record(path, Layout("a scene", (box,)), f"{METADATA}:1") for box in (*many, *few)]
        return [f.message for f in check_dataset(records).findings if f.name == "label-imbalance"]

    path = tmp_path / "a.png"
    scene(1).save(path)
    assert imbalance(6) == ["60 boxes say 'red ball', 6 say 'blue cup': 10.0 times as many"]
    assert imbalance(7) == []


def test_every_place_is_listed_where_the_examples_are_few(tmp_path: Path) -> None:
    planted = Planted(tmp_path / "set")
    for _ in range(20):
        planted.add(caption="", objects=boxes([0.6, 0.6, 0.9, 0.9]))
    (found,) = planted.check().findings
    assert (found.name, found.count, len(found.examples)) == ("empty-captions", 20, 12)
    assert found.to_dict()["places"] == [f"{planted.folder / METADATA}:{n}" for n in range(1, 21)]


def crop_findings(record: Record, size: tuple[int, int], buckets: Buckets) -> list[Finding]:
    found = Findings({"boxes": len(record.layout.boxes)})
    size_findings(found, [record], [ImageFacts(record, size=size)], buckets=buckets)
    return [f for f in found.result() if f.name == "cropped-boxes"]


def test_boxes_lost_to_the_crop_are_those_that_the_transform_drops() -> None:
    rng = np.random.default_rng(1)
    buckets = make_buckets([64], [1.0, 2.0], multiple=8)
    for size in ((160, 64), (64, 150), (64, 64), (641, 479)):
        corners = [np.sort(rng.uniform(0, 1, (2, 2)), axis=0).T for _ in range(40)]
        every = tuple(Box((float(x[0]), float(y[0]), float(x[1]), float(y[1])), "a") for x, y in corners)
        layout, path = Layout("c", every), Path("a.png")
        _, kept = prepare(Image.new("RGB", size), layout, (64, 64))
        record = Record(path, layout, "a:1")
        lost = crop_findings(record, size, one_size((64, 64)))
        assert sum(f.count for f in lost) == len(every) - len(kept.boxes)
        assert bool(lost) == (size[0] != size[1])
        _, kept = prepare(Image.new("RGB", size), layout, buckets.of((size[1], size[0])))
        lost = crop_findings(record, size, buckets)
        assert sum(f.count for f in lost) == len(every) - len(kept.boxes)


def test_what_buckets_make_of_sizes_is_found_at_its_record(tmp_path: Path) -> None:
    planted = Planted(tmp_path / "set")
    for number, size in enumerate([(64, 64), (80, 70), (96, 48), (40, 40), (400, 5), (64, 64)], start=1):
        planted.add(save=lambda path, number=number, size=size: scene(number, size).save(path))
    buckets = make_buckets([64], [1.0, 2.0], multiple=8)

    def found(**options: Any) -> dict[str, Any]:
        report = planted.check(**options)
        names = {"no-bucket", "small-images", "below-buckets", "sparse-buckets", "cropped-boxes"}
        return {f.name: f for f in report.findings if f.name in names} | {"report": report}

    seen = found(buckets=buckets, batch=2)
    assert seen["no-bucket"].severity == "error"
    assert seen["no-bucket"].places == (f"{planted.folder / METADATA}:5",)
    assert seen["report"].errors == [
        f"{planted.folder / METADATA}:5: the image has 400 x 5 pixels, and an image token covers 8"
    ]
    assert seen["below-buckets"].places == (f"{planted.folder / METADATA}:4",)
    assert seen["sparse-buckets"].count == 2  # 88x48 reduced to 88 x 48's own, and 40x40
    assert "small-images" not in seen
    assert seen["report"].buckets == {"64x64": 3, "40x40": 1, "88x48": 1}
    enlarged = found(buckets=make_buckets([64], [1.0, 2.0], multiple=8, upscale=True))
    assert enlarged["small-images"].places == tuple(f"{planted.folder / METADATA}:{n}" for n in (5, 4))
    assert not {"no-bucket", "below-buckets", "sparse-buckets"} & enlarged.keys()
    assert found()["report"].buckets == {}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_an_image_that_declares_20000_pixels_a_side_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(declared_png(20_000, 20_000))
    script = (
        "import re, sys; from pathlib import Path; from mmdit_lora import Layout;"
        "from mmdit_lora.data.check.images import inspect_image; from mmdit_lora.data.records import Record;"
        "seen = inspect_image(Record(Path(sys.argv[1]), Layout('c'), 'm:1'));"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1];"  # kB; ru_maxrss survives exec
        "print(seen.kind, int(peak) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.png")], capture_output=True, text=True, cwd=ROOT, check=True
    )
    kind, megabytes = done.stdout.split()
    assert kind == "decompression-bomb"
    assert int(megabytes) < 400  # the pixels alone would be 1,200


@pytest.mark.parametrize("verb", ["check SET", "show SET --out OUT.png", "split SET --by image --out OUT", "stats SET"])
def test_one_limit_of_pixels_in_every_verb(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(tmp_path / "SET")
    (tmp_path / "SET" / "a.png").write_bytes(declared_png(9_460, 9_459))
    argv = [str(tmp_path / part) if "S" in part or "OUT" in part else part for part in verb.split()]
    assert main(["data", *argv]) == 2
    assert "9,460 x 9,459 pixels, and more than 89,478,485 are not decoded" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["SET"]


def test_what_is_said_of_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    seen = inspect_image(Record(tmp_path / "a.png", Layout("c"), "m:1"))
    assert (seen.kind, seen.decoded) == ("empty-file", False)
    assert str(seen.error).startswith(f"m:1: {tmp_path / 'a.png'}: is an empty file of 0 bytes")
    scene(1).save(tmp_path / "a.png")
    seen = inspect_image(Record(tmp_path / "a.png", Layout("c"), "m:1"))
    assert (seen.error, seen.decoded, seen.size, seen.frames) == (None, True, (96, 96), 1)


def test_tokens_by_the_tokenizer_of_a_base_or_by_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    estimate, counted = clip_tokens(None), clip_tokens(ROOT / "data/tiny_base")
    assert (estimate.limit, estimate.estimated) == (CLIP_TOKENS, True)
    assert (counted.limit, counted.estimated) == (32, False)
    assert counted.of("a red circle") == 5
    # Counted by CLIP's own vocabulary (openai/clip-vit-large-patch14).
    assert estimate_tokens("") == 2
    assert estimate_tokens("a photo of a cat.") == 8
    assert estimate_tokens("two dogs, 25 years old") == 9
    assert main(["data", "check", "nowhere", "--base", str(ROOT / "tests")]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_wrong_sizes_in_voc_have_their_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = voc(tmp_path / "src", annotation(), annotation(size=(20, 40), filename="1.png"))
    assert main(["data", "check", str(src), "--from", "voc", "--json", "--out", str(tmp_path / "out")]) == 2
    report = json.loads(capsys.readouterr().out)
    assert {f["name"]: f["count"] for f in report["findings"] if f["severity"] == "error"} == {"wrong-size": 1}
    assert (tmp_path / "out" / "check.html").is_file()


def test_blood_cells() -> None:
    """The real set (BCCD): what is really there. Images 37 and 38 are one field of view at two depths of focus."""
    root = os.environ.get("MMDIT_LORA_DATA")
    if not root or not (Path(root) / "bccd").is_dir():
        pytest.skip("set MMDIT_LORA_DATA to a folder that holds bccd (Pascal VOC)")
    report = check_dataset(read_format("voc", Path(root) / "bccd").records, buckets=one_size((480, 480)))
    assert {f.name: f.count for f in report.findings} == {
        "cropped-boxes": 480,
        "label-imbalance": 361,
        "near-duplicate-images": 1,
    }
    assert [e.image.stem for f in report.findings[-1:] for e in f.examples if e.image] == [
        "BloodImage_00037",
        "BloodImage_00038",
    ]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted, out = plant_everything(tmp_path / "set"), tmp_path / "out"
    planted.add(caption="<script>alert(1)</script>", objects=boxes(WHOLE, WHOLE, phrases=["<b>", '"&']))
    assert main(["data", "check", str(planted.folder), "--out", str(out), "--resolution", "64"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error:") == 1
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "check.html", "check.json"]
    written = json.loads((out / "check.json").read_text(encoding="utf-8"))
    text = (out / "check.html").read_text(encoding="utf-8")
    page = Tags()
    page.feed(text)
    assert page.open == []
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "link", "iframe", "object"}
    assert "svg" in kinds
    assert not re.search(r"https?://|url\(|@import|<b>&lt;", text)
    sources = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(sources) > 25
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/jpeg;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert [str(name).rpartition("-")[0] for name in ids] == [f["name"] for f in written["findings"]]
    assert {str(attrs["href"]) for tag, attrs in page.tags if tag == "a"} == {f"#{name}" for name in ids}
    for found in written["findings"]:
        assert found["name"] in captured.err.replace("\n", "")


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (640, 320), (128, 128, 128)).save(tmp_path / "a.png")
    url = thumbnail(Example("m:1", "", tmp_path / "a.png", ((0.25, 0.25, 0.75, 0.75),), ((0.8, 0.1, 0.95, 0.9),)))
    assert url is not None
    shown = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert shown.size == (320, 160)

    def reddest(*at: int) -> bool:
        red, green, blue = shown.getpixel(at)  # type: ignore[misc]
        return bool(red > 150 and red > green + 60 and red > blue + 40)

    assert reddest(80, 80)
    assert reddest(160, 40)
    assert not reddest(160, 80)
    assert not reddest(256, 80)
    assert not reddest(20, 20)
    beyond = thumbnail(Example("m:1", "", tmp_path / "a.png", ((0.5, 0.5, 9.0, 1.25),)))
    assert beyond is not None
    assert Image.open(io.BytesIO(base64.b64decode(beyond.partition(",")[2]))).size == (480, 200)
    assert thumbnail(Example("m:1", "", tmp_path / "none.png")) is None
    assert thumbnail(Example("m:1", "")) is None


def test_charts_hold_every_count() -> None:
    assert by_powers([0.5, 0.51, 1.0, 0.0001])["50%"] == 1
    assert by_powers([0.5, 0.51, 1.0, 0.0001])["100%"] == 2
    assert by_powers([0.0001])["0.1%"] == 1
    assert texts(columns({"a<$x$": 3, "b": 0, "c": 2}, "x")) == ["a&lt;$x$", "b", "c", "3", "2"]
    many = texts(rows({f"p{n}": n + 101 for n in range(20)}, "x"))
    assert many[:13] == [*(f"p{n}" for n in range(12)), "and 8 more"]
    assert many[13:] == [str(n + 101) for n in range(12)]
    assert columns({}, "x") == rows({}, "x") == heat([], "x") == ""
    assert "data:image/png" in heat([(0.1, 0.2), (1.0, 1.0)], "x")
    assert columns({"a": 1}, "x") == columns({"a": 1}, "x") != columns({"a": 1}, "y").replace("y", "x", 1)


def texts(chart: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", chart)]


def test_an_out_that_is_a_file_is_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image(tmp_path / "a.png")
    assert main(["data", "check", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("broken", "says"), [(b"", "0 bytes"), (b"no image", "is no readable image"), (None, "")])
def test_a_run_stops_at_a_broken_image_before_it_loads_the_base(
    broken: bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = Planted(tmp_path / "set")
    planted.add()
    planted.add()
    if broken is not None:
        (planted.folder / "2.png").write_bytes(broken)
        with pytest.raises(InputError, match=f"metadata.jsonl:2: .*{says}"):
            quick_check(read_dataset(planted.folder))
    config = tmp_path / "run.yaml"
    config.write_text(f"base: {tmp_path / 'nowhere'}\ndata: {planted.folder}\noutput_dir: {tmp_path / 'out'}\n")
    assert main(["train", str(config), "--check-only"]) == 2
    assert (says if broken is not None else "nowhere") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
