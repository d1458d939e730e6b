"""The plots of `inspect.html`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmdit_lora.analysis.inspection import SHARES, Inspection, ModuleFigures, Similarity
from mmdit_lora.analysis.svg import BAR, INK, LINE, SERIES, SOFT, figure, to_svg


def kind_of(name: str) -> str:
    """The last two parts of a module's name, e.g. `layout_mlp.fc1`."""
    return ".".join(name.split(".")[-2:])


def short(name: str) -> str:
    """A module's name without what all of them share."""
    parts = name.replace("single_transformer_blocks.", "single ").replace("transformer_blocks.", "block ").split(".")
    return " ".join(part for part in parts if part != "layout_stream")


def colors_of(modules: Sequence[ModuleFigures]) -> dict[str, str]:
    """A colour for each kind of linear; the last one is shared by those that are too many."""
    kinds = list(dict.fromkeys(kind_of(module.name) for module in modules))
    return {kind: SERIES[min(place, len(SERIES) - 1)] for place, kind in enumerate(kinds)}


def spectra(modules: Sequence[ModuleFigures]) -> str:
    """Singular values of every linear, each against its largest, on a logarithmic scale."""
    colors = colors_of(modules)
    with figure(5.2, 3.2) as (drawn, axes):
        for module in modules:
            values = np.array(module.singular_values[: max(module.directions, 1)])
            if values.any():
                axes.plot(
                    np.arange(1, len(values) + 1),
                    values / values[0],
                    color=colors[kind_of(module.name)],
                    alpha=0.7,
                    lw=1.1,
                )
        axes.set_yscale("log")
        axes.set_xlabel("singular value number")
        axes.set_ylabel("share of the largest")
        _whole_numbers(axes)
        _key(axes, colors)
        return to_svg(drawn, "spectra")


def energy(modules: Sequence[ModuleFigures], suggested: int) -> str:
    """Energy (sum of squared singular values) that the first ranks hold: of each linear, and of all together."""
    colors = colors_of(modules)
    longest = max(len(module.singular_values) for module in modules)
    together = np.zeros(longest)
    with figure(5.2, 3.2) as (drawn, axes):
        for module in modules:
            squares = np.square(module.singular_values)
            together[: len(squares)] += squares
            if squares.any():
                held = np.cumsum(squares) / squares.sum()
                axes.plot(np.arange(1, len(held) + 1), held, color=colors[kind_of(module.name)], alpha=0.45, lw=0.9)
        if together.any():
            axes.plot(np.arange(1, longest + 1), np.cumsum(together) / together.sum(), color=INK, lw=2.2)
        for share in SHARES:
            axes.axhline(share, color=SOFT, lw=0.8, ls=":")
        axes.axvline(suggested, color=SOFT, lw=0.9, ls="--")
        axes.annotate(
            f"rank {suggested}", (suggested, 0.45), xycoords=("data", "axes fraction"), color=SOFT, xytext=(4, 0),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
        axes.set_xlabel("rank")
        axes.set_ylabel("share of the energy held")
        axes.set_ylim(top=1.02)
        _whole_numbers(axes)
        _key(axes, {"all together": INK, **colors}, loc="lower right")
        return to_svg(drawn, "energy")


def blocks(inspection: Inspection) -> str:
    """Each block's part of ||dW||_F^2, by kind of linear."""
    names = [block.name for block in inspection.blocks]
    colors = colors_of(inspection.modules)
    with figure(10.8, max(1.6, 0.26 * len(names) + 0.9)) as (drawn, axes):
        left = np.zeros(len(names))
        for kind, color in colors.items():
            parts = np.zeros(len(names))
            for module in inspection.modules:
                if kind_of(module.name) == kind:
                    parts[names.index(module.block)] += module.energy_share
            axes.barh(range(len(names)), parts, left=left, color=color, height=0.66, label=kind)
            left += parts
        axes.set_yticks(range(len(names)), [short(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("share of the change")
        _key(axes, colors, loc="best")
        return to_svg(drawn, "blocks")


def amplification(modules: Sequence[ModuleFigures]) -> str:
    """||W|| in the directions of dW, between that in random ones and in W's own, and the factor by which dW goes beyond."""
    rows = np.arange(len(modules))
    with figure(10.8, max(2.0, 0.23 * len(modules) + 1.2), ncols=2, sharey=True) as (drawn, (left, right)):
        for row, module in enumerate(modules):
            left.plot([module.projected_random, module.projected_own], [row, row], color=LINE, lw=3, zorder=1)
        for field, color, label in (
            ("projected_random", SERIES[6], "random directions"),
            ("projected", BAR, "directions of dW"),
            ("projected_own", SERIES[1], "W's own top directions"),
        ):
            left.scatter([getattr(m, field) for m in modules], rows, color=color, s=24, zorder=2, label=label)
        left.scatter([m.norm for m in modules], rows, color=INK, marker="|", s=60, zorder=2, label="||dW||")
        if any(module.directions for module in modules):
            left.set_xscale("log")
        left.set_xlabel("Frobenius norm of W, projected on k directions")
        left.set_yticks(rows, [short(module.name) for module in modules])
        left.set_ylim(len(modules) - 0.4, -0.6)
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=1.0, handletextpad=0.2)
        known = [(row, m.amplification) for row, m in enumerate(modules) if m.amplification is not None]
        if known:
            right.barh([row for row, _ in known], [value for _, value in known], color=BAR, height=0.62)
            right.bar_label(
                right.containers[0], [f"{value:.2f}" for _, value in known], padding=3, fontsize=8, color=SOFT
            )
            right.margins(x=0.12)
        right.axvline(1, color=SOFT, lw=0.9, ls="--")
        right.grid(visible=False, axis="y")
        right.set_xlabel("amplification ||dW|| / ||U^T W V||")
        return to_svg(drawn, "amplification")


def similarity(found: Sequence[Similarity]) -> str:
    """phi of all directions by linear, beside its chance level."""
    rows = np.arange(len(found))
    with figure(6.2, max(2.0, 0.23 * len(found) + 1.2)) as (drawn, axes):
        axes.barh(rows, [each.full for each in found], color=BAR, height=0.62, label="all directions of both")
        chances = [each.chance for each in found]
        axes.scatter(chances, rows, color=SERIES[1], marker="|", s=70, label="random directions", zorder=2)
        axes.set_xlim(0, 1)
        axes.set_yticks(rows, [short(each.name) for each in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("phi of all directions")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return to_svg(drawn, "similarity")


def similarity_map(found: Sequence[Similarity]) -> str:
    """phi(i, j) averaged over those linears that have all of i and j."""
    shape = tuple(max(np.shape(each.phi)[axis] for each in found) for axis in (0, 1))
    padded = np.full((len(found), *shape), np.nan)
    for place, each in enumerate(found):
        padded[place, : len(each.phi), : len(each.phi[0])] = each.phi
    known = np.isfinite(padded)
    mean = np.ma.array(np.where(known, padded, 0).sum(0), mask=~known.any(0)) / known.sum(0).clip(min=1)
    with figure(5.2, 4.2) as (drawn, axes):
        extent = (0.5, shape[1] + 0.5, shape[0] + 0.5, 0.5)
        image = axes.imshow(mean, vmin=0, vmax=1, cmap="viridis", origin="upper", aspect="auto", extent=extent)
        axes.grid(visible=False)
        axes.set_xlabel("top j directions of the other adapter")
        axes.set_ylabel("top i directions of this one")
        drawn.colorbar(image, ax=axes, fraction=0.05)
        return to_svg(drawn, "similarity-map")


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _key(axes: Any, colors: dict[str, str], loc: str = "best") -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=color, lw=2, label=kind) for kind, color in colors.items()]
    axes.legend(handles=lines[:8], loc=loc)
