"""Dropout by sample: what one drops depends on its key and the layer alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdit_lora.lora import add_layout_lora
from mmdit_lora.lora.dropout import SampleDropout, SampleKeys, sample_bits, use_sample_dropout
from tests.tiny import tiny_transformer


def keyed(*values: int) -> SampleKeys:
    keys = SampleKeys()
    keys.value = torch.tensor(values, dtype=torch.int32)
    return keys


def test_a_sample_drops_the_same_in_any_batch_and_another_in_another_layer() -> None:
    x = torch.ones(3, 50, 20)
    together = SampleDropout(0.3, "fc1", keyed(5, 6, 7))(x)
    alone = SampleDropout(0.3, "fc1", keyed(6))(x[1:2])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(SampleDropout(0.3, "fc2", keyed(6))(x[1:2]), alone)
    assert together.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_what_is_kept_is_the_share_asked_for_and_independent_of_keys_places_and_layers() -> None:
    keys = torch.arange(2000, dtype=torch.int32)
    salts = [torch.tensor(value, dtype=torch.int32) for value in (1, 2)]
    one, two = ((sample_bits(keys, salt, 100) >= round(0.1 * 2**24)).double() for salt in salts)
    error = (0.1 * 0.9) ** 0.5  # of one entry
    assert abs(one.mean() - 0.9) < 4 * error / (2000 * 100) ** 0.5
    assert abs(one.mean(0).std() / (error / 2000**0.5) - 1) < 0.3  # by place
    assert abs(one.mean(1).std() / (error / 100**0.5) - 1) < 0.1  # by key
    for other in (two, one.roll(1, 0), one.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 4 / (2000 * 100) ** 0.5


def test_nothing_is_dropped_in_evaluation_and_without_keys_it_is_pytorchs() -> None:
    x = torch.randn(2, 3, 4)
    layer = SampleDropout(0.5, "a", keyed(1, 2))
    assert layer.eval()(x) is x
    layer.train()
    layer.keys.value = None
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    assert torch.equal(found, nn.functional.dropout(x, 0.5))


def test_a_forward_that_checkpointing_repeats_drops_the_same() -> None:
    layer, x = SampleDropout(0.5, "a", keyed(1, 2)), torch.randn(2, 3, 4, requires_grad=True)
    (plain,) = torch.autograd.grad((layer(x) ** 2).sum(), x)
    again = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    (repeated,) = torch.autograd.grad((again**2).sum(), x)
    assert torch.equal(plain, repeated)


def test_every_dropout_of_the_adapter_is_replaced_and_no_other_tensor_comes() -> None:
    model = tiny_transformer()
    add_layout_lora(model)
    before = set(model.state_dict())
    use_sample_dropout(model)
    layers = [m for m in model.modules() if isinstance(m, SampleDropout)]
    assert len(layers) == len([n for n in before if "lora_A" in n])
    assert len({int(m.salt) for m in layers}) == len(layers)
    assert not any("lora_dropout" in n and isinstance(m, nn.Dropout) for n, m in model.named_modules())
    assert set(model.state_dict()) == before
