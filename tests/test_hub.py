"""Hub ids where files are meant: found in a cache as huggingface_hub lays it out, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mmdit_lora.cli.main import main
from mmdit_lora.errors import InputError
from mmdit_lora.hub import local_copy
from tests.creatilayout_files import write_files

Capture = pytest.CaptureFixture[str]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(cache: Path, repository: str, files: dict[str, Path]) -> Path:
    """A repository as huggingface_hub caches it: blobs, a snapshot of links to them, and the branch that names it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    for number, (name, source) in enumerate(files.items()):
        shutil.copy2(source, folder / "blobs" / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(folder / "blobs" / str(number))
    return snapshot


def test_an_import_takes_hub_ids_for_base_and_weights(cache: Path, tmp_path: Path, capsys: Capture) -> None:
    base, weights = write_files("sd3", tmp_path)
    put(cache, "owner/base", {file.relative_to(base).as_posix(): file for file in base.rglob("*") if file.is_file()})
    put(cache, "owner/weights", {"SD3/model.safetensors": weights, "README.md": __file__})  # type: ignore[dict-item]
    for number, name in enumerate(("owner/weights/SD3", "owner/weights/SD3/model.safetensors", str(weights))):
        out = tmp_path / f"out{number}"
        argv = ["import", "creatilayout", "--base", "owner/base", "--weights", name, "--out", str(out)]
        assert main(argv) == 0, capsys.readouterr().err
    written = "transformer/diffusion_pytorch_model.safetensors"
    first, *others = (set(_tensors(tmp_path / f"out{number}" / written)) for number in range(3))
    assert all(other == first for other in others)
    assert not (tmp_path / "out0" / written).is_symlink()


def _tensors(file: Path) -> list[tuple[str, bytes]]:
    from safetensors.torch import load_file

    return [(name, value.numpy().tobytes()) for name, value in load_file(file).items()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/nowhere", "neither in the cache nor to be had"),
        ("owner/weights/FLUX", "owner/weights holds no FLUX"),
        ("owner/weights/../weights", "no such file or folder"),
        ("nowhere", "no such file or folder"),
        ("x" * 5000, "no such file or folder"),
    ],
)
def test_what_is_not_there_is_one_message(
    cache: Path, tmp_path: Path, capsys: Capture, name: str, message: str
) -> None:
    base, weights = write_files("sd3", tmp_path)
    put(cache, "owner/weights", {"SD3/model.safetensors": weights})
    argv = ["import", "creatilayout", "--base", str(base), "--weights", name, "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--weights" in error
    assert len(error) < 2000
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_there_is_taken_as_it_is(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert local_copy(tmp_path / "owner" / "name", location="x", allow=["*"]) == tmp_path / "owner" / "name"
    put(cache, "owner/name", {"config.json": Path(__file__)})
    assert local_copy("owner/name", location="x", allow=["*.json"]).name == REVISION
    with pytest.raises(InputError, match="no such file or folder"):
        local_copy("a\0b", location="x", allow=["*"])
