"""Malformed inputs by a generator, over all readers, configs, layouts, adapters, bases and options.

Each ends the command with exit code 2 and one message of less than 2,000 characters, within 20 seconds and 2 GB: limits that
nothing comes near, but a reader that waits for a FIFO, follows a link to /dev/zero or tries a regular expression on a long name.
The default suite runs one in three of each kind, the same ones each time; the others are marked slow.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from mmdit_lora.cli.main import app, main
from mmdit_lora.config.loading import Config
from tests.format_makers import MAKERS, options, source
from tests.time_limit import at_most

SECONDS, BYTES, CHARACTERS = 20, 2 * 2**30, 2000
IMAGES = {".png", ".jpg", ".jpeg"}


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """The libraries take seconds to come, whatever the input."""
    import mmdit_lora.export.export
    import mmdit_lora.training.trainer  # noqa: F401


def one_in_three(cases: Iterable[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """The cases as parameters, of every three two marked slow."""
    ordered = sorted(cases, key=lambda case: zlib.crc32(name(case).encode()))
    return [
        pytest.param(case, id=name(case), marks=[pytest.mark.slow] if number % 3 else [])
        for number, case in enumerate(ordered)
    ]


@contextmanager
def within_limits() -> Iterator[None]:
    """Fails if what runs in it takes longer than `SECONDS`, or more than `BYTES` of memory beyond what there is."""

    def kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    measured = Path("/proc/self/clear_refs").exists()
    if measured:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
        before = kilobytes("VmRSS")
    with at_most(SECONDS):
        yield
    if measured:
        assert (kilobytes("VmHWM") - before) * 1024 < BYTES


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that ends with exit code 2, as the head of this file says."""
    capsys.readouterr()
    with within_limits():
        code = main(argv)
    message = capsys.readouterr().err
    assert code == 2, f"exit code {code}: {message[-1500:]}"
    assert message.count("error:") == 1, message[:3000]
    assert "Traceback" not in message
    assert len(message[message.index("error:") :]) < CHARACTERS
    return message


# -- faults of a file, whatever is in it: what replaces it

Fault = Callable[[Path], object]


def _half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _noise(path: Path) -> None:
    path.write_bytes(random.Random(path.name).randbytes(3000))


def _again(make: Fault) -> Fault:
    def fault(path: Path) -> None:
        path.unlink()
        make(path)

    return fault


FAULTS: dict[str, Fault] = {
    "empty": lambda path: path.write_bytes(b""),
    "half of it": _half,
    "noise": _noise,
    "UTF-16 without a mark": lambda path: path.write_bytes(path.read_bytes().decode("latin-1").encode("utf-16-le")),
    "nested without end": lambda path: path.write_text("[" * 200_000),
    "one long line": lambda path: path.write_text("x" * 5_000_000),
    "a folder": _again(Path.mkdir),
    "a FIFO": _again(os.mkfifo),
    "a link to /dev/zero": _again(lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": _again(lambda path: path.symlink_to("nowhere")),
    "a link to itself": _again(lambda path: path.symlink_to(path.name)),
}


def set_files(name: str, folder: Path) -> list[Path]:
    MAKERS[name](folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


# (format, file): faults that leave a set which is right.
LINKS = {"a link to nothing", "a link to itself"}  # as if the file were not there
TEXTS = {"half of it", "nested without end", "one long line", "empty"}  # still a text
RIGHT: dict[tuple[str, str], set[str]] = {
    ("coco", "annotations/captions_val.json"): LINKS,
    ("simpletuner", "a.txt"): LINKS | TEXTS,
    ("comfyui", "a.txt"): LINKS | TEXTS,
    ("openimages", "class-descriptions-boxable.csv"): {"half of it"},  # the half that names the class
    ("flickr30k", "Sentences/36979.txt"): {"half of it"},  # the first of two sentences
    ("flickr30k", "train.txt"): set(FAULTS),  # read with --split alone
    ("jsonl", "b.png"): set(FAULTS),  # of no record
    ("cvat", "annotations.xml"): {"UTF-16 without a mark"},  # XML says how its encoding is told
    ("voc", "Annotations/0.xml"): {"UTF-16 without a mark"},
    ("flickr30k", "Annotations/36979.xml"): {"UTF-16 without a mark"},
}


def data_cases() -> Iterator[tuple[str, str, str]]:
    """(format, file, fault); files as the makers make them, found once."""
    import tempfile

    for name in MAKERS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "src"
            files = [path.relative_to(folder).as_posix() for path in set_files(name, folder)]
        for file in files:
            is_image = Path(file).suffix in IMAGES
            for fault in FAULTS:
                if fault in RIGHT.get((name, file), ()):
                    continue
                if is_image and fault in ("UTF-16 without a mark", "nested without end", "one long line"):
                    continue  # noise, as the one that stays
                yield name, file, fault


@pytest.mark.parametrize("case", one_in_three(data_cases(), ": ".join))
def test_data_sets(case: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, file, fault = case
    src = tmp_path / "src"
    set_files(name, src)
    FAULTS[fault](src / file)
    given = [f"--{key.replace('_', '-')}={value}" for key, value in options(name, src).items()]
    refused(["data", "check", str(source(name, src)), "--from", name, *given], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


# -- configs: every key with a value of another kind


def keys_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        inner = next((a for a in (field.annotation, *get_args(field.annotation)) if _is_section(a)), None)
        if inner is None:
            yield (*above, name)
        else:
            yield from keys_of(inner, (*above, name))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


WRONG_VALUES: dict[str, Any] = {"an object": {"x": {"y": 1}}, "a date": "2024-01-01", "not a number": float("nan")}


@pytest.mark.parametrize("key", one_in_three(keys_of(Config), ".".join))
def test_config_keys(key: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config: dict[str, Any] = {"base": "data/tiny_base", "data": {"path": "shapes://basic?count=8&seed=1"}}
    section = config
    for part in key[:-1]:
        section = section.setdefault(part, {})
    for number, value in enumerate((WRONG_VALUES["an object"], [[["x"]]], float("nan"))):
        section[key[-1]] = value
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(config))
        message = refused(["train", str(file), "--check-only"], capsys)
        assert key[-1] in message


CONFIG_TEXTS = {
    "a list": "- base: x",
    "a text": "base",
    "a date for a path": "base: 2024-01-01\ndata: {path: x}\n",
    "a date for a folder": "base: x\ndata: {path: x}\noutput_dir: 2024-01-01 10:00:00\n",
    "a tag": "base: !!python/object/apply:os.system ['true']\ndata: {path: x}\n",
    "an anchor within itself": "base: &a [*a]\ndata: {path: x}\n",
    "aliases that multiply": "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
    "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n"
    "f: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\nbase: [*f,*f,*f,*f,*f,*f,*f,*f,*f]\ndata: {path: x}\n",
    "a key of a megabyte": f"base: x\ndata: {{path: x}}\n? {'k' * 100_000}\n: 1\n",
    "a value of a megabyte": f"base: x\ndata: {{path: x}}\nmethod: {'v' * 1_000_000}\n",
    "a tabulator": "base: x\ndata:\n\tpath: x\n",
    "a key twice": "base: x\nbase: y\ndata: {path: x}\n",
    "octal": "base: x\ndata: {path: x}\ntrain: {max_steps: 0o}\n",
    "a number of thousands of digits": f"base: x\ndata: {{path: x}}\ntrain: {{max_steps: {'9' * 5000}}}\n",
    "nested without end": "base: " + "[" * 50_000,
    "a NUL": "base: \0\n",
}


@pytest.mark.parametrize("name", one_in_three(CONFIG_TEXTS))
def test_config_texts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG_TEXTS[name])
    refused(["train", str(tmp_path / "run.yaml"), "--check-only"], capsys)


@pytest.mark.parametrize("fault", one_in_three(FAULTS))
def test_config_files(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: data/tiny_base\ndata: {path: x}\n")
    FAULTS[fault](file)
    refused(["train", str(file), "--check-only"], capsys)


# -- layouts

BOX = {"xyxy": [0.1, 0.1, 0.4, 0.5], "phrase": "a red circle"}
LAYOUTS: dict[str, Any] = {
    "a number": 3,
    "no caption": {"boxes": [BOX]},
    "no layout in a list": [],
    "caption of 10 MB": {"caption": "x " * 5_000_000, "boxes": [BOX]},
    "phrase of 10 MB": {"caption": "c", "boxes": [BOX | {"phrase": "x " * 5_000_000}]},
    "100,000 boxes": {"caption": "c", "boxes": [BOX] * 100_000},
    "key of a megabyte": {"caption": "c", "boxes": [], "x" * 1_000_000: 1},
    "key of a box of a megabyte": {"caption": "c", "boxes": [BOX | {"x" * 1_000_000: 1}]},
    "a huge number": {"caption": "c", "boxes": [BOX | {"xyxy": [0, 0, 1, 10**400]}]},
    "a negative number": {"caption": "c", "boxes": [BOX | {"xyxy": [-1, 0, 1, 1]}]},
    "1e300": {"caption": "c", "boxes": [BOX | {"xyxy": [0, 0, 1e300, 1]}]},
    "no width": {"caption": "c", "boxes": [BOX | {"xyxy": [0.3, 0, 0.3, 1]}]},
    "true": {"caption": "c", "boxes": [BOX | {"xyxy": [0, 0, True, 1]}]},
    "texts": {"caption": "c", "boxes": [BOX | {"xyxy": ["0", "0", "1", "1"]}]},
    "a list for a phrase": {"caption": "c", "boxes": [BOX | {"phrase": ["a"]}]},
    "half a character": {"caption": "\ud800", "boxes": [BOX]},
    "no such convention": {"caption": "c", "boxes": [BOX], "bbox_format": "yxyx"},
    "no such units": {"caption": "c", "boxes": [BOX], "bbox_units": "inch"},
}


def sample_layout(file: Path, tmp_path: Path) -> list[str]:
    return ["sample", "--base", "data/tiny_base", "--layout", str(file), "--out", str(tmp_path / "out"), "--steps", "1"]


@pytest.mark.parametrize("name", one_in_three(LAYOUTS))
def test_layouts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "layout.json"
    file.write_text(json.dumps(LAYOUTS[name]))
    refused(sample_layout(file, tmp_path), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("fault", one_in_three(FAULTS))
def test_layout_files(fault: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / f"layout{suffix}"
    file.write_text(json.dumps({"caption": "c", "boxes": [BOX]}))
    FAULTS[fault](file)
    refused(sample_layout(file, tmp_path), capsys)
    assert not (tmp_path / "out").exists()


# -- adapters


def config_entry(**changes: Any) -> Fault:
    def fault(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return fault


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Fault:
    def fault(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file)

    return fault


def first(value: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    return tensors(lambda state: state.update({min(state): value(state[min(state)]).contiguous()}))


def bytes_of(change: Callable[[bytes], bytes]) -> Fault:
    def fault(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return fault


EVIL = r"(.*)*(.*)*(.*)*(.*)*(.*)*layout_mlp\.fc3"
ADAPTERS: dict[str, Fault] = {
    "r: 0": config_entry(r=0),
    "r: -1": config_entry(r=-1),
    "r: text": config_entry(r="16"),
    "r: 1.5": config_entry(r=1.5),
    "r: huge": config_entry(r=10**30),
    "r: null": config_entry(r=None),
    "alpha: NaN": config_entry(lora_alpha=float("nan")),
    "alpha: infinity": config_entry(lora_alpha=float("inf")),
    "alpha: 1e300": config_entry(lora_alpha=1e300),
    "alpha: huge": config_entry(lora_alpha=10**400),
    "alpha: text": config_entry(lora_alpha="32"),
    "alpha: true": config_entry(lora_alpha=True),
    "dropout: 7": config_entry(lora_dropout=7),
    "dropout: NaN": config_entry(lora_dropout=float("nan")),
    "dropout: text": config_entry(lora_dropout="much"),
    "targets: a number": config_entry(target_modules=3),
    "targets: none": config_entry(target_modules=[]),
    "targets: another name": config_entry(target_modules=["layout_mlp.fc3"]),
    "targets: no pattern": config_entry(target_modules="("),
    "targets: a megabyte": config_entry(target_modules=["x" * 1_000_000]),
    "rank pattern: no pattern": config_entry(rank_pattern={"(": 4}),
    "rank pattern: backtracks": config_entry(rank_pattern={EVIL: 4}),
    "rank pattern: 0": config_entry(rank_pattern={"layout_mlp.fc1": 0}),
    "rank pattern: a list": config_entry(rank_pattern=[1]),
    "alpha pattern: NaN": config_entry(alpha_pattern={"layout_mlp.fc1": float("nan")}),
    "alpha pattern: a text": config_entry(alpha_pattern={"layout_mlp.fc1": "x"}),
    "another kind": config_entry(peft_type="LOHA"),
    "another bias": config_entry(bias="all"),
    "whole modules": config_entry(modules_to_save=["proj_out"]),
    "a weight of NaN": first(lambda t: t.fill_(float("nan"))),
    "a weight of infinity": first(lambda t: t.fill_(float("inf"))),
    "a weight of whole numbers": first(lambda t: t.to(torch.int64)),
    "a weight of another shape": first(lambda t: t[:, :-1]),
    "a weight of no dimension": first(lambda t: t.sum()),
    "a weight is missing": tensors(lambda state: state.pop(min(state))),
    "a weight too many": tensors(lambda state: state.update({"x" * 100_000: torch.zeros(1)})),
    "other prefix": tensors(
        lambda state: [state.update({k.removeprefix("base_model.model."): state.pop(k)}) for k in list(state)]
    ),
    "no weights": tensors(dict.clear),
    "a header without end": bytes_of(lambda content: (2**62).to_bytes(8, "little") + content[8:]),
    "a header of noise": bytes_of(lambda content: content[:8] + b"\xff" * 100 + content[108:]),
    "a pickle": bytes_of(lambda _: b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}."),
}


def adapter_cases() -> dict[str, Fault]:
    def of(name: str, fault: str) -> Fault:
        return lambda folder: FAULTS[fault](folder / name)

    files = ("adapter_config.json", "adapter_model.safetensors")
    return ADAPTERS | {f"{name}: {fault}": of(name, fault) for name in files for fault in FAULTS}


@pytest.fixture
def one_base(monkeypatch: pytest.MonkeyPatch, base: Path) -> Any:
    """`base`, opened once for all: a refused adapter leaves it as it was, which is looked at too."""
    import mmdit_lora.export.export
    import mmdit_lora.pipelines

    pipe = _opened(base)
    for module in (mmdit_lora.export.export, mmdit_lora.pipelines):
        monkeypatch.setattr(module, "load_pipeline", lambda *_, **__: pipe)
    return pipe


_BASES: dict[Path, Any] = {}


def _opened(base: Path) -> Any:
    from mmdit_lora.pipelines import load_pipeline

    if base not in _BASES:
        _BASES[base] = load_pipeline(str(base))
    return _BASES[base]


@pytest.mark.parametrize("name", one_in_three(adapter_cases()))
def test_adapters(
    name: str, adapter: Path, base: Path, one_base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    adapter_cases()[name](folder)
    before = {key: value.clone() for key, value in one_base.transformer.state_dict().items()}
    refused(["verify", str(folder), "--base", str(base)], capsys)
    after = one_base.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not getattr(one_base.transformer, "peft_config", {})


# -- bases: every file of one


def base_cases() -> Iterator[tuple[str, str]]:
    for file in (
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ):
        for fault in ("empty", "half of it", "noise", "nested without end", "a folder", "a FIFO", "a link to nothing"):
            yield file, fault


@pytest.mark.parametrize("case", one_in_three(base_cases(), ": ".join))
def test_bases(case: tuple[str, str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, fault = case
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    if not (folder / file).is_file():
        pytest.skip(f"this base has no {file}")
    FAULTS[fault](folder / file)
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps({"caption": "c", "boxes": [BOX]}))
    refused(["sample", "--base", str(folder), "--layout", str(layout), "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


# -- options: every one that takes a number, in every verb


def option_cases() -> Iterator[tuple[str, ...]]:
    import typer

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*path, name))
        if path and not getattr(command, "commands", {}):
            for parameter in command.params:
                if parameter.opts[0].startswith("-") and _kinds(parameter) & {int, float}:
                    for value in ("x", "nan", "1e999", "-1e999", ""):
                        yield (*path, parameter.opts[0], *[value] * parameter.nargs)

    yield from walk(typer.main.get_command(app), ())


def _kinds(parameter: Any) -> set[Any]:
    annotation = parameter.type_descriptor.annotation
    return {annotation, *get_args(annotation)}


@pytest.mark.parametrize("case", one_in_three(set(option_cases()), " ".join))
def test_options(case: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb = next(number for number, part in enumerate(case) if part.startswith("-"))
    needed = list(_needed(case[:verb], tmp_path, case[verb]))
    refused([*case[:verb], *needed, *case[verb:]], capsys)
    assert not (tmp_path / "out").exists()


def _needed(path: tuple[str, ...], tmp_path: Path, given: str) -> Iterator[str]:
    """What else the verb requires, so that nothing but the number is wrong, as far as the parser can tell."""
    import typer

    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    for parameter in command.params:
        if parameter.required and parameter.opts[0] != given:
            annotation = parameter.type_descriptor.annotation
            choices = get_args(annotation) if get_origin(annotation) is Literal else ()
            value = choices[0] if choices else "1" if int in _kinds(parameter) else str(tmp_path / "none")
            value = str(tmp_path / "out") if parameter.opts[0] == "--out" else value
            yield from ([parameter.opts[0], value] if parameter.opts[0].startswith("-") else [value])


# -- found by hand: bombs, contradictions, numbers without end


def bomb(levels: int = 9) -> str:
    """A few lines that stand for 9 ** (levels + 1) values."""
    rows = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    rows += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels + 1)]
    return "\n".join(rows) + "\n"


def yolo(names: str, label: str = "0 0.5 0.5 0.2 0.2") -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        MAKERS["yolo"](folder)
        for file in folder.glob("*.yaml"):
            file.write_text(names)
        for file in folder.rglob("*.txt"):
            file.write_text(f"{label}\n")
        return ["data", "check", str(folder), "--from", "yolo"]

    return make


def coco(segmentation: Any = None, twice: bool = False) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        MAKERS["coco"](folder)
        (file,) = folder.glob("annotations/instances_*.json")
        data = json.loads(file.read_text())
        if segmentation is not None:
            for annotation in data["annotations"]:
                annotation.pop("bbox", None)
                annotation["segmentation"] = segmentation
        text = json.dumps(data)
        file.write_text(text.replace('"images":', '"images": [], "images":', 1) if twice else text)
        return ["data", "check", str(folder), "--from", "coco"]

    return make


def url(address: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["data", "stats", address.format(folder=folder)]


def config_bomb(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "run.yaml").write_text(bomb() + "base: *a9\ndata: x\n")
    return ["train", str(folder / "run.yaml")]


def mapped(folder: Path) -> list[str]:
    MAKERS["voc"](folder)
    given = ["--map", "RBC=a", "--map", "RBC=b"]
    return ["data", "convert", "--from", "voc", str(folder), *given, "--out", f"{folder}_out"]


BY_HAND: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "YAML: a bomb": (yolo(bomb() + "names: *a9"), "aliases"),
    "YAML: a bomb of merges": (
        yolo(
            "a: &a {x: 1, y: 2}\n"
            + "".join(f"b{n}: &b{n} {{<<: [{','.join([f'*b{n - 1}' if n else '*a'] * 30)}]}}\n" for n in range(9))
        ),
        "aliases",
    ),
    "YAML: a list that holds itself": (yolo("names: &a [*a]"), "aliases"),
    "YAML: a small bomb": (yolo(bomb(4) + "names: *a4"), "names holds 0: [["),
    "YAML: a bomb in a config": (config_bomb, "aliases"),
    "YOLO: a class of 5,000 digits": (yolo("names: [cat]", "1" * 5000 + " 0.5 0.5 0.2 0.2"), "has no name"),
    "COCO: runs beyond the mask": (
        coco({"counts": [1, 10**12], "size": [10**6, 10**6]}),
        "the size of its mask is [1000000, 1000000]",
    ),
    "COCO: a negative run": (coco({"counts": [-1, 801], "size": [20, 40]}), "the runs of its mask are [-1, 801]"),
    "COCO: runs too few": (coco({"counts": [1, 5], "size": [20, 40]}), "whose sum is height x width, 800"),
    "COCO: a compressed run too long": (coco({"counts": "oooooo0", "size": [20, 40]}), "RLE"),
    "COCO: images twice": (coco(twice=True), "the key 'images' stands twice"),
    "a map that contradicts itself": (mapped, "gives 'RBC' two phrases, 'a' and 'b'"),
    "a store that is not there": (url("ftp://localhost:1/x"), "ftp://localhost:1/x"),
    "a store of another kind": (url("zip://a::file:///etc/passwd"), "zip://a::file:///etc/passwd"),
    "a store without path": (url("github://a:b@/x"), "github://a:b@/x"),
    "a pattern of 5,000 digits": (url("{folder}/x-{{0.." + "9" * 5000 + "}}.tar"), "is no possible path"),
    "a base of 5,000 letters": (lambda _: ["plan", "x" * 5000], "no such folder"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_found_by_hand(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, says = BY_HAND[name]
    assert says in refused(make(tmp_path / "src"), capsys)
    assert not (tmp_path / "src_out").exists()


@pytest.mark.usefixtures("one_base")
def test_an_adapter_of_many_tensors_is_refused_by_its_header(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmdit_lora.lora.style_files import fetch_style

    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    save_file({f"t{n}": torch.zeros(1) for n in range(30_000)}, file)
    said = refused(["verify", str(folder), "--base", str(base)], capsys)
    assert f"{file}: holds 30,000 tensors, and an adapter at most 20,000" in said
    with pytest.raises(ValueError, match="holds 30,000 tensors"):
        fetch_style(file)


def edited(part: str, **changes: Any) -> Callable[[Path], object]:
    def edit(base: Path) -> None:
        file = base / part
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


CONFIG = "transformer/config.json"
PLANNED: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep": (lambda base: (base / CONFIG).write_text("[" * 100_000), "nested too deeply"),
    "deep in an object": (lambda base: (base / CONFIG).write_text('{"a":' * 100_000), "nested too deeply"),
    "a BOM": (
        lambda base: (base / CONFIG).write_bytes(b"\xef\xbb\xbf" + (base / CONFIG).read_bytes()),
        "save it as UTF-8 without BOM",
    ),
    "layers: -1": (edited(CONFIG, num_layers=-1), "num_layers"),
    "layers: many": (edited(CONFIG, num_layers=10**9), "num_layers"),
    "heads: 0": (edited(CONFIG, num_attention_heads=0), "num_attention_heads"),
    "heads: a text": (edited(CONFIG, num_attention_heads="x"), "num_attention_heads"),
    "VAE: deep": (lambda base: (base / "vae/config.json").write_text("[" * 100_000), "vae/config.json"),
}


@pytest.mark.parametrize("name", PLANNED)
def test_bases_that_are_planned_and_opened(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, says = PLANNED[name]
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    edit(folder)
    assert says in refused(["plan", str(folder)], capsys)
    said = refused(["sample", "--base", str(folder), "--prompt", "x", "--out", str(tmp_path / "out")], capsys)
    assert name.startswith(("deep", "heads: a", "VAE", "a BOM")) or says in said


def test_a_base_with_a_fifo_in_it_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    file = folder / "tokenizer" / "tokenizer_config.json"
    FAULTS["a FIFO"](file)
    said = refused(["sample", "--base", str(folder), "--prompt", "x", "--out", str(tmp_path / "out")], capsys)
    assert f"{file}: is a FIFO" in said
