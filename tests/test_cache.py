"""The cache on disk: keyed by content, whole or not there, made once, and never different from what it stands for."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config
from mmdit_lora.data.cache import LATENTS, PHRASES, PROMPTS, VIEWS, WEIGHTS, EncodingCache, Entry, content_key
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError
from mmdit_lora.training.encoding import LayoutEncoder
from mmdit_lora.training.fill_cache import fill_cache
from mmdit_lora.training.trainer import prepare_run, train

FORK = multiprocessing.get_context("fork")
DRAWN = {"crop": "random", "flip": True, "cache_variants": 3}


def make_config(base: Path, data: Path, out: Path = Path("unused"), **changes: Any) -> Config:
    length = {"max_steps": 9, "batch_size": 2, "checkpoint_every": 0, "sample_every": 0, "validate_every": 0}
    section = {"path": str(data), "validation_share": 0.25, **changes}
    return Config.model_validate({"base": str(base), "output_dir": str(out), "data": section, "train": length})


def fill(base: Path, data: Path, root: Path, **changes: Any) -> EncodingCache:
    cache = EncodingCache(root)
    fill_cache(make_config(base, data, **changes), cache)
    return cache


def files(root: Path) -> dict[str, bytes]:
    """Every file but the locks."""
    found = (path for path in root.rglob("*") if path.is_file() and path.parent.name != "locks")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def filled(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `base` and `data`; copy it to change it."""
    root = tmp_path_factory.mktemp("cache")
    fill(base, data, root)
    return root


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(filled, tmp_path / "cache")


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A copy with the same times: not the place of a file decides, but what is in it."""
    return shutil.copytree(base, tmp_path / "base")


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data, tmp_path / "elsewhere" / "data")


def some_entry() -> Entry:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5, -2], dtype=torch.bfloat16)}
    return Entry(tensors, {"said": "é", "list": [1, 0.1]})


def test_an_entry_is_read_as_it_was_written_and_any_damage_is_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, key, made = EncodingCache(tmp_path), content_key("k"), some_entry()
    assert cache.read(LATENTS, key) is None
    cache.write(LATENTS, key, made)
    read = cache.read(LATENTS, key)
    assert read is not None
    assert read.note == made.note
    assert read.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(read.tensors[n], t) and read.tensors[n].dtype == t.dtype for n, t in made.tensors.items())
    stored = load_file(cache.path(LATENTS, key))  # an ordinary safetensors file
    assert torch.equal(stored["a"], made.tensors["a"])

    path = cache.path(LATENTS, key)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert EncodingCache(tmp_path).read(LATENTS, key, warn=False) is None, f"byte {at}"
    for length in (0, 1, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert cache.read(LATENTS, key, warn=False) is None
    assert not caplog.records
    assert cache.get(LATENTS, key, some_entry).note == made.note
    assert path.read_bytes() == whole, "the same entry has the same bytes"
    assert cache.stats.damaged == {LATENTS: 1}
    assert cache.stats.misses == {LATENTS: 1}
    assert [record.message for record in caplog.records] == [f"{path} is damaged: it is made anew"]


def test_a_large_entry_is_mapped_and_outlives_its_file(tmp_path: Path) -> None:
    cache, key = EncodingCache(tmp_path), content_key("large")
    large = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    cache.write(PROMPTS, key, Entry({"x": large}))
    read = cache.read(PROMPTS, key)
    assert read is not None
    cache.path(PROMPTS, key).unlink()
    assert torch.equal(read.tensors["x"], large)
    assert cache.read(PROMPTS, key) is None


def test_least_recently_used_entries_are_pruned_first(tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path)
    keys = [content_key(number) for number in range(4)]
    for age, key in enumerate(keys):  # the first is the oldest
        cache.write(LATENTS, key, Entry({"x": torch.zeros(100)}))
        long_ago = time.time_ns() - (10 - age) * 3600 * 10**9
        os.utime(cache.path(LATENTS, key), ns=(long_ago, long_ago))
    assert cache.read(LATENTS, keys[0]) is not None  # used now
    size = cache.path(LATENTS, keys[0]).stat().st_size
    assert cache.prune(4 * size) == (0, 0)
    assert cache.prune(2 * size + 1) == (2, 2 * size)
    assert [(LATENTS, key) in cache for key in keys] == [True, False, False, True]
    assert cache.size() == {LATENTS: {"entries": 2, "bytes": 2 * size}}


@pytest.mark.parametrize("changes", [{}, DRAWN], ids=["fixed", "variants"])
def test_training_gives_the_same_bits_with_and_without(base: Path, data: Path, tmp_path: Path, changes: Any) -> None:
    cache = str(tmp_path / "cache")
    train(make_config(base, data, tmp_path / "without", **changes))
    train(make_config(base, data, tmp_path / "fresh", cache=cache, **changes))
    before = files(tmp_path / "cache")
    train(make_config(base, data, tmp_path / "again", cache=cache, **changes))
    assert files(tmp_path / "cache") == before
    assert {name.split("/")[1] for name in before} == {LATENTS, PROMPTS, PHRASES, VIEWS, WEIGHTS}
    plain, *cached = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("without", "fresh", "again")
    )
    assert plain
    for other in cached:
        assert other.keys() == plain.keys()
        assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("changes", [{}, DRAWN], ids=["fixed", "variants"])
def test_training_from_a_full_cache_neither_decodes_nor_encodes(
    base: Path, data: Path, tmp_path: Path, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(base, data, tmp_path / "cache", **changes)

    def refuse(*_: Any) -> None:
        raise AssertionError("the encoders were asked")

    for owner, name in (
        (Record, "load"),
        (LayoutEncoder, "latents"),
        (LayoutEncoder, "encode_captions"),
        (LayoutEncoder, "encode_phrases"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    run = prepare_run(make_config(base, data, tmp_path / "run", cache=str(tmp_path / "cache"), **changes))
    for first in range(0, 40, 4):
        run.examples.batch(range(first, first + 4))
    assert run.held_out is not None
    run.held_out.batch(range(3))
    assert run.examples.encoder.cache.root is not None
    assert not run.examples.encoder.cache.stats.misses


def test_variants_are_so_many_an_image_and_functions_of_seed_and_position(base: Path, data: Path) -> None:
    examples = prepare_run(make_config(base, data, **DRAWN)).examples
    again = prepare_run(make_config(base, data, **DRAWN)).examples
    seen: dict[str, set[bytes]] = {}
    for position in range(90):
        latents = examples.batch([position]).x0
        seen.setdefault(str(examples.record_at(position).image), set()).add(latents.numpy().tobytes())
        if position % 10 == 9:
            assert torch.equal(again.batch([position]).x0, latents)
    assert len(seen) == 9
    # Square images have one crop: their variants are the image and its mirror image.
    assert max(len(views) for views in seen.values()) == 2
    fresh = prepare_run(make_config(base, data, crop="random", flip=True)).examples
    assert fresh.variants is None
    assert prepare_run(make_config(base, data, cache_variants=3)).examples.variants == 1, "nothing is drawn"


def test_random_images_without_variants_are_not_stored(base: Path, data: Path, tmp_path: Path) -> None:
    cache = fill(base, data, tmp_path, flip=True)
    assert cache.size().keys() == {PROMPTS, PHRASES, WEIGHTS}


def test_the_same_content_elsewhere_is_found(own_base: Path, own_data: Path, cache: Path) -> None:
    for number, image in enumerate(sorted(own_data.rglob("*.png"))):  # other names, in another order
        image.rename(image.with_name(f"renamed{99 - number}.png"))
    lines = [json.loads(line) for line in (own_data / "metadata.jsonl").read_text().splitlines()]
    names = {p: f"renamed{99 - n}.png" for n, p in enumerate(sorted({line["file_name"] for line in lines}))}
    lines = [
        line | {"file_name": Path(line["file_name"]).with_name(names[line["file_name"]]).as_posix()} for line in lines
    ]
    (own_data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    done = fill(own_base, own_data, cache)
    assert done.stats.misses.keys() == {WEIGHTS}, "files elsewhere are hashed once"
    assert done.stats.hits[LATENTS] == 12
    assert fill(own_base, own_data, cache).stats.misses == {}


def test_an_edited_caption_rebuilds_its_embedding_alone(base: Path, own_data: Path, cache: Path) -> None:
    lines = (own_data / "metadata.jsonl").read_text().splitlines()
    edited = json.loads(lines[5])
    edited["caption"] += " seen twice"
    (own_data / "metadata.jsonl").write_text("\n".join([*lines[:5], json.dumps(edited), *lines[6:]]) + "\n")
    # The view holds the caption; it is a note, and encodes nothing.
    assert fill(base, own_data, cache).stats.misses == {PROMPTS: 1, VIEWS: 1}


def test_an_edited_phrase_rebuilds_its_embedding_alone(base: Path, own_data: Path, cache: Path) -> None:
    lines = (own_data / "metadata.jsonl").read_text().splitlines()
    edited = json.loads(lines[5])
    edited["objects"]["phrase"][0] = "a phrase that was not there"
    (own_data / "metadata.jsonl").write_text("\n".join([*lines[:5], json.dumps(edited), *lines[6:]]) + "\n")
    assert fill(base, own_data, cache).stats.misses == {PHRASES: 1, VIEWS: 1}


def test_an_edited_pixel_rebuilds_its_latents_alone(base: Path, own_data: Path, cache: Path) -> None:
    path = sorted(own_data.rglob("*.png"))[4]
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    status = path.stat()
    image.save(path, compress_level=0)  # the same pixels in another file
    assert fill(base, own_data, cache).stats.misses == {VIEWS: 1}
    red, *rest = image.getpixel((0, 0))  # type: ignore[misc]
    image.putpixel((0, 0), ((red + 128) % 256, *rest))
    image.save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # its time says nothing
    assert fill(base, own_data, cache).stats.misses == {VIEWS: 1, LATENTS: 1}


@pytest.mark.parametrize(
    ("part", "kinds"),
    [("vae", {LATENTS}), ("text_encoder", {PROMPTS, PHRASES}), ("text_encoder_2", {PROMPTS, PHRASES})],
)
def test_an_edited_weight_rebuilds_what_its_encoder_made(
    own_base: Path, data: Path, cache: Path, part: str, kinds: set[str]
) -> None:
    fill(own_base, data, cache)
    (file,) = (own_base / part).glob("*.safetensors")
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    there = EncodingCache(cache).size()
    done = fill(own_base, data, cache)
    assert done.stats.misses == {**{kind: there[kind]["entries"] for kind in kinds}, WEIGHTS: 1}
    weights = load_file(own_base / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({n: t + 1 for n, t in weights.items()}, own_base / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not fill(own_base, data, cache).stats.misses, "the transformer encodes nothing"


@pytest.mark.parametrize(
    ("changes", "kinds"), [({"resolution": 16}, {LATENTS, VIEWS}), ({"bbox_format": "xyxy"}, set())]
)
def test_settings_rebuild_what_depends_on_them(
    base: Path, data: Path, cache: Path, changes: dict[str, Any], kinds: set[str]
) -> None:
    assert fill(base, data, cache, **changes).stats.misses.keys() == kinds


def test_another_dtype_has_other_entries(base: Path, data: Path, cache: Path) -> None:
    config = make_config(base, data)
    config = config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": "bf16"})})
    other = EncodingCache(cache)
    fill_cache(config, other)
    assert other.stats.misses.keys() == {LATENTS, PROMPTS, PHRASES}


def test_what_is_pruned_while_a_run_goes_on_is_made_again(base: Path, data: Path, cache: Path) -> None:
    examples = prepare_run(make_config(base, data, cache=str(cache))).examples
    examples.encoder.cache.max_bytes = 0  # as with a set that is larger than the memory
    before = examples.batch(range(9)).x0
    store = EncodingCache(cache)
    assert store.prune(0)[0] > 12
    assert torch.equal(examples.batch(range(9)).x0, before)
    assert store.size()[LATENTS]["entries"] == 9


def test_a_changed_image_is_refused_where_it_changed_under_the_hand(
    base: Path, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    fill(base, own_data, root)
    shutil.rmtree(root / "v1" / LATENTS)
    load = Record.load
    monkeypatch.setattr(Record, "load", lambda self: Image.eval(load(self), lambda value: 255 - value))
    with pytest.raises(InputError, match=r"\.png: changed while it was read"):
        fill(base, own_data, root)
    assert not EncodingCache(root).size().get(LATENTS)


def test_check_only_writes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    prepare_run(make_config(base, data, tmp_path / "run", cache=str(tmp_path / "cache")))
    assert not list(tmp_path.iterdir())


def child(base: Path, data: Path, root: Path, encoded: Any = None, gate: Any = None) -> None:
    """In a process of its own: a fill that begins when all are at the `gate`, and how many entries of a kind it made."""
    torch.set_num_threads(1)
    if gate is not None:
        gate.wait(60)
    cache = fill(base, data, root)
    if encoded is not None:
        encoded.put(dict(cache.stats.misses))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_killed_fills_end_in_the_bytes_of_an_undisturbed_one(
    base: Path, data: Path, filled: Path, tmp_path: Path, kills: int
) -> None:
    chance, killed, root = random.Random(kills), 0, tmp_path / "killed"
    count, counts = 0, []
    for _ in range(10 * kills):
        # A moment between two numbers of entries, and not by the clock: a busy machine would be killed while it loads the base.
        wanted = chance.randint(count, len(files(filled)) - 1)
        process = FORK.Process(target=child, args=(base, data, root))
        process.start()
        while process.is_alive() and sum(1 for _ in EncodingCache(root).entries()) < wanted:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        cache = EncodingCache(root)
        count, damaged = cache.verify()
        assert not damaged, "what is there is whole"
        counts.append(count)
        if killed == kills:
            break
        if count == len(files(filled)):  # full: the next one begins anew
            shutil.rmtree(root)
            count = 0
    assert killed == kills
    assert len(set(counts)) > 1, "every kill came at the same moment"
    child(base, data, root)
    assert files(root) == files(filled)


def test_half_written_files_are_removed_and_those_of_a_live_process_are_not(
    base: Path, data: Path, cache: Path
) -> None:
    store = EncodingCache(cache)
    dead, live = (store.path(LATENTS, content_key(name)) for name in ("dead", "live"))
    for path in (dead, live):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.abc.safetensors").write_bytes(b"half")
    with store._lock(live.stem):
        fill(base, data, cache)
    left = [path.name for path in cache.rglob(".*.safetensors")]
    assert left == [f".{live.name}.abc.safetensors"]
    assert store.sweep() == 1


def test_processes_that_fill_together_make_each_entry_once(
    base: Path, data: Path, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = LayoutEncoder.encode_captions

    def slowly(self: LayoutEncoder, captions: Any) -> Any:  # so that both are at it at the same time
        time.sleep(0.5)
        return encode(self, captions)

    monkeypatch.setattr(LayoutEncoder, "encode_captions", slowly)
    results, gate = FORK.Queue(), FORK.Barrier(2)
    arguments = (base, data, tmp_path / "both", results, gate)
    processes = [FORK.Process(target=child, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    made = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert files(tmp_path / "both") == files(filled)
    total = Counter(made[0]) + Counter(made[1])
    assert total == {kind: of_kind["entries"] for kind, of_kind in EncodingCache(filled).size().items()}
    assert all(each.total() for each in map(Counter, made)), "one of them did everything"


def test_an_entry_under_construction_is_left_or_waited_for(tmp_path: Path) -> None:
    cache, key = EncodingCache(tmp_path), content_key("k")

    def make_slowly(ready: Any) -> None:
        def make() -> Entry:
            ready.set()
            time.sleep(0.5)
            return Entry({}, "theirs")

        EncodingCache(tmp_path).get(VIEWS, key, make)

    ready = FORK.Event()
    process = FORK.Process(target=make_slowly, args=(ready,))
    process.start()
    assert ready.wait(10)
    assert cache.get_many(VIEWS, [key], lambda _: [Entry({}, "ours")], wait=False) == [None]
    assert cache.get(VIEWS, key, lambda: Entry({}, "ours")).note == "theirs"
    process.join()
    assert not cache.stats.misses
    assert cache.stats.hits == {VIEWS: 1}


def test_an_entry_whose_maker_was_killed_is_made_by_the_next(tmp_path: Path) -> None:
    cache, key = EncodingCache(tmp_path), content_key("k")

    def make_for_ever(ready: Any) -> None:
        def make() -> Entry:
            ready.set()
            time.sleep(60)
            return Entry({}, "theirs")

        EncodingCache(tmp_path).get(VIEWS, key, make)

    ready = FORK.Event()
    process = FORK.Process(target=make_for_ever, args=(ready,))
    process.start()
    assert ready.wait(10)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert cache.get(VIEWS, key, lambda: Entry({}, "ours")).note == "ours"


def test_the_command_fills_verifies_mends_and_prunes(
    base: Path, data: Path, filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "cache"
    command = ["data", "cache", str(data), "--base", str(base), "--out", str(root), "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert files(root) == files(filled)
    assert report["images"] == 12
    assert report["stats"]["misses"]["latents"] == 12
    assert report["bytes"] == sum(len(content) for content in files(root).values())

    broken = next(path for kind, _, path in EncodingCache(root).entries() if kind == LATENTS)
    broken.write_bytes(broken.read_bytes()[:-1] + b"\xff")
    assert main([*command, "--verify"]) == 0
    captured = capsys.readouterr()
    assert str(broken) in captured.err
    assert json.loads(captured.out)["verified"]["damaged"] == [str(broken)]
    assert json.loads(captured.out)["stats"]["misses"] == {"latents": 1}
    assert files(root) == files(filled)

    assert main([*command, "--prune", "20KB"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["bytes"] <= 20_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{data}", "--prune", "lots"], "--prune: is 'lots'"),
        (["{data}", "data.cache_variants=2"], "is for a config file"),
        (["{tmp}/none.yaml"], "no such config file"),
        (["{tmp}"], "metadata.jsonl"),
        (["{data}", "--out", "{data}/metadata.jsonl"], "is a file, not a folder"),
        (["{data}", "--base", "{tmp}/none"], "none"),
    ],
)
def test_wrong_input_is_refused(
    data: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "cache")]
    assert main(["data", "cache", *(a.format(data=data, tmp=tmp_path) for a in arguments), *out]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_file_where_the_cache_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        EncodingCache(tmp_path / "file" / "below")
