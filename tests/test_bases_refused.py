"""Bases that are not whole, not of one piece, pickles, or not there: refused where they are opened, with what to do about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit_lora.cli.main import main
from mmdit_lora.errors import InputError
from mmdit_lora.files import nearest, public_name
from mmdit_lora.lora import add_layout_lora, base_fingerprint, read_adapter_header, save_adapter
from mmdit_lora.lora.known_bases import note_file, recall_base, recall_named, remember_base
from mmdit_lora.models import LayoutSD3Transformer2DModel
from mmdit_lora.models.families import stored_transformer
from mmdit_lora.pipelines import LayoutStableDiffusion3Pipeline, load_pipeline
from tests.tiny import tiny_pipeline, tiny_vae, trained_adapter


def without(part: str, number: int) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        (file,) = (base / part).glob("*.safetensors")
        state = load_file(file)
        del state[sorted(state)[number]]
        save_file(state, file, {"format": "pt"})

    return edit


def pickled(part: str, name: str) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        (file,) = (base / part).glob("*.safetensors")
        torch.save(load_file(file), base / part / name)
        file.unlink()

    return edit


def words(**changes: Any) -> Callable[[Path], None]:
    """Another vocabulary: `tokenizer` with more words, or other settings."""

    def edit(base: Path) -> None:
        file = base / "tokenizer" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def more_words(base: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(base), subfolder="tokenizer")
    tokenizer.add_tokens([f"word{number}" for number in range(300)])
    tokenizer.save_pretrained(base / "tokenizer")


def other_latents(base: Path) -> None:
    from diffusers import AutoencoderKL

    config = dict(tiny_vae().config) | {"latent_channels": 8}
    AutoencoderKL.from_config(config).save_pretrained(base / "vae")


NOT_WHOLE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "the VAE lacks a tensor": (without("vae", 3), "vae", "does not hold the weights of its config: 1 missing"),
    "a text encoder lacks a tensor": (without("text_encoder_2", 2), "text_encoder_2", "1 missing"),
    "the VAE is a pickle": (pickled("vae", "diffusion_pytorch_model.bin"), "vae", "pickle"),
    "a text encoder is a pickle": (pickled("text_encoder", "pytorch_model.bin"), "text_encoder", "pickle"),
    "the transformer is a pickle": (pickled("transformer", "diffusion_pytorch_model.bin"), "transformer", "pickle"),
    "a tokenizer knows more words": (more_words, "tokenizer", "has ids up to"),
    "a tokenizer makes longer texts": (words(model_max_length=77), "tokenizer", "makes 77 tokens"),
    "the VAE is of another base": (other_latents, "vae", "has 8 latent channels"),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_a_base_that_is_not_whole_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    spoil, part, says = NOT_WHOLE[case]
    shutil.copytree(base, tmp_path / "base")
    spoil(tmp_path / "base")
    for open_it in (load_pipeline, LayoutStableDiffusion3Pipeline.from_pretrained):
        with pytest.raises(InputError) as refusal:
            open_it(str(tmp_path / "base"))
        assert says in str(refusal.value)
        assert f"base/{part}" in str(refusal.value)
        assert refusal.value.hint


def test_a_pickle_beside_safetensors_is_not_opened(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"no pickle at all")
    load_pipeline(str(tmp_path / "base"))
    for open_it in (LayoutStableDiffusion3Pipeline.from_pretrained, LayoutSD3Transformer2DModel.from_pretrained):
        with pytest.raises(InputError, match="pickle"):
            open_it(str(base), use_safetensors=False)


@pytest.mark.parametrize("open_it", [load_pipeline, LayoutStableDiffusion3Pipeline.from_pretrained, stored_transformer])
def test_a_slip_of_the_pen_in_a_path_names_the_nearest_folder(
    open_it: Callable[[str], Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "my_base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    for given in ("models/my_bse", "modles/my_base", str(tmp_path / "models" / "my-base"), "./model/my_bas"):
        with pytest.raises(InputError) as refusal:
            open_it(given)
        assert str(refusal.value).startswith(f"{given}: there is no such folder")
        assert "models/my_base" in (refusal.value.hint or "")
        assert "hub" not in str(refusal.value) or given.count("/") == 1
    for given in ("/nowhere/at/all", "/" + "x" * 10_000, "./a\0b"):
        with pytest.raises(InputError, match="there is no such folder") as refusal:
            open_it(given)
        assert len(str(refusal.value)) < 2000


def test_the_command_line_names_the_nearest_adapter_too(base: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "layout.json").write_text('{"caption": "a", "boxes": []}')
    given = ["--base", str(base), "--adapter", str(tmp_path / "adaptr"), "--layout", str(tmp_path / "layout.json")]
    assert main(["sample", *given, "--out", str(tmp_path / "out")]) == 2
    assert f"did you mean {tmp_path / 'adapter'}?" in capsys.readouterr().err


def test_nearest(tmp_path: Path) -> None:
    (tmp_path / "one" / "two").mkdir(parents=True)
    assert nearest(tmp_path / "oen" / "tow") == tmp_path / "one" / "two"
    assert nearest(tmp_path / "one" / "zzz") is None
    assert nearest(tmp_path / "one" / ("x" * 300)) is None


def test_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (
        "org/folder",
        "./org/folder",
        str(tmp_path / "org" / "folder"),
        "~/folder",
        r"C:\Users\me\folder",
        "a/b/folder/",
    ):
        assert public_name(path) == "folder", path
    for hub_id in ("org/model", "model", "stabilityai/stable-diffusion-3-medium-diffusers"):
        assert public_name(hub_id) == hub_id
    monkeypatch.chdir(tmp_path / "org" / "folder")
    assert public_name(".") == "folder"


def test_nothing_that_is_given_away_says_where_the_base_was(tmp_path: Path) -> None:
    """Adapter, header, card, exports and saved bases."""
    secret = tmp_path / "secret_customer"
    tiny_pipeline(tmp_path / "vocabulary").save_pretrained(secret / "base")
    pipe = load_pipeline(str(secret / "base"))
    fingerprint = base_fingerprint(pipe.transformer)
    pipe.save_pretrained(tmp_path / "saved")
    pipe.transformer.save_pretrained(tmp_path / "alone")
    add_layout_lora(pipe.transformer)
    trained_adapter(pipe.transformer)
    metadata = {"base": str(secret / "base"), "fingerprint": fingerprint}
    save_adapter(pipe.transformer, tmp_path / "adapter", metadata=metadata)
    pipe.save_pretrained(tmp_path / "merged", merge_adapters=True)
    files = [f for name in ("saved", "alone", "adapter", "merged") for f in (tmp_path / name).rglob("*") if f.is_file()]
    assert len(files) > 20
    found = [file for file in files if b"secret_customer" in file.read_bytes()]
    assert not found
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_the_base_is_found_by_its_name(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdit_lora.lora.known_bases import base_of

    assert Path(base_of(adapter)) == base  # by the run's own config
    shutil.copytree(adapter, tmp_path / "copies" / "adapter")
    monkeypatch.setenv("MMDIT_LORA_HOME", str(tmp_path / "home"))
    remember_base(read_adapter_header(adapter)["fingerprint"], str(base))
    assert Path(base_of(tmp_path / "copies" / "adapter")) == base  # by this machine's note
    monkeypatch.setenv("MMDIT_LORA_HOME", str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"names its base 'pipeline', and no such folder is here\n  hint: give --base"):
        base_of(tmp_path / "copies" / "adapter")
    (tmp_path / "pipeline").symlink_to(base)
    assert Path(base_of(tmp_path / "copies" / "adapter")).resolve() == base.resolve()
    (tmp_path / "here" / "data").mkdir(parents=True)
    (tmp_path / "pipeline").rename(tmp_path / "here" / "data" / "pipeline")
    monkeypatch.chdir(tmp_path / "here")
    assert base_of(tmp_path / "copies" / "adapter") == "data/pipeline"


def test_a_note_of_bases_that_cannot_be_used_is_none(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMDIT_LORA_HOME", str(tmp_path / "home"))
    assert recall_base("f00") is None
    remember_base("f00", str(base))
    remember_base("f01", "org/model")
    assert recall_base("f00") == base
    assert recall_base("f01") is None
    assert recall_named(base.name) == base  # whether it is the right one is for the fingerprint to say
    for content in ("[]", "{", '{"f00": 3}', '{"f00": "/nowhere"}'):
        note_file().write_text(content)
        assert recall_base("f00") is None
    remember_base("f00", str(base))
    assert recall_base("f00") == base
    monkeypatch.setenv("MMDIT_LORA_HOME", str(note_file()))  # a file: nothing can be written there
    remember_base("f02", str(base))
    assert recall_base("f02") is None
