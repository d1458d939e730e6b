"""One contract for every family and variant: what a layout stream may and may not change, whatever carries it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from mmdit_lora.lora import add_layout_lora, load_adapter, lora_parameters, merge_adapter, remove_adapter, save_adapter
from mmdit_lora.models import FAMILIES, LayoutInputs, LayoutModelMixin
from tests.tiny import VARIANTS, plain_twin, tiny_inputs, tiny_layout, tiny_transformer, trained_adapter
from tests.tiny_flux import tiny_flux_inputs, tiny_flux_transformer


@dataclass(frozen=True)
class Case:
    """A family at tiny size with one choice of everything that a config may say about its stream."""

    build: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    changes: dict[str, Any] = field(default_factory=dict)

    def model(self, **changes: Any) -> Any:
        return self.build(**self.changes, **changes)

    def layout(self, model: Any, counts: tuple[int, ...] = (3, 2), **options: Any) -> LayoutInputs:
        return tiny_layout(counts, width=model.phrase_dim, tokens=model.phrase_tokens, **options)

    def run_inputs(self, model: Any, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        inputs = self.inputs(batch, dtype=dtype)
        if "guidance" in inputs and not model.config.guidance_embeds:
            del inputs["guidance"]
        return inputs

    @torch.no_grad()
    def velocity(self, model: Any, rows: slice = slice(None), **kwargs: Any) -> torch.Tensor:
        inputs = self.run_inputs(model, dtype=model.dtype)
        per_sample = {k: v[rows] if len(v) == 2 else v for k, v in inputs.items()}
        return model(**per_sample, **kwargs).sample


def sd3(variant: str, **changes: Any) -> Case:
    return Case(tiny_transformer, tiny_inputs, VARIANTS[variant] | changes)


def flux(**changes: Any) -> Case:
    return Case(tiny_flux_transformer, tiny_flux_inputs, changes)


CASES = {
    "sd3-medium": sd3("sd3-medium"),
    "sd3.5-large": sd3("sd3.5-large"),
    "sd3.5-medium": sd3("sd3.5-medium"),
    "sd3-medium cross": sd3("sd3-medium", layout_attention="cross"),
    "sd3.5-medium cross": sd3("sd3.5-medium", layout_attention="cross"),
    "flux-dev": flux(),
    "flux-dev cross": flux(layout_attention="cross"),
    "flux-dev tokens": flux(phrase_tokens=4),
    "flux-schnell singles": flux(guidance_embeds=False, layout_single_blocks=True),
    "flux-dev singles tokens": flux(layout_single_blocks=True, phrase_tokens=4),
    "flux-dev singles cross": flux(layout_single_blocks=True, layout_attention="cross"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(autouse=True)
def _default_attention_backend() -> Iterator[None]:
    """diffusers' `set_attention_backend` also changes the default of every other model in the process."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=0)


def checkpoint_every_second(model: Any) -> None:
    model.train()
    model.enable_gradient_checkpointing(every=2)


def checkpoint_all(model: Any) -> None:
    model.train()
    model.enable_gradient_checkpointing()


EXECUTION_MODES: dict[str, Callable[[Any], Any]] = {
    "checkpoint all": checkpoint_all,
    "checkpoint every second": checkpoint_every_second,
    "chunks of the batch": lambda model: model.enable_forward_chunking(1),
    "chunks of tokens": lambda model: model.enable_forward_chunking(3, dim=1),
    "another attention backend": lambda model: model.set_attention_backend("_native_math"),
}


class TestContract:
    # -- the base, where there is no layout

    def test_a_fresh_stream_is_the_stock_class_bit_for_bit(self, case: Case) -> None:
        model = case.model(open_gates=False)
        assert torch.equal(case.velocity(model, layout=case.layout(model)), case.velocity(plain_twin(model)))

    def test_no_layout_is_the_stock_class_bit_for_bit(self, case: Case) -> None:
        model = case.model()
        base = case.velocity(plain_twin(model))
        layout = case.layout(model)
        assert torch.equal(case.velocity(model), base)
        assert torch.equal(case.velocity(model, layout=layout.dropped()), base)
        assert torch.equal(case.velocity(model, layout=layout, layout_scale=0.0), base)
        assert not torch.allclose(case.velocity(model, layout=layout), base, atol=1e-2)

    # -- padding, batch mates and box order

    def test_padding_changes_nothing(self, case: Case) -> None:
        model = case.model()
        wide = case.layout(model, slots=9)
        padded = case.velocity(model, layout=wide)
        close(padded, case.velocity(model, layout=case.layout(model)))
        rubbish = LayoutInputs(wide.boxes.clone(), wide.phrase_embeds.clone(), wide.mask)
        rubbish.boxes[~rubbish.mask] = -3.0
        rubbish.phrase_embeds[~rubbish.mask] = 1e4
        assert torch.equal(case.velocity(model, layout=rubbish), padded)
        wide.phrase_embeds[0, 0] += 1.0
        assert not torch.allclose(case.velocity(model, layout=wide), padded, atol=1e-3)

    def test_batch_mates_change_nothing(self, case: Case) -> None:
        model = case.model()
        layout = case.layout(model)
        both = case.velocity(model, layout=layout)
        for row in range(2):
            rows = slice(row, row + 1)
            close(case.velocity(model, rows, layout=layout[rows])[0], both[row])
        mask = layout.mask.clone()
        mask[0] = False
        mixed = case.velocity(model, layout=LayoutInputs(layout.boxes, layout.phrase_embeds, mask))
        assert torch.equal(mixed[0], case.velocity(model)[0])
        close(mixed[1], both[1])
        assert not torch.allclose(mixed[0], both[0], atol=1e-2)

    def test_box_order_changes_nothing(self, case: Case) -> None:
        model = case.model()
        layout, order = case.layout(model, (3, 3)), torch.tensor([2, 0, 1])
        there = case.velocity(model, layout=layout)
        permuted = LayoutInputs(layout.boxes[:, order], layout.phrase_embeds[:, order], layout.mask[:, order])
        close(case.velocity(model, layout=permuted), there)
        swapped = LayoutInputs(layout.boxes, layout.phrase_embeds[:, order], layout.mask)
        assert not torch.allclose(case.velocity(model, layout=swapped), there, atol=1e-3)

    # -- what trains

    def test_exactly_the_lora_trains_and_all_of_it(self, case: Case) -> None:
        model = case.model()
        with torch.device("meta"):
            names = [n for n, _ in case.build(**case.changes, open_gates=False).named_modules()]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = add_layout_lora(model)
        assert report.targets == [n for n in names if n.endswith(("layout_mlp.fc1", "layout_mlp.fc2"))]
        assert not report.zero_gates
        assert not report.dead_targets
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{t}.lora_{ab}.default.weight" for t in report.targets for ab in "AB"}
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
        layout = case.layout(model)
        for factor in "BA":  # all of lora_B moves at the first step, all of lora_A once lora_B is not zero
            model(**case.run_inputs(model), layout=layout).sample.square().mean().backward()
            assert all(p.grad.any() for n, p in model.named_parameters() if f"lora_{factor}" in n)
            assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
            optimizer.step()
            optimizer.zero_grad()
        after = {n.replace(".base_layer.", "."): v for n, v in model.state_dict().items() if "lora_" not in n}
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in after.items())

    def test_the_whole_stream_can_train(self, case: Case) -> None:
        """No parameter of the stream is out of the loss's reach, but those that nothing reads by construction."""
        model = case.model()
        model(**case.run_inputs(model), layout=case.layout(model)).sample.square().mean().backward()
        stream = {n: p for n, p in model.named_parameters() if "layout" in n}
        assert all(p.grad is not None for p in stream.values())
        dead = {n for n, p in stream.items() if not p.grad.any()}
        unread = ("null_phrase", "null_box")  # padding is masked
        unread += (
            "attn.add_q_proj.weight",
            "attn.add_q_proj.bias",
            "attn.norm_added_q.weight",
        )  # of a last joint attention
        unread += ("attn.to_k.bias", "attn.add_k_proj.bias")  # a bias of all keys moves no softmax
        assert all(name.endswith(unread) for name in dead)

    @pytest.mark.parametrize("mode", EXECUTION_MODES)
    def test_execution_modes_change_no_result(self, case: Case, mode: str) -> None:
        self._same_outputs_and_gradients(case, EXECUTION_MODES[mode])

    @pytest.mark.slow
    def test_compiling_changes_no_result(self, case: Case) -> None:
        self._same_outputs_and_gradients(case, lambda model: model.compile_repeated_blocks(backend="aot_eager"))

    @staticmethod
    def _same_outputs_and_gradients(case: Case, change: Callable[[Any], Any]) -> None:
        def run(model: Any) -> dict[str, torch.Tensor]:
            out = model(**case.run_inputs(model), layout=case.layout(model), layout_scale=0.7).sample
            out.square().mean().backward()
            return {"output": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        plain, changed = case.model(), case.model()
        change(changed)
        expected, got = run(plain), run(changed)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")

    # -- files

    def test_adapters_save_load_merge_and_go(self, case: Case, tmp_path: Path) -> None:
        model, plain = case.model(), case.model()
        layout = case.layout(model)
        base = case.velocity(model, layout=layout)
        add_layout_lora(model)
        trained_adapter(model)
        adapted = case.velocity(model, layout=layout)
        assert not torch.allclose(adapted, base, atol=1e-3)
        save_adapter(model, tmp_path / "adapter", metadata={})
        load_adapter(plain, tmp_path / "adapter")
        assert torch.equal(case.velocity(plain, layout=layout), adapted)
        torch.testing.assert_close(case.velocity(merge_adapter(plain), layout=layout), adapted, atol=2e-5, rtol=0)
        remove_adapter(plain)
        assert torch.equal(case.velocity(plain, layout=layout), base)

    def test_a_saved_model_opens_again(self, case: Case, tmp_path: Path) -> None:
        model = case.model(layout_slots=5, mask_padding=False)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(str(tmp_path))
        assert {k: again.config[k] for k in case.changes} == case.changes | {
            k: list(v) for k, v in case.changes.items() if isinstance(v, tuple)
        }
        layout = case.layout(model)
        assert torch.equal(case.velocity(again, layout=layout), case.velocity(model, layout=layout))

    @pytest.mark.parametrize("init", ["copy_text", "copy_image", "random"])
    def test_a_plain_folder_opens_with_a_seeded_reported_stream(
        self, case: Case, init: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = case.model()
        twin = plain_twin(model)
        twin.save_pretrained(tmp_path)
        rng = torch.get_rng_state()
        options = {k: v for k, v in case.changes.items() if k.startswith(("layout", "phrase"))}
        first, second = (type(model).from_pretrained(str(tmp_path), layout_init=init, **options) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), rng)  # the caller's random numbers are not used up
        assert (
            sum("has no layout stream" in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING) == 2
        )
        assert not any(p.is_meta for p in first.parameters())
        assert first.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(v, second.state_dict()[n]) for n, v in first.state_dict().items())
        assert not any(block.layout_stream.out_proj.weight.any() for block in first.layout_blocks())
        assert torch.equal(case.velocity(first, layout=case.layout(first)), case.velocity(twin))
        if init == "random":
            return
        block = first.layout_blocks()[0]
        feed_forward = block.ff_context if init == "copy_text" else block.ff
        assert torch.equal(block.layout_stream.layout_mlp.fc2.weight, feed_forward.net[2].weight)
        add_v = block.attn.add_v_proj if init == "copy_text" else block.attn.to_v
        assert torch.equal(block.layout_stream.attn.add_v_proj.weight, add_v.weight)
        # Nothing of a block's stream is left random: a stream of another seed is the same but for the processor.
        other = type(model).from_pretrained(str(tmp_path), layout_init=init, layout_seed=1, **options).state_dict()
        differ = {name for name, value in first.state_dict().items() if not torch.equal(value, other[name])}
        assert differ
        assert all(name.startswith("layout_processor.") for name in differ)

    # -- numbers

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, case: Case, dtype: torch.dtype) -> None:
        exact = case.model()
        model = case.model().to(dtype)
        layout = case.layout(model)
        add_layout_lora(model)
        # Times and guidance that bf16 holds, for the base of some families computes with both in its own dtype.
        times = {k: v for k, v in (("timestep", [0.5, 0.25]), ("guidance", [2.0, 2.0])) if k in case.run_inputs(model)}
        exact_inputs = case.run_inputs(model) | {k: torch.tensor(v) for k, v in times.items()}
        inputs = {k: v.to(dtype) if k not in times and not k.endswith("ids") else v for k, v in exact_inputs.items()}
        out = model(**inputs, layout=layout).sample
        out.float().square().mean().backward()
        assert out.dtype is dtype
        assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
        assert all(p.grad.isfinite().all() for p in lora_parameters(model))
        assert all(p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
        with torch.no_grad():
            wanted = exact(**exact_inputs, layout=layout).sample
        step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert (out.detach().float() - wanted).norm() / wanted.norm() < 8 * step

    def test_from_latents_and_back(self, case: Case) -> None:
        model = case.model()
        generator = torch.Generator().manual_seed(4)
        latents = torch.randn(2, model.latent_channels, 12, 8, generator=generator)
        texts = {name: torch.randn(2, *shape, generator=generator) for name, shape in model.text_shapes(7).items()}
        times = torch.tensor([0.9, 0.3])
        inputs = model.model_inputs(latents, times, texts, guidance=3.5)
        sample = model(**inputs, layout=case.layout(model)).sample
        assert model.as_latents(sample, 12, 8).shape == latents.shape
        assert torch.equal(model.as_latents(inputs["hidden_states"], 12, 8), latents)
        assert 12 % model.latent_multiple == 0
        half = model.model_inputs(latents.to(torch.bfloat16), times, texts)
        assert half["hidden_states"].dtype is torch.bfloat16
        assert half["timestep"].dtype is torch.float32

    # -- refusals

    def test_what_knows_two_streams_only_is_refused(self, case: Case) -> None:
        model = case.model()
        with pytest.raises(NotImplementedError, match="FirstBlockCacheConfig is not supported with a layout stream"):
            model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(NotImplementedError, match="fused"):
            model.fuse_qkv_projections()

    def test_a_layout_that_does_not_fit_is_refused(self, case: Case) -> None:
        model = case.model()
        with pytest.raises(ValueError, match="layouts for a batch of 2"):
            case.velocity(model, layout=case.layout(model, (1, 1, 1)))
        with pytest.raises(ValueError, match=r"a phrase is .* wide, this model takes"):
            case.velocity(model, layout=tiny_layout(width=model.phrase_dim + 1, tokens=model.phrase_tokens))
        with pytest.raises(ValueError, match=r"a phrase is .* wide, this model takes"):
            case.velocity(model, layout=tiny_layout(width=model.phrase_dim, tokens=3))


# -- the registry


def test_every_family_is_under_contract() -> None:
    assert {CASES[name].model().family for name in CASES} == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert issubclass(family.transformer, LayoutModelMixin)
        assert family.transformer.family == name
        assert family.stock_class in [cls.__name__ for cls in family.transformer.__mro__]


# Parameters in millions: base, stream, LoRA at r = 16; number of target linears. SD3-medium's stream is CreatiLayout's (580
# tensors, 1280.30 M), and so is that of flux-dev with single blocks and phrases of 30 tokens (1,146 tensors, 9873.99 M).
FULL_SIZES = {
    ("sd3-medium", ""): (2028.33, 1280.30, 5.73, 48),
    ("sd3-medium", "cross"): (2028.33, 1051.30, 5.73, 48),
    ("sd3.5-medium", ""): (2243.17, 1280.31, 5.73, 48),
    ("sd3.5-large", ""): (8056.63, 5111.22, 14.52, 76),
    ("flux-dev", ""): (11901.41, 4023.86, 9.00, 38),
    ("flux-dev", "creatilayout"): (11901.41, 9873.99, 28.17, 116),
    ("flux-schnell", "cross"): (11891.18, 3296.95, 9.00, 38),
}
CHOICES: dict[str, dict[str, Any]] = {
    "": {},
    "cross": {"layout_attention": "cross"},
    "creatilayout": {"phrase_tokens": 30, "layout_single_blocks": True, "mask_padding": False},
}


@pytest.mark.parametrize(("preset", "choice"), FULL_SIZES)
def test_full_sizes(preset: str, choice: str) -> None:
    family = next(family for family in FAMILIES.values() if preset in family.presets)
    with torch.device("meta"):
        model = family.transformer(**family.presets[preset], **CHOICES[choice])
    total = sum(p.numel() for p in model.parameters())
    stream = sum(p.numel() for n, p in model.named_parameters() if "layout" in n)
    report = add_layout_lora(model)
    sizes = tuple(round(count / 1e6, 2) for count in (total - stream, stream, report.trainable_params))
    assert (*sizes, len(report.targets)) == FULL_SIZES[preset, choice]


# -- what only one family has


def test_packing_is_that_of_diffusers_flux_pipeline() -> None:
    model = tiny_flux_transformer()
    latents = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    texts = {"embeds": torch.zeros(2, 7, 24), "pooled": torch.zeros(2, 16)}
    inputs = model.model_inputs(latents, torch.ones(2), texts, guidance=2.5)
    assert torch.equal(inputs["hidden_states"], FluxPipeline._pack_latents(latents, 2, 4, 12, 8))
    ids = FluxPipeline._prepare_latent_image_ids(2, 6, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(inputs["img_ids"], ids)
    assert torch.equal(inputs["guidance"], torch.tensor([2.5, 2.5]))
    assert "guidance" not in tiny_flux_transformer(guidance_embeds=False).model_inputs(latents, torch.ones(2), texts)


def test_the_uncond_call_of_true_guidance_sees_no_layout() -> None:
    case = CASES["flux-dev"]
    model = case.model()
    layout = case.layout(model)
    base, full = case.velocity(model), case.velocity(model, layout=layout)
    with model.cache_context("cond"):
        assert torch.equal(case.velocity(model, layout=layout), full)
    with model.cache_context("uncond"):
        assert torch.equal(case.velocity(model, layout=layout), base)
    assert torch.equal(case.velocity(model, layout=layout), full)


def test_controlnet_residuals_reach_both_kinds_of_flux_blocks() -> None:
    case = CASES["flux-schnell singles"]
    model = case.model(num_layers=3)
    twin, layout = plain_twin(model), case.layout(model)
    one, two = torch.randn(2, 2, 64, 32, generator=torch.Generator().manual_seed(6))
    for samples in (
        {"controlnet_block_samples": [one, two]},
        {"controlnet_block_samples": [one, two], "controlnet_blocks_repeat": True},
        {"controlnet_single_block_samples": [one]},
    ):
        wanted = case.velocity(twin, **samples)
        assert not torch.allclose(wanted, case.velocity(twin), atol=1e-3)
        assert torch.equal(case.velocity(model, **samples), wanted)
        assert torch.equal(case.velocity(model, layout=layout.dropped(), **samples), wanted)
