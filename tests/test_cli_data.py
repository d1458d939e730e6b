"""The data verbs as a user runs them: files on disk, stdout for the result, stderr for the rest, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmdit_lora import __version__
from mmdit_lora.cli import main as cli
from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import load_config
from mmdit_lora.data.records import read_dataset
from tests.data_makers import annotation, dataset, line, make_image, objects, voc


def run(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 0) -> str:
    """stdout of a command that must exit with `code`."""
    assert main([str(arg) for arg in argv]) == code
    return capsys.readouterr().out


def test_init_prints_a_config_that_loads_and_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = dataset(tmp_path / "my data: #1", line(), line("b.png"))
    config_file = tmp_path / "c.yaml"
    printed = run(capsys, "init", data, "--base", "some/base")
    assert run(capsys, "init", data, "--base", "some/base", "--out", config_file) == ""
    assert config_file.read_text() == printed
    config = load_config(config_file)
    assert (config.base, config.data.path) == ("some/base", str(data))
    assert config.train.batch_size == 1
    assert "# optimizer steps\n  max_steps: " in printed
    assert "2 images, 2 layouts, 4 boxes" in printed


def test_init_passes_the_box_convention_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = dataset(tmp_path / "d", line(objects={"bbox": [[0, 0, 20, 10]], "phrase": ["x"]}))
    run(capsys, "init", data, "--bbox-format", "xywh", "--bbox-units", "pixel", "--out", tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml")
    assert (config.data.bbox_format, config.data.bbox_units) == ("xywh", "pixel")


def test_make_writes_a_data_set_that_checks_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [tmp_path / "one", tmp_path / "two"]
    for out in made:
        printed = run(
            capsys, "data", "make", "shapes", "--out", out, "--count", 4, "--seed", 3, "--domain", "mixed", "--json"
        )
        assert json.loads(printed)["records"] == 4
    assert [p.read_bytes() for p in sorted(made[0].iterdir())] == [p.read_bytes() for p in sorted(made[1].iterdir())]
    report = json.loads(run(capsys, "data", "check", made[0], "--json"))
    assert (report["ok"], report["records"], report["errors"]) == (True, 4, [])


def test_check_reports_on_stderr_and_fails_with_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dataset(tmp_path, line(), line(caption=5), line("c.png"))
    assert main(["data", "check", str(folder), "--json"]) == 2
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["errors"]) == 2
    assert captured.err.count("error:") == 1
    assert "metadata.jsonl:2" in captured.err
    assert "metadata.jsonl:3" in captured.err


def test_check_reads_voc_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = voc(tmp_path, annotation([("RBC", 1, 1, 20, 10), ("RBC", 3, 3, 3, 3)]))
    report = json.loads(run(capsys, "data", "check", src, "--from", "voc", "--json"))
    assert (report["boxes"], report["left_out"]) == (1, {"boxes without area": 1})


def test_convert_writes_captions_phrases_and_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, out = voc(tmp_path / "src", annotation([("RBC", 1, 1, 20, 10)]), annotation()), tmp_path / "out"
    options = ("--caption", "blood with {phrases}", "--map", "RBC=a red blood cell", "--json")
    printed = json.loads(run(capsys, "data", "convert", "--from", "voc", src, "--out", out, *options))
    assert (printed["records"], printed["boxes"], printed["pixels_from"]) == (2, 2, 1)
    first = read_dataset(out)[0]
    assert first.layout.caption == "blood with a red blood cell"
    assert first.layout.boxes[0].xyxy == (0, 0, 0.5, 0.5)
    assert (out / "0.png").read_bytes() == (src / "JPEGImages" / "0.png").read_bytes()


def test_convert_takes_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = voc(tmp_path / "src", annotation(), annotation(), test=["1"])
    run(capsys, "data", "convert", "--from", "voc", src, "--out", tmp_path / "out", "--split", "test")
    assert [record.image.name for record in read_dataset(tmp_path / "out")] == ["1.png"]


def test_holdout_writes_two_data_sets_the_same_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = voc(tmp_path / "src", *[annotation()] * 10)
    found = []
    for out in (tmp_path / "one", tmp_path / "two", tmp_path / "one"):
        printed = json.loads(
            run(capsys, "data", "convert", "--from", "voc", src, "--out", out, "--holdout", 0.2, "--json")
        )
        assert (printed["train"], printed["validation"]) == (8, 2)
        found.append({part: {r.image.name for r in read_dataset(out / part)} for part in ("train", "validation")})
    assert found[0] == found[1] == found[2]
    assert not found[0]["train"] & found[0]["validation"]


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == f"mmdit-lora {__version__}\n"
    assert "Commands:" in run(capsys)
    assert "convert" in run(capsys, "data", "--help")


@pytest.mark.parametrize("argv", [["--debug", "data", "check", "nowhere"], ["data", "check", "nowhere", "--debug"]])
def test_debug_shows_the_traceback(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (RuntimeError("out of memory\nmore\nlines"), 1, "error: RuntimeError: out of memory (run again with --debug"),
        (KeyError(), 1, "error: KeyError: no message (run again"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_not_the_inputs_fault(
    raised: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", broken)
    assert main([]) == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(says)
    assert len(stderr.strip().splitlines()) == 1


def test_init_gives_buckets_where_a_square_would_cut_boxes_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(name: str, *sizes: tuple[int, int], box: list[float]) -> list[str]:
        folder = tmp_path / name
        lines = []
        for number, size in enumerate(sizes):
            make_image(folder / f"{number}.png", size)
            lines.append(json.dumps(line(f"{number}.png", objects=objects([box]))))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        config = tmp_path / f"{name}.yaml"
        run(capsys, "init", folder, "--out", config)
        return load_config(config).data.buckets.ratios

    corner, middle = [0.0, 0.0, 0.1, 0.1], [0.4, 0.4, 0.6, 0.6]
    wide, tall, square = (80, 60), (60, 80), (60, 60)
    assert chosen("mixed", wide, wide, tall, square, box=corner) == ["1:1", "4:3", "3:4"]
    assert chosen("wide", *[wide] * 30, square, box=corner) == ["4:3"]  # the square is one of 31
    assert chosen("square", square, square, box=corner) == []
    assert chosen("middle", wide, tall, box=middle) == []  # no box is lost
