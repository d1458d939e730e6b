"""What messages advise exists: every option, verb and config key that the code around data sets names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from mmdit_lora.cli.main import app
from mmdit_lora.config.loading import SECTIONS

PACKAGE = Path(__file__).resolve().parent.parent / "mmdit_lora"
FILES = [
    *sorted((PACKAGE / "data").rglob("*.py")),
    *(PACKAGE / name for name in ("boxes.py", "layout.py", "files.py", "cli/data.py")),
]
OTHERS = re.compile(r"(uv|pip|iconv|datasets)\b[^`]*")  # commands of other programs, as far as they go
FILE = re.compile(r"\.(yaml|yml|json|jsonl|txt|parquet|csv|tar)$")


def commands(command: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    yield name, {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for key, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*name, key))


COMMANDS = dict(commands(typer.main.get_command(app)))
OPTIONS = {option for options in COMMANDS.values() for option in options} | {"--help"}


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """Strings of a file that are no docstrings, f-strings with their fixed parts."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def config_keys(section: Any, name: str) -> Iterator[str]:
    for key, field in section.model_fields.items():
        yield f"{name}.{key}"
        if hasattr(field.annotation, "model_fields"):
            yield from config_keys(field.annotation, f"{name}.{key}")


KEYS = {key for name, section in SECTIONS.items() for key in config_keys(section, name)}


def unknown(text: str) -> list[str]:
    """What a text names and nobody has."""
    ours = OTHERS.sub("", text)
    found = [option for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours) if option not in OPTIONS]
    keys = re.findall(rf"(?<![\w./])(?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[a-z_]+)*", ours)
    found += [key for key in keys if key not in KEYS and not FILE.search(key)]
    for command in re.findall(r"`(?:mmdit-lora )([^`]+)`|`(data [^`]+|train|evaluate|sample|init)`", text):
        words = (command[0] or command[1]).split()
        verbs = words[1].split("|") if words[0] == "data" and len(words) > 1 else [""]
        for verb in verbs:
            name = (words[0], verb) if verb else (words[0],)
            if name not in COMMANDS:
                found.append(" ".join(name))
            else:
                options = [word for word in words if word.startswith("--")]
                found += [f"{' '.join(name)} {option}" for option in options if option not in COMMANDS[name]]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_all_that_is_advised_exists(file: Path) -> None:
    wrong = [f"{file.name}:{number}: {what}" for number, text in texts(file) for what in unknown(text)]
    assert not wrong


def test_what_does_not_exist_is_seen() -> None:
    assert unknown("give --clop, or `mmdit-lora data chekc --out X`, or set data.clip") == [
        "--clop",
        "data.clip",
        "data chekc",
    ]
    assert unknown("`mmdit-lora data split --base b`") == ["data split --base"]
    assert (
        unknown("give --base, set data.buckets.ratios, `data check|stats`, `uv sync --extra formats`, data.yaml") == []
    )
    assert {"data.bbox_units", "data.buckets.upscale", "train.max_steps"} <= KEYS
    assert {"--bbox-format", "--skip-missing"} <= OPTIONS
