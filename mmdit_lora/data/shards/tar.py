"""Tar shards: members of one key are one record (the convention of the package webdataset, its page "The WebDataset format").

    000001.jpg     the image (jpg, jpeg, png, webp)
    000001.json    {"caption": "...", "objects": {"bbox": [...], "phrase": [...]}}, as a line of metadata.jsonl without file_name
    000001.txt     the caption, where the json has none

A key is a member's name up to the first dot behind its last slash. Members of other endings are ignored.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import xxhash

from mmdit_lora.boxes import EdgeCount
from mmdit_lora.data.images import MOST_BYTES, image_size
from mmdit_lora.data.records import COLUMNS, parse_layout
from mmdit_lora.data.shards.index import row_type
from mmdit_lora.data.shards.store import Stored
from mmdit_lora.data.split import name_key
from mmdit_lora.errors import InputError, several
from mmdit_lora.files import decode_text, inside
from mmdit_lora.json_files import parse_json
from mmdit_lora.layout import Clipped, Layout

IMAGES = ("jpg", "jpeg", "png", "webp")
_BLOCK = tarfile.BLOCKSIZE


@dataclass
class _Member:
    name: str
    block: int
    content: bytes


Keyed = tuple[str, dict[str, _Member]]


def scan(shard: Stored, *, bbox_format: str, bbox_units: str, edges: EdgeCount) -> np.ndarray:
    """The rows of a shard's index, in the order of its keys' first members. Every layout and every image's header is read.

    Args:
        edges: counts the boxes that were clipped.

    Raises:
        InputError: it is no whole tar file, a record lacks a member, or some are wrong; with `shard:key`.
    """
    rows: list[tuple[Any, ...]] = []
    errors: list[InputError] = []
    for key, members in _collected(_records(shard), errors):
        clipped: Clipped = []
        try:
            rows.append(_row(members, bbox_format, bbox_units, clipped))
        except InputError as error:
            errors.append(error.at(f"{shard.name}:{key}"))
        for by, place in clipped:
            edges.add(by, f"{shard.name}:{key}: {place}")
    if errors:
        raise several(errors, location=shard.name)
    if not rows:
        raise InputError("holds no record", location=shard.name, hint=f"a record is KEY.{IMAGES[0]} and KEY.json")
    names = max(len(row[-1]) for row in rows)
    return np.array(rows, dtype=row_type(names))


def _collected(records: Iterator[Keyed], errors: list[InputError]) -> Iterator[Keyed]:
    """The records up to the place where the shard itself is wrong, which is the last of the errors."""
    try:
        yield from records
    except InputError as error:
        errors.append(error)


def read_layout(
    data: bytes | None,
    caption: bytes | None,
    size: Callable[[], tuple[int, int]],
    *,
    bbox_format: str,
    bbox_units: str,
    clipped: Clipped | None = None,
) -> tuple[Layout, tuple[str, ...]]:
    """Layout and ignored keys of a record's json and txt. Raises `InputError` without place."""
    if data is None:
        raise InputError("has no .json", hint="each image has its layout beside it, under the same key")
    parsed = parse_json(decode_text(data, location="its .json"), location="its .json")
    if isinstance(parsed, dict):
        if parsed.get("caption") is None and caption is not None:
            parsed["caption"] = decode_text(caption, location="its .txt").strip()
        extra = tuple(str(key) for key in parsed if key not in COLUMNS)
    else:
        extra = ()
    return parse_layout(parsed, size, bbox_format=bbox_format, bbox_units=bbox_units, clipped=clipped), extra


def digest(*parts: bytes) -> int:
    """XXH3 of 64 bits over the parts."""
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()


def split_key(file_name: Any, content: bytes) -> int:
    """The key by which a record is held out (`mmdit_lora.data.split`): of its stated file name, else of its image's bytes."""
    return name_key(file_name) if isinstance(file_name, str) and file_name else digest(content)


def _row(members: dict[str, _Member], bbox_format: str, bbox_units: str, clipped: Clipped) -> tuple[Any, ...]:
    image, layout, caption = (members.get(kind) for kind in ("image", "json", "txt"))
    if image is None:
        raise InputError("has no image", hint=f"give it one: {', '.join(IMAGES)}")
    if not image.content:
        raise InputError("its image is empty, 0 bytes")
    size = image_size(image.content)
    found, _ = read_layout(
        layout.content if layout else None,
        caption.content if caption else None,
        lambda: size,
        bbox_format=bbox_format,
        bbox_units=bbox_units,
        clipped=clipped,
    )
    assert layout is not None
    text = caption or _Member("", 0, b"")
    return (
        image.block,
        len(image.content),
        layout.block,
        len(layout.content),
        text.block,
        len(text.content),
        *size,
        len(found.boxes),
        digest(image.content),
        digest(layout.content, text.content),
        split_key(parse_json(decode_text(layout.content, location=""), location="").get("file_name"), image.content),
        image.name.encode("utf-8", "surrogateescape"),
    )


def _records(shard: Stored) -> Iterator[Keyed]:
    """(key, its members), which by the convention are neighbours."""
    seen: set[str] = set()
    current: dict[str, _Member] = {}
    last = None
    for member in _members(shard):
        inside(".", member.name, location=shard.name, what="member")
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        key, ending = f"{folder}{slash}{stem}", ending.lower()
        kind = "image" if ending in IMAGES else ending
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
    with shard.open() as file:
        yield from _members_of(file, shard)


def _members_of(file: BinaryIO, shard: Stored) -> Iterator[_Member]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all that it has seen
                if not info.isreg():
                    continue
                if info.size > MOST_BYTES:
                    raise InputError(
                        f"has {info.size:,} bytes, and a member at most {MOST_BYTES:,}",
                        location=f"{shard.name}:{info.name}",
                    )
                handle = tar.extractfile(info)
                assert handle is not None
                content = handle.read()
                if len(content) != info.size:
                    raise InputError("is cut off", location=f"{shard.name}:{info.name}", hint="restore the shard")
                yield _Member(info.name, info.offset_data // _BLOCK, content)
            end = tar.offset
    except OSError as error:  # the store fails while it is read
        raise InputError(f"cannot be read ({error})", location=shard.name) from None
    except (tarfile.TarError, EOFError) as error:
        raise InputError(
            f"is no whole tar file ({error})",
            location=shard.name,
            hint="restore the shard; compressed ones are not read",
        ) from None
    if shard.size < end + _BLOCK:
        raise InputError(
            "is cut off: its end-of-archive mark is missing", location=shard.name, hint="restore the shard"
        )


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member whose bytes depend on nothing but name and content. Returns the block where its content begins."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    tar.addfile(info, BytesIO(content))
    return tar.offset // _BLOCK - -(-len(content) // _BLOCK)
