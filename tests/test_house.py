"""The house itself: rooms that import leftwards only, light `--help`, nobody's machine paths."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmdit_lora.cli.main import VERBS, _commands_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmdit_lora"
FILES = sorted(PACKAGE.rglob("*.py"))

# The rooms from the lowest to the highest; a file imports only from its own room and from lower ones.
ROOMS = (
    ("", "layout", "boxes", "errors", "locks", "files", "json_files", "outputs", "flow", "hub", "resources"),
    ("config",),
    ("models",),
    ("visual",),
    ("data",),
    ("lora",),
    ("pipelines",),
    ("evaluation",),
    ("training",),
    ("export",),
    ("analysis",),
    ("cli", "studio", "__main__"),
)
# Only the families' own files and the places that list them know their names.
FAMILY_NAME = re.compile(r"sd3|stable_?diffusion|flux|z_?image|qwen_?image|krea|lumina|ideogram", re.IGNORECASE)
CHECKPOINT_NAME = re.compile(r"\b(sd3(\.5)?|flux)-[a-z]+\b")  # of a published one, as help texts give examples
KNOW_FAMILIES = {f"models/{name}.py" for name in ("__init__", "families", "sd3", "flux", "creatilayout")}
KNOW_FAMILIES |= {f"pipelines/{name}.py" for name in ("__init__", "loading", "stable_diffusion_3", "flux")}
HEAVY = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "wandb",
    "gradio",
    "scipy",
    "matplotlib",
)


def module_of(file: Path) -> str:
    """The dotted name under which Python imports a file of the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def room_of(module: str) -> int:
    """Place of `mmdit_lora.<name>...` in `ROOMS`."""
    name = f"{module}.".split(".")[1]
    for place, names in enumerate(ROOMS):
        if name in names:
            return place
    raise AssertionError(f"{module} belongs to no room: say in ROOMS where it stands")


def imports(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports, inside functions too, but not those for type checking alone."""
    nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mmdit_lora")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            if node.module and node.module.split(".")[0] == "mmdit_lora":
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name in MODULES else node.module for name in names)
        nodes.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_a_file_imports_from_lower_rooms_only(file: Path) -> None:
    own = room_of(module_of(file))
    wrong = [module for module in imports(file) if room_of(module) > own]
    assert not wrong or file == PACKAGE / "__init__.py", f"{file.name} imports from higher rooms: {wrong}"


def test_no_files_import_one_another_in_a_circle() -> None:
    graph = {module: set(imports(file)) - {module} for module, file in MODULES.items()}
    assert set().union(*graph.values()) <= set(MODULES)
    assert sum(map(len, graph.values())) > len(MODULES)  # imports were found at all
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def code_alone(text: str) -> str:
    """A file without comments and docstrings (any text that stands alone)."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            alone = [s for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
            node.body = [s for s in body if s not in alone] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def test_code_alone_keeps_names_and_strings_and_drops_what_people_read() -> None:
    text = '"""about flux"""\n# flux\nclass A:\n    "flux"\ndef f():\n    """flux"""\n    return "x" + SD3\n'
    assert FAMILY_NAME.findall(code_alone(text)) == ["SD3"]
    assert CHECKPOINT_NAME.sub("", "'sd3-medium', 'sd3.5-large', 'flux-dev', sd3, fluxes") == "'', '', '', sd3, fluxes"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_nothing_but_the_families_own_files_knows_their_names(file: Path) -> None:
    if file.relative_to(PACKAGE).as_posix() in KNOW_FAMILIES or file.parent.name == "stream_families":
        return
    found = [
        line.strip()
        for line in code_alone(file.read_text(encoding="utf-8")).splitlines()
        if FAMILY_NAME.search(CHECKPOINT_NAME.sub("", line))
    ]
    assert not found


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["inspect", "--help"], ["data", "--help"], ["data", "convert", "--help"]]
)
def test_help_and_version_load_nothing_heavy(argv: list[str]) -> None:
    script = (
        "import sys; from mmdit_lora.cli.main import main; code = main(sys.argv[1:]);"
        f"print('LOADED', [n for n in {HEAVY} if n in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("LOADED []"), done.stdout


def test_the_table_of_verbs_lists_what_their_modules_add() -> None:
    added = {verb: module for module, _ in VERBS.values() for verb in _commands_of(module)}
    assert added == {verb: module for verb, (module, _) in VERBS.items()}
    assert all(line.endswith(".") and len(line) <= 80 for _, line in VERBS.values())


def test_every_listed_fault_can_still_be_put_in() -> None:
    """`scripts/mutations.py` edits lines that stand in the package once, and its last record names the same faults."""
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "scripts" / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    gone = [m.name for m in module.MUTATIONS if (PACKAGE / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    assert not gone
    record = json.loads((ROOT / "data" / "benchmarks" / "mutations.json").read_text(encoding="utf-8"))
    assert [entry["fault"] for entry in record if entry["caught_by"]] == [m.name for m in module.MUTATIONS]


def test_nobodys_machine_paths() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w")
    suffixes = {".py", ".yaml", ".yml", ".toml", ".md", ".sh", ".json"}
    folders = [PACKAGE, *(ROOT / name for name in ("tests", "configs", "scripts"))]
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix in suffixes]
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in [*files, *ROOT.glob("*.md"), *ROOT.glob("*.toml")]
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(text)
    ]
    assert not found
