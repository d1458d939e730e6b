"""The wheel alone, in another folder than a clone: it holds the embedded base and the configs, and the quickstart runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmdit_lora.config.loading import Config, load_config
from mmdit_lora.errors import InputError
from mmdit_lora.pipelines import LayoutStableDiffusion3Pipeline, load_pipeline
from mmdit_lora.resources import NAMES, here_or_packaged, resource

ROOT = Path(__file__).resolve().parent.parent


def test_the_embedded_base_and_the_configs_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = str(ROOT / "data" / "tiny_base")
    assert load_config("configs/quickstart.yaml").base == packaged
    assert Config.model_validate({"base": "data/tiny_base", "data": "x"}).base == packaged
    assert load_pipeline("data/tiny_base").opened_from == Path(packaged)
    assert LayoutStableDiffusion3Pipeline.from_pretrained("data/tiny_base").opened_from == Path(packaged)
    assert caplog.text.count("data/tiny_base does not exist here") <= 1
    for name in ("data/tiny_base_narrow", "configs/../data/tiny_base", "data/quickstart", "configs/none.yaml", "x\0"):
        assert resource(name) is None
        assert here_or_packaged(name) == name
    with pytest.raises(InputError, match="no such config file"):
        load_config("configs/none.yaml")


def test_what_is_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("base: mine\ndata: x\n")
    (tmp_path / "data" / "tiny_base").mkdir(parents=True)
    assert load_config("configs/quickstart.yaml").base == "mine"
    assert here_or_packaged("data/tiny_base") == "data/tiny_base"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, without its dependencies."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    folder = tmp_path_factory.mktemp("installed")
    build = subprocess.run(
        [uv, "build", "--wheel", "--offline", "-o", folder / "dist", ROOT], capture_output=True, text=True
    )
    if build.returncode and "hatchling" in build.stderr:
        pytest.skip("hatchling is not in uv's cache")
    assert build.returncode == 0, build.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    assert wheel.stat().st_size < 12 * 2**20
    install = [uv, "pip", "install", "--offline", "--no-deps", "--python", sys.executable, "--target", folder / "site"]
    subprocess.run([*install, wheel], check=True, capture_output=True)
    return folder / "site"


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    assert all((installed / "mmdit_lora" / "_resources" / name).exists() for name in NAMES)
    script = (
        "import sys, mmdit_lora\n"
        f"assert mmdit_lora.__file__.startswith({str(installed)!r}), mmdit_lora.__file__\n"
        "import mmdit_lora.cli.quickstart as quickstart\n"
        "quickstart.TRAIN_IMAGES, quickstart.HELD_OUT_IMAGES, quickstart.SHOWN = 16, 6, 4\n"
        "quickstart.CONFIG = sys.argv.pop(1)\n"
        "from mmdit_lora.cli.main import main\n"
        "sys.exit(main())"
    )
    config = "base: data/tiny_base\ndata: {path: x}\ntrain: {max_steps: 3, batch_size: 4, sample_every: 0}\n"
    (tmp_path / "quick.yaml").write_text(config)
    environment = {**os.environ, "PYTHONPATH": str(installed), "MMDIT_LORA_HOME": str(tmp_path / "home")}

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, "quick.yaml", *argv]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    done = run("quickstart", "--out", "out", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("data/tiny_base does not exist here") == 1
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["export_max_abs_diff"] <= 1e-4
    assert report["steps"] == 3
    assert (tmp_path / "out" / "before_after.png").is_file()
    checked = run(
        "train",
        "configs/quickstart.yaml",
        "--check-only",
        "data.path=out/data/train",
        "data.validation=null",
        "train.batch_size=4",
    )
    assert checked.returncode == 0, checked.stderr[-2000:]
    assert "configs/quickstart.yaml does not exist here" in checked.stderr
