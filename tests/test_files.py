"""Files and folders that are whole or absent: what is on the disk before the name is, and what a kill leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmdit_lora.files import atomic_file, atomic_folder, remove_temporaries


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads names of open files from /proc")
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def place(path: Path) -> str:
        relative = path.relative_to(tmp_path)
        return "/".join(["TEMPORARY" if part.startswith(".out.") else part for part in relative.parts]) or "PARENT"

    def seen(handle: int) -> None:
        done.append(f"fsync {place(Path(f'/proc/self/fd/{handle}').readlink())}")
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        done.append(f"rename {place(self)} to {place(Path(target))}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(Path, "replace", renamed)
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "deep.txt").write_text("deep")
        (temporary / "flat.txt").write_text("flat")
    assert set(done[:2]) == {"fsync TEMPORARY/inner/deep.txt", "fsync TEMPORARY/flat.txt"}
    assert done[2:] == ["fsync TEMPORARY/inner", "fsync TEMPORARY", "rename TEMPORARY to out", "fsync PARENT"]


def test_what_kills_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("out", ".out.other", ".outer.abc"):
        (tmp_path / name).mkdir()
    # Held, so that they are not cleaned up: a kill does not come back to them.
    file, folder = atomic_file(tmp_path / "f[1].txt"), atomic_folder(tmp_path / "out")
    file.__enter__()
    folder.__enter__()
    assert len(list(tmp_path.iterdir())) == 5
    remove_temporaries(tmp_path / "f[1].txt")
    assert not list(tmp_path.glob(".f*"))
    remove_temporaries(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".outer.abc", "out"]
