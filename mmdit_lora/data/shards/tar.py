"""Tar shards: members of one key are one record (the convention of the package webdataset, its page "The WebDataset format").

    000001.jpg     the image (jpg, jpeg, png, webp)
    000001.json    {"caption": "...", "objects": {"bbox": [...], "phrase": [...]}}, as a line of metadata.jsonl without file_name
    000001.txt     the caption, where the json has none

A key is a member's name up to the first dot behind its last slash. Members of other endings are ignored.

`NAME.tar.index.safetensors` beside a shard says what is known without reading it: one tensor "rows" (records, bytes of a row)
uint8, mapped; its header says how a row is read (a NumPy structured type) and of which shard it is. Text is not in it: a layout
is parsed when its record is asked for, which takes one ranged read.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from safetensors.numpy import save_file

from mmdit_lora.boxes import EdgeCount
from mmdit_lora.data.images import MOST_BYTES, image_size, load_image
from mmdit_lora.data.records import COLUMNS, Record, layout_columns, parse_layout
from mmdit_lora.data.shards.records import Part, ShardRecord
from mmdit_lora.data.shards.store import Stored, find
from mmdit_lora.data.split import name_key
from mmdit_lora.errors import InputError, several
from mmdit_lora.files import atomic_file, decode_text, inside, json_text, require_file
from mmdit_lora.json_files import parse_json
from mmdit_lora.layout import Clipped, Layout
from mmdit_lora.outputs import new_folder

VERSION, SUFFIX = "2", ".index.safetensors"
IMAGES = ("jpg", "jpeg", "png", "webp")
CONVENTIONS = "xyxy relative"  # what is written, and what readers take where nothing is declared
_BLOCK, _NEAR = tarfile.BLOCKSIZE, 64 * 1024  # bytes; members of a remote record that lie so near are read at once
_MOST_HEADER = 10**6  # bytes
_UNUSABLE = (InputError, OSError, ValueError, LookupError, TypeError, SyntaxError, AttributeError, RecursionError)
# Places are counted in tar's blocks of 512 bytes, so that 32 bits reach 2 TB. `content` and `meta` are XXH3 (64 bits) of the
# image's file and of what says the layout; `boxes` is how many the latter has; `key` says which side of a split it is on.
_FIELDS = [
    *((name, "<u4") for name in ("image", "image_bytes", "json", "json_bytes", "text", "text_bytes")),
    *((name, "<u4") for name in ("width", "height", "boxes")),
    *((name, "<u8") for name in ("content", "meta", "key")),
]


class _Member(NamedTuple):
    name: str
    block: int
    content: bytes


Members = dict[str, _Member]
Row = tuple[Any, ...]


def digest(*parts: bytes) -> int:
    """XXH3 of 64 bits over the parts."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()


class TarPart(Part):
    """A tar shard that is open: its index, and its records by ranged reads. Without an index it is looked through once.

    Args:
        edges: counts the boxes that were clipped when the shard was looked through. on_warning: called with a line for people.

    Raises:
        InputError: the shard, or a record of it, is wrong and no index says that it was right.
    """

    def __init__(
        self, stored: Stored, *, bbox_format: str, bbox_units: str, edges: EdgeCount, on_warning: Callable[[str], None]
    ) -> None:
        self.stored, self._reading = stored, {"bbox_format": bbox_format, "bbox_units": bbox_units}
        self._conventions = f"{bbox_format} {bbox_units}"
        rows, counted = load_index(stored, self._conventions)
        if rows is None:
            if stored.is_remote:
                on_warning(
                    f"{stored.name}: has no index beside it, so all of it is read at every start; `data shard` writes them"
                )
            rows = _scan(stored, self._reading, counted)
            if not stored.is_remote:
                try:
                    save_index(stored, rows, self._conventions, counted)
                    mapped, _ = load_index(stored, self._conventions)
                    rows = rows if mapped is None else mapped
                except OSError as error:
                    on_warning(
                        f"{stored.name}: its index cannot be kept beside it ({error.strerror}) and is made at every start"
                    )
        self.rows: np.ndarray = rows
        self.blocks = (len(rows),)
        edges.merge(counted)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which maps the index anew: a mapped array would be sent as a copy."""
        return vars(self) | ({"rows": None} if isinstance(self.rows, np.memmap) else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.rows is None:
            rows, _ = load_index(self.stored, self._conventions)
            if rows is None:
                raise InputError("its index has changed during the run", location=self.name, hint="start again")
            self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        return self.rows[name]

    def record(self, index: int) -> ShardRecord:
        row = self.rows[index]
        member = bytes(row["name"]).decode()
        inside(".", member, location=self.name, what="member")  # an index may have been written by anyone
        location = f"{self.name}:{_key_of(member)[0]}"
        places = {
            kind: (int(row[kind]) * _BLOCK, int(row[f"{kind}_bytes"]))
            for kind in ("json", "text", "image")
            if row[f"{kind}_bytes"]
        }
        content, pixels = int(row["content"]), (int(row["width"]), int(row["height"]))
        try:
            held = self._read_together(places)
            data, text = held["json"], held.get("text", b"")
            self._verify(int(row["meta"]), data, text)
            layout, extra = _read_layout(data, text or None, lambda: pixels, self._reading)
        except InputError as error:
            raise InputError(error.what, location=location, hint=error.hint) from None
        near = held.get("image")

        def read() -> bytes:
            image = self.stored.read(*places["image"]) if near is None else near
            self._verify(content, image)
            return image

        image = Path(self.name) / member
        return ShardRecord(image=image, layout=layout, location=location, extra=extra, read=read, pixels=pixels)

    def _read_together(self, places: dict[str, tuple[int, int]]) -> dict[str, bytes]:
        """The texts of a record; of a remote one its image too where that costs no second request."""
        texts = {kind: place for kind, place in places.items() if kind != "image"}
        wanted = places if self.is_remote else texts
        first = min(start for start, _ in wanted.values())
        last = max(start + length for start, length in wanted.values())
        if last - first > sum(length for _, length in wanted.values()) + _NEAR:
            return {kind: self.stored.read(*place) for kind, place in texts.items()}
        together = self.stored.read(first, last - first)
        return {kind: together[start - first : start - first + length] for kind, (start, length) in wanted.items()}

    def _verify(self, wanted: int, *parts: bytes) -> None:
        if digest(*parts) != wanted:
            hint = "start again, and the index is made anew; do not change shards during a run"
            if self.is_remote:
                hint = "store the shard together with the index that `data shard` wrote beside it, or without any"
            raise InputError("is not what it was when the shard's index was made", hint=hint)


# --- the index --------------------------------------------------------------------------------------------------------


def _row_type(longest_name: int) -> np.dtype:
    """The type of a row; `name` is the image's member name as UTF-8, padded."""
    return np.dtype([*_FIELDS, ("name", f"S{max(1, longest_name)}")])


def save_index(shard: Stored, rows: np.ndarray, conventions: str, edges: EdgeCount | None = None) -> None:
    """Write a shard's index beside it. Raises `OSError` where the folder cannot be written to.

    Args:
        edges: the boxes that were clipped, which is said at every opening.
    """
    stamp: dict[str, Any] = {**_stamp(shard, conventions), "row": rows.dtype.descr, "xxh3": _checksum(rows)}
    if edges is not None and edges.boxes:
        stamp["clipped"] = vars(edges)
    header = {"shard": json.dumps(stamp)}  # one key: the order of several varies
    with atomic_file(Path(shard.name + SUFFIX)) as temporary:
        save_file({"rows": rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize)}, temporary, metadata=header)


def load_index(shard: Stored, conventions: str) -> tuple[np.ndarray | None, EdgeCount]:
    """The rows of a shard and its clipped boxes; None where there is no index, or not of the shard as it is now.

    Of a local shard they are mapped. Of a remote one they are in memory, and that the shard is of the same size has to do:
    uploading changes its time, and whatever is read later is compared with the index's hashes.

    Args:
        conventions: how boxes are read where a record does not say it; layouts were checked under these.
    """
    try:
        if shard.is_remote:
            data = np.frombuffer(shard.neighbour(SUFFIX), dtype=np.uint8)
        else:
            data = np.memmap(require_file(Path(shard.name + SUFFIX)), dtype=np.uint8, mode="r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + min(length, _MOST_HEADER)].tobytes())
        stamp, tensor = json.loads(header["__metadata__"]["shard"]), header["rows"]
        wanted = _stamp(shard, conventions)
        if any(stamp[key] != value for key, value in wanted.items() if not (shard.is_remote and key == "stamp")):
            return None, EdgeCount()
        kind = np.dtype([tuple(entry) for entry in stamp["row"]])
        (count, width), (first, last) = tensor["shape"], tensor["data_offsets"]
        if (kind, tensor["dtype"], kind.itemsize) != (_row_type(kind["name"].itemsize), "U8", width):
            return None, EdgeCount()
        if last - first != count * width or len(data) != 8 + length + last:
            return None, EdgeCount()
        rows = data[8 + length + first :].view(kind)
        clipped = stamp.get("clipped", {})
        places = [*map(str, clipped.get("places", []))]
        edges = EdgeCount(int(clipped.get("boxes", 0)), float(clipped.get("most", 0)), places)
        if _checksum(rows) == stamp["xxh3"]:
            return rows, edges
    except _UNUSABLE:
        pass  # whatever it is, a new one is made
    return None, EdgeCount()


def _checksum(rows: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(rows.view(np.uint8).data)


def _stamp(shard: Stored, conventions: str) -> dict[str, str]:
    return {"version": VERSION, "size": str(shard.size), "stamp": shard.stamp, "boxes": conventions}


# --- looking through a shard ------------------------------------------------------------------------------------------


def _scan(shard: Stored, reading: dict[str, str], edges: EdgeCount) -> np.ndarray:
    """The rows of a shard's index, in the order of its keys' first members. Every layout and every image's header is read.

    Args:
        edges: counts the boxes that were clipped.

    Raises:
        InputError: it is no whole tar file, a record lacks a member, or some are wrong; with `shard:key`.
    """
    rows: list[Row] = []
    errors: list[InputError] = []
    try:
        for key, members in _records(shard):
            clipped: Clipped = []
            try:
                rows.append(_scanned_row(members, reading, clipped))
            except InputError as error:
                errors.append(error.at(f"{shard.name}:{key}"))
            for by, place in clipped:
                edges.add(by, f"{shard.name}:{key}: {place}")
    except InputError as error:  # the shard itself is wrong, from there on
        errors.append(error)
    if errors:
        raise several(errors, location=shard.name)
    if not rows:
        raise InputError("holds no record", location=shard.name, hint=f"a record is KEY.{IMAGES[0]} and KEY.json")
    return _rows(rows)


def _rows(rows: list[Row]) -> np.ndarray:
    return np.array(rows, dtype=_row_type(max(len(row[-1]) for row in rows)))


def _row(image: _Member, layout: _Member, text: _Member, size: tuple[int, int], boxes: int, file_name: Any) -> Row:
    """One row of an index, in the order of `_FIELDS`. `file_name`: that the record states; without, bytes say the side."""
    places = [value for member in (image, layout, text) for value in (member.block, len(member.content))]
    content = digest(image.content)
    key = name_key(file_name) if isinstance(file_name, str) and file_name else content
    name = image.name.encode("utf-8", "surrogateescape")
    return (*places, *size, boxes, content, digest(layout.content, text.content), key, name)


def _scanned_row(members: Members, reading: dict[str, str], clipped: Clipped) -> Row:
    image, layout, caption = (members.get(kind) for kind in ("image", "json", "txt"))
    if image is None:
        raise InputError("has no image", hint=f"give it one: {', '.join(IMAGES)}")
    if not image.content:
        raise InputError("its image is empty, 0 bytes")
    if layout is None:
        raise InputError("has no .json", hint="each image has its layout beside it, under the same key")
    size, text = image_size(image.content), caption or _Member("", 0, b"")
    parsed, _ = _read_layout(layout.content, caption and caption.content, lambda: size, reading, clipped)
    file_name = parse_json(decode_text(layout.content, location=""), location="").get("file_name")
    return _row(image, layout, text, size, len(parsed.boxes), file_name)


def _read_layout(
    data: bytes,
    caption: bytes | None,
    size: Callable[[], tuple[int, int]],
    reading: dict[str, str],
    clipped: Clipped | None = None,
) -> tuple[Layout, tuple[str, ...]]:
    """Layout and ignored keys of a record's json and txt. Raises `InputError` without place."""
    parsed = parse_json(decode_text(data, location="its .json"), location="its .json")
    extra: tuple[str, ...] = ()
    if isinstance(parsed, dict):
        if parsed.get("caption") is None and caption is not None:
            parsed["caption"] = decode_text(caption, location="its .txt").strip()
        extra = tuple(str(key) for key in parsed if key not in COLUMNS)
    return parse_layout(parsed, size, **reading, clipped=clipped), extra


def _key_of(member: str) -> tuple[str, str]:
    """(key, kind) of a member's name; the kind is "image" or its ending."""
    folder, slash, base = member.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}{slash}{stem}", "image" if ending.lower() in IMAGES else ending.lower()


def _records(shard: Stored) -> Iterator[tuple[str, Members]]:
    """(key, its members), which by the convention are neighbours."""
    seen: set[str] = set()
    current: Members = {}
    last = None
    for member in _members(shard):
        inside(".", member.name, location=shard.name, what="member")
        key, kind = _key_of(member.name)
        if kind not in ("image", "json", "txt"):
            continue
        if key != last:
            if last is not None:
                yield last, current
            current, last = {}, key
            if key in seen:
                raise InputError(
                    "its members are not together, or the key comes twice",
                    location=f"{shard.name}:{key}",
                    hint="write each record's members one after the other, under a key of its own",
                )
            seen.add(key)
        if kind in current:
            raise InputError(f"has two members that are its {kind}", location=f"{shard.name}:{key}")
        current[kind] = member
    if last is not None:
        yield last, current


def _members(shard: Stored) -> Iterator[_Member]:
    try:
        with shard.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all that it has seen
                if not info.isreg():
                    continue
                location = f"{shard.name}:{info.name}"
                if info.size > MOST_BYTES:
                    raise InputError(f"has {info.size:,} bytes, and a member at most {MOST_BYTES:,}", location=location)
                handle = tar.extractfile(info)
                content = b"" if handle is None else handle.read()
                if len(content) != info.size:
                    raise InputError("is cut off", location=location, hint="restore the shard")
                yield _Member(info.name, info.offset_data // _BLOCK, content)
            end = tar.offset
    except OSError as error:  # the store fails while it is read
        raise InputError(f"cannot be read ({error})", location=shard.name) from None
    except (tarfile.TarError, EOFError) as error:
        what, hint = f"is no whole tar file ({error})", "restore the shard; compressed ones are not read"
        raise InputError(what, location=shard.name, hint=hint) from None
    if shard.size < end + _BLOCK:
        what = "is cut off: its end-of-archive mark is missing"
        raise InputError(what, location=shard.name, hint="restore the shard")


# --- writing ----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes `shard-000000.tar`, ... and an index of each into a folder, which it must have for itself.

    Args:
        size: bytes after which a shard is full; one record may be larger.
    """

    def __init__(self, folder: Path, *, size: int) -> None:
        self.folder, self.size = folder, size
        self.records = self.shards = 0
        self._tar: tarfile.TarFile | None = None
        self._rows: list[Row] = []

    def add(self, image: bytes, ending: str, layout: Layout, *, file_name: str | None = None) -> None:
        """Append a record; its key is its number.

        Args:
            image: the content of a file of `IMAGES`, `ending` without dot. file_name: kept in the json: it says on which
                side of a split the record is.

        Raises:
            InputError: `image` is none, without place.
        """
        size = image_size(image)
        named = {} if file_name is None else {"file_name": file_name}
        text = json_text({**named, **layout_columns(layout)}).encode()
        if self._tar is not None and self._tar.offset + len(image) + len(text) + 4096 > self.size:
            self.close()
        if self._tar is None:
            self._tar = tarfile.open(self._path(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed in `close`
        key = f"{self.records:09d}"
        first = _add_member(self._tar, f"{key}.{ending}", image)
        second = _add_member(self._tar, f"{key}.json", text)
        self._rows.append(_row(first, second, _Member("", 0, b""), size, len(layout.boxes), file_name))
        self._tar.members = []  # type: ignore[attr-defined]  # tarfile keeps what it has written
        self.records += 1

    def close(self) -> None:
        """Finish the last shard."""
        if self._tar is not None:
            self._tar.close()
            save_index(find(str(self._path())), _rows(self._rows), CONVENTIONS)
            self._tar, self._rows = None, []
            self.shards += 1

    def _path(self) -> Path:
        return self.folder / f"shard-{self.shards:06d}.tar"


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> _Member:
    """Append a member whose bytes depend on nothing but name and content."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    tar.addfile(info, BytesIO(content))
    return _Member(name, tar.offset // _BLOCK - -(-len(content) // _BLOCK), content)


def write_shards(out: str | Path, records: Iterable[Record], *, size: int) -> ShardWriter:
    """Write records as tar shards with indices into the folder `out`: all of them, or nothing.

    An image's file is taken as it is (of an ending that is not one of `IMAGES`: as PNG), and decoded once, so that no
    damaged one is passed on.

    Returns:
        The closed writer, for its counts.

    Raises:
        InputError: `out` holds something else than earlier shards, or an image cannot be read.
    """
    with new_folder(out, verb="data shard") as folder:
        writer = ShardWriter(folder, size=size)
        for record in records:
            content, ending = record.read_bytes(), record.image.suffix.lower().lstrip(".")
            try:
                image = load_image(content)
            except InputError as error:
                raise error.at(record.location) from None
            if ending not in IMAGES:
                image.save(target := BytesIO(), format="PNG")
                content, ending = target.getvalue(), "png"
            writer.add(content, ending, record.layout, file_name=record.name)
        if not writer.records:
            raise InputError("there is no image to write", hint="a data set holds at least one image")
        writer.close()
    return writer
