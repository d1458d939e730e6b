"""`inspect`: what an adapter changes, module by module, and how much of it a smaller rank would hold."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit_lora.analysis.spectrum import (
    effective_rank,
    frobenius,
    projected_norm,
    random_norm,
    rank_holding,
    similarity,
    stable_rank,
    top,
)
from mmdit_lora.analysis.updates import Update, open_adapter, updates
from mmdit_lora.errors import InputError, listed
from mmdit_lora.lora import load_adapter

SHARES = (0.90, 0.95, 0.99)
RANK_NAMES = tuple(f"{share:.0%}" for share in SHARES)
SUGGESTED_SHARE = 0.99  # of the energy of dW that a suggested rank holds
_AGAINST = "against"
_BLOCK = re.compile(r"^(?:.*\.)?[a-z_]*blocks\.\d+(?=\.)")


@dataclass(frozen=True)
class ModuleFigures:
    """One adapted linear, W (m, n). dW is the whole change of the weight, alpha / r (and DoRA's magnitude) included.

    Args:
        block: the part of the model that it is in.
        shape: (m, n). rank: r as stored. scale: the factor of B A.
        norm, spectral_norm: ||dW||_F and ||dW||_2; weight_norm, weight_spectral_norm: those of W.
        relative_norm: ||dW||_F / ||W||_F; None where W is zero.
        singular_values: of scale * B A, r numbers (with DoRA: of the part of dW that has a rank).
        effective_rank, stable_rank, ranks: of these; `ranks` the smallest rank that holds each of `SHARES` of the energy.
        suggested_rank: the one that holds `SUGGESTED_SHARE`, at least 1.
        directions: k, the directions of dW that are compared with W.
        projected: ||U^T W V||_F with U, V the top k directions of dW; of W's own top k directions `projected_own`; of random
            ones `projected_random` (root of the mean square).
        amplification: ||dW||_F / ||U^T W V||_F, LoRA paper section 7.3; likewise `amplification_own`, `amplification_random`.
            None where dW or the denominator is zero.
        energy_share: of ||dW||_F^2 summed over the adapter.
    """

    name: str
    block: str
    shape: tuple[int, int]
    rank: int
    scale: float
    dora: bool
    norm: float
    spectral_norm: float
    weight_norm: float
    weight_spectral_norm: float
    relative_norm: float | None
    singular_values: list[float]
    effective_rank: float
    stable_rank: float
    ranks: dict[str, int]
    suggested_rank: int
    directions: int
    projected: float
    projected_own: float
    projected_random: float
    amplification: float | None
    amplification_own: float | None
    amplification_random: float | None
    energy_share: float = 0.0


@dataclass(frozen=True)
class BlockFigures:
    """The linears of one block together: `norm` is the root of the sum of squares, `share` its part of the whole."""

    name: str
    modules: int
    norm: float
    relative_norm: float | None
    share: float


@dataclass(frozen=True)
class Similarity:
    """How alike the input directions of two adapters are in one linear: phi of the LoRA paper, equation 4.

    Args:
        phi: (k_1, k_2), entry [i - 1][j - 1] of the top i directions of the adapter and the top j of the other.
        full: of all directions of both; `chance`: what random directions would have, max(k_1, k_2) / n.
        top: of the first direction of each; `top_chance` 1 / n.
    """

    name: str
    phi: list[list[float]]
    full: float
    chance: float
    top: float
    top_chance: float


@dataclass(frozen=True)
class Inspection:
    """What `inspect.json` holds. `against`: the other adapter, where one was given."""

    adapter: str
    base: str
    header: dict[str, Any]
    modules: list[ModuleFigures]
    blocks: list[BlockFigures]
    suggested_rank: int
    parameters: int
    notes: list[str]
    against: str | None = None
    similarity: list[Similarity] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def inspect_adapter(
    adapter: str | Path,
    *,
    base: str | None = None,
    stream: str | Path | None = None,
    against: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Inspection:
    """Measure an adapter against the weights that it changes.

    Args:
        base: folder or hub id; None = the one that the adapter names.
        stream: folder of a generic layout stream; None = the one that the adapter names, if any.
        against: a second adapter, whose directions are compared with the first's.
        dtype: of the base's weights.

    Raises:
        InputError: one of the two is no adapter or does not fit the base, or they share no linear.
    """
    opened = open_adapter(adapter, base=base, stream=stream, dtype=dtype)
    own, pairs = list(opened.updates()), None
    if against is not None:
        model = opened.pipe.transformer
        load_adapter(model, against, adapter_name=_AGAINST, allow_same=True)
        pairs = _similarities(own, {update.name: update.down for update in updates(model, _AGAINST)})
        if pairs is None:
            raise InputError(
                f"adapts none of the linears of {opened.folder}",
                location=f"--against {against}",
                hint="compare adapters that share targets",
            )
    measured = [measure(update) for update in own]
    energy = sum(module.norm**2 for module in measured)
    modules = [replace(module, energy_share=module.norm**2 / energy if energy else 0.0) for module in measured]
    return Inspection(
        adapter=str(adapter),
        base=opened.base,
        header=opened.header,
        modules=modules,
        blocks=_blocks(modules),
        suggested_rank=suggest([module.singular_values for module in modules]),
        parameters=sum(update.up.numel() + update.down.numel() for update in own),
        notes=_notes(own, modules),
        against=None if against is None else str(against),
        similarity=pairs,
    )


def measure(update: Update) -> ModuleFigures:
    """The figures of one linear; `energy_share` is left at 0."""
    (norm, change), low = update.directions(), update.low_rank().values
    count = change.rank
    change, own, weight = change.first(count), top(update.weight, max(count, 1)), frobenius(update.weight)
    projected = projected_norm(update.weight.double(), change.left, change.right)
    projected_own, projected_random = frobenius(own.values[:count]), random_norm(update.weight, count)
    return ModuleFigures(
        name=update.name,
        block=block_of(update.name),
        shape=(update.weight.shape[0], update.weight.shape[1]),
        rank=update.rank,
        scale=update.scale,
        dora=update.magnitude is not None,
        norm=norm,
        spectral_norm=change.values[0].item() if count else 0.0,
        weight_norm=weight,
        weight_spectral_norm=own.values[0].item(),
        relative_norm=_ratio(norm, weight),
        singular_values=low.tolist(),
        effective_rank=effective_rank(low),
        stable_rank=stable_rank(low),
        ranks={name: rank_holding(low, share) for name, share in zip(RANK_NAMES, SHARES, strict=True)},
        suggested_rank=max(1, rank_holding(low, SUGGESTED_SHARE)),
        directions=count,
        projected=projected,
        projected_own=projected_own,
        projected_random=projected_random,
        amplification=_ratio(norm, projected) if norm else None,
        amplification_own=_ratio(norm, projected_own) if norm else None,
        amplification_random=_ratio(norm, projected_random) if norm else None,
    )


def suggest(spectra: Sequence[Sequence[float]], share: float = SUGGESTED_SHARE) -> int:
    """The smallest one rank for all modules with which the adapter keeps `share` of its energy, summed over modules."""
    squares = [sorted((value * value for value in values), reverse=True) for values in spectra]
    total = math.fsum(math.fsum(each) for each in squares)
    largest = max((len(each) for each in squares), default=1)
    for rank in range(1, largest):
        if math.fsum(math.fsum(each[:rank]) for each in squares) >= share * total:
            return rank
    return max(largest, 1)


def block_of(name: str) -> str:
    """`transformer_blocks.3` of a module inside it; of any other its first part."""
    match = _BLOCK.match(name)
    return match[0] if match else name.split(".")[0]


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None


def _blocks(modules: Sequence[ModuleFigures]) -> list[BlockFigures]:
    figures = []
    for name in dict.fromkeys(module.block for module in modules):
        own = [module for module in modules if module.block == name]
        norm = math.hypot(*(module.norm for module in own))
        relative = _ratio(norm, math.hypot(*(module.weight_norm for module in own)))
        figures.append(BlockFigures(name, len(own), norm, relative, sum(module.energy_share for module in own)))
    return figures


def _notes(own: Sequence[Update], modules: Sequence[ModuleFigures]) -> list[str]:
    notes = []
    if any(module.dora for module in modules):
        notes.append(
            "DoRA: norms and amplification are of the whole change of the weight, rescaled rows included, which has full rank; "
            "spectra and ranks are of scale * B A."
        )
    if any(update.bias for update in own):
        notes.append("The adapter also changes biases (lora_bias); no figure here counts them.")
    still = [module.name for module in modules if module.norm == 0]
    if still:
        notes.append(f"{len(still)} of {len(modules)} linears are not changed at all: {listed(still)}.")
    return notes


def _similarities(own: Sequence[Update], others: dict[str, Tensor]) -> list[Similarity] | None:
    """Of the linears that both adapt and change; None where they share none. `others`: the matrices A by module."""
    shared = [update for update in own if update.name in others]
    pairs = []
    for update in shared:
        phi, width = similarity(update.down, others[update.name]), update.down.shape[1]
        if phi.numel():  # else one of the two is zero, and has no direction
            full, first = phi[-1, -1].item(), phi[0, 0].item()
            pairs.append(Similarity(update.name, phi.tolist(), full, max(phi.shape) / width, first, 1 / width))
    return pairs if shared else None
