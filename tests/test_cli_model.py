"""`train`, `sample`, `evaluate`, `export`, `verify` through the real `main`: what they write, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mmdit_lora import Box, Layout
from mmdit_lora.cli.main import main
from mmdit_lora.cli.sample import given_layouts
from mmdit_lora.data.shapes import DOMAINS, make_scene
from tests.test_layout_stream_method import stock_flux

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts") / "two.jsonl"
    lines = [json.dumps(make_scene(DOMAINS["basic"], 9, index)[1].to_dict()) for index in range(2)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_sample_writes_images_boxes_sheet_and_settings(
    base: Path, adapter: Path, layouts: Path, tmp_path: Path, capsys: Capture
) -> None:
    command = ["sample", "--base", str(base), "--layout", str(layouts), "--steps", "2", "--seed", "5", "--json"]
    assert main([*command, "--adapter", str(adapter), "--out", str(tmp_path / "one")]) == 0
    answer = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "one" / "sample.json").read_text())
    assert answer["images"] == record["images"]
    assert record["settings"]["steps"] == 2
    assert [p["seed"] for p in record["images"]] == [5, 6]
    assert Image.open(tmp_path / "one" / "0001.png").size == (32, 32)
    assert Image.open(tmp_path / "one" / "0001_boxes.png").width > 32
    assert (tmp_path / "one" / "contact_sheet.png").is_file()

    # The same command gives the same pixels; without the adapter, and with another seed, they differ.
    pixels = (tmp_path / "one" / "0000.png").read_bytes()
    assert main([*command, "--adapter", str(adapter), "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "0000.png").read_bytes() == pixels
    assert main([*command, "--out", str(tmp_path / "two")]) == 0
    assert (tmp_path / "two" / "0000.png").read_bytes() != pixels
    assert main([*command, "--adapter", f"{adapter}=0.0", "--out", str(tmp_path / "three")]) == 0
    assert (tmp_path / "three" / "0000.png").read_bytes() == (tmp_path / "two" / "0000.png").read_bytes()


def test_a_prompt_and_boxes_are_a_layout_without_a_file(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "layout.json"
    boxes = [Box((0.1, 0.1, 0.5, 0.5), "a red circle"), Box((0.5, 0.5, 0.9, 1.0), "a = b")]
    file.write_text(json.dumps(Layout("two things", boxes).to_dict()), encoding="utf-8")
    command = ["sample", "--base", str(base), "--steps", "2"]
    assert main([*command, "--layout", str(file), "--out", str(tmp_path / "file")]) == 0
    given = ["--prompt", "two things", "--box", "0.1,0.1,0.5,0.5=a red circle", "--box", ".5, .5, 0.9, 1 = a = b"]
    assert main([*command, *given, "--out", str(tmp_path / "given")]) == 0
    for name in ("0000.png", "0000_boxes.png"):
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()
    records = [json.loads((tmp_path / name / "sample.json").read_text()) for name in ("file", "given")]
    assert records[0]["images"] == records[1]["images"]


@pytest.mark.parametrize(
    ("box", "order", "units", "size"),
    [
        ("100,250,500,1000=x", "xyxy", "permille", None),
        ("0.1,0.25,0.4,0.75=x", "xywh", "relative", None),
        ("3.2,16,16,64=x", "xyxy", "pixel", "32x64"),
    ],
)
def test_a_box_may_be_in_other_units(box: str, order: str, units: str, size: str | None) -> None:
    (layout,) = given_layouts(None, "x", [box], order, units, size)
    assert layout.boxes[0].xyxy == pytest.approx((0.1, 0.25, 0.5, 1.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to sample"),
        (["--box", "0,0,1,1=x"], "--prompt: is missing"),
        (["--prompt", "x", "--layout", "x.json"], "is given beside --layout"),
        (["--prompt", "x", "--box", "0,0,1=x"], "--box: is '0,0,1=x'"),
        (["--prompt", "x", "--box", "0,0,1,1"], "--box: is '0,0,1,1'"),
        (["--prompt", "x", "--box", "0,0,1,1= "], "--box"),
        (["--prompt", "x", "--box", "0,0,nan,1=x"], "NaN"),
        (["--prompt", "x", "--box", "0,0,1e300,1=x"], "--box 0,0,1e300,1=x: the box"),
        (["--prompt", "x", "--box", "0,0," + "9" * 100_000 + ",1=x"], "--box 0,0,999"),
    ],
)
def test_a_prompt_or_a_box_that_is_none_is_refused(
    tmp_path: Path, capsys: Capture, given: list[str], message: str
) -> None:
    assert main(["sample", "--base", "data/tiny_base", *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 2000


def test_batch_size_does_not_change_images(base: Path, layouts: Path, tmp_path: Path) -> None:
    for size in ("1", "2"):
        command = ["sample", "--base", str(base), "--layout", str(layouts), "--steps", "2", "--batch-size", size]
        assert main([*command, "--out", str(tmp_path / size)]) == 0
    for name in ("0000.png", "0001.png"):
        one, two = (Image.open(tmp_path / size / name) for size in ("1", "2"))
        assert max(abs(a - b) for a, b in zip(one.tobytes(), two.tobytes(), strict=True)) <= 1


def test_bf16_paints_nearly_the_same(base: Path, adapter: Path, layouts: Path, tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        command = ["sample", "--base", str(base), "--adapter", str(adapter), "--layout", str(layouts), "--steps", "2"]
        assert main([*command, "--dtype", dtype, "--out", str(tmp_path / dtype)]) == 0
    assert json.loads((tmp_path / "bf16" / "sample.json").read_text())["settings"]["dtype"] == "bf16"
    one, two = (Image.open(tmp_path / dtype / "0000.png").tobytes() for dtype in ("fp32", "bf16"))
    assert one != two
    assert sum(abs(a - b) for a, b in zip(one, two, strict=True)) / len(one) < 4  # of 255


def test_evaluate_gives_every_side_and_is_repeatable(
    base: Path, adapter: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    command = [
        "evaluate",
        "--base",
        str(base),
        "--adapter",
        str(adapter),
        "--data",
        str(data),
        "--steps",
        "2",
        "--json",
    ]
    reports = []
    for name in ("one", "two"):
        assert main([*command, "--out", str(tmp_path / name)]) == 0
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
        assert json.loads(capsys.readouterr().out)["base"] == reports[-1]["base"]
    assert reports[0]["base"] == reports[1]["base"]
    for side in ("base", "adapter", "ground_truth", "shuffled"):
        assert set(reports[0][side]) >= {"miou", "iou50", "color_acc", "shape_acc"}
    assert reports[0]["by_boxes"]["1-4"]["layouts"] == 12


def test_a_plain_base_of_another_family_from_stream_to_images(
    data: Path, layouts: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = stock_flux(tmp_path / "base")
    (tmp_path / "run.yaml").write_text(
        f"base: {base}\ndata: {{path: {data}, validation_share: 0.25, resolution: 32}}\n"
        "train: {max_steps: 2, batch_size: 2, learning_rate: 3e-2, sample_every: 2, sample_count: 1}\n"
        "sample: {steps: 2}\n"
    )
    run = ["train", str(tmp_path / "run.yaml"), "--json"]
    refused([*run, f"output_dir={tmp_path / 'out'}"], capsys, tmp_path / "out")  # no stream yet
    stream = ["method=layout_stream", "stream.attention=cross", "stream.phrase_tokens=3", "flow.guidance=3.5"]
    assert main([*run, *stream, f"output_dir={tmp_path / 'stream'}"]) == 0
    trained = f"base={tmp_path / 'stream' / 'base'}"
    assert main([*run, trained, f"output_dir={tmp_path / 'lora'}"]) == 0
    capsys.readouterr()
    sides = ["--base", str(tmp_path / "stream" / "base"), "--adapter", str(tmp_path / "lora" / "adapter")]
    generate = [*sides, "--steps", "2", "--size", "32"]
    assert main(["sample", *generate, "--layout", str(layouts), "--out", str(tmp_path / "images")]) == 0
    assert Image.open(tmp_path / "images" / "0001.png").size == (32, 32)
    assert main(["evaluate", *generate, "--data", str(data), "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {"base", "adapter", "ground_truth", "shuffled"} <= report.keys()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["peft", "merged"])
def test_exports_are_read_back_and_equal(
    base: Path, adapter: Path, layouts: Path, tmp_path: Path, capsys: Capture, to: str
) -> None:
    assert main(["export", str(adapter), "--to", to, "--out", str(tmp_path / to), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["max_abs_diff"] <= 1e-5 < 1e-3 < report["effect"]
    if to == "merged":
        command = ["sample", "--layout", str(layouts), "--steps", "2"]
        assert main([*command, "--base", str(tmp_path / to), "--out", str(tmp_path / "a")]) == 0
        assert main([*command, "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "b")]) == 0
        a, b = (Image.open(tmp_path / side / "0000.png").tobytes() for side in "ab")
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1
    else:
        assert main(["verify", str(tmp_path / to), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["effect"] == report["effect"]


@pytest.mark.usefixtures("in_this_process")
def test_a_wrong_export_is_not_left_behind(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("mmdit_lora.export.export.TOLERANCE", -1.0)
    assert main(["export", str(adapter), "--to", "peft", "--out", str(tmp_path / "out")]) == 1
    assert "differs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- refused -------------------------------------------------------------------------------------------------------------

Breaker = Callable[[Path], object]


def _drop(key: str) -> Breaker:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors.pop(next(name for name in tensors if key in name))
        save_file(tensors, file)

    return change


def _config(**changes: object) -> Breaker:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


BAD_ADAPTERS: dict[str, Breaker] = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "junk weights": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"junk" * 100),
    "truncated weights": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()[:-50]
    ),
    "broken JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "JSON list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "a tensor less": _drop("lora_A"),
    "another rank": _config(r=4),
    "no such target": _config(target_modules=["layout_mlp.fc3"]),
    "not LoRA": _config(peft_type="IA3"),
}


@pytest.mark.parametrize("verb", ["sample", "export", "verify"])
@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_bad_adapters_are_refused(
    base: Path, adapter: Path, layouts: Path, tmp_path: Path, capsys: Capture, verb: str, name: str
) -> None:
    broken = tmp_path / "adapter"
    shutil.copytree(adapter, broken)
    BAD_ADAPTERS[name](broken)
    out = tmp_path / "out"
    command = {
        "sample": [
            "sample",
            "--base",
            str(base),
            "--adapter",
            str(broken),
            "--layout",
            str(layouts),
            "--out",
            str(out),
        ],
        "export": ["export", str(broken), "--to", "peft", "--base", str(base), "--out", str(out)],
        "verify": ["verify", str(broken), "--base", str(base)],
    }[verb]
    refused(command, capsys, out)


def _component(name: str) -> Breaker:
    return lambda folder: shutil.rmtree(folder / name)


def _truncate_transformer(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _rename_tensor(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.wight"] = tensors.pop("proj_out.weight")
    save_file(tensors, file, metadata={"format": "pt"})


BAD_BASES: dict[str, Breaker] = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no index": lambda folder: (folder / "model_index.json").unlink(),
    "broken index": lambda folder: (folder / "model_index.json").write_text("{"),
    "another pipeline": lambda folder: (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
    "no transformer": _component("transformer"),
    "no vae": _component("vae"),
    "no tokenizer": _component("tokenizer"),
    "truncated transformer": _truncate_transformer,
    "a tensor with another name": _rename_tensor,
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_bad_bases_are_refused(base: Path, layouts: Path, tmp_path: Path, capsys: Capture, name: str) -> None:
    broken = tmp_path / "base"
    shutil.copytree(base, broken)
    BAD_BASES[name](broken)
    out = tmp_path / "out"
    refused(["sample", "--base", str(broken), "--layout", str(layouts), "--out", str(out)], capsys, out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--steps", "x"],
        ["--size", "3"],
        ["--size", "33"],
        ["--size", "32x"],
        ["--size", "32x33"],
        ["--size", "-32"],
        ["--layout-window", "0.5", "0.5"],
        ["--layout-window", "-1", "1"],
        ["--seed", "-1"],
        ["--batch-size", "0"],
        ["--guidance", "-2"],
        ["--no-such-option"],
        ["--adapter", "nowhere"],
        ["--layout", "nowhere.json"],
    ],
    ids=" ".join,
)
def test_bad_arguments_are_refused(
    base: Path, layouts: Path, tmp_path: Path, capsys: Capture, arguments: list[str]
) -> None:
    out = tmp_path / "out"
    refused(["sample", "--base", str(base), "--layout", str(layouts), "--out", str(out), *arguments], capsys, out)


def test_too_few_steps_for_the_window_is_one_message(
    base: Path, layouts: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    window = ["--layout-window", "0", "0.3", "--steps", "3"]
    refused(["sample", "--base", str(base), "--layout", str(layouts), "--out", str(out), *window], capsys, out)


def test_a_folder_of_something_else_is_never_overwritten(
    base: Path, layouts: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for command in (
        ["sample", "--base", str(base), "--layout", str(layouts)],
        ["evaluate", "--base", str(base), "--data", str(data)],
        ["quickstart"],
    ):
        assert main([*command, "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("error:")
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_photographs_are_not_judged_by_the_reader_of_shapes(base: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (64, 48), (90, 120, 60)).save(folder / "a.png")
    objects = {"bbox": [[0.1, 0.1, 0.5, 0.5]], "phrase": ["a cat"]}
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "caption": "a photo", "objects": objects}))
    out = tmp_path / "out"
    refused(["evaluate", "--base", str(base), "--data", str(folder), "--out", str(out)], capsys, out)


def refused(command: list[str], capsys: Capture, out: Path) -> None:
    """Exit code 2, one message with a cure or a place, no traceback, nothing written."""
    code = main(command)
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("error:") == 1, err
    assert "Traceback" not in err
    assert not out.exists()
    assert not list(out.parent.glob(".out*"))
