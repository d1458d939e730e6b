"""`inspect.html` with its charts: the figures of an adapter for reading; and the same as lines for a terminal."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from mmdit_lora.analysis.inspection import RANK_NAMES, SHARES, SUGGESTED_SHARE, Inspection, ModuleFigures, Similarity
from mmdit_lora.errors import clip
from mmdit_lora.visual.charts import BAR, INK, LINE, SERIES, SOFT, figure, to_svg
from mmdit_lora.visual.pages import render

_Column = tuple[str, str, Callable[[ModuleFigures], object]]  # head, what it means, cell


def page(inspection: Inspection) -> str:
    """The whole page as HTML."""
    modules, others = inspection.modules, inspection.similarity or []
    largest = max(inspection.blocks, key=lambda block: block.share)
    return render(
        "inspect.html",
        title="/".join(Path(inspection.adapter).resolve().parts[-2:]),
        verdict=advice(inspection),
        inspection=inspection,
        figures=(
            (", ".join(map(str, sorted({module.rank for module in modules}))), "rank as stored"),
            (f"{statistics.median(module.effective_rank for module in modules):.1f}", "median effective rank"),
            (inspection.suggested_rank, f"rank for {SUGGESTED_SHARE:.0%} of the energy"),
            (_short_number(_median(modules, "relative_norm")), "median |dW| / |W|"),
            (_short_number(_median(modules, "amplification")), "median amplification"),
            (f"{largest.share:.0%}", f"of it in {_short(largest.name)}"),
        ),
        rank_line=rank_line(inspection),
        amplification_line=amplification_line(modules),
        similarity_line=similarity_line(inspection) if others else "",
        spectra=_spectra(modules),
        energy=_energy(modules, inspection.suggested_rank),
        blocks=_blocks(inspection),
        amplification=_amplification(modules),
        similarity=_similarity(others) if others else "",
        similarity_map=_similarity_map(others) if others else "",
        tables=[
            (
                ["linear", *(head for head, *_ in columns)],
                ["", *(meaning for _, meaning, _ in columns)],
                [[_short(module.name), *(cell(module) for *_, cell in columns)] for module in modules],
            )
            for columns in (_SIZE, _DIRECTIONS)
        ],
    )


def lines(inspection: Inspection) -> list[str]:
    """A table for a terminal, with what it says in words."""
    modules = inspection.modules
    width = max(len(_short(module.name)) for module in modules)
    head = f"{'':<{width}} {'r':>4} {'|dW|':>9} {'dW/W':>7} {'share':>6} {'eff':>6} {'stable':>6} {'90%':>4} {'95%':>4} {'99%':>4}"
    out = [f"{head} {'amplif.':>8} {'own':>6} {'random':>7}"]
    for m in modules:
        ranks = " ".join(f"{rank:>4}" for rank in m.ranks.values())
        own, other, random = map(_short_number, (m.amplification, m.amplification_own, m.amplification_random))
        out.append(
            f"{_short(m.name):<{width}} {m.rank:>4} {_short_number(m.norm):>9} {_short_number(m.relative_norm):>7} "
            f"{m.energy_share:>6.1%} {m.effective_rank:>6.2f} {m.stable_rank:>6.2f} {ranks} {own:>8} {other:>6} {random:>7}"
        )
    out += [
        f"{_short(b.name)}: {b.share:.1%} of the change, |dW|/|W| {_short_number(b.relative_norm)}"
        for b in inspection.blocks
    ]
    out += [advice(inspection), rank_line(inspection), amplification_line(modules), *inspection.notes]
    return [*out, similarity_line(inspection)] if inspection.similarity else out


# -- what it says in words


def advice(inspection: Inspection) -> str:
    """What to do with this adapter, in one sentence."""
    modules, rank = inspection.modules, inspection.suggested_rank
    stored = max(module.rank for module in modules)
    if not any(module.norm for module in modules):
        return "Train this adapter for longer, or with a higher learning rate: it changes nothing yet."
    if rank < stored:
        adapter = shlex.quote(clip(inspection.adapter))
        return (
            f"Make it smaller with `mmdit-lora resize {adapter} --rank {rank} --out OUT --data DATA`: rank {rank} of {stored} holds "
            f"{SUGGESTED_SHARE:.0%} of its change, and DATA's layouts show whether the images stay as good."
        )
    return (
        f"Keep rank {stored}: a smaller one would lose more than {1 - SUGGESTED_SHARE:.0%} of its change; if its images are not good "
        "enough, train with a larger `lora.r`."
    )


def rank_line(inspection: Inspection) -> str:
    """What the spectra say about the rank."""
    stored = sorted({module.rank for module in inspection.modules})
    effective = statistics.median(module.effective_rank for module in inspection.modules)
    ranks = f"{stored[0]}" if len(stored) == 1 else f"{stored[0]} to {stored[-1]}"
    own = sum(module.suggested_rank * sum(module.shape) for module in inspection.modules)
    return (
        f"Stored at rank {ranks}; the median effective rank is {effective:.1f}. Rank {inspection.suggested_rank} for all keeps "
        f"{SUGGESTED_SHARE:.0%} of the energy of all together; a rank of its own for each linear, with {SUGGESTED_SHARE:.0%} of its "
        f"energy, would leave {own:,} of {inspection.parameters:,} parameters (`mmdit-lora resize --energy {SUGGESTED_SHARE}`). "
        "Energy is not fidelity: `mmdit-lora resize --data D` measures that before and after."
    )


def amplification_line(modules: Sequence[ModuleFigures]) -> str:
    """The finding of section 7.3 of the LoRA paper, for this adapter: figures, no judgement."""
    known = [module for module in modules if module.amplification is not None]
    if not known:
        return "Nothing is changed, so nothing is amplified."
    above = statistics.median(m.projected / m.projected_random for m in known if m.projected_random)
    own = statistics.median(m.projected / m.projected_own for m in known if m.projected_own)
    return (
        f"Medians over {len(known)} linears: the change is {_median(known, 'amplification'):.2f} times what W has in the same "
        f"directions; W has there {above:.2f} times what random directions would hold, and {own:.0%} of what its own strongest "
        "directions hold."
    )


def similarity_line(inspection: Inspection) -> str:
    """How alike the two adapters are."""
    pairs = inspection.similarity or []
    full, chance, top = (_median(pairs, field) for field in ("full", "chance", "top"))
    return (
        f"Against {inspection.against}: medians over {len(pairs)} linears of phi of all directions {full:.3f} (random directions "
        f"{chance:.3f}), of the first direction of each {top:.3f}."
    )


def _median(rows: Sequence[object], field: str) -> float | None:
    known = [value for row in rows if (value := getattr(row, field)) is not None]
    return statistics.median(known) if known else None


def _short_number(value: float | None) -> str:
    """Three digits; a dash for what is not known."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _short(name: str) -> str:
    """A module's name without what all of them share."""
    parts = name.replace("single_transformer_blocks.", "single ").replace("transformer_blocks.", "block ").split(".")
    return " ".join(part for part in parts if part != "layout_stream")


# -- tables


def _figure(field: str) -> Callable[[ModuleFigures], str]:
    return lambda module: _short_number(getattr(module, field))


def _rank_for(share: str) -> Callable[[ModuleFigures], int]:
    return lambda module: module.ranks[share]


_SIZE: tuple[_Column, ...] = (
    ("shape", "outputs x inputs of W", lambda m: f"{m.shape[0]} × {m.shape[1]}"),
    ("r", "rank as stored", lambda m: m.rank),
    ("scale", "factor of B A: alpha / r, or alpha / sqrt(r)", lambda m: f"{m.scale:.4g}"),
    ("|dW|", "Frobenius norm of the change, scale included", _figure("norm")),
    ("|dW|₂", "largest singular value of the change", _figure("spectral_norm")),
    ("|W|", "Frobenius norm of the base's weight", _figure("weight_norm")),
    ("|W|₂", "largest singular value of the base's weight", _figure("weight_spectral_norm")),
    ("|dW|/|W|", "", _figure("relative_norm")),
    ("share", "of the adapter's whole |dW|²", lambda m: f"{m.energy_share:.1%}"),
    ("effective", "effective rank: exp of the entropy of the singular values", lambda m: f"{m.effective_rank:.2f}"),
    ("stable", "stable rank: |dW|² / |dW|₂²", lambda m: f"{m.stable_rank:.2f}"),
    *((share, f"smallest rank that holds {share} of the energy", _rank_for(share)) for share in RANK_NAMES),
)
_DIRECTIONS: tuple[_Column, ...] = (
    ("k", "directions of dW that are more than rounding", lambda m: m.directions),
    ("|UᵀWV|", "norm of W in the top k directions of dW", _figure("projected")),
    ("of W's own", "norm of W in its own top k directions", _figure("projected_own")),
    ("of random ones", "norm of W in k random directions", _figure("projected_random")),
    ("|dW|", "Frobenius norm of the change", _figure("norm")),
    ("amplification", "|dW| / |UᵀWV| in the directions of dW", _figure("amplification")),
    ("W's own", "|dW| / |UᵀWV| with W's own directions", _figure("amplification_own")),
    ("random", "|dW| / |UᵀWV| with random directions", _figure("amplification_random")),
)


# -- charts


def _kind(name: str) -> str:
    """The last two parts of a module's name, e.g. `layout_mlp.fc1`."""
    return ".".join(name.split(".")[-2:])


def _colors(modules: Sequence[ModuleFigures]) -> dict[str, str]:
    """A colour for each kind of linear; the last one is shared by those that are too many."""
    kinds = dict.fromkeys(_kind(module.name) for module in modules)
    return {kind: SERIES[min(place, len(SERIES) - 1)] for place, kind in enumerate(kinds)}


def _legend(axes: Any, colors: Mapping[str, str], **options: Any) -> None:
    handles = [Line2D([], [], color=color, lw=2, label=kind) for kind, color in colors.items()]
    axes.legend(handles=handles[:8], **options)


def _row_names(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _log_ticks(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "columnspacing": 1.0}


def _spectra(modules: Sequence[ModuleFigures]) -> str:
    """Singular values of every linear, each against its largest, on a logarithmic scale."""
    colors = _colors(modules)
    with figure(5.2, 3.2) as (drawn, axes):
        for module in modules:
            values = np.array(module.singular_values[: max(module.directions, 1)])
            if values.any():
                places = np.arange(1, len(values) + 1)
                axes.plot(places, values / values[0], color=colors[_kind(module.name)], alpha=0.7, lw=1.1)
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="singular value number", ylabel="share of the largest")
        _legend(axes, colors)
        return to_svg(drawn, "spectra")


def _energy(modules: Sequence[ModuleFigures], suggested: int) -> str:
    """Energy (sum of squared singular values) that the first ranks hold: of each linear, and of all together."""
    colors = _colors(modules)
    longest = max(len(module.singular_values) for module in modules)
    together = np.zeros(longest)
    with figure(5.2, 3.2) as (drawn, axes):
        for module in modules:
            squares = np.square(module.singular_values)
            together[: len(squares)] += squares
            if squares.any():
                share = np.cumsum(squares) / squares.sum()
                axes.plot(np.arange(1, len(share) + 1), share, color=colors[_kind(module.name)], alpha=0.45, lw=0.9)
        if together.any():
            axes.plot(np.arange(1, longest + 1), np.cumsum(together) / together.sum(), color=INK, lw=2.2)
        for share in SHARES:
            axes.axhline(share, color=SOFT, lw=0.8, ls=":")
        axes.axvline(suggested, color=SOFT, lw=0.9, ls="--")
        axes.text(suggested, 0.45, f" rank {suggested}", transform=axes.get_xaxis_transform(), color=SOFT, fontsize=8)
        axes.set_ylim(top=1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="rank", ylabel="share of the energy held")
        _legend(axes, {"all together": INK, **colors}, loc="lower right")
        return to_svg(drawn, "energy")


def _blocks(inspection: Inspection) -> str:
    """Each block's part of ||dW||_F^2, by kind of linear."""
    names = [block.name for block in inspection.blocks]
    colors = _colors(inspection.modules)
    with figure(10.8, max(1.6, 0.26 * len(names) + 1.1)) as (drawn, axes):
        left = np.zeros(len(names))
        for kind, color in colors.items():
            parts = np.zeros(len(names))
            for module in inspection.modules:
                if _kind(module.name) == kind:
                    parts[names.index(module.block)] += module.energy_share
            axes.barh(range(len(names)), parts, left=left, color=color, height=0.66)
            left += parts
        _row_names(axes, names)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("share of the change")
        _legend(axes, colors, **_ABOVE)
        return to_svg(drawn, "blocks")


def _amplification(modules: Sequence[ModuleFigures]) -> str:
    """||W|| in the directions of dW, between that in random ones and in W's own, and the factor by which dW goes beyond."""
    rows = np.arange(len(modules))
    series = (
        ("projected_random", "random directions", {"color": SERIES[6], "s": 24}),
        ("projected", "directions of dW", {"color": BAR, "s": 24}),
        ("projected_own", "W's own top directions", {"color": SERIES[1], "s": 24}),
        ("norm", "||dW||", {"color": INK, "marker": "|", "s": 60}),
    )
    with figure(10.8, max(2.0, 0.23 * len(modules) + 1.2), ncols=2, sharey=True) as (drawn, (left, right)):
        for row, module in enumerate(modules):
            left.plot([module.projected_random, module.projected_own], [row, row], color=LINE, lw=3, zorder=1)
        for field, label, style in series:
            left.scatter([getattr(m, field) for m in modules], rows, label=label, zorder=2, **style)
        if any(module.directions for module in modules):
            left.set_xscale("log")
            _log_ticks(left.xaxis)
        left.set_xlabel("Frobenius norm of W, projected on k directions")
        _row_names(left, [module.name for module in modules])
        left.legend(**_ABOVE, handletextpad=0.2)
        known = [(row, m.amplification) for row, m in enumerate(modules) if m.amplification is not None]
        if known:
            bars = right.barh(*zip(*known, strict=True), color=BAR, height=0.62)
            right.bar_label(bars, fmt="{:.2f}", padding=3, fontsize=8, color=SOFT)
            right.margins(x=0.12)
        right.axvline(1, color=SOFT, lw=0.9, ls="--")
        right.grid(visible=False, axis="y")
        right.set_xlabel("amplification ||dW|| / ||U^T W V||")
        return to_svg(drawn, "amplification")


def _similarity(pairs: Sequence[Similarity]) -> str:
    """phi of all directions by linear, beside its chance level."""
    rows = np.arange(len(pairs))
    with figure(5.2, max(2.0, 0.23 * len(pairs) + 1.2)) as (drawn, axes):
        axes.barh(rows, [pair.full for pair in pairs], color=BAR, height=0.62, label="all directions of both")
        chance = [pair.chance for pair in pairs]
        axes.scatter(chance, rows, color=SERIES[1], marker="|", s=70, label="random directions", zorder=2)
        axes.set_xlim(0, 1)
        _row_names(axes, [pair.name for pair in pairs])
        axes.set_xlabel("phi of all directions")
        axes.legend(**_ABOVE)
        return to_svg(drawn, "similarity")


def _similarity_map(pairs: Sequence[Similarity]) -> str:
    """phi(i, j) averaged over those linears that have all of i and j."""
    shape = tuple(max(np.shape(pair.phi)[axis] for pair in pairs) for axis in (0, 1))
    padded = np.full((len(pairs), *shape), np.nan)
    for place, pair in enumerate(pairs):
        padded[place, : len(pair.phi), : len(pair.phi[0])] = pair.phi
    mean = np.ma.masked_invalid(padded).mean(0)
    with figure(5.2, 4.2) as (drawn, axes):
        extent = (0.5, shape[1] + 0.5, shape[0] + 0.5, 0.5)
        image = axes.imshow(mean, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent)
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="top j directions of the other adapter", ylabel="top i directions of this one")
        drawn.colorbar(image, ax=axes, fraction=0.05)
        return to_svg(drawn, "similarity-map")
