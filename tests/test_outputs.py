"""What the program writes and removes: every verb with an `--out`, onto everything that it must not touch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer

from mmdit_lora import files, outputs
from mmdit_lora.cli.main import app, main
from mmdit_lora.errors import InputError
from mmdit_lora.files import RESERVED, atomic_file, atomic_folder
from mmdit_lora.locks import FolderLock, this_process
from mmdit_lora.outputs import MARKER, Marker, check_new_folder, new_folder, open_folder

ROOT = Path(__file__).resolve().parent.parent


class Inputs:
    """What verbs read, in a folder of the test's own, so that a wrong step of a verb can be seen."""

    def __init__(self, folder: Path) -> None:
        self.base, self.data, self.adapter = folder / "base", folder / "data", folder / "adapter"
        self.weights, self.config = folder / "weights.safetensors", folder / "run.yaml"

    def train(self, out: Path) -> list[str]:
        return ["train", str(self.config), f"output_dir={out}"]

    def painting(self, out: Path) -> list[str]:
        paths = ["--base", self.base, "--adapter", f"{self.adapter}=0.5", "--layout", self.data, "--out", out]
        return [*map(str, paths), "--steps", "1", "--count", "2"]


Make = Callable[[Inputs, Path], list[str]]
# verb -> a call of it, and the names of what it reads.
VERBS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "quickstart": (lambda _, out: ["quickstart", "--out", str(out)], ()),
    "init": (lambda i, out: ["init", str(i.data), "--base", str(i.base), "--out", str(out)], ("data", "base")),
    "train": (Inputs.train, ("base", "data")),
    "sample": (lambda i, out: ["sample", *i.painting(out)], ("base", "data", "adapter")),
    "attribute": (lambda i, out: ["attribute", *i.painting(out)], ("base", "data", "adapter")),
    "evaluate": (
        lambda i, out: ["evaluate", *_argv(out, base=i.base, data=i.data, adapter=i.adapter), "--steps", "1"],
        ("base", "data", "adapter"),
    ),
    "export": (
        lambda i, out: ["export", str(i.adapter), *_argv(out, base=i.base), "--to", "diffusers"],
        ("base", "adapter"),
    ),
    "resize": (lambda i, out: ["resize", str(i.adapter), *_argv(out, base=i.base), "--rank", "2"], ("base", "adapter")),
    "inspect": (lambda i, out: ["inspect", str(i.adapter), *_argv(out, base=i.base)], ("base", "adapter")),
    "study": (
        lambda i, out: ["study", "rank", str(i.config), *_argv(out), "--quick", "data.validation_share=0.25"],
        ("base", "data"),
    ),
    "import creatilayout": (
        lambda i, out: ["import", "creatilayout", *_argv(out, base=i.base, weights=i.weights)],
        ("base", "weights"),
    ),
    "data make": (lambda _, out: ["data", "make", "shapes", *_argv(out), "--count", "2"], ()),
    "data convert": (lambda i, out: ["data", "convert", str(i.data), *_argv(out), "--from", "jsonl"], ("data",)),
    "data check": (lambda i, out: ["data", "check", str(i.data), *_argv(out)], ("data",)),
    "data split": (lambda i, out: ["data", "split", str(i.data), *_argv(out)], ("data",)),
    "data shard": (lambda i, out: ["data", "shard", str(i.data), *_argv(out)], ("data",)),
    "data show": (lambda i, out: ["data", "show", str(i.data), *_argv(out)], ("data",)),
    "data synthesize": (
        lambda i, out: [
            *("data", "synthesize", *_argv(out, base=i.base, captions=i.data)),
            *("--detector", "shapes", "--steps", "1", "--count", "2"),
        ],
        ("base", "data"),
    ),
    "data cache": (lambda i, out: ["data", "cache", str(i.config), *_argv(out)], ("data", "base")),
}
ONLY_READ = {"verify", "plan", "verify-resume", "data formats", "data stats"}
FILES = {"init": "out.yaml", "data show": "out.png"}  # verbs that write one file; the others write a folder
VERB = pytest.mark.parametrize("verb", VERBS)


def _argv(out: Path, **options: Path) -> list[str]:
    return ["--out", str(out), *(part for key, value in options.items() for part in (f"--{key}", str(value)))]


def call(verb: str, inputs: Inputs, out: Path) -> list[str]:
    return VERBS[verb][0](inputs, out)


def out_name(verb: str) -> str:
    return FILES.get(verb, "out")


@pytest.fixture
def inputs(base: Path, data: Path, adapter: Path, tmp_path: Path) -> Inputs:
    folder = tmp_path / "inputs"
    found = Inputs(folder)
    for source, target in ((base, found.base), (data, found.data), (adapter, found.adapter)):
        copy(source, target)
    found.weights.write_bytes(b"none is read")
    config = {"base": str(found.base), "data": {"path": str(found.data)}, "train": {"max_steps": 1, "batch_size": 2}}
    found.config.write_text(json.dumps(config))  # YAML too
    return found


def copy(source: Path, target: Path) -> None:
    """A tree of hard links: nothing may change what they name."""
    for path in sorted(source.rglob("*")):
        to = target / path.relative_to(source)
        if path.is_dir():
            to.mkdir(parents=True)
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, to)


def state(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything in a folder: kind, mode, content, and the time of files."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else None
        time = status.st_mtime_ns if content else None
        link = str(path.readlink()) if path.is_symlink() else None
        found[str(path.relative_to(folder))] = (status.st_mode, content, time, link)
    return found


def refused(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str], *, own: str = "nothing") -> str:
    """A call exits with 2 and one message, and nothing below `folder` changes, but for `folder/own`."""
    capsys.readouterr()
    before = state(folder)
    code = main(argv)
    stderr = capsys.readouterr().err
    changed = {name for name, now in state(folder).items() if before.get(name) != now} | (before.keys() - state(folder))
    assert not {name for name in changed if not name.startswith(own)}, (argv, stderr)
    assert code == 2, (argv, stderr)
    assert stderr.count("error: ") == 1, stderr
    assert "Traceback" not in stderr
    assert len(stderr) < 2000
    return stderr


def commands(command: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, bool]]:
    """(verb, whether it has an `--out`) of the command line."""
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            yield from commands(one, (*above, name))
    else:
        yield " ".join(above), any(parameter.name == "out" for parameter in command.params)


def test_every_verb_that_writes_is_walked() -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert found.keys() == VERBS.keys() | ONLY_READ
    assert {verb for verb, writes in found.items() if writes} == VERBS.keys() - {"train"}


@VERB
def test_onto_its_own_input(verb: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in VERBS[verb][1]:
        given: Path = getattr(inputs, name)
        linked = tmp_path / f"link_{name}"
        linked.symlink_to(given)
        roundabout = given.parent / "base" / ".." / given.name
        for out in (given, linked, roundabout, given.parent):
            refused(call(verb, inputs, out), tmp_path, capsys)
        if given.is_dir():
            file = next(path for path in sorted(given.rglob("*")) if path.is_file())
            refused(call(verb, inputs, file), tmp_path, capsys)
            if verb != "data cache":  # which adds names of its own, and replaces nothing
                said = refused(call(verb, inputs, given / out_name(verb)), tmp_path, capsys)
                assert "lies in what is read" in said


@VERB
def test_onto_what_is_not_its_own(
    verb: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the quickstart finds its config there
    own = tmp_path / "own"
    own.mkdir()
    (own / "full").mkdir()
    (own / "full" / "notes.txt").write_text("mine")
    (own / "full" / ".config.yaml.swp").write_text("an editor's")
    (own / "file").write_text("mine")
    (own / "file.yaml").write_text("mine: 1")
    (own / "file.png").write_bytes(b"mine")
    os.mkfifo(own / "fifo.png")
    (own / "dangling.png").symlink_to(own / "nowhere")
    (own / "circle.png").symlink_to(own / "circle.png")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(own)  # the name of a socket is short
        server.bind("socket.png")
        monkeypatch.chdir(ROOT)
        if os.geteuid() == 0:
            os.mknod(own / "device.png", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        names = {path.name for path in own.iterdir()} - ({"file"} if verb == "data show" else set())
        for name in sorted(names):
            refused(call(verb, inputs, own / name), tmp_path, capsys)
        for place in ("file/below.png", "x" * 300 + ".png", "fifo.png/below.png", "dangling.png/below.png"):
            refused(call(verb, inputs, own / place), tmp_path, capsys)


@VERB
def test_onto_another_verbs_folder(
    verb: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with new_folder(tmp_path / "other.png", verb="another verb") as folder:
        (folder / "result.txt").write_text("hours of work")
    said = refused(call(verb, inputs, tmp_path / "other.png"), tmp_path, capsys)
    assert "what `another verb` wrote" in said or "is a folder" in said


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Makes small file systems: "ro" that may not be written, "size=..."."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path_factory.mktemp("mount")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no right to mount: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", folder], check=False)


@VERB
def test_onto_a_read_only_and_a_full_disk(
    verb: str,
    inputs: Inputs,
    mounts: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if verb == "import creatilayout":
        pytest.skip("reads its weights first, which tests/test_creatilayout_refused.py makes")
    monkeypatch.chdir(ROOT)
    read_only, full = mounts("ro"), mounts("size=16k")
    said = refused(call(verb, inputs, read_only / out_name(verb)), read_only, capsys)
    assert "read-only" in said
    with suppress(OSError), (full / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    # A cache keeps its empty locks, which other processes may hold.
    own = "out" if verb == "data cache" else "nothing"
    said = refused(call(verb, inputs, full / out_name(verb)), full, capsys, own=own)
    assert "no space is left" in said


# --- the rule itself


def written(out: Path, text: str = "ours") -> None:
    with new_folder(out, verb="test") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text(text)


def test_only_what_the_manifest_lists_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(out)
    assert Marker.read(out) == Marker("test", {"inner/": None, "inner/a.txt": outputs._stamp(out / "inner" / "a.txt")})
    written(out, "again")
    assert (out / "inner" / "a.txt").read_text() == "again"
    (out / ".DS_Store").touch()  # of a file manager
    (out / "inner" / "a.txt").unlink()  # what the user removed is no obstacle
    written(out)

    for change in (
        lambda: (out / "notes.txt").write_text("mine"),
        lambda: (out / "inner" / "notes.txt").write_text("mine"),
        lambda: (out / "mine").mkdir(),
        lambda: (out / "inner" / "a.txt").write_text("changed"),
        lambda: (out / MARKER).unlink(),
        lambda: (out / MARKER).write_text("{"),
    ):
        before = state(tmp_path)
        change()
        with pytest.raises(InputError, match=r"did not write|carries no"):
            written(out)
        files.shutil.rmtree(out)
        written(out)
        assert state(tmp_path).keys() == before.keys()


def test_an_edit_anywhere_in_a_large_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it keeps the size and the time; a copy of the folder is the same output."""
    large = 12 * 2**20
    for limit in (2 * large, large):  # always digested; digested where its times or its inode are others
        monkeypatch.setattr(outputs, "_LARGE", limit)
        out = tmp_path / f"{limit}"
        with new_folder(out, verb="test") as folder:
            (folder / "weights").write_bytes(bytes(large))
        check_new_folder(out, verb="test")
        files.shutil.copytree(out, tmp_path / f"copy_{limit}")
        check_new_folder(tmp_path / f"copy_{limit}", verb="test")
        before = (out / "weights").stat()
        with (out / "weights").open("r+b") as file:
            file.seek(large // 2)
            file.write(b"thirty bytes that are the user's")
        os.utime(out / "weights", ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(InputError, match="changed since: weights"):
            check_new_folder(out, verb="test")


def test_an_untouched_large_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_LARGE", 1)
    written(tmp_path / "out")
    monkeypatch.setattr(hashlib, "file_digest", None)
    check_new_folder(tmp_path / "out", verb="test")


def test_a_marker_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text('{"written_by": "data make", "files": {}}')
    for name in ("fifo", "zero", "link", "dangling", "folder", "nested"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
        (tmp_path / f"{name}_alone").mkdir()
    for place in (tmp_path / "{}" / MARKER, tmp_path / "{}_alone" / MARKER):
        os.mkfifo(str(place).format("fifo"))
        Path(str(place).format("zero")).symlink_to("/dev/zero")
        Path(str(place).format("link")).symlink_to(tmp_path / "mine.txt")
        Path(str(place).format("dangling")).symlink_to("nowhere")
        Path(str(place).format("folder")).mkdir()
    (tmp_path / "nested" / MARKER).write_text("[" * 100_000)
    (tmp_path / "nested_alone" / "x.txt").touch()
    for folder in sorted(path for path in tmp_path.iterdir() if path.is_dir()):
        said = [refused(["data", "make", "shapes", "--count", "1", "--out", str(folder)], tmp_path, capsys)]
        before = state(tmp_path)
        with pytest.raises(InputError) as error, open_folder(folder, verb="test", names=["a"]):
            pass
        said.append(str(error.value))
        assert state(tmp_path) == before
        assert all(
            "carries no" in text if "nested" in folder.name else f"{folder / MARKER}: is " in text for text in said
        )


@pytest.mark.parametrize(
    "out", ["{}/set", "file://{}/set", "file://{}/set/*.tar", "local://{}/set", "zip://a::file://{}/set"]
)
def test_a_url_may_name_a_folder_of_this_machine(out: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    given = out.format(tmp_path)
    for name, what in (("set/x", "lies in"), ("set", "is")):
        with pytest.raises(InputError, match=f"{what} what is read: DATA {re.escape(given)}"):
            check_new_folder(tmp_path / name, verb="data check", inputs={"DATA": given})
    check_new_folder(tmp_path / "set", verb="data check", inputs={"DATA": "s3:/" + str(tmp_path / "set")})


def test_a_name_that_ends_as_folders_do_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = Inputs(tmp_path / "none")
    for out in ("new/", "new/.", "new.png/", "new.safetensors/"):
        for verb in ("init", "data show", "export"):
            argv = [{"diffusers": "kohya"}.get(part, part) for part in call(verb, inputs, Path("OUT"))]
            refused([part.replace("OUT", f"{tmp_path}/{out}") for part in argv], tmp_path, capsys)
        with pytest.raises(InputError, match="names a folder"), atomic_file(f"{tmp_path}/{out}"):
            pass


def test_a_file_that_came_while_it_was_written_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(out)
    writing = new_folder(out, verb="test")
    (writing.__enter__() / "b.txt").write_text("new")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="notes"):
        writing.__exit__(None, None, None)
    assert sorted(p.name for p in out.iterdir()) == [MARKER, "inner", "notes.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing is left beside it"


def test_names_in_an_open_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    rules: dict[str, Any] = {"verb": "test", "names": ["report.json", "images/"]}
    with open_folder(out, **rules):
        files.write_text(out / "report.json", "{}")
        (out / "images").mkdir()
    (out / "notes.txt").write_text("mine")
    (out / ".report.json.my_notes").write_text("mine")
    with open_folder(out, **rules):
        files.write_text(out / "report.json", "[]")
    assert (out / "notes.txt").read_text() == (out / ".report.json.my_notes").read_text() == "mine"
    (out / "report.json").write_text("[] // a note of mine")
    with pytest.raises(InputError, match=r"changed since: report\.json"), open_folder(out, **rules):
        pass
    with pytest.raises(InputError, match="what `test` wrote"), open_folder(out, **rules | {"verb": "other"}):
        pass


def test_after_a_kill_only_what_was_written_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "run"
    rules: dict[str, Any] = {"verb": "test", "names": ["page.md", "report.json", "images/"]}

    def killed() -> None:
        with open_folder(out, **rules):
            files.write_text(out / "page.md", "of the program")
            os.kill(os.getpid(), 9)

    assert killed_at(0, killed)
    with open_folder(out, **rules):
        files.write_text(out / "page.md", "again")
    assert killed_at(0, killed)
    for name in ("report.json", "page.md"):
        before = (out / name).read_text() if (out / name).exists() else None
        (out / name).write_text("my own notes")
        with (
            pytest.raises(InputError, match=rf"did not write, or that were changed since: {name}"),
            open_folder(out, **rules),
        ):
            pass
        assert (out / name).read_text() == "my own notes"
        (out / name).unlink()
        if before:
            (out / name).write_text(before)


def test_what_comes_while_a_folder_is_written_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open_folder(out, verb="test", names=["report.json", "page.md"]):
        files.write_text(out / "report.json", "{}")
        files.write_text(out / "report.json", "[]")
        (out / "page.md").write_text("my own notes")
        with pytest.raises(InputError, match=r"did not write, or that were changed since: page\.md"):
            files.write_text(out / "page.md", "of the program")
    assert (out / "page.md").read_text() == "my own notes"
    assert Marker.read(out) == Marker("test", {"report.json": outputs._stamp(out / "report.json")})
    assert not list(tmp_path.rglob(f"{RESERVED}*"))


def test_a_verb_within_a_verb_leaves_the_marker_open(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open_folder(out, verb="outer", names=["report.json", "later/"]):
        with open_folder(out, verb="inner", names=["report.json", "a", "log"], others=["outer"], logs=["log"]):
            files.write_text(out / "report.json", "{}")
        there = outputs._stamp(out / "report.json")
        assert Marker.read(out) == Marker("outer", {"report.json": there, "later/": None, "log": None})
    assert Marker.read(out) == Marker("outer", {"report.json": there})


def test_a_start_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    for folder in (new_folder, open_folder):
        more = {"names": ["a"]} if folder is open_folder else {}
        with pytest.raises(InputError, match="wrong"), folder(tmp_path / "a" / "b", verb="test", **more):  # type: ignore[operator]
            raise InputError("wrong")
        assert not list(tmp_path.iterdir())


def test_the_folder_that_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "..", "/"):
        with pytest.raises(InputError, match="current directory"):
            check_new_folder(out, verb="sample")
    assert main(["data", "make", "shapes", "--count", "2", "--out", "."]) == 2
    assert not list(Path().iterdir())
    with pytest.raises(InputError, match="is a mount point"):
        check_new_folder("/proc", verb="sample")


def test_a_file_that_begins_as_temporaries_do_is_the_users(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with new_folder(tmp_path / "out", verb="sample") as folder:
            (folder / "a.txt").write_text(text)
    (tmp_path / "out" / f"{RESERVED}notes").write_text("mine")
    with pytest.raises(InputError, match="did not write"):
        check_new_folder(tmp_path / "out", verb="sample")


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    written(tmp_path / "out")
    written(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "inner" / "a.txt").read_text() == "ours"


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for umask, file_mode, folder_mode in ((0o022, 0o644, 0o755), (0o007, 0o660, 0o770), (0o077, 0o600, 0o700)):
        before = os.umask(umask)
        try:
            out = tmp_path / f"{umask:o}"
            with new_folder(out, verb="test") as folder:
                (folder / "inner").mkdir(mode=0o700)
                save_file({"a": torch.zeros(1)}, folder / "inner" / "a.safetensors")
            with atomic_file(tmp_path / f"{umask:o}.safetensors") as temporary:
                save_file({"a": torch.zeros(1)}, temporary)
        finally:
            os.umask(before)
        for path in [out, *out.rglob("*"), tmp_path / f"{umask:o}.safetensors"]:
            assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode), path


# --- locks


HOLDER = """
import sys, time
from pathlib import Path
from mmdit_lora.files import write_text
from mmdit_lora.outputs import new_folder, open_folder
out = Path(sys.argv[2])
context = new_folder(out, verb="test") if sys.argv[1] == "new" else open_folder(out, verb="test", names=["a"])
with context as folder:
    write_text(folder / "a", "a" * 1000)
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["new", "open"])
def test_a_second_writer_is_refused_and_a_dead_one_taken_over(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, kind, out], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        process.stdout.readline()

        def again() -> Any:
            return new_folder(out, verb="test") if kind == "new" else open_folder(out, verb="test", names=["a"])

        with (
            pytest.raises(InputError, match=rf"process {process.pid}, started \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"),
            again(),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    assert len(list(tmp_path.rglob(f"{RESERVED}*"))) == (2 if kind == "new" else 1)
    with again() as folder:
        files.write_text(folder / "a", "b")
    assert f"from process {process.pid}, started" in caplog.text
    assert len(caplog.records) <= 2
    assert not list(tmp_path.rglob(f"{RESERVED}*"))
    assert (out / "a").read_text() == "b"


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "FIFO", "folder", "text"])
def test_what_only_has_the_name_of_a_lock_is_left_alone(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "precious.txt"
    own.write_text("precious")
    (tmp_path / "run").mkdir()
    for place in (outputs._beside(tmp_path / "lk"), tmp_path / "run" / f"{RESERVED}lock"):
        if kind in ("link", "dangling link"):
            place.symlink_to(own if kind == "link" else tmp_path / "nowhere")
        elif kind == "hard link":
            os.link(own, place)
        elif kind == "FIFO":
            os.mkfifo(place)
        elif kind == "folder":
            place.mkdir()
        else:
            place.write_text('{"pid": 1}')
    said = [refused(["data", "make", "shapes", "--count", "1", "--out", str(tmp_path / "lk")], tmp_path, capsys)]
    before = state(tmp_path)
    for write in (open_folder(tmp_path / "run", verb="test", names=["a"]), new_folder(tmp_path / "run", verb="test")):
        with pytest.raises(InputError) as error, write:
            pass
        said.append(str(error.value))
    assert state(tmp_path) == before
    assert all("has the name of the lock of" in text for text in said)


@pytest.mark.parametrize("left", [b"", bytes(120)])
def test_what_a_power_cut_leaves_of_a_lock_is_taken_over(left: bytes, tmp_path: Path) -> None:
    outputs._beside(tmp_path / "out").write_bytes(left)
    written(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_the_file_system_has_no_locks_the_record_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdit_lora import locks

    monkeypatch.setattr(locks, "fcntl", None)
    path = tmp_path / f"{RESERVED}lock"
    me = vars(this_process())
    parent = {"pid": os.getppid(), "start": locks.start_of(os.getppid())}
    for record, message in (
        ({}, None),
        ({"pid": 2**22 + 1}, None),  # no process has this number
        ({"start": 1}, None),  # another process had this number
        (parent, f"process {os.getppid()}"),
        ({"host": "elsewhere"}, "on elsewhere.*\n.*if that process is gone, remove"),
    ):
        path.write_text(json.dumps(me | record))
        lock = FolderLock.at(path, tmp_path)
        if message is None:
            lock.acquire()
            lock.release()
            assert not path.exists()
        else:
            with pytest.raises(InputError, match=message):
                lock.acquire()


def test_another_thread_of_this_process_is_refused_too(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with new_folder(tmp_path / "out", verb="test") as folder, ThreadPoolExecutor() as pool:
        (folder / "a").write_text("a")
        with pytest.raises(InputError, match="is at work there"):
            pool.submit(written, tmp_path / "out").result()
    check_new_folder(tmp_path / "out", verb="test")


# --- kills


def killed_at(step: int, action: Callable[[], None]) -> bool:
    """Run `action` in a fork that is killed at its `step`-th change of a directory or fsync; whether it came to that."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def counted(name: str) -> None:
            original = getattr(os, name)

            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), 9)
                return original(*args, **kwargs)

            setattr(os, name, wrapper)

        try:
            for name in ("mkdir", "open", "rename", "replace", "fsync", "rmdir", "unlink", "ftruncate"):
                counted(name)
            exchange = files._exchange

            def exchanged(one: Path, other: Path) -> bool:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), 9)
                return exchange(one, other)

            files._exchange = exchanged
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one_step", "before"),
    [
        pytest.param(True, None, id="fresh", marks=pytest.mark.slow),
        pytest.param(True, "old", id="replaced by renameat2"),
        pytest.param(False, "old", id="replaced by two renames", marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_step_of_a_folder(
    one_step: bool, before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not one_step:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    step, killed = 0, True
    while killed:
        step += 1
        out = tmp_path / f"{step}" / "out"
        out.parent.mkdir()
        if before:
            written(out, before)
        killed = killed_at(step, lambda out=out: written(out, "killed"))  # type: ignore[misc]
        there = (out / "inner" / "a.txt").read_text() if out.exists() else None
        assert there in (before, "killed") or (not one_step and there is None), "whole, old or new"
        # The next start that fails puts back what was there.
        with pytest.raises(InputError, match="wrong"), new_folder(out, verb="test"):
            raise InputError("wrong")
        there = (out / "inner" / "a.txt").read_text() if out.exists() else None
        assert there in (before, "killed")
        written(out, "next")
        assert (out / "inner" / "a.txt").read_text() == "next"
        assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing is left"
        assert sorted(path.name for path in out.iterdir()) == [MARKER, "inner"]
    assert step > 15


def open_and_write(out: Path, text: str) -> None:
    with open_folder(out, verb="test", names=["report.json", "adapter/"]):
        files.write_text(out / "report.json", text)
        written(out / "adapter", text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "before", [pytest.param(None, id="fresh"), pytest.param("old", id="replaced", marks=pytest.mark.slow)]
)
def test_killed_at_every_step_of_an_open_folder(before: str | None, tmp_path: Path) -> None:
    step, killed = 0, True
    while killed:
        step += 1
        out = tmp_path / f"{step}" / "out"
        out.parent.mkdir()
        if before:
            open_and_write(out, before)
        killed = killed_at(step, lambda out=out: open_and_write(out, "killed"))  # type: ignore[misc]
        open_and_write(out, "next")
        assert (out / "report.json").read_text() == (out / "adapter" / "inner" / "a.txt").read_text() == "next"
        assert not list(tmp_path.rglob(f"{RESERVED}*"))
        stamps = Marker.read(out)
        assert stamps is not None
        assert stamps.files == {"report.json": outputs._stamp(out / "report.json"), "adapter/": None}
    assert step > 25


def test_what_a_live_process_writes_is_left_alone(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out"), atomic_file(tmp_path / "file"):
        assert files.remove_all_temporaries(tmp_path) == []
        assert len(list(tmp_path.iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_empty_temporaries_of_earlier_versions_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".report.json.k3j2h1g0.json").touch()
    open_and_write(out, "new")
    assert not list(out.glob(".report*"))
    (out / ".report.json.my_notes.json").write_text("mine")
    open_and_write(out, "again")
    assert (out / ".report.json.my_notes.json").read_text() == "mine"


# --- signals and streams


def start(*argv: object, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmdit_lora", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **more)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 15], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_at_any_moment_gives_one_message(number: int, inputs: Inputs, tmp_path: Path) -> None:
    import time

    for moment in (0.3, 0.6, 1.0, 2.0, 3.5, 5.0, 7.0):
        out = tmp_path / "signal"
        process = start(*call("sample", inputs, out))
        time.sleep(moment)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        if process.returncode == 0:  # on a fast machine
            break
        if process.returncode == -number and moment < 1:
            continue  # before the program's first line
        assert process.returncode == 130, said
        assert re.fullmatch(r"interrupted by (Ctrl-C|SIGTERM)", said.strip().splitlines()[-1])
        assert "Traceback" not in said
        assert not out.exists()
        assert not list(tmp_path.rglob(f"{RESERVED}*"))


@pytest.mark.parametrize("redirection", [">&-", "> /dev/full", "| head -c 0", "> /dev/full 2>&1", ">&- 2>&-"])
def test_a_standard_output_that_takes_nothing(redirection: str) -> None:
    command = f"{sys.executable} -m mmdit_lora data formats --json {redirection}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if "head" in redirection:
        assert done.returncode in (0, 1)  # 0: head was late to go
    else:
        assert done.returncode == 2
        if "2>" not in redirection:
            assert done.stderr.startswith("error: standard output: ")
