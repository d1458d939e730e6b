"""Detectors as plug-ins: the learned ones against their libraries' own answers, at tiny size, and what is refused."""

from __future__ import annotations

import re
import shutil
import urllib.error
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors import DETECTORS, Detection, Detector, known_layouts, open_detector
from mmdit_lora.evaluation.detectors.base import agrees
from tests.detector_makers import CLASSES, SSD, asked, grounding_dino_folder, noise, owlv2_folder, ssd_file

PHRASES = ("a red circle", "the big sofa", "an blue square")
HUB = {"grounding-dino": "IDEA-Research/grounding-dino-tiny", "owlv2": "google/owlv2-base-patch16-ensemble"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("detectors")
    return {"grounding-dino": grounding_dino_folder(root / "dino"), "owlv2": owlv2_folder(root / "owl")}


@pytest.fixture(scope="module")
def ssd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ssd_file(tmp_path_factory.mktemp("ssd") / "ssd.safetensors")


def everything(kind: str, folders: dict[str, Path], **options: Any) -> Any:
    """A detector that drops nothing."""
    return open_detector(f"{kind}:{folders[kind]}", device="cpu", **{"threshold": 0.0, "nms": 1.0, **options})


def close(a: list[Detection], b: list[Detection]) -> bool:
    return [d.label for d in a] == [d.label for d in b] and all(
        torch.allclose(torch.tensor([*x.xyxy, x.score]), torch.tensor([*y.xyxy, y.score]), atol=1e-5)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    ("label", "phrase", "expected"),
    [
        ("dog", "a black dog", True),
        ("dog", "Two Dogs.", True),
        ("hot dog", "a hot dog", True),
        ("hot dog", "a dog, hot", False),
        ("cat", "a caterpillar", False),
        ("a dog", "the dog", True),
        ("glass", "a glass", True),
        ("狗", "狗", True),
        ("!", "!", False),
    ],
)
def test_labels_agree_with_phrases_by_whole_words(label: str, phrase: str, expected: bool) -> None:
    assert agrees(label, phrase) is expected


@pytest.mark.parametrize("kind", sorted(HUB))
def test_open_vocabulary_detectors_answer_as_their_library_does(kind: str, folders: dict[str, Path]) -> None:
    """Boxes and best scores are transformers' own, for an image that is no square; labels are those of the best score."""
    detector = everything(kind, folders)
    image = noise(96, 64)
    (found,) = detector.detect([image], [asked(*PHRASES, PHRASES[0])])
    inputs = detector.processor(images=[image], text=[list(PHRASES)], return_tensors="pt")
    with torch.no_grad():
        output = detector.model(**inputs)
    (theirs,) = detector.processor.post_process_grounded_object_detection(
        output, threshold=0.0, target_sizes=[(64, 96)]
    )
    scores, best = theirs["scores"], theirs.get("labels") if kind == "owlv2" else None
    if kind == "grounding-dino":  # its library takes the ends and the stops for labels too
        ids = inputs["input_ids"][0]
        word = (ids > 103) & (ids < 1000)
        phrase = (ids == 1012).cumsum(0)  # stops before a token
        of_phrase = [output.logits[0][:, : len(ids)][:, word & (phrase == n)].amax(1).sigmoid() for n in range(3)]
        most, best = torch.stack(of_phrase, dim=1).max(1)
        assert (most <= scores).all()
        scores = most
    assert best is not None
    order = scores.argsort(descending=True, stable=True)
    boxes = (theirs["boxes"] / torch.tensor([96, 64, 96, 64])).clamp(0, 1)
    inside = [n for n in order.tolist() if (boxes[n, 2:] > boxes[n, :2]).all()]
    assert len(inside) > 8
    torch.testing.assert_close(torch.tensor([d.score for d in found]), scores[inside], atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor([d.xyxy for d in found]), boxes[inside], atol=1e-5, rtol=0)
    assert [d.label for d in found] == [PHRASES[n] for n in best[inside].tolist()]
    assert len({d.label for d in found}) > 1


@pytest.mark.parametrize("kind", sorted(HUB))
def test_an_answer_depends_neither_on_the_batch_nor_on_the_others_in_it(kind: str, folders: dict[str, Path]) -> None:
    images = [noise(96, 64, 0), noise(64, 96, 1), noise(96, 64, 2), noise(96, 64, 3)]
    layouts = [asked(*PHRASES), asked("a dog"), asked("a dog"), asked()]
    together = everything(kind, folders, batch_size=4).detect(images, layouts)
    alone = everything(kind, folders, batch_size=1)
    for image, layout, found in zip(images, layouts, together, strict=True):
        assert close(found, alone.detect([image], [layout])[0])
    assert together[3] == []
    assert {d.label for d in together[2]} == {"a dog"}
    assert not close(together[2], alone.detect(images[:1], layouts[2:3])[0])  # the image matters


@pytest.mark.parametrize("kind", sorted(HUB))
def test_threshold_and_nms_drop_what_they_say(kind: str, folders: dict[str, Path]) -> None:
    layout = asked(*PHRASES)
    (found,) = everything(kind, folders).detect([noise()], [layout])
    middle = found[len(found) // 2].score
    (sure,) = everything(kind, folders, threshold=middle).detect([noise()], [layout])
    assert close(sure, [d for d in found if d.score > middle])
    assert 0 < len(sure) < len(found)
    (apart,) = everything(kind, folders, nms=1e-6).detect([noise()], [layout])
    assert 0 < len(apart) < len(found)
    for n, first in enumerate(apart):
        for other in apart[n + 1 :]:
            assert first.label != other.label or not overlap(first, other)


def overlap(a: Detection, b: Detection) -> bool:
    sides = [min(a.xyxy[n + 2], b.xyxy[n + 2]) - max(a.xyxy[n], b.xyxy[n]) for n in (0, 1)]
    return min(sides) > 1e-4


def test_grounding_dino_asks_for_many_phrases_in_parts_and_cuts_long_ones(folders: dict[str, Path]) -> None:
    detector = everything("grounding-dino", folders)
    many = [f"{'big ' * n}dog" for n in range(1, 9)]  # 44 tokens and 8 stops, and 30 fit beside first and last
    parts = detector._groups(many)
    assert [phrase for part in parts for phrase in part] == many
    assert [sum(len(detector._tokens(p)) + 1 for p in part) for part in parts] == [25, 27]
    (found,) = detector.detect([noise()], [asked(*many)])
    assert len(found) > 12  # proposals of both parts
    assert {d.label for d in found} & set(parts[0])
    assert {d.label for d in found} & set(parts[1])
    long = "big " * 60 + "dog"
    (found,) = detector.detect([noise()], [asked(long)])
    (cut,) = detector.detect([noise()], [asked("big " * 28 + "big")])
    assert {d.label for d in found} == {long}
    assert close(found, [replace(d, label=long) for d in cut])


def test_a_phrases_own_stops_do_not_part_it(folders: dict[str, Path]) -> None:
    detector = everything("grounding-dino", folders)
    (plain,) = detector.detect([noise()], [asked("a red circle a dog")])
    (stops,) = detector.detect([noise()], [asked("A red circle. A dog?")])
    assert close(plain, [replace(d, label="a red circle a dog") for d in stops])
    assert detector.detect([noise()], [asked("...")]) == [[]]
    assert detector.tokenizer(". ".join(PHRASES) + ".")["input_ids"] == [
        101,
        *(token for phrase in PHRASES for token in [*detector._tokens(phrase), 1012]),
        102,
    ]


def test_owlv2_cuts_a_long_phrase(folders: dict[str, Path]) -> None:
    detector = everything("owlv2", folders)
    (long,) = detector.detect([noise()], [asked("abcdefghijklmnop")])
    (other,) = detector.detect([noise()], [asked("abcdefghijklmnxyz")])
    assert close(long, [replace(d, label="abcdefghijklmnop") for d in other])
    (third,) = detector.detect([noise()], [asked("zbc")])
    assert not close(long, [replace(d, label="abcdefghijklmnop") for d in third])


@pytest.mark.parametrize("kind", sorted(HUB))
def test_fingerprints_follow_weights_and_options_not_places(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    def of(folder: Path, **options: Any) -> str:
        return open_detector(f"{kind}:{folder}", device="cpu", **options).fingerprint()

    copy = shutil.copytree(folders[kind], tmp_path / "copy")
    plain = of(folders[kind])
    assert re.fullmatch(r"[0-9a-f]{64}", plain)
    assert of(copy) == plain != of(copy, threshold=0.4)
    weights = load_file(copy / "model.safetensors")
    first = next(name for name in sorted(weights) if weights[name].is_floating_point())
    save_file({**weights, first: weights[first] + 1}, copy / "model.safetensors", {"format": "pt"})
    assert of(copy) != plain


@pytest.mark.parametrize("kind", sorted(HUB))
def test_without_weights_the_message_says_how_to_get_them(kind: str, tmp_path: Path) -> None:
    local = f"models/{HUB[kind].rpartition('/')[2]}"
    for spec in (kind, f"{kind}:", f"{kind}:{tmp_path / 'none'}", f"{kind}:{tmp_path}", f"{kind}:{HUB[kind]}"):
        with pytest.raises(InputError) as caught:
            open_detector(spec)
        assert f"`hf download {HUB[kind]} --local-dir {local}`, then {kind}:{local}" in str(caught.value)
        assert caught.value.location == spec
    with pytest.raises(InputError, match="hf download some/other --local-dir models/other"):
        open_detector(f"{kind}:some/other")


def test_a_hub_id_is_fetched_without_its_pickles(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[Any] = []

    def fetched(hub_id: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked_for.append((hub_id, allow_patterns))
        return str(folders["owlv2"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    detector = open_detector(f"owlv2:{HUB['owlv2']}", device="cpu")
    assert detector.name == f"owlv2:{HUB['owlv2']}"
    assert detector.fingerprint() == open_detector(f"owlv2:{folders['owlv2']}", device="cpu").fingerprint()
    ((hub_id, patterns),) = asked_for
    assert hub_id == HUB["owlv2"]
    names = (
        "model.safetensors",
        "config.json",
        "vocab.txt",
        "pytorch_model.bin",
        "model.pth",
        "own.py",
        "flax.msgpack",
    )
    assert [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)] == list(names[:3])


def test_folders_that_would_answer_wrongly_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a owlv2, not a grounding-dino"):
        open_detector(f"grounding-dino:{folders['owlv2']}")
    broken = shutil.copytree(folders["owlv2"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "class_head" not in k}, broken / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"lacks weights of Owlv2ForObjectDetection.*class_head"):
        open_detector(f"owlv2:{broken}")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="does not load"):
        open_detector(f"owlv2:{broken}")
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text('{"model_type": "nothing known"}')
    with pytest.raises(InputError, match="does not load"):
        open_detector(f"owlv2:{broken}")
    (broken / "config.json").write_text(config)
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds no safetensors; pickles are not read"):
        open_detector(f"owlv2:{broken}")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("owlv3:x", {}, "did you mean 'owlv2'"),
        ("", {}, "no such detector: ''"),
        ("owlv2:x?treshold=0.5", {}, "did you mean 'threshold'"),
        ("owlv2:x?threshold=much", {}, "threshold is 'much'"),
        ("owlv2:x", {"batch_size": 0}, "batch_size is 0"),
        ("owlv2:x?threshold", {}, "not of the form key=value"),
        ("shapes:x", {}, "takes nothing"),
        ("shapes?threshold=0.5", {}, "unknown key 'threshold'"),
        ("torchvision", {}, "torchvision:fasterrcnn_resnet50_fpn_v2=COCO_V1"),
        ("torchvision:fasterrcnn_resnet50_fpn_v3", {}, "did you mean 'fasterrcnn_resnet50_fpn_v2'"),
        ("torchvision:fasterrcnn_resnet50_fpn_v2=none.safetensors", {}, "no such file 'none.safetensors'"),
    ],
)
def test_specs_that_are_refused(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        open_detector(spec, **options)


def test_the_exact_reader_is_the_default_and_knows_its_own_phrases_only() -> None:
    assert list(DETECTORS) == ["shapes", "torchvision", "grounding-dino", "owlv2"]
    detector = open_detector()
    assert detector.name == "shapes"
    assert detector.fingerprint() == open_detector("shapes").fingerprint()
    assert detector.knows("a red circle")
    assert not detector.knows("a dog")
    layouts = [asked("a red circle", "a dog")]
    with pytest.raises(InputError, match=r"does not know 'a dog'"):
        detector.detect([noise()], layouts)
    assert known_layouts(detector, layouts) == [asked("a red circle")]
    with pytest.raises(ValueError, match="1 images, but 2 layouts"):
        detector.detect([noise()], layouts * 2)


def torchvision_detector(ssd: Path, **options: Any) -> Detector:
    return open_detector(f"torchvision:{SSD}={ssd}", device="cpu", **{"threshold": 0.0, "nms": 1.0, **options})


def test_torchvision_answers_as_the_bare_model_does(ssd: Path) -> None:
    model = torchvision.models.get_model(SSD, weights=None, weights_backbone=None, num_classes=len(CLASSES)).eval()
    model.load_state_dict(load_file(ssd))
    image = noise(96, 64)
    with torch.no_grad():
        (theirs,) = model([pil_to_tensor(image) / 255])
    (found,) = torchvision_detector(ssd).detect([image], [asked("a dog")])
    boxes = theirs["boxes"] / torch.tensor([96, 64, 96, 64])
    expected = {
        (CLASSES[label], round(score, 6), *(round(v, 4) for v in box))
        for box, label, score in zip(boxes.tolist(), theirs["labels"].tolist(), theirs["scores"].tolist(), strict=True)
        if box[0] < box[2] and box[1] < box[3]
    }
    assert len(expected) > 20
    assert {(d.label, round(d.score, 6), *(round(v, 4) for v in d.xyxy)) for d in found} == expected
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    (sure,) = torchvision_detector(ssd, threshold=found[50].score).detect([image], [asked("a dog")])
    assert 0 < len(sure) <= 50


def test_torchvision_sizes_and_batches_do_not_matter(ssd: Path) -> None:
    images = [noise(96, 64, 0), noise(64, 96, 1), noise(96, 64, 2)]
    layouts = [asked("a dog")] * 3
    together = torchvision_detector(ssd, threshold=0.3).detect(images, layouts)
    alone = torchvision_detector(ssd, threshold=0.3, batch_size=1)
    for image, layout, found in zip(images, layouts, together, strict=True):
        assert found
        assert close(found, alone.detect([image], [layout])[0])


def test_torchvision_phrases_name_classes_or_are_refused(ssd: Path) -> None:
    detector = torchvision_detector(ssd)
    assert detector.agrees("hot dog", "two hot dogs on a sofa")
    assert not detector.agrees("dog", "two hot dogs on a sofa")
    assert not detector.agrees("sofa", "two hot dogs on a sofa")
    assert detector.agrees("sofa", "the big sofa")
    assert detector.knows("a dog")
    assert not detector.knows("a background")
    layouts = [asked("a dog"), asked("a red circle")]
    with pytest.raises(InputError, match=r"none of its 3 classes is named by 'a red circle'.*\n.*dog, hot dog, sofa"):
        detector.detect([noise()] * 2, layouts)
    ignoring = torchvision_detector(ssd, ignore_unknown="true")
    assert len(ignoring.detect([noise()] * 2, layouts)) == 2
    assert ignoring.fingerprint() != detector.fingerprint()
    assert known_layouts(detector, layouts) == [asked("a dog"), asked()]


def test_torchvision_weights_that_do_not_fit_are_refused(ssd: Path, tmp_path: Path) -> None:
    cases = {
        "does not fit a ssdlite320_mobilenet_v3_large of 91 classes": ssd_file(tmp_path / "a.safetensors", header={}),
        "`classes` that are no JSON list of names": ssd_file(tmp_path / "b.safetensors", header={"classes": "dog"}),
        "is not a whole safetensors file": tmp_path / "c.safetensors",
        "is no .safetensors file; pickles may run code": tmp_path / "d.pth",
    }
    (tmp_path / "c.safetensors").write_bytes(ssd.read_bytes()[:1000])
    torch.save(load_file(ssd), tmp_path / "d.pth")
    for message, file in cases.items():
        with pytest.raises(InputError, match=re.escape(message)):
            open_detector(f"torchvision:{SSD}={file}")


def test_torchvision_without_weights_says_the_command_that_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="names no weights") as caught:
        open_detector(f"torchvision:{SSD}")
    command = re.search(r'python -c "(.*)", then torchvision:(\S+)', str(caught.value))
    assert command is not None
    calls: list[dict[str, Any]] = []

    def state(url: str, *_: Any, **options: Any) -> dict[str, torch.Tensor]:
        calls.append({"url": url, **options})
        return torchvision.models.get_model(SSD, weights=None, weights_backbone=None).state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", state)
    monkeypatch.chdir(tmp_path)
    exec(command[1], {})  # the command as it is printed
    detector: Any = open_detector(f"torchvision:{command[2]}", device="cpu")
    assert detector.classes[1] == "person"
    assert len(detector.classes) == 91
    named = open_detector(f"torchvision:{SSD}=COCO_V1", device="cpu")
    assert named.name == f"torchvision:{SSD}=COCO_V1"
    assert all(call["weights_only"] for call in calls)
    assert calls[-1]["check_hash"]
    assert len(calls) == 2


def test_torchvision_weights_by_name_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no connection")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(InputError, match=r"could not be had .*no connection.*\n.*python -c"):
        open_detector(f"torchvision:{SSD}=COCO_V1")


def test_images_of_other_modes_are_read(folders: dict[str, Path], ssd: Path) -> None:
    grey = noise().convert("L")
    for detector in (*(everything(kind, folders) for kind in HUB), torchvision_detector(ssd)):
        layout = asked("a dog")
        assert detector.detect([grey], [layout]) == detector.detect([grey.convert("RGB")], [layout])
    assert isinstance(grey, Image.Image)
