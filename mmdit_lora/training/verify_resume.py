"""`verify-resume`: whether a run that is stopped and resumed equals the undisturbed run, to the bit, on the user's own config.

Three short runs of 2N steps in temporary folders: undisturbed; abandoned in step N + 1 and resumed from the checkpoint of
step N, everything set up anew; and in a process of its own that is killed (SIGKILL) and resumed again and again. They are
compared step by step, then by the files they left.

That process is `python -m mmdit_lora.training.verify_resume CONFIG ROWS THREADS`: it trains on from the newest checkpoint and
appends a row for every step to ROWS.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mmdit_lora import json_files
from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError, Stopped
from mmdit_lora.training.callbacks import Callback, OnProgress
from mmdit_lora.training.checkpoint import WEIGHTS, checkpoints
from mmdit_lora.training.run_dir import CHECKPOINTS
from mmdit_lora.training.setup import read_data
from mmdit_lora.training.step import StepRecord
from mmdit_lora.training.stopping import Interrupted
from mmdit_lora.training.trainer import train

Row = dict[str, Any]

# In the order in which one follows from the other; what a difference says about its cause.
_FIELDS = {
    "samples": "the order of the data depends on more than seed and position",
    "times": "what is drawn for a sample depends on more than seed and position",
    "losses": "weights, moving parts of the base or what is drawn for the samples are not what they were",
    "loss": "the mean is taken in another way",
    "learning_rate": "the schedule did not go on where it was",
    "grad_norm": "the backward pass is not the same",
}
# Of a checkpoint's state: what is compared beside the run's own, and what of that may differ between equal runs.
_STATE = ("schedule_step", "scaler", "fingerprints")
_FREE = {"seconds", "tracker_run_id"}


def row_of(record: StepRecord) -> Row:
    """A step as JSON can hold it, without loss: what Python writes of a float reads back as the same one."""
    tensors = {"times": record.times.tolist(), "losses": record.losses.tolist()}
    numbers = {name: getattr(record, name) for name in ("loss", "learning_rate", "grad_norm")}
    return {"step": record.step, "samples": list(record.samples), **tensors, **numbers}


def read_rows(path: Path) -> list[Row]:
    """Rows, one a line; a last line that a kill cut short is left out."""
    return json_files.read_rows(path, what="list of steps")


def first_difference(one: Iterable[Row], two: Iterable[Row]) -> str | None:
    """What differs in the first step that differs, None where none does.

    Args:
        one: every step once. two: of the other run, in any order; a step that was done again after a kill is there again.
    """
    expected, seen = {row["step"]: row for row in one}, set()
    for row in sorted(two, key=lambda row: row["step"]):
        seen.add(row["step"])
        if row["step"] not in expected:
            return f"step {row['step']}: the undisturbed run ended before it"
        for name, meaning in _FIELDS.items():
            a, b = expected[row["step"]][name], row[name]
            if a != b:
                return f"step {row['step']}: the {_difference(name, a, b, row['samples'])} ({meaning})"
    missing = sorted(expected.keys() - seen)
    return f"step {missing[0]}: only the undisturbed run came to it" if missing else None


def _difference(name: str, a: Any, b: Any, samples: list[str]) -> str:
    what = name.replace("_", " ")
    if not isinstance(a, list):
        return f"{what} differs: {a!r} against {b!r}"
    pairs = [(x, y, sample) for x, y, sample in zip(a, b, samples, strict=False) if x != y]
    if name != "samples" and pairs:
        x, y, sample = pairs[0]
        return f"{what} differ, at {_short([sample])}: {x!r} against {y!r}"
    return f"{what} differ: {_short([x for x, *_ in pairs] or a)} against {_short([y for _, y, _ in pairs] or b)}"


def _short(samples: Sequence[str]) -> str:
    """The first four, by file name and line."""
    names = [Path(str(sample)).name for sample in samples]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def end_difference(one: Path, two: Path) -> str | None:
    """What differs in two output folders: the last checkpoints' weights, optimizer, average and state, then the result."""
    first, second = (checkpoints(folder / CHECKPOINTS)[-1] for folder in (one, two))
    if first.step != second.step:
        return f"the last checkpoint: step {first.step} against step {second.step}"
    location = f"the checkpoint of step {first.step}"
    states = first.state(), second.state()
    files = sorted(states[0]["sha256"].keys() | states[1]["sha256"].keys(), key=lambda name: name != WEIGHTS)
    for name in files:
        if difference := _file_difference(first.folder / name, second.folder / name, name):
            return f"{location}: {difference}"
    a, b = ({key: state[key] for key in _STATE} | state["run"] for state in states)
    for key in a:
        if key not in _FREE and a[key] != b[key]:
            return f"{location}: {key} is {a[key]!r} against {b[key]!r}"
    names = [path.relative_to(one) for path in result_files(one)]
    if names != [path.relative_to(two) for path in result_files(two)]:
        return "the result has other files"
    return next(filter(None, (_file_difference(one / name, two / name, str(name)) for name in names)), None)


def result_files(folder: Path) -> list[Path]:
    """The weights that a run left: of its adapter, or of its base's transformer."""
    return sorted([*folder.glob("adapter/*.safetensors"), *folder.glob("base/transformer/*.safetensors")])


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of what safetensors files hold. (Not of their bytes: the order of a header's entries is drawn anew each time.)"""
    sha256 = hashlib.sha256()
    for path in paths:
        tensors, header = _content(path)
        sha256.update(json.dumps(header, sort_keys=True).encode())
        for name in sorted(tensors):
            tensor = tensors[name].contiguous()
            sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


def _file_difference(one: Path, two: Path, name: str) -> str | None:
    if not (one.is_file() and two.is_file()):
        return f"{name} is only in one of them"
    (a, header), (b, other_header) = _content(one), _content(two)
    if a.keys() != b.keys():
        return f"{name} holds other tensors: {', '.join(sorted(a.keys() ^ b.keys())[:4])}"
    bad = [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])]
    if not bad:
        return None if header == other_header else f"{name} has another header"
    most = max((a[key].double() - b[key].double()).abs().max().item() for key in bad)
    return f"{name} differs in {len(bad)} of {len(a)} tensors, first {bad[0]}, by at most {most:.3g}"


LEAST, MOST = 4, 40  # steps of each half, where nobody says how many


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


def verify_resume(
    config: Config, *, steps: int | None = None, kills: int = 2, on_progress: OnProgress | None = None
) -> Verdict:
    """Train 2N steps of `config` undisturbed, N + N, and with kills; compare steps, checkpoints and results.

    Batch, optimizer, precision, moving average, data, base and cache are the config's; what the encoders make goes to its
    cache as in any run. Of the rest, only lengths change: `max_steps` is 2N, warm-up and the steps between validations and
    images are cut to fit in, two images are sampled each time, `early_stop` and `preflight` are off, and there is no tracker.

    Args:
        steps: N; None = enough to cross the warm-up and an epoch's end, where that takes at most `MOST`.
        kills: how many, at moments drawn from the config's seed.
        on_progress: called as it goes on, with the run, steps done, of how many, and scalars.

    Raises:
        InputError: the config allows no run. Stopped: a run ended by itself, for another reason.
    """
    on_progress = on_progress or (lambda *_: None)
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        raise InputError(
            "is for one process",
            location="verify-resume",
            hint="run it without torchrun: the processes of a run draw alike",
        )
    config = Config.model_validate(config.model_dump(mode="json"))  # as the killed process reads it from a file
    records, batch = len(read_data(config).records), config.train.batch_size * config.train.gradient_accumulation
    steps = steps or _enough_steps(config, records, batch)
    verdict = Verdict(steps, *_crossings(config, steps, records, batch))
    with tempfile.TemporaryDirectory(prefix="mmdit_lora_verify_", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        whole, halves, killed, again = (folder / name for name in ("whole", "halves", "killed", "again"))
        start = time.perf_counter()
        rows = _run(_shortened(config, steps, whole), on_progress, "undisturbed")
        verdict.seconds = time.perf_counter() - start
        verdict.sha256 = digest(result_files(whole))

        def in_halves() -> list[Row]:
            """The step after the checkpoint is done twice: what is not in the checkpoint must not matter."""
            short = _shortened(config, steps, halves)
            return _run(short, on_progress, "to be resumed", until=steps + 1) + _run(
                short, on_progress, "resumed", resume=True
            )

        def with_kills() -> list[Row]:
            short = _shortened(config, steps, killed, checkpoint_every=max(1, steps // 8))
            return _killed(short, steps, kills, verdict.seconds / (2 * steps), folder, verdict.kills, on_progress)

        trials = [(f"{steps} + {steps} steps", in_halves, halves)]
        trials += [(f"{kills} kill{'s' * (kills > 1)}", with_kills, killed)] if kills else []
        for name, run, place in trials:
            start = time.perf_counter()
            other = run()
            seconds = time.perf_counter() - start
            verdict.trials.append(Trial(name, first_difference(rows, other) or end_difference(whole, place), seconds))
        if not verdict.equal:
            twice = _run(_shortened(config, steps, again), on_progress, "undisturbed, again")
            verdict.undisturbed_differs = first_difference(rows, twice) or end_difference(whole, again)
    return verdict


def _enough_steps(config: Config, records: int, batch: int) -> int:
    wanted = [LEAST, config.train.warmup_steps + 2, _epoch_end(records, batch) // 2 + 1]
    return max(number for number in wanted if number <= MOST)


def _epoch_end(records: int, batch: int) -> int:
    """The step in which the first epoch ends."""
    return -(-records // batch)


def _crossings(config: Config, steps: int, records: int, batch: int) -> tuple[list[str], list[str]]:
    train, end = _shortened(config, steps, Path()).train, _epoch_end(records, batch)
    cut = "" if train.warmup_steps == config.train.warmup_steps else f" (cut from {config.train.warmup_steps})"
    crossed = [f"a warm-up of {train.warmup_steps} steps{cut}"] if train.warmup_steps else []
    crossed += [f"the end of an epoch in step {end}"] if end < 2 * steps else []
    crossed += [f"validations every {train.validate_every} steps"] if train.validate_every else []
    crossed += [f"images every {train.sample_every} steps"] if train.sample_every else []
    late = f"the end of an epoch is in step {end}: `--steps {end // 2 + 1}` crosses it"
    return crossed, [] if end < 2 * steps else [late]


def _shortened(config: Config, steps: int, folder: Path, *, checkpoint_every: int | None = None) -> Config:
    train, length = config.train, {"max_steps": 2 * steps, "checkpoint_every": checkpoint_every or steps}
    cut = {name: min(getattr(train, name), steps) for name in ("warmup_steps", "validate_every", "sample_every")}
    rest = {"sample_count": min(train.sample_count, 2), "keep_checkpoints": 2, "early_stop": 0, "preflight": False}
    sections = {
        "train": train.model_copy(update=length | cut | rest),
        "tracking": config.tracking.model_copy(update={"tracker": "none"}),
    }
    return config.model_copy(update={"output_dir": str(folder), **sections})


def _run(
    config: Config, on_progress: OnProgress, name: str, *, resume: bool = False, until: int | None = None
) -> list[Row]:
    """Train in this process; the steps that were done."""
    rows: list[Row] = []

    class Rows(Callback):
        def on_step(self, record: StepRecord) -> None:
            rows.append(row_of(record))
            on_progress(name, record.step, config.train.max_steps, {"loss": record.loss})
            if record.step == until:
                raise _Enough

    try:
        train(config, resume=resume, callbacks=[Rows()])
    except _Enough:
        pass
    except Interrupted as error:
        raise Stopped(f"stopped by {error.signal_name}; nothing was found out, nothing is left behind") from None
    gc.collect()  # the next run needs the memory of this one's base
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


def _killed(
    config: Config, steps: int, kills: int, pace: float, folder: Path, at: list[int], on_progress: OnProgress
) -> list[Row]:
    """Train in a process that is killed `kills` times.

    Args:
        pace: seconds a step. folder: for its files. at: gets the steps that were done at each kill.
    """
    chance = random.Random(config.train.seed)
    file, out, messages = folder / "killed.yaml", folder / "killed.jsonl", folder / "killed.txt"
    file.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "mmdit_lora.training.verify_resume", str(file), str(out)]
    # Each in a stretch of its own, so that every kill comes, whatever the pace.
    stretch = max(1, 2 * steps // (kills + 1))
    goals = [min(number * stretch + chance.randrange(stretch), 2 * steps - 1) for number in range(kills)]
    shown = -1
    for goal in [*goals, None]:
        before = len(read_rows(out))
        with messages.open("w", encoding="utf-8") as errors:
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
                if done != shown:
                    on_progress("with kills", shown := done, config.train.max_steps, {})
                if goal is not None and len(rows) > before and done >= goal:
                    time.sleep(chance.uniform(0, 1.5 * pace))  # in the step, in a validation, in a checkpoint
                    if process.poll() is None:
                        at.append(max(row["step"] for row in read_rows(out)))
                    break
        finally:
            process.kill()
            process.wait()
        if process.returncode > 0:
            lines = messages.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1] if lines else "it said nothing"
            raise Stopped(f"the run that was to be killed ended by itself (exit code {process.returncode}): {last}")
    return read_rows(out)


def main(config: str, rows: str, threads: str) -> int:
    """Train; whatever stops it is one line on stderr."""
    torch.set_num_threads(int(threads))  # sums over other numbers of threads differ in the last bits
    with Path(rows).open("a", encoding="utf-8", buffering=1) as file:

        class Rows(Callback):
            def on_step(self, record: StepRecord) -> None:
                file.write(json.dumps(row_of(record)) + "\n")

        try:
            train(config, resume=True, callbacks=[Rows()])
        except (InputError, Stopped) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
