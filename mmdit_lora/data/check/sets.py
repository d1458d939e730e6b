"""What images of one set, or of two, have in common: the same file, or the same image saved anew."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from mmdit_lora.data.check.findings import Example, Finding, example, finding
from mmdit_lora.data.check.images import ImageFacts
from mmdit_lora.data.records import Record

# Of 64 bits of the perceptual hash. Saved anew or scaled, a photograph keeps all but a few; two photographs of one kind
# (blood under one microscope) were seen to differ in 14 and more.
MAX_DISTANCE = 6
# The hash sees no colour and little of what is small; so both images are compared at 16 x 16 too, less their mean
# brightness: by the mean difference and by the largest, in levels of 255.
MEAN_LEVELS, MAX_LEVELS = 4, 24


def set_findings(records: Sequence[Record], images: Sequence[ImageFacts]) -> list[Finding]:
    """Records and images that stand in the set twice (warnings)."""
    seen: dict[object, Record] = {}
    repeated = []
    for record in records:
        first = seen.setdefault((record.image, record.layout), record)
        if first is not record:
            repeated.append(example(record, f"repeats {first.location}"))
    equal, near = same_bytes(images), near_groups(images)
    return [
        *finding(
            "duplicate-records",
            "{n} records repeat an earlier one, image and layout",
            "remove them: a repeated line counts more in training",
            repeated,
            total=len(records),
            unit="records",
        ),
        *finding(
            "duplicate-images",
            "{n} images have the same bytes as another one",
            "keep one file, with all of its boxes",
            _side_by_side(equal, "has the bytes of"),
            total=len(images),
            unit="images",
            count=sum(len(group) - 1 for group in equal),
        ),
        *finding(
            "near-duplicate-images",
            "{n} images look the same as another one (perceptual hash, compared at 16 x 16)",
            "keep one of each: the same image, scaled or saved anew, counts more in training",
            _side_by_side(near, "looks like"),
            total=len(images),
            unit="images",
            count=sum(len(group) - 1 for group in near),
        ),
    ]


def _side_by_side(groups: Sequence[Sequence[ImageFacts]], how: str) -> list[Example]:
    """Each group's first image, then the others of it: what is the same is seen at a glance."""
    return [
        example(
            p.record, f"{how} {group[0].record.image.name}" if p is not group[0] else f"first of {len(group)} alike"
        )
        for group in groups
        for p in group
    ]


def leak_findings(images: Sequence[ImageFacts], against: Sequence[ImageFacts]) -> list[Finding]:
    """Images of the set that the other one holds too: the same bytes are an error, the same look a warning."""
    theirs = {p.digest: p for p in against if p.decoded}
    exact = [(p, theirs[p.digest]) for p in images if p.decoded and p.digest in theirs]
    gone = {p.digest for p, _ in exact}
    mine = {id(p) for p in images}
    alike: list[tuple[ImageFacts, ImageFacts]] = []
    for group in near_groups([*images, *against]):
        other = [p for p in group if id(p) not in mine]
        alike += [(p, other[0]) for p in group if other and id(p) in mine and p.digest not in gone]
    hint = "remove them from one of the two: a figure of the held-out set would measure what was learnt by heart"
    found = finding(
        "leakage",
        "{n} of {total} images are in the other set too, byte for byte",
        hint,
        _both(exact, "has the bytes of"),
        total=len(images),
        unit="images",
        count=len(exact),
        severity="error",
    )
    return [
        *found,
        *finding(
            "near-leakage",
            "{n} of {total} images look the same as one of the other set",
            hint,
            _both(alike, "looks like"),
            total=len(images),
            unit="images",
            count=len(alike),
        ),
    ]


def _both(pairs: Sequence[tuple[ImageFacts, ImageFacts]], how: str) -> list[Example]:
    return [
        shown
        for ours, theirs in pairs
        for shown in (
            example(ours.record, f"{how} {theirs.record.image.name} of the other set"),
            example(theirs.record, "of the other set"),
        )
    ]


def same_bytes(images: Sequence[ImageFacts]) -> list[list[ImageFacts]]:
    """Groups of two and more, in the order of the images."""
    groups: defaultdict[bytes, list[ImageFacts]] = defaultdict(list)
    for image in images:
        if image.decoded:
            groups[image.digest].append(image)
    return [group for group in groups.values() if len(group) > 1]


def near_groups(images: Sequence[ImageFacts]) -> list[list[ImageFacts]]:
    """Groups of images that look the same and are not the same bytes.

    Two hashes that differ in at most `MAX_DISTANCE` of 64 bits are equal in one of `MAX_DISTANCE + 1` bands of them; so
    only images with an equal band are compared, not all pairs.
    """
    first: dict[bytes, ImageFacts] = {}
    for image in images:
        if image.decoded:
            first.setdefault(image.digest, image)
    distinct = list(first.values())
    if len(distinct) < 2:
        return []
    hashes = np.array([p.phash for p in distinct], dtype=np.uint64)
    thumbs = np.stack([p.thumb for p in distinct if p.thumb is not None]).reshape(len(distinct), -1)
    label = np.arange(len(distinct))  # of the group that each one is in so far
    width = 64 // (MAX_DISTANCE + 1) + 1
    for shift in range(0, 64, width):
        band = (hashes >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, band[order][1:] != band[order][:-1]])
        for members in np.split(order, starts[1:]):
            for place, i in enumerate(members[:-1]):
                rest = members[place + 1 :]
                rest = rest[label[rest] != label[i]]
                rest = rest[np.bitwise_count(hashes[rest] ^ hashes[i]) <= MAX_DISTANCE]
                for j in rest[_look_alike(thumbs[i], thumbs[rest])]:
                    label[label == label[j]] = label[i]
    sizes = Counter(label.tolist())
    groups: defaultdict[int, list[ImageFacts]] = defaultdict(list)
    for n, image in zip(label.tolist(), distinct, strict=True):
        if sizes[n] > 1:
            groups[n].append(image)
    return list(groups.values())


def _look_alike(one: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Which of `many` (N, values) look like `one` (values,): (N,) bool."""
    levels = many.astype(np.float32)
    levels -= levels.mean(axis=1, keepdims=True)
    apart = np.abs(levels - (one - one.mean()))
    same: np.ndarray = (apart.mean(axis=1) < MEAN_LEVELS) & (apart.max(axis=1) < MAX_LEVELS)
    return same
