"""A text's encoding is the same to the bit whatever else is encoded with it: batches have one size, filled up with copies."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import mmdit_lora.training.encoding as encoding
from mmdit_lora.models.stream_families import STREAM_FAMILIES
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.training.encoding import TEXT_BATCH, LayoutEncoder
from tests.streams import MAKERS
from tests.streams.common import seeded
from tests.tiny_flux import tiny_flux_pipeline, tiny_flux_transformer

ROOT = Path(__file__).parent.parent
WORDS = [
    "a",
    "red",
    "circle",
    "blue",
    "square",
    "green",
    "left",
    "right",
    "large",
    "small",
    "the",
    "of",
    "and",
    "on",
    "under",
    "dog",
    "cat",
]


def pipeline(name: str, base: Path, tmp_path: Path) -> Any:
    """SD3 with two CLIPs and T5; FLUX with CLIP and T5, phrases pooled or as tokens; the embedded bases, with two CLIPs."""
    if name == "sd3":
        return load_pipeline(str(base))
    if name in RAGGED:
        with seeded(0):
            stock = MAKERS[name].pipeline(MAKERS[name].transformer())
        getattr(stock, "modular", stock).save_pretrained(str(tmp_path / "base"))
        return load_pipeline(str(tmp_path / "base"))
    if name.startswith("flux"):
        tokens = 3 if name == "flux, phrase tokens" else None
        return tiny_flux_pipeline(tmp_path / "tokenizer", tiny_flux_transformer(phrase_tokens=tokens))
    return load_pipeline(str(ROOT / "data" / name))


def check(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    # Those that are encoded one by one take longer.
    most_words, batches, trials = (20, 1, 3) if pipe.ragged_captions else (60, 3, 8)
    texts = [
        "",
        *(" ".join(chance.choices(WORDS, k=chance.randint(1, most_words))) for _ in range(batches * TEXT_BATCH)),
    ]
    texts = list(dict.fromkeys(texts))
    encoded = LayoutEncoder(pipe).prompts(texts)
    phrases = LayoutEncoder(pipe).phrases(texts)
    assert len({row.numpy().tobytes() for row in encoded["embeds"].float().cpu()}) > len(texts) // 2, (
        "texts that differ"
    )
    for trial in range(trials):
        chosen = chance.sample(texts, chance.choice([1, 2, TEXT_BATCH - 1, TEXT_BATCH, len(texts)]))
        filler = chance.choice(["", "something else", "cat " * 90])
        if trial % 2:  # what the rest of a batch holds does not matter either
            monkeypatch.setattr(encoding, "_filled", lambda t, f=filler: [*t, *[f] * (TEXT_BATCH - len(t))])
        again = LayoutEncoder(pipe).prompts(chosen)
        again_phrases = LayoutEncoder(pipe).phrases(chosen)
        for row, text in enumerate(chosen):
            number = texts.index(text)
            for name, value in encoded.items():
                length = min(len(value[number]), len(again[name][row]))  # of a batch: that of its longest
                assert torch.equal(again[name][row][:length], value[number][:length]), (trial, name, text)
            assert torch.equal(again_phrases[text], phrases[text]), (trial, text)
        monkeypatch.undo()


RAGGED = [name for name, family in STREAM_FAMILIES.items() if family.ragged]
NAMES = ["sd3", "flux", "flux, phrase tokens", "tiny_base", "tiny_base_narrow"]
NAMES += [pytest.param(name, marks=pytest.mark.slow) for name in RAGGED]  # type: ignore[list-item]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_has_the_same_bits_in_any_company(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(pipeline(name, base, tmp_path), monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_text_has_the_same_bits_in_any_company_on_a_gpu(
    name: str, dtype: torch.dtype, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(pipeline(name, base, tmp_path).to("cuda", dtype), monkeypatch)


def test_where_a_base_masks_nothing_padding_is_that_of_the_longer_window(tmp_path: Path, base: Path) -> None:
    pipe = pipeline("flux3", base, tmp_path)
    short, long = "a red circle", "a blue square under the large dog " * 4
    together = LayoutEncoder(pipe).prompts([short, long])["embeds"]
    assert together.shape[1] == 160
    assert LayoutEncoder(pipe).prompts([short])["embeds"].shape[1] == 80
    torch.testing.assert_close(together, pipe.encode_caption([short, long])["embeds"], atol=1e-5, rtol=1e-5)
    masked = pipeline("qwen_image", base, tmp_path / "qwen")
    both = LayoutEncoder(masked).prompts([short, long])
    assert both["mask"].sum(1).tolist() == [
        LayoutEncoder(masked).prompts([text])["embeds"].shape[1] for text in (short, long)
    ]
