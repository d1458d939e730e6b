"""What `import mmdit_lora` gives: public names that load when they are used, documented and typed."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mmdit_lora

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "wandb", "pydantic")


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = (
        "import json, sys, mmdit_lora; before = [n for n in sys.argv[1:] if n in sys.modules];"
        "mmdit_lora.Box((0, 0, 1, 1), 'x'); print(json.dumps([before, [n for n in sys.argv[1:] if n in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *HEAVY], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout) == [[], []]


@pytest.mark.parametrize("name", mmdit_lora.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert name in dir(mmdit_lora)
    value = getattr(mmdit_lora, name)
    assert name == "__version__" or inspect.getdoc(value)
    assert vars(mmdit_lora)[name] is value, "found without `__getattr__` from now on"


def test_the_public_names_are_those_that_are_loaded_lazily() -> None:
    assert set(mmdit_lora.__all__) == {*mmdit_lora._MODULES, "__version__"}
    assert mmdit_lora.__all__ == sorted(mmdit_lora.__all__, key=lambda name: (name != name.upper(), name))


def test_a_name_that_does_not_exist_is_named_beside_those_that_do() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; public names: .*\btrain\b"):
        mmdit_lora.trian  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Boxes'"):
        from mmdit_lora import Boxes  # noqa: F401


USERS_FILE = """
import mmdit_lora
from mmdit_lora import Box, Layout, add_layout_lora, export_adapter, load_pipeline, train

layout = Layout("two things", [Box((0.1, 0.1, 0.5, 0.5), "a red circle")])
reveal_type(layout.boxes[0])
reveal_type(load_pipeline("data/tiny_base"))
reveal_type(add_layout_lora)
export_adapter("adapter", to="onnx", out="out")
mmdit_lora.evaluate("one", "two")
train(1)
"""

# Of the large libraries nothing is looked at: it takes minutes.
CHECKER = """
[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-torch.*,torchvision.*,diffusers.*,transformers.*,peft.*,accelerate.*,numpy.*,scipy.*,matplotlib.*,PIL.*]
follow_imports = skip
"""


@pytest.mark.slow
def test_a_type_checker_sees_the_types_of_a_users_file(tmp_path: Path) -> None:
    from mypy import api

    assert (ROOT / "mmdit_lora" / "py.typed").is_file()
    (tmp_path / "users.py").write_text(USERS_FILE)
    (tmp_path / "mypy.ini").write_text(CHECKER)
    arguments = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    out, errors, _ = api.run([*arguments, "--python-executable", sys.executable, str(tmp_path / "users.py")])
    assert not errors
    lines = {int(line.split(":")[1]): line for line in out.splitlines() if line.startswith(str(tmp_path))}
    assert 'Revealed type is "mmdit_lora.layout.Box"' in lines[6]
    assert 'Revealed type is "mmdit_lora.pipelines.base.LayoutPipeline"' in lines[7]
    assert "LayoutLoraReport" in lines[8]
    assert 'Argument "to" to "export_adapter" has incompatible type' in lines[9]
    assert 'to "evaluate"' in lines[10]
    assert 'Argument 1 to "train" has incompatible type "int"' in lines[11]
