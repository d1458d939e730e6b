"""Whether a run that is stopped and resumed is the run that was not: tried out on one's own config, to the bit.

Three short runs of 2N steps in temporary folders: undisturbed; abandoned in step N + 1 and resumed from the checkpoint of
step N, everything set up anew; and in a process of its own that is killed (SIGKILL) and resumed again and again.
"""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmdit_lora.config import Config
from mmdit_lora.errors import InputError, Stopped
from mmdit_lora.training.loop import StepRecord
from mmdit_lora.training.run_data import read_data
from mmdit_lora.training.stopping import Interrupted
from mmdit_lora.training.trainer import train
from mmdit_lora.training.verify_compare import (
    Row,
    digest,
    end_difference,
    first_difference,
    read_rows,
    result_files,
    row_of,
)

LEAST, MOST = 4, 40  # steps of each half, where nobody says how many

Tell = Callable[[str, int, int, dict[str, float]], None]  # what runs, steps done, of how many, scalars


@dataclass(frozen=True)
class Trial:
    """One of the disturbed runs. `differs`: None, or what was first unlike the undisturbed run. `seconds`: it took."""

    name: str
    differs: str | None
    seconds: float


@dataclass
class Verdict:
    """What came out.

    Args:
        steps: of each half, N. crossed: what lies within the 2N steps; not_crossed: what does not, and where it is.
        trials: of the resumed and of the killed run. kills: steps that were done when the kills came.
        undisturbed_differs: asked only where a trial differs: what is unlike in two undisturbed runs; None = nothing.
        sha256: of the undisturbed run's adapter (or base).
        seconds: of the undisturbed run.
    """

    steps: int
    crossed: list[str]
    not_crossed: list[str]
    trials: list[Trial] = field(default_factory=list)
    kills: list[int] = field(default_factory=list)
    undisturbed_differs: str | None = None
    sha256: str = ""
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        return all(trial.differs is None for trial in self.trials)

    def to_dict(self) -> dict[str, Any]:
        return {"equal": self.equal, **asdict(self)}


class _Enough(Exception):
    """Ends a run as a crash would: after a step, with nothing saved of it."""


def verify_resume(config: Config, *, steps: int | None = None, kills: int = 2, tell: Tell | None = None) -> Verdict:
    """Train 2N steps of `config` undisturbed, N + N, and with kills; compare steps, checkpoints and results.

    Batch, optimizer, precision, moving average, data, base and cache are the config's; what the encoders make goes to its
    cache as in any run. Of the rest, only lengths change: `max_steps` is 2N, warm-up and the steps between validations and
    pictures are cut to fit in, two pictures are painted each time, `early_stop` and `preflight` are off, and no tracker is told.

    Args:
        steps: N; None = enough to cross the warm-up and an epoch's end, where that takes at most `MOST`.
        kills: how many, at moments drawn from the config's seed.
        tell: called as it goes on.

    Raises:
        InputError: the config allows no run. Stopped: a run ended by itself, for another reason.
    """
    tell = tell or (lambda *_: None)
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        raise InputError(
            "is for one process",
            where="verify-resume",
            cure="run it without torchrun: the processes of a run draw alike",
        )
    config = Config.model_validate(config.model_dump(mode="json"))  # as the killed process reads it from a file
    records, batch = len(read_data(config).records), config.train.batch_size * config.train.gradient_accumulation
    steps = steps or _enough_steps(config, records, batch)
    verdict = Verdict(steps, *_crossings(config, steps, records, batch))
    with tempfile.TemporaryDirectory(prefix="mmdit_lora_verify_", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        whole, verdict.seconds = _timed(lambda: _run(_shortened(config, steps, folder / "whole"), tell, "undisturbed"))
        verdict.sha256 = digest(result_files(folder / "whole"))

        def compare(name: str, run: Callable[[], list[Row]], place: str) -> None:
            rows, seconds = _timed(run)
            differs = first_difference(whole, rows) or end_difference(folder / "whole", folder / place)
            verdict.trials.append(Trial(name, differs, seconds))

        halves = _shortened(config, steps, folder / "halves")
        compare(f"{steps} + {steps} steps", lambda: _halves(halves, steps, tell), "halves")
        if kills:
            pace = verdict.seconds / (2 * steps)
            killed = _shortened(config, steps, folder / "killed", checkpoint_every=max(1, steps // 8))
            compare(
                f"{kills} kill{'s' * (kills > 1)}",
                lambda: _killed(killed, steps, kills, pace, folder, verdict.kills, tell),
                "killed",
            )
        if not verdict.equal:
            again = _run(_shortened(config, steps, folder / "again"), tell, "undisturbed, again")
            verdict.undisturbed_differs = first_difference(whole, again) or end_difference(
                folder / "whole", folder / "again"
            )
    return verdict


def _enough_steps(config: Config, records: int, batch: int) -> int:
    wanted = [LEAST, config.train.warmup_steps + 2, _epoch_end(records, batch) // 2 + 1]
    return max(number for number in wanted if number <= MOST)


def _epoch_end(records: int, batch: int) -> int:
    """The step in which the first epoch ends."""
    return -(-records // batch)


def _crossings(config: Config, steps: int, records: int, batch: int) -> tuple[list[str], list[str]]:
    train, end = _shortened(config, steps, Path()).train, _epoch_end(records, batch)
    crossed, not_crossed = [], []
    if train.warmup_steps:
        cut = "" if train.warmup_steps == config.train.warmup_steps else f" (cut from {config.train.warmup_steps})"
        crossed.append(f"a warm-up of {train.warmup_steps} steps{cut}")
    if end < 2 * steps:
        crossed.append(f"the end of an epoch in step {end}")
    else:
        not_crossed.append(f"the end of an epoch is in step {end}: `--steps {end // 2 + 1}` crosses it")
    if train.validate_every:
        crossed.append(f"validations every {train.validate_every} steps")
    if train.sample_every:
        crossed.append(f"pictures every {train.sample_every} steps")
    return crossed, not_crossed


def _shortened(config: Config, steps: int, folder: Path, *, checkpoint_every: int | None = None) -> Config:
    train = config.train
    changes: dict[str, Any] = {
        "max_steps": 2 * steps,
        "checkpoint_every": checkpoint_every or steps,
        "keep_checkpoints": 2,
        "warmup_steps": min(train.warmup_steps, steps),
        "validate_every": min(train.validate_every, steps),
        "sample_every": min(train.sample_every, steps),
        "sample_count": min(train.sample_count, 2),
        "early_stop": 0,
        "preflight": False,
    }
    return config.model_copy(
        update={
            "output_dir": str(folder),
            "train": train.model_copy(update=changes),
            "tracking": config.tracking.model_copy(update={"tracker": "none"}),
        }
    )


def _run(config: Config, tell: Tell, name: str, *, resume: bool = False, until: int | None = None) -> list[Row]:
    """Train in this process; the steps that were done."""
    rows: list[Row] = []

    def witness(record: StepRecord) -> None:
        rows.append(row_of(record))
        tell(name, record.step, config.train.max_steps, {"loss": record.loss})
        if record.step == until:
            raise _Enough

    try:
        train(config, resume=resume, witness=witness)
    except _Enough:
        pass
    except Interrupted as error:
        raise Stopped(f"stopped by {error.signal_name}; nothing was found out, nothing is left behind") from None
    gc.collect()  # the next run needs the memory of this one's base
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


def _halves(config: Config, steps: int, tell: Tell) -> list[Row]:
    """The step after the checkpoint is done twice: what is not in the checkpoint must not matter."""
    return _run(config, tell, "to be resumed", until=steps + 1) + _run(config, tell, "resumed", resume=True)


def _killed(config: Config, steps: int, kills: int, pace: float, folder: Path, at: list[int], tell: Tell) -> list[Row]:
    """Train in a process that is killed `kills` times.

    Args:
        pace: seconds a step. folder: for its files. at: gets the steps that were done at each kill.
    """
    chance = random.Random(config.train.seed)
    file, out, said = folder / "killed.yaml", folder / "killed.jsonl", folder / "killed.txt"
    file.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "mmdit_lora.training.verify_child", str(file), str(out)]
    # Each in a stretch of its own, so that every kill comes, whatever the pace.
    stretch = max(1, 2 * steps // (kills + 1))
    goals = [min(number * stretch + chance.randrange(stretch), 2 * steps - 1) for number in range(kills)]
    told = -1
    for goal in [*goals, None]:
        before = len(read_rows(out))
        with said.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [*command, str(torch.get_num_threads())],
                stdout=errors,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for us; we end it ourselves
            )
        try:
            while process.poll() is None:
                time.sleep(0.02)
                rows = read_rows(out)
                done = max((row["step"] for row in rows), default=0)
                if done != told:
                    tell("with kills", told := done, config.train.max_steps, {})
                if goal is not None and len(rows) > before and done >= goal:
                    time.sleep(chance.uniform(0, 1.5 * pace))  # in the step, in a validation, in a checkpoint
                    if process.poll() is None:
                        at.append(max(row["step"] for row in read_rows(out)))
                    break
        finally:
            process.kill()
            process.wait()
        if process.returncode > 0:
            last = said.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            raise Stopped(f"the run that was to be killed ended by itself (exit code {process.returncode}): {last[-1]}")
    return read_rows(out)


def _timed(run: Callable[[], list[Row]]) -> tuple[list[Row], float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start
