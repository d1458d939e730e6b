"""Folders of tiny random detectors and judges of the real classes, their processors made without a connection."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from mmdit_lora.layout import Box, Layout

CLASSES = ("__background__", "dog", "hot dog", "sofa")
SSD = "ssdlite320_mobilenet_v3_large"


def noise(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """An image of coarse noise."""
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def asked(*phrases: str) -> Layout:
    return Layout("", [Box((0.1, 0.2, 0.6, 0.7), phrase) for phrase in phrases])


def grounding_dino_folder(folder: Path) -> Path:
    """175 k parameters, 12 proposals, 32 text tokens. The special tokens have BERT's ids, which the model's code holds."""
    import transformers as t

    vocabulary = {f"[unused{index}]": index for index in range(1100)}
    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    plain = ("a", "an", "red", "blue", "circle", "square", "dog", "on", "sofa", "the", "big")
    for token, index in {**special, **{word: 200 + n for n, word in enumerate(plain)}}.items():
        del vocabulary[f"[unused{index}]"]
        vocabulary[token] = index
    config = t.GroundingDinoConfig(
        backbone_config=t.SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_indices=[2, 3, 4],
        ),
        text_config=t.BertConfig(
            vocab_size=1100,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=12,
        max_text_len=32,
    )
    model = seeded(lambda: t.GroundingDinoForObjectDetection(config))
    for head in model.bbox_embed:  # as made, every proposal is its anchor
        torch.nn.init.normal_(head.layers[-1].weight, std=0.2, generator=torch.Generator().manual_seed(1))
    images = t.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    save(folder, model, t.GroundingDinoProcessor(images, t.BertTokenizer(vocab=vocabulary)))
    return folder


def owlv2_folder(folder: Path) -> Path:
    """16 proposals. As in the published vocabulary, the end has the highest id and "!" fills up, with id 0."""
    import transformers as t

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = t.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], pad_token="!", model_max_length=16
    )
    config = t.Owlv2Config(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "bos_token_id": len(tokens) - 2,
            "eos_token_id": len(tokens) - 1,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        projection_dim=16,
    )
    model = seeded(lambda: t.Owlv2ForObjectDetection(config))
    generator = torch.Generator().manual_seed(2)
    for text in model.owlv2.text_model.parameters():  # as made, all phrases have nearly the same features
        if text.ndim == 2:
            torch.nn.init.normal_(text, std=1.5, generator=generator)
    images = t.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    save(folder, model, t.Owlv2Processor(images, tokenizer))
    return folder


def ssd_file(file: Path, *, header: dict[str, str] | None = None) -> Path:
    """A torchvision SSDlite of `CLASSES`, which the file's header names."""
    model = seeded(
        lambda: torchvision.models.get_model(SSD, weights=None, weights_backbone=None, num_classes=len(CLASSES))
    )
    # As made, its batch norms let next to nothing through, and all scores are the same.
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    pixels = torch.rand(2, 3, 320, 320, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        model.train().head(list(model.backbone(pixels).values()))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), file, {"classes": json.dumps(CLASSES)} if header is None else header)
    return file


def llava_folder(folder: Path, *, words: Sequence[str] = ("yes", "no", "maybe"), chat: bool = True) -> Path:
    """A LLaVA whose answers are rows of `words`, whatever it is asked."""
    import transformers as t
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    plain = ["is", "this", "a", "red", "circle", "blue", "square", "dog", "answer"]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *words, *plain]
    inner = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            projection_dim=16,
        ),
        text_config=t.LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    model = seeded(lambda: t.LlavaForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    model.generation_config.suppress_tokens = [n for n, token in enumerate(tokens) if token not in words]
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}answer{% endif %}"
    )
    processor = t.LlavaProcessor(
        t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template if chat else None,
    )
    save(folder, model, processor)
    return folder


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def save(folder: Path, model: Any, processor: Any) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
