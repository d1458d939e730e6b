"""`inspect.html` with its charts: the figures of an adapter for reading; and the same as lines for a terminal."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mmdit_lora.analysis import inspect_page as charts
from mmdit_lora.analysis.inspection import RANK_NAMES, SHARES, SUGGESTED_SHARE, Inspection, ModuleFigures, Similarity
from mmdit_lora.errors import clip
from mmdit_lora.visual.page import document
from mmdit_lora.visual.svg import BAR, INK, LINE, SERIES, SOFT, figure, to_svg


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


_STYLE = """
.lead{color:var(--soft);margin:0 0 12px;max-width:75ch}.charts.pair{grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr))}
code{font-size:13px;overflow-wrap:anywhere}svg{height:auto}
.charts.one figure{overflow-x:auto}.charts.one svg{min-width:560px}
"""


def _rank_at(share: str, module: ModuleFigures) -> str:
    return str(module.ranks[share])


def number(value: float | None) -> str:
    """Three digits; a dash for what is not known."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


_Column = tuple[str, str, Callable[[ModuleFigures], str]]
_SIZE: tuple[_Column, ...] = (
    ("shape", "outputs x inputs of W", lambda m: f"{m.shape[0]} × {m.shape[1]}"),
    ("r", "rank as stored", lambda m: f"{m.rank}"),
    ("scale", "factor of B A: alpha / r, or alpha / sqrt(r)", lambda m: f"{m.scale:.4g}"),
    ("|dW|", "Frobenius norm of the change, scale included", lambda m: number(m.norm)),
    ("|dW|₂", "largest singular value of the change", lambda m: number(m.spectral_norm)),
    ("|W|", "Frobenius norm of the base's weight", lambda m: number(m.weight_norm)),
    ("|W|₂", "largest singular value of the base's weight", lambda m: number(m.weight_spectral_norm)),
    ("|dW|/|W|", "", lambda m: number(m.relative_norm)),
    ("share", "of the adapter's whole |dW|²", lambda m: f"{m.energy_share:.1%}"),
    ("effective", "effective rank: exp of the entropy of the singular values", lambda m: f"{m.effective_rank:.2f}"),
    ("stable", "stable rank: |dW|² / |dW|₂²", lambda m: f"{m.stable_rank:.2f}"),
    *((share, f"smallest rank that holds {share} of the energy", partial(_rank_at, share)) for share in RANK_NAMES),
)
_DIRECTIONS: tuple[_Column, ...] = (
    ("k", "directions of dW that are more than rounding", lambda m: f"{m.directions}"),
    ("|UᵀWV|", "norm of W in the top k directions of dW", lambda m: number(m.projected)),
    ("of W's own", "norm of W in its own top k directions", lambda m: number(m.projected_own)),
    ("of random ones", "norm of W in k random directions", lambda m: number(m.projected_random)),
    ("|dW|", "Frobenius norm of the change", lambda m: number(m.norm)),
    ("amplification", "|dW| / |UᵀWV| in the directions of dW", lambda m: number(m.amplification)),
    ("W's own", "|dW| / |UᵀWV| with W's own directions", lambda m: number(m.amplification_own)),
    ("random", "|dW| / |UᵀWV| with random directions", lambda m: number(m.amplification_random)),
)


def page(inspection: Inspection) -> str:
    """The whole page as HTML."""
    modules = inspection.modules
    notes = "".join(f"<li>{escape(note)}</li>" for note in inspection.notes)
    body = [
        f'<div class="figures">{_figures(inspection)}</div>',
        f'<ul class="notes">{notes}</ul>' if notes else "",
        "<h2>How low its rank is</h2>",
        f'<p class="lead">{escape(rank_line(inspection))}</p>',
        _charts("pair", ("Singular values", charts.spectra(modules)),
                ("Energy held by the first ranks", charts.energy(modules, inspection.suggested_rank))),
        "<h2>Where the change is</h2>",
        _charts("one", ("Share of the change, by block", charts.blocks(inspection))),
        "<h2>What it amplifies</h2>",
        f'<p class="lead">{escape(amplification_line(modules))}</p>',
        _charts("one", ("W in the directions of dW, and how far dW goes beyond it", charts.amplification(modules))),
        _against(inspection),
        f"<h2>Every linear</h2>{_table(modules, _SIZE)}{_table(modules, _DIRECTIONS)}",
        f'<p class="of">adapter <code>{escape(inspection.adapter)}</code>, base <code>{escape(inspection.base)}</code></p>',
    ]  # fmt: skip
    title = "/".join(Path(inspection.adapter).resolve().parts[-2:])
    body.insert(0, f'<p class="lead">{_summary(inspection)}</p>')
    return document("".join(body), kind="adapter", title=title, verdict=escape(advice(inspection)), style=_STYLE)


def lines(inspection: Inspection) -> list[str]:
    """A table for a terminal, with what it says in words."""
    modules = inspection.modules
    width = max(len(charts.short(module.name)) for module in modules)
    head = f"{'':<{width}} {'r':>4} {'|dW|':>9} {'dW/W':>7} {'share':>6} {'eff':>6} {'stable':>6} {'90%':>4} {'95%':>4} {'99%':>4}"
    out = [f"{head} {'amplif.':>8} {'own':>6} {'random':>7}"]
    for m in modules:
        ranks = " ".join(f"{rank:>4}" for rank in m.ranks.values())
        factors = f"{number(m.amplification):>8} {number(m.amplification_own):>6} {number(m.amplification_random):>7}"
        out.append(
            f"{charts.short(m.name):<{width}} {m.rank:>4} {number(m.norm):>9} {number(m.relative_norm):>7} {m.energy_share:>6.1%} "
            f"{m.effective_rank:>6.2f} {m.stable_rank:>6.2f} {ranks} {factors}"
        )
    out += [
        f"{charts.short(b.name)}: {b.share:.1%} of the change, |dW|/|W| {number(b.relative_norm)}"
        for b in inspection.blocks
    ]
    out += [advice(inspection), rank_line(inspection), amplification_line(modules), *inspection.notes]
    if inspection.similarity:
        out.append(similarity_line(inspection))
    return out


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
        "Energy is no fidelity: `mmdit-lora resize --data D` measures that before and after."
    )


def amplification_line(modules: Sequence[ModuleFigures]) -> str:
    """The finding of section 7.3 of the LoRA paper, for this adapter: figures, no judgement."""
    known = [module for module in modules if module.amplification is not None]
    if not known:
        return "Nothing is changed, so nothing is amplified."
    factor = statistics.median(module.amplification for module in known if module.amplification is not None)
    above = statistics.median(m.projected / m.projected_random for m in known if m.projected_random)
    own = statistics.median(m.projected / m.projected_own for m in known if m.projected_own)
    return (
        f"Medians over {len(known)} linears: the change is {factor:.2f} times what W has in the same directions; W has there "
        f"{above:.2f} times what random directions would hold, and {own:.0%} of what its own strongest directions hold."
    )


def similarity_line(inspection: Inspection) -> str:
    """How alike the two adapters are."""
    found = inspection.similarity or []
    full, chance, top = (
        statistics.median(getattr(each, field) for each in found) for field in ("full", "chance", "top")
    )
    return (
        f"Against {inspection.against}: medians over {len(found)} linears of phi of all directions {full:.3f} (random directions "
        f"{chance:.3f}), of the first direction of each {top:.3f}."
    )


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


def _summary(inspection: Inspection) -> str:
    return f"{len(inspection.modules)} linears, {inspection.parameters:,} parameters."


def _figures(inspection: Inspection) -> str:
    modules = inspection.modules
    relative = [module.relative_norm for module in modules if module.relative_norm is not None]
    factors = [module.amplification for module in modules if module.amplification is not None]
    largest = max(inspection.blocks, key=lambda block: block.share)
    shown = (
        (", ".join(map(str, sorted({module.rank for module in modules}))), "rank as stored"),
        (f"{statistics.median(module.effective_rank for module in modules):.1f}", "median effective rank"),
        (str(inspection.suggested_rank), f"rank for {SUGGESTED_SHARE:.0%} of the energy"),
        (number(statistics.median(relative)) if relative else "–", "median |dW| / |W|"),
        (number(statistics.median(factors)) if factors else "–", "median amplification"),
        (f"{largest.share:.0%}", f"of it in {charts.short(largest.name)}"),
    )
    return "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in shown)


def _charts(kind: str, *shown: tuple[str, str]) -> str:
    cards = "".join(f"<figure><figcaption>{escape(name)}</figcaption>{chart}</figure>" for name, chart in shown)
    return f'<div class="charts {kind}">{cards}</div>'


def _against(inspection: Inspection) -> str:
    found = inspection.similarity
    if not found:
        return ""
    return f'<h2>Against another adapter</h2><p class="lead">{escape(similarity_line(inspection))}</p>' + _charts(
        "pair",
        ("phi of the input directions (LoRA paper, equation 4)", charts.similarity(found)),
        ("phi(i, j), mean of the linears that have i and j", charts.similarity_map(found)),
    )


def _table(modules: Sequence[ModuleFigures], columns: Sequence[_Column]) -> str:
    head = "".join(f'<th title="{escape(meaning, quote=True)}">{name}</th>' for name, meaning, _ in columns)
    rows = "".join(
        f'<tr><td title="{escape(module.name, quote=True)}">{escape(charts.short(module.name))}</td>'
        + "".join(f"<td>{value(module)}</td>" for _, _, value in columns)
        + "</tr>"
        for module in modules
    )
    return f'<div class="wide"><table><thead><tr><th>linear</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
