"""Progress: what is left is told with the pauses to come, and what is shown fits a terminal and a file."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
from rich.console import Console

from mmdit_lora.cli.output import ProgressLines, TimeLeft, clock
from mmdit_lora.training.throughput import Throughput

FIGURES = {"loss": 0.51, "learning_rate": 1e-3, "grad_norm": 0.2, "samples_per_s": 41.3, "memory_gb": 1.25}
FIGURES |= {"share_data": 0.03, "share_other": 0.01, "tflops": 0.044}


def simulate(total: int, *, step: float, pauses: dict[str, tuple[int, float]], every: int) -> list[tuple[int, float]]:
    """What `at` is told after each step that is logged: the step, and the time; pauses come behind it."""
    now, seen = 0.0, []
    for done in range(1, total + 1):
        now += step
        if done % every == 0 or done == total:
            seen.append((done, now))
        now += sum(seconds for period, seconds in pauses.values() if done % period == 0)
    return seen


@pytest.mark.parametrize("every", [1, 10])
def test_what_is_left_counts_the_pauses_to_come(every: int) -> None:
    pauses = {"validation": (50, 30.0), "images": (100, 100.0)}
    seen = simulate(1000, step=1.0, pauses=pauses, every=every)
    left = TimeLeft(1000, {name: period for name, (period, _) in pauses.items()})
    end = seen[-1][1]
    found = {done: (left.at(done, now), end - now) for done, now in seen}
    for done in (210, 300, 350, 640, 990):  # both kinds of pauses were seen
        guessed, true = found[done]
        assert guessed == pytest.approx(true, rel=1e-6)
        plain = dict(seen)[done] / done * (1000 - done)
        assert abs(plain - true) > abs(guessed - true)
    assert found[1000][0] == pytest.approx(end - seen[0][1])
    assert left.rate == pytest.approx(1.0)


def test_what_is_left_where_every_interval_has_a_pause_is_the_plain_mean() -> None:
    left = TimeLeft(100, {"validation": 5})
    assert left.at(10, 0.0) is None
    assert left.at(20, 40.0) == pytest.approx(80 * 4.0)
    assert left.at(30, 80.0) == pytest.approx(70 * 4.0)


def test_a_resumed_run_counts_from_where_it_goes_on() -> None:
    left = TimeLeft(1000, {})
    assert left.at(900, 5.0) is None
    assert left.at(910, 25.0) == pytest.approx(180.0)


def test_times_are_short() -> None:
    assert [clock(s) for s in (4.4, 725, 12_000, 187_200)] == ["0:04", "12:05", "3:20:00", "2 d 4:00:00"]


def test_lines_of_a_file_hold_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLines(every_seconds=0) as progress:
        progress("train", 10, 40, FIGURES)
        time.sleep(0.02)
        progress("train", 20, 40, FIGURES)
        progress("encode", 0, 0, {})
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == (
        "train 10/40  loss 0.5100  41.3 samples/s  1.25 GB  data 3%  other 1%  44 GFLOP/s  lr 1.0e-03  |g| 0.2"
    )
    assert re.fullmatch(r"train 20/40  0:00 left  loss .*", second)
    assert third == "encode ..."
    with ProgressLines(every_seconds=0) as progress:
        progress("train", 10, 40, {"tflops": 212.0})
    assert capsys.readouterr().err == "train 10/40  212 TFLOP/s\n"


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_bar_of_a_terminal_fits_it(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = ProgressLines()
    out = io.StringIO()
    progress._bars.live.console = Console(file=out, width=width, force_terminal=False)
    progress("train", 10, 40, FIGURES)
    progress("train", 20, 40, FIGURES)
    progress._bars.console.print(*progress._bars.get_renderables())
    lines = out.getvalue().rstrip().splitlines()
    assert all(len(line) <= width for line in lines)
    assert "20/40" in lines[0]
    assert "left" in lines[0]
    assert "loss 0.5100  41.3 samples/s" in lines[1]
    assert ("|g|" in lines[1]) == (width == 140)


def test_a_pause_is_no_part_of_a_rate() -> None:
    meter = Throughput()
    with meter.phase("compute"):
        time.sleep(0.02)
    with meter.phase("pause"):
        time.sleep(0.2)
    read = meter.read(samples=2)
    assert read["samples_per_s"] > 2 / 0.15
    assert read["share_other"] < 0.5


def test_a_phase_that_was_announced_before_it_counts_says_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    progress = ProgressLines(every_seconds=0)
    progress("train", 0, 0, {})  # as the quickstart announces its phases
    for done in (10, 20, 30):
        progress("train", done, 100, {})
    assert "train 30/100  1:10 left" in capsys.readouterr().err
