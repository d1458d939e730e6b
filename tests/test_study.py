"""Studies: what decides a claim, where parameters go, what subspaces share, and that a stopped study goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdit_lora.analysis.spectrum import phi as similarity
from mmdit_lora.analysis.studies import runs as study_runs
from mmdit_lora.analysis.studies.budget import ALL, ATTENTION, BOTH, ONE, OTHER, BudgetStudy, changes, groups, spend
from mmdit_lora.analysis.studies.intrinsic import IntrinsicDimensionStudy
from mmdit_lora.analysis.studies.methods import FULL, LORA, MethodsStudy
from mmdit_lora.analysis.studies.rank import RankStudy
from mmdit_lora.analysis.studies.setup import Arm, Scan, Setup
from mmdit_lora.analysis.studies.similarity import adapter_directions, directions
from mmdit_lora.analysis.studies.statistics import (
    Curve,
    above,
    all_of,
    below,
    bootstrap_d90,
    d90,
    log_ratio,
)
from mmdit_lora.analysis.studies.study import STUDIES, run_study
from mmdit_lora.analysis.studies.subspace import subspace_linears
from mmdit_lora.analysis.studies.table import Table
from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.intervals import Interval, mean_interval
from mmdit_lora.lora import add_layout_lora
from mmdit_lora.training.stopping import Diverged
from mmdit_lora.training.trainable import lora_config
from tests.tiny import tiny_transformer


def make_setup(base: Path, data: Path, out: Path, name: str = "rank", **changes: Any) -> Setup:
    config = Config.model_validate(
        {
            "base": str(base),
            "data": {"path": str(data), "validation_share": 0.4},
            "lora": {"r": 8, "alpha": 16.0},
            "sample": {"steps": 2},
            "train": {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2},
        }
    )
    values: dict[str, Any] = {"seeds": (0, 1), "images": 3, "quick": True, **changes}
    return Setup(name=name, config=config, out=out, **values)


# --- subspaces


def test_phi_is_one_of_equal_subspaces_and_zero_of_orthogonal_ones() -> None:
    basis = directions(torch.randn(8, 20, generator=torch.Generator().manual_seed(0)))
    one, other = basis[:4], basis[4:]
    turned = directions(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))) @ one
    assert torch.allclose(similarity(one, turned)[3, 3], torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(similarity(one, turned)[3], torch.ones(4, dtype=torch.float64))  # each j lies in the whole
    assert similarity(one, turned)[0, 0] < 0.99
    assert similarity(one, other).abs().max() < 1e-12
    assert torch.allclose(similarity(one, one), torch.ones(4, 4, dtype=torch.float64))


def test_phi_of_random_subspaces_is_the_larger_dimension_over_the_whole() -> None:
    draw, width = torch.Generator().manual_seed(0), 64
    found = [similarity(*(directions(torch.randn(r, width, generator=draw)) for r in (4, 16))) for _ in range(200)]
    mean = torch.stack(found).mean(0)
    i, j = torch.arange(1, 5)[:, None], torch.arange(1, 17)[None]
    assert torch.allclose(mean, (torch.maximum(i, j) / width).double(), atol=0.02)


def test_directions_of_an_adapter_are_those_of_its_update(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 10, generator=draw), torch.randn(12, 3, generator=draw)
    save_file({"m.lora_A.weight": a, "m.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    found = adapter_directions(tmp_path, "BA")["m"]
    expected = torch.linalg.svd((b @ a).double()).Vh[:3]
    assert torch.allclose(similarity(found, expected).diagonal(), torch.ones(3, dtype=torch.float64))
    assert not torch.allclose(adapter_directions(tmp_path, "A")["m"].abs(), found.abs(), atol=1e-3)


# --- budgets


@pytest.mark.parametrize("attention", ["siamese", "cross"])
def test_every_way_to_spend_costs_the_same(attention: str, base: Path, data: Path, tmp_path: Path) -> None:
    model = tiny_transformer(layout_attention=attention)
    shapes = {n: (m.out_features, m.in_features) for n, m in subspace_linears(model).items()}
    ways = groups(shapes)
    assert set(ways) == {ONE, OTHER, BOTH, ATTENTION, ALL}
    assert set(ways[BOTH]) == {*ways[ONE], *ways[OTHER]}
    assert not set(ways[BOTH]) & set(ways[ATTENTION])
    assert {name.rpartition(".")[2] for name in ways[ATTENTION]} <= {"to_q", "to_v", "add_q_proj", "add_v_proj"}
    budget = 8 * sum(sum(shapes[name]) for name in ways[BOTH])
    setup = make_setup(base, data, tmp_path)
    for names in ways.values():
        ranks = spend(budget, {name: shapes[name] for name in names})
        assert all(rank >= max(ranks.values()) - 1 or rank == min(shapes[name]) for name, rank in ranks.items())
        # What PEFT makes of it is what counts.
        config = Arm("x", 0, changes(setup, ranks)).config(setup)
        fresh = tiny_transformer(layout_attention=attention)
        report = add_layout_lora(fresh, lora_config(config.lora))
        assert report.trainable_params == pytest.approx(budget, rel=0.02)
        assert not report.dead_targets
        scales = {m.scaling["default"] for m in fresh.modules() if hasattr(m, "scaling")}
        assert scales == {2.0}


@pytest.mark.parametrize("budget", [10, 100_000])
def test_a_budget_that_cannot_be_met_is_refused(budget: int) -> None:
    with pytest.raises(InputError, match=r"lora\.r"):
        spend(budget, {"a": (32, 16), "b": (16, 32)})
    assert spend(4 * 96, {"a": (32, 16), "b": (16, 32)}) == {"a": 4, "b": 4}


# --- figures and verdicts


def test_intervals_count_seeds_and_layouts() -> None:
    draw = np.random.default_rng(0)
    same = np.tile(draw.normal(1.0, 0.1, size=50), (3, 1))
    by_layouts = mean_interval(same)
    assert by_layouts.mean == pytest.approx(same.mean())
    assert (by_layouts.high - by_layouts.low) / 2 == pytest.approx(2.0096 * same[0].std(ddof=1) / 50**0.5, rel=1e-3)
    by_seeds = mean_interval(np.array([[1.0] * 50, [2.0] * 50, [3.0] * 50]))
    assert (by_seeds.low, by_seeds.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-3)
    assert mean_interval(np.full((2, 3), 0.5)) == Interval(0.5, 0.5, 0.5)


def test_intervals_cover_what_they_claim() -> None:
    draw, hits = np.random.default_rng(1), 0
    for _ in range(400):
        values = draw.normal(0, 0.2, (3, 1)) + draw.normal(0, 1, (1, 40)) + draw.normal(0, 0.3, (3, 40))
        interval = mean_interval(values)
        hits += interval.low <= 0 <= interval.high
    assert hits / 400 > 0.92


def test_above_and_below_decide_only_where_all_of_the_interval_does() -> None:
    assert above(Interval(1, 0.5, 1.5), 0) == "held"
    assert above(Interval(-1, -1.5, -0.5), 0) == "did not hold"
    assert above(Interval(1, -0.5, 1.5), 0) == "undecided"
    assert below(Interval(-1, -1.5, -0.5), 0) == "held"
    assert below(Interval(1, 0.5, 1.5), 0) == "did not hold"
    assert below(Interval(math.nan, math.nan, math.nan), 0) == "undecided"
    assert all_of(["held", "held"]) == "held"
    assert all_of(["held", "undecided"]) == "undecided"
    assert all_of(["undecided", "did not hold"]) == "did not hold"


def test_d90_lies_between_the_dimensions_where_the_gain_crosses() -> None:
    dimensions = [10, 100, 1000]
    assert d90(dimensions, np.array([0.1, 0.8, 1.0]), 1.0) == pytest.approx(100 * 10**0.5)
    assert d90(dimensions, np.array([0.95, 0.8, 1.0]), 1.0) == 10
    assert d90(dimensions, np.array([0.1, 0.2, 0.3]), 1.0) == math.inf
    assert d90(dimensions, np.array([0.1, 0.2, 0.3]), -1.0) == math.inf


def make_runs(
    gains: dict[str, float], *, seeds: int = 3, noise: float = 0.01, old: bool = False
) -> list[dict[str, Any]]:
    """Figures of a study whose true gains over the base are planted; layouts differ much, alike for all."""
    draw = np.random.default_rng(0)
    layouts = draw.uniform(0.3, 0.7, size=40)
    found = []
    for setting, gain in gains.items():
        trained = not setting.endswith("base")
        for seed in range(seeds if trained else 1):
            ious = layouts + gain + (draw.normal(0, noise, 40) + draw.normal(0, noise) if trained else 0)
            found.append(
                {
                    "setting": setting,
                    "seed": seed,
                    "ious": ious.tolist(),
                    "old_ious": (ious - 2 * gain).tolist() if old else None,
                    "old_losses": (0.5 - ious + 2 * gain).tolist() if old else None,
                    "loss_minus_base": (-ious + layouts).tolist() if trained else None,
                    "learning_rate": 0.1 if trained else None,
                }
            )
    return found


@pytest.mark.parametrize(
    ("lora", "full", "result"), [(0.3, 0.31, "held"), (0.15, 0.3, "did not hold"), (0.268, 0.3, "undecided")]
)
def test_methods_are_judged_by_the_share_of_the_gain(
    lora: float, full: float, result: str, base: Path, data: Path, tmp_path: Path
) -> None:
    noise = 0.03 if result == "undecided" else 0.01
    table = Table(make_runs({"base": 0, LORA: lora, FULL: full}, noise=noise, old=True))
    setup = make_setup(base, data, tmp_path, "methods", old=str(data))
    first, second = MethodsStudy().conclude(setup, table)[0]
    assert first.result == result
    assert second.result == ("held" if lora < full - 0.1 else second.result)  # the larger gain forgets more here


@pytest.mark.parametrize(
    ("spread", "one", "result"), [(0.3, 0.2, "held"), (0.2, 0.3, "did not hold"), (0.32, 0.3, "undecided")]
)
def test_budgets_are_judged_by_the_best_single_matrix(
    spread: float, one: float, result: str, base: Path, data: Path, tmp_path: Path
) -> None:
    noise = 0.06 if result == "undecided" else 0.005
    table = Table(make_runs({"base": 0, BOTH: spread, ONE: one, OTHER: 0.1}, noise=noise))
    decided, _ = BudgetStudy().conclude(make_setup(base, data, tmp_path, "budget"), table)
    assert [one.result for one in decided] == [result]
    assert decided[0].figures["best_single"] == ONE


@pytest.mark.parametrize(
    ("small", "large", "weights", "low", "smaller"),
    [
        ([0.1, 0.2], [0.1, 0.3], 6_000, "held", "held"),
        ([0.1, 0.3], [0.1, 0.2], 6_000, "held", "did not hold"),
        ([0.1, 0.3], [0.1, 0.3], 6_000, "held", "undecided"),
        ([0.1, 0.3], [0.1, 0.3], 1_500, "did not hold", "undecided"),
        ([0.1, 0.1], [0.1, 0.1], 6_000, "did not hold", "undecided"),  # not by d = 64, and 1 % are 60
        ([0.1, 0.1], [0.1, 0.1], 10_000, "undecided", "undecided"),  # 1 % are 100, which was not tried
    ],
)
def test_intrinsic_dimensions_are_judged_by_their_intervals(
    monkeypatch: pytest.MonkeyPatch,
    base: Path,
    data: Path,
    tmp_path: Path,
    small: list[float],
    large: list[float],
    weights: int,
    low: str,
    smaller: str,
) -> None:
    study = IntrinsicDimensionStudy()
    monkeypatch.setattr(study, "_weights", lambda *_: weights)
    setup = make_setup(base, data, tmp_path, "intrinsic-dimension", bases=("a/small", "b/large"))
    planted: dict[str, float] = {}
    for label, gains in (("small", small), ("large", large)):
        full = 0.2 if max(gains) > 0.1 else 0.3
        planted |= {f"{label} base": 0.0, f"{label} stream": full}
        planted |= {f"{label} SAID d={d}": gain for d, gain in zip(study.dimensions(setup), gains, strict=True)}
    decided, extra = study.conclude(setup, Table(make_runs(planted, noise=0.002)))
    assert [one.result for one in decided] == [low, smaller]
    found = extra["d90"]["large"]["SAID"]["ious"]
    assert math.isfinite(found.mean) == (max(large) > 0.1)


def test_the_bootstrap_of_d90_is_the_same_each_time_and_holds_infinity() -> None:
    draw = np.random.default_rng(0)
    gains = np.stack([draw.normal(mean, 0.05, (2, 30)) for mean in (0.2, 0.85, 0.95)])
    curve = Curve([10, 100, 1000], gains, draw.normal(1.0, 0.05, (2, 30)))
    one, other = bootstrap_d90(curve), bootstrap_d90(curve)
    assert one[0] == other[0]
    assert one[0].low <= one[0].mean <= one[0].high
    never = bootstrap_d90(Curve([10, 100, 1000], gains / 4, curve.full))
    assert never[0].low == math.inf
    unknown = log_ratio(never, never)
    assert (unknown.low, unknown.high) == (-math.inf, math.inf)
    assert below(unknown, 0) == "undecided"
    assert log_ratio(one, never).mean == -math.inf
    assert log_ratio(one, one).mean == 0.0


# --- runs


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_does_no_finished_run_again(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdit_lora.analysis.studies import worker

    setup = make_setup(base, data, tmp_path / "study", seeds=(0,))
    done: list[str] = []
    real, measure = worker.run_arm, worker._fidelity

    def counted(setup: Setup, arm: Arm) -> None:
        real(setup, arm)
        done.append(arm.folder)

    def killed(*arguments: Any) -> dict[str, Any]:
        if len(done) == 2:  # of the third run, after its training
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(study_runs, "run_arm", counted)
    monkeypatch.setattr(worker, "_fidelity", killed)
    with pytest.raises(KeyboardInterrupt):
        run_study(setup, isolate=False)
    monkeypatch.setattr(worker, "_fidelity", measure)
    assert done == ["base_seed0", "r=2_seed0"]
    assert not (setup.out / "study.json").exists()
    before = (setup.out / "runs/r=2_seed0/figures.json").read_bytes()

    results = run_study(setup, command="mmdit-lora study rank", isolate=False)
    assert done[2:] == ["r=4_seed0"]
    assert (setup.out / "runs/r=2_seed0/figures.json").read_bytes() == before
    resumed = {path.parent.name: json.loads(path.read_text())["resumed"] for path in setup.out.glob("runs/*/*res.json")}
    assert resumed == {"base_seed0": False, "r=2_seed0": False, "r=4_seed0": True}

    undisturbed = run_study(make_setup(base, data, tmp_path / "whole", seeds=(0,)), isolate=False)
    clock = ("seconds", "train_seconds", "peak_memory", "resumed")

    def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in clock} for row in rows]

    assert steady(results["settings"]) == steady(undisturbed["settings"])
    assert results["verdicts"] == undisturbed["verdicts"]
    assert results["similarity"] == undisturbed["similarity"]
    assert results["settings"][0]["trainable_params"] == 0
    assert not list(setup.out.glob("runs/*/checkpoints"))
    page = (setup.out / "study.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 5  # head, line, base, two ranks
    assert len({line.count("|") for line in table}) == 1
    assert all(verdict["claim"] in page and verdict["rule"] in page for verdict in results["verdicts"])
    assert json.loads((setup.out / "verdict.json").read_text())["claims"] == results["verdicts"]
    assert (setup.out / "study.png").stat().st_size > 10_000

    done.clear()
    assert run_study(setup, isolate=False)["verdicts"] == results["verdicts"]
    assert not done

    with pytest.raises(InputError, match="seeds"):
        run_study(make_setup(base, data, tmp_path / "study", seeds=(1,)), isolate=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["budget", "methods", "intrinsic-dimension"])
def test_the_other_studies_run(name: str, base: Path, data: Path, tmp_path: Path) -> None:
    bases = (str(base),) if name == "intrinsic-dimension" else ()
    old = str(data) if name == "methods" else None
    setup = make_setup(base, data, tmp_path / "study", name, seeds=(0,), bases=bases, old=old)
    results = run_study(setup, isolate=False)
    trained = [row for row in results["settings"] if row["learning_rate"] is not None]
    assert len(trained) >= 2
    assert all(row["trainable_params"] > 0 and row["peak_memory"] >= 0 for row in trained)
    if name == "budget":
        one, both = (row["trainable_params"] for row in trained)
        assert one == pytest.approx(both, rel=0.02)
    if name == "methods":
        assert all(row["old_change"] is not None and row["old_loss_minus_base"] is not None for row in trained)
        assert trained[0]["trainable_params"] < trained[1]["trainable_params"]
    if name == "intrinsic-dimension":
        assert [row["trainable_params"] for row in trained[1:]] == [16, 64]
    assert (setup.out / "study.png").stat().st_size > 10_000


def test_where_phrases_cannot_be_read_the_held_out_loss_decides(base: Path, data: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(data, photos)
    lines = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line["objects"]["phrase"] = ["a dog"] * len(line["objects"]["phrase"])
    (photos / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    setup = make_setup(base, photos, tmp_path / "study", "methods", seeds=(0,), old=str(photos))
    results = run_study(setup, isolate=False)
    measures = [verdict["figures"]["measure"] for verdict in results["verdicts"]]
    assert measures == ["held-out loss below the base's", "loss in the old domain below the base's"]
    assert all(row["miou"] is None for row in results["settings"])
    # The old images are the new ones here, all of them: both losses fall, in the same draws or others.
    full = results["settings"][-1]
    assert full["old_loss_minus_base"]["mean"] < 0
    assert full["loss_minus_base"]["mean"] < 0
    assert "not measured" not in (tmp_path / "study" / "study.md").read_text().split("## Settings")[0]


def test_a_scan_goes_on_beyond_a_best_rate_at_its_end(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup(base, data, tmp_path, quick=False)

    def planted(_: Setup, arms: list[Arm], *__: Any, **___: Any) -> list[dict[str, Any]]:
        rates = [arm.changes["train.learning_rate"] for arm in arms if arm.changes]
        return [{"loss_minus_base": [abs(math.log(rate / 0.31))]} for rate in rates]

    monkeypatch.setattr(study_runs, "run_all", planted)
    chosen, tried = study_runs.scan_rates(setup, [Scan("up", [0.01, 0.03, 0.1], {}), Scan("in", [0.1, 0.3, 0.9], {})])
    assert chosen == {"up": 0.3, "in": 0.3}
    assert [one["learning_rate"] for one in tried["up"]] == [0.01, 0.03, 0.1, 0.3, 0.9]
    assert [one["learning_rate"] for one in tried["in"]] == [0.1, 0.3, 0.9]


def test_a_trial_may_diverge_and_a_run_may_not(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdit_lora.analysis.studies import worker

    def diverge(config: Config, **_: Any) -> None:
        raise Diverged(f"too far at {config.train.learning_rate}")

    monkeypatch.setattr(worker, "train", diverge)
    setup = make_setup(base, data, tmp_path, quick=False)
    with pytest.raises(InputError, match=r"diverges for x at all of 0\.0111, 0\.0333, 0\.1, 0\.3"):
        study_runs.scan_rates(setup, [Scan("x", [0.1, 0.3], {})], isolate=False)
    with pytest.raises(Diverged):
        study_runs.run_all(setup, [Arm("x", 0, {"train.learning_rate": 0.3})], isolate=False)


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_study_has_a_folder_of_its_own(name: str, base: Path, data: Path, tmp_path: Path) -> None:
    setup = make_setup(base, data, tmp_path, name, quick=False, bases=(str(base),) if "intrinsic" in name else ())
    study = STUDIES[name]
    rates = {scan.kind: scan.rates[0] for scan in study.scans(setup)}
    arms = study.arms(setup, rates)
    assert len({arm.folder for arm in arms}) == len(arms) > 8
    assert all("/" not in arm.folder for arm in arms)
    assert setup.scan_seed not in setup.seeds


# --- the command line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["rank", "--bases", "a,b"], "--bases"),
        (["rank", "--seeds", "1,1"], "--seeds"),
        (["rank", "--seeds", "x"], "--seeds"),
        (["ranks"], "ranks"),
    ],
)
def test_wrong_options_are_one_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base: Path, data: Path, more: list[str], said: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"base: {base}\ndata: {data}\n")
    name, *options = more
    assert main(["study", name, str(config), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_nothing_held_out_and_a_foreign_folder_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    setup = make_setup(base, data, tmp_path / "out")
    bare = setup.config.data.model_copy(update={"validation_share": 0.0})
    with pytest.raises(InputError, match="holds nothing out"):
        run_study(
            Setup("rank", setup.config.model_copy(update={"data": bare}), tmp_path / "out", quick=True), isolate=False
        )
    assert not (tmp_path / "out").exists()
    gone = make_setup(base, data, tmp_path / "out", "methods", old=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere"):
        run_study(gone, isolate=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="it holds mine"):
        run_study(setup, isolate=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_the_command_runs_a_study_in_processes_of_their_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base: Path, data: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"base: {base}\ndata: {{path: {data}, validation_share: 0.4}}\nsample: {{steps: 2}}\n")
    argv = ["study", "rank", str(config), "--quick", "--seeds", "0", "--out", str(tmp_path / "out"), "--json"]
    assert main(argv) == 0
    results = json.loads(capsys.readouterr().out)
    assert all(run["peak_memory"] > 0 for run in results["runs"] if run["learning_rate"])
    assert RankStudy().title == results["title"]
