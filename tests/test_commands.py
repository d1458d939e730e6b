"""Every command and every piece of Python on the pages runs as it stands, in the pages' order, in an empty clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mmdit_lora.config.loading import SECTIONS, Config
from mmdit_lora.models.stream_families import STREAM_FAMILIES
from tests.data_makers import annotation, voc
from tests.test_advice import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md"]
PAGES += [f"{folder}/README.md" for folder in ("data", "configs", "scripts", "mmdit_lora")]
FENCE = re.compile(r"(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")
SUITE = "uv run pytest -n 2"  # this is it


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(note before it, language, text) of every fenced block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(m["note"] or "", m["kind"], m["text"]) for m in FENCE.finditer(text)]


def unknown(command: str) -> str | None:
    """What a command of ours names and does not have: its verb, or an option."""
    words = command.split()
    if words[:1] != ["mmdit-lora"] or len(words) < 2 or {"VERB", "..."} & set(words):
        return None
    name = tuple(words[1:3]) if tuple(words[1:3]) in COMMANDS else (words[1],)
    if name not in COMMANDS:
        return f"{command}: no such verb"
    wrong = [word for word in words if word.startswith("--") and word not in COMMANDS[name] | {"--help"}]
    return f"{command}: {wrong}" if wrong else None


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not ((ROOT / page).parent / link).exists()]
    assert not missing
    code = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    code += [line for _, kind, block in blocks(page) if kind == "sh" for line in block.splitlines()]
    assert not [wrong for command in code if (wrong := unknown(command.removeprefix("uv run ").replace("\\|", "|")))]
    for _, kind, block in blocks(page):
        if kind == "json":
            json.loads(block)


def test_the_readme_is_short_and_has_the_loop() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    loop = (ROOT / "scripts" / "custom_training_loop.py").read_text(encoding="utf-8")
    assert len(loop.splitlines()) <= 45
    assert f"```python\n{loop}```" in text


def test_the_chinese_page_has_the_same_commands_and_code() -> None:
    kinds = ("sh", "python", "json")
    own, others = (
        [block for _, kind, block in blocks(page) if kind in kinds] for page in ("README.zh-CN.md", "README.md")
    )
    without_comments = [[re.sub(r" *#.*", "", block) for block in blocks_] for blocks_ in (own, others)]
    assert without_comments[0] == without_comments[1]


def key_table() -> str:
    """The config's keys as `configs/README.md` shows them."""

    def rows(model: type[BaseModel], prefix: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += rows(inner, f"{prefix}{name}.")
                continue
            default = "required" if field.default is PydanticUndefined else f"`{json.dumps(field.default)}`"
            found.append(f"| `{prefix}{name}` | {default} | {(field.description or '').replace('|', chr(92) + '|')} |")
        return found

    every = rows(Config, "")
    assert all(any(f"`{name}." in row for row in every) for name in SECTIONS)
    return "\n".join(["| key | default | |", "| --- | --- | --- |", *every])


GUIDANCE = {
    "calls": "two calls, the one without text sees no layout",
    "alternate": "two calls in turn, the one without text sees no layout",
    "uncond_first": "a doubled batch, its first half without layout",
    "cond_first": "a doubled batch, its second half without layout",
    "single": "one call",
}


def family_table() -> str:
    """The families of the generic stream as `mmdit_lora/README.md` shows them."""
    rows = [f"| `{f.name}` | `{f.transformer}` | {GUIDANCE[f.guidance]} |" for f in STREAM_FAMILIES.values()]
    return "\n".join(["| family | transformer | guidance of its pipeline |", "| --- | --- | --- |", *rows])


def _plans(name: str) -> dict[str, Any]:
    plans: dict[str, Any] = json.loads((ROOT / "data" / "benchmarks" / f"plan_{name}.json").read_text())
    return plans["presets" if name == "presets" else "bases"]


def _row(name: str, plan: dict[str, Any], *, flops: bool = False) -> str:
    numbers, memory = plan["parameters"], plan["memory"]
    cells = [
        f"{numbers['base'] / 1e9:.1f} B",
        f"{numbers['stream'] / 1e9:.1f} B",
        f"{numbers['trainable'] / 1e6:.1f} M",
    ]
    cells += [f"{memory['peak'] / 2**30:.1f} GiB"]
    cells += [f"{plan['flops']['step'] / 1e12:.0f} TFLOP"] if flops else []
    return f"| {name} | {' | '.join(cells)} |"


FEATURED = (
    "flux2-klein-4b",
    "flux2-klein-9b",
    "flux2-dev",
    "flux3-klein",
    "z-image",
    "qwen-image",
    "krea2",
    "ideogram4",
)


def plan_table() -> str:
    """Bases and what a LoRA on them needs, as README.md shows them."""
    built_in, generic = _plans("presets"), _plans("bases")
    rows = [
        _row(f"`{name}`", built_in[f"{name}, siamese"]["lora"]) for name in ("sd3-medium", "sd3.5-medium", "flux-dev")
    ]
    rows += [_row(f"`{name} --stream-width 1024`", generic[name]) for name in FEATURED]
    head = "| base (`mmdit-lora plan --method lora --family ...`, 1024 px, batch 1, bf16) | parameters | layout stream | LoRA, r = 16 | peak memory |"
    return "\n".join([head, "| --- | ---: | ---: | ---: | ---: |", *rows])


def bases_table() -> str:
    """Every published base with a generic stream, as `mmdit_lora/README.md` shows them."""
    rows = [_row(f"`{name}`", plan, flops=True) for name, plan in _plans("bases").items()]
    head = "| `plan --method lora --stream-width 1024 --family ...` | parameters | layout stream | LoRA, r = 16 | peak memory | a step |"
    return "\n".join([head, "| --- | ---: | ---: | ---: | ---: | ---: |", *rows])


@pytest.mark.parametrize(("page", "table"), [("README.md", plan_table), ("mmdit_lora/README.md", bases_table)])
def test_the_table_of_bases_is_the_plan_s(page: str, table: Callable[[], str]) -> None:
    assert table() in (ROOT / page).read_text(encoding="utf-8")


def test_the_table_of_families_is_the_code_s() -> None:
    assert family_table() in (ROOT / "mmdit_lora" / "README.md").read_text(encoding="utf-8")


def test_the_table_of_keys_is_the_config_s() -> None:
    assert key_table() in (ROOT / "configs" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that git knows, and no others; `mmdit-lora` and `uv run` are those of this environment."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / "clone" / name)
    scripts = {
        "mmdit-lora": f'exec "{sys.executable}" -m mmdit_lora "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        "uv": '[ "$1" = run ] && shift && exec "$@"',
    }
    for name, text in scripts.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    return tmp_path / "clone"


def run_page(clone: Path, page: str) -> None:
    """Run the `sh` and `python` blocks of a page in its order."""
    path = os.pathsep.join([str(clone.parent / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    for note, kind, text in blocks(page):
        if kind not in ("sh", "python") or note.startswith("not run"):
            continue
        commands = [line for line in text.splitlines() if line and line != SUITE] if kind == "sh" else [text]
        for command in commands:
            argv = ["sh", "-c", command] if kind == "sh" else [sys.executable, "-c", command]
            done = subprocess.run(argv, cwd=clone, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{page}: {command}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_commands_of_the_readme_and_of_the_scripts_page(clone: Path) -> None:
    run_page(clone, "README.md")
    out = clone / "outputs" / "quickstart"
    report = json.loads((out / "report.json").read_text())
    assert report["layouts"] >= 96
    assert report["base"]["miou"] == pytest.approx(0.612, abs=0.01)
    assert report["adapter"]["miou"] == pytest.approx(0.904, abs=0.01)
    assert report["ground_truth"]["miou"] > report["adapter"]["miou"] > report["shuffled"]["miou"]
    assert report["old_domain"]["adapter"]["miou"] > 0.7
    assert report["export_max_abs_diff"] <= 1e-4
    assert report["adapter_bytes"] < 500_000
    assert report["adapter_bytes"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    assert Image.open(out / "before_after.png").width >= 1500
    assert Image.open(clone / "page.png").size == (64, 64)
    run_page(clone, "scripts/README.md")


@pytest.mark.slow
def test_the_commands_of_the_data_page(clone: Path) -> None:
    cells = (("RBC", 1, 1, 20, 10), ("WBC", 12, 3, 30, 18), ("Platelets", 2, 12, 8, 18))
    size = (64, 48)
    voc(clone / "BCCD", *(annotation(cells, size=size, filename=f"{number}.png") for number in range(40)))
    draws = np.random.default_rng(0)
    for image in sorted((clone / "BCCD" / "JPEGImages").iterdir()):  # no two of them alike
        Image.fromarray(draws.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(image)
    run_page(clone, "data/README.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["configs/README.md", "mmdit_lora/README.md", "CONTRIBUTING.md"])
def test_the_commands_of_a_page(clone: Path, page: str) -> None:
    run_page(clone, page)


if __name__ == "__main__":
    print(key_table(), family_table(), plan_table(), bases_table(), sep="\n\n")
