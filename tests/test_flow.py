"""The objective, each part against a formula or against diffusers' own function."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import stats

from mmdit_lora.data.dataset import LayoutDataset
from mmdit_lora.data.shapes import open_scenes
from mmdit_lora.flow import (
    flow_loss,
    inside_weight,
    interpolate,
    sample_timesteps,
    scheduler_shift,
    shift_timesteps,
    velocity,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.6, 0.5), (-1.0, 2.0)])
def test_logit_normal_is_the_logistic_of_a_normal(mean: float, std: float) -> None:
    t = sample_timesteps(20_000, logit_mean=mean, logit_std=std, generator=generator())
    assert stats.kstest(torch.logit(t.double()).numpy(), "norm", args=(mean, std)).pvalue > 0.01
    assert stats.kstest(torch.logit(t.double()).numpy(), "norm", args=(mean + 0.1, std)).pvalue < 0.01


def test_uniform_is_uniform() -> None:
    t = sample_timesteps(20_000, density="uniform", generator=generator())
    assert stats.kstest(t.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("scale", [1.29, -0.5, 0.0])
def test_mode_is_equation_20(scale: float) -> None:
    u = torch.rand(1000, generator=generator())
    expected = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    t = sample_timesteps(1000, density="mode", mode_scale=scale, generator=generator())
    torch.testing.assert_close(t, expected)


@pytest.mark.parametrize("density", ["logit_normal", "mode"])
def test_densities_are_those_of_diffusers(density: str) -> None:
    expected = compute_density_for_timestep_sampling(density, 100, 0.2, 1.1, 1.0, generator=generator(3))
    t = sample_timesteps(
        100,
        density=density,  # type: ignore[arg-type]
        logit_mean=0.2,
        logit_std=1.1,
        mode_scale=1.0,
        generator=generator(3),
    )
    assert torch.equal(t, expected)


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_shift_is_that_of_the_scheduler(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    plain = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(shift_timesteps(plain, shift), scheduler.sigmas.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_the_shift_of_a_resolution_is_that_of_the_scheduler(kind: str, side: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, time_shift_type=kind
    )
    tokens = (side // 16) ** 2
    sigmas = torch.linspace(1, 0.02, 50)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=calculate_shift(tokens))
    shifted = shift_timesteps(sigmas, scheduler_shift(scheduler.config, tokens))
    torch.testing.assert_close(shifted, scheduler.sigmas[:-1].float(), atol=1e-6, rtol=1e-5)


def test_a_scheduler_without_dynamic_shifting_has_one_shift() -> None:
    assert scheduler_shift(FlowMatchEulerDiscreteScheduler(shift=3.0).config, 4096) == 3.0


def test_images_of_each_size_are_shifted_by_their_own_tokens() -> None:
    """The draws are the same, so the times differ by the shift alone."""
    records = open_scenes("shapes://basic?count=4&seed=0")
    plain = LayoutDataset(records, size=64, seed=0)
    shifted = LayoutDataset(records, size=64, seed=0, shift=lambda size: size[0] / 32)
    for index in range(4):
        assert shifted[index].t == pytest.approx(shift_timesteps(plain[index].t, 2.0))


def test_interpolation_is_the_schedulers_noise_and_the_velocity_is_its_slope() -> None:
    x0, noise = (torch.randn(3, 4, 8, 8, generator=generator(seed)) for seed in (1, 2))
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    steps = scheduler.timesteps[[10, 500, 900]]
    t = steps / 1000
    torch.testing.assert_close(interpolate(x0, noise, t), scheduler.scale_noise(x0, steps, noise))
    assert torch.equal(interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3)), noise)
    slope = (interpolate(x0, noise, t + 0.05) - interpolate(x0, noise, t - 0.05)) / 0.1
    torch.testing.assert_close(slope, velocity(x0, noise), atol=1e-4, rtol=1e-3)


def test_the_exact_velocity_brings_the_sampler_back_to_the_image() -> None:
    x0, noise = (torch.randn(1, 4, 8, 8, generator=generator(seed)) for seed in (1, 2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(7)
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x0, noise), timestep, x).prev_sample
    torch.testing.assert_close(x, x0, atol=1e-5, rtol=1e-5)


def test_loss_is_the_mean_square_per_sample_in_fp32() -> None:
    prediction, target = (torch.randn(2, 4, 8, 8, generator=generator(seed)) for seed in (1, 2))
    expected = torch.stack([torch.nn.functional.mse_loss(p, q) for p, q in zip(prediction, target, strict=True)])
    torch.testing.assert_close(flow_loss(prediction, target), expected)
    assert flow_loss(prediction.bfloat16(), target.bfloat16()).dtype is torch.float32


def test_inside_weight_counts_cells_by_what_boxes_cover() -> None:
    boxes = torch.tensor(
        [[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]], [[0.125, 0.0, 0.5, 0.25], [0.0, 0.0, 1.0, 1.0]]]
    )
    mask = torch.tensor([[True, True], [True, False]])
    weights = inside_weight(boxes, mask, 4, 4, 5.0)
    assert weights.shape == (2, 1, 4, 4)
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3)), torch.ones(2))
    ratio = weights[0, 0] / weights[0, 0, 3, 3]
    expected = torch.ones(4, 4)
    expected[:2, :2] = 5  # two equal boxes count once
    torch.testing.assert_close(ratio, expected)
    # The second layout covers half of the first cell and all of the next; its padding box counts nothing.
    torch.testing.assert_close(weights[1, 0, 0] / weights[1, 0, 3, 3], torch.tensor([3.0, 5.0, 1.0, 1.0]))


def test_no_box_or_a_weight_of_one_is_the_plain_loss() -> None:
    boxes, mask = torch.rand(2, 3, 2, 2, generator=generator()).sort(dim=2).values.flatten(2), torch.ones(2, 3).bool()
    assert torch.equal(inside_weight(boxes, ~mask, 8, 8, 9.0), torch.ones(2, 1, 8, 8))
    assert torch.equal(inside_weight(boxes, mask, 8, 8, 1.0), torch.ones(2, 1, 8, 8))
