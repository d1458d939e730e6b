"""Files and folders that are whole or absent: what is on the disk before the name is, and what a kill leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmdit_lora.errors import InputError, clip
from mmdit_lora.files import RESERVED, atomic_folder, read_text


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads names of open files from /proc")
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def place(path: Path) -> str:
        relative = path.relative_to(tmp_path)
        return "/".join(["TEMPORARY" if part.startswith(RESERVED) else part for part in relative.parts]) or "PARENT"

    def seen(handle: int) -> None:
        done.append(f"fsync {place(Path(f'/proc/self/fd/{handle}').readlink())}")
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        done.append(f"rename {place(self)} to {place(Path(target))}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(Path, "rename", renamed)
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "deep.txt").write_text("deep")
        (temporary / "flat.txt").write_text("flat")
    assert set(done[:2]) == {"fsync TEMPORARY/inner/deep.txt", "fsync TEMPORARY/flat.txt"}
    assert done[2:] == ["fsync TEMPORARY/inner", "fsync TEMPORARY", "rename TEMPORARY to out", "fsync PARENT"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_in_the_encodings_of_editors(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("größe\r\nzwei".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "größe\r\nzwei"


def test_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\ngröße".encode("cp1252"))
    with pytest.raises(InputError, match=r"a\.txt: is not UTF-8 text: byte 0xf6 in line 2, probably Windows-1252"):
        read_text(tmp_path / "a.txt")


def test_only_regular_files_up_to_a_limit_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "big").write_bytes(b"x" * 11)
    for name, message in {
        "fifo": "is a FIFO, not a list",
        "zero": "is a device, not a list",
        ".": "is a folder, not a list",
        "none": "no such list",
        "big": "is larger than",
    }.items():
        with pytest.raises(InputError, match=message):
            read_text(tmp_path / name, what="list", limit=10)


def test_a_message_does_not_echo_megabytes() -> None:
    error = InputError("x" * 10**7, location="y" * 10**6, hint="z" * 10**6)
    assert len(str(error)) < 2000
    assert clip("abc", 3) == "abc"
    assert clip("a" * 500 + "b", 60).endswith("b")
    assert len(clip("a" * 500, 60)) == 60
