"""`mmdit-lora VERB`: the table of verbs, and the one place where exceptions become exit codes.

Exit codes: 0 done; 2 the input is wrong (one message, no traceback); 1 anything else; 130 interrupted. A verb's module is
imported when the verb is called, and what loads torch after the verb's options were checked: `--help` answers at once, and
wrong input is refused at once.
"""

from __future__ import annotations

import errno
import functools
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer

from mmdit_lora import __version__
from mmdit_lora.errors import InputError, Stopped, clip
from mmdit_lora.files import NO_SPACE

# ClickException, which Typer brings under different modules from version to version: BadParameter -> UsageError -> it.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]

# Verb or group of verbs -> the module of this folder whose `register` adds it, and its line in `--help`.
VERBS = {
    "quickstart": ("train", "Train an adapter on the embedded base, show before and after, export it."),
    "init": ("data", "Print a commented config for your own data set."),
    "data": ("data", "Make, convert, check, split, show and cache data sets."),
    "train": ("train", "Train an adapter, the layout stream, or everything."),
    "verify-resume": ("train", "Test on your config that a resumed run equals the undisturbed one."),
    "sample": ("sample", "Sample images of layouts, with and without adapters."),
    "evaluate": ("evaluate", "Measure how well layouts are obeyed, without and with the adapter."),
    "export": ("export", "Write an adapter for other tools, read it back and compare."),
    "verify": ("export", "Check that an adapter is complete, fits its base and has an effect."),
    "import": ("export", "Bring in the weights of other projects."),
    "inspect": ("analysis", "Show what an adapter changes, linear by linear."),
    "resize": ("analysis", "Write an adapter at a smaller rank."),
    "attribute": ("analysis", "Show which box moved which part of an image."),
    "plan": ("plan", "Compute what a training run needs: parameters, memory, FLOPs."),
    "study": ("study", "Run a study of many short trainings: ranks, budgets, methods."),
}


class _Verbs(Mapping[str, Any]):
    """The commands by name. A module of this folder is imported when one of its verbs is asked for."""

    def __getitem__(self, verb: str) -> Any:
        return _commands_of(VERBS[verb][0])[verb]

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


@functools.cache
def _commands_of(module: str) -> dict[str, Any]:
    group = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    importlib.import_module(f"mmdit_lora.cli.{module}").register(group)
    return typer.main.get_group(group).commands  # type: ignore[return-value]


class _LazyGroup(typer.core.TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Verbs()  # type: ignore[assignment]

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


app = typer.Typer(
    name="mmdit-lora",
    cls=_LazyGroup,
    help="Layout LoRA adapters for MM-DiT diffusion models.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mmdit-lora {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks; may stand after the verb too.")] = False,
) -> None:
    del version, debug  # the one acts in its callback, the other is taken out by `main`
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; what went wrong is one message on stderr.

    Args:
        argv: arguments without the program's name; None = those of the process.
    """
    _silence_torchao()
    args, debug = _without_debug(list(sys.argv[1:] if argv is None else argv))
    try:
        if "--json" in args:
            sys.stdout.write("")  # a closed one is noticed before any work
        code = app(args, prog_name="mmdit-lora", standalone_mode=False)
        sys.stdout.flush()  # a reader that went away is noticed here, not when the interpreter ends
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _report(error, str(error), 2, debug)
    except _ClickException as error:
        return _report(error, _usage_message(error), 2, debug)
    except Stopped as error:
        return _report(error, str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `mmdit-lora ... | head`: nobody listens any more
        _drop_stdout()
        return 1
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # of paths alone, wherever one is used first
            wrong = InputError(
                f"is no possible path: {error.strerror}", location=error.filename, hint="give another one"
            )
        elif error.errno in NO_SPACE and error.filename is None:
            _drop_stdout()
            what = f"cannot be written: {error.strerror}"
            wrong = InputError(what, location="standard output", hint="redirect it elsewhere")
        else:
            return _report_unknown(error, debug)
        return _report(error, str(wrong), 2, debug)
    except Exception as error:
        return _report_unknown(error, debug)


def _drop_stdout() -> None:
    """What is still to be written there is lost: the interpreter would complain of it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _silence_torchao() -> None:
    """Where torchao is installed, diffusers imports it for every command, and it complains of torch and of itself."""
    for source in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(source).addFilter(_is_not_about_torchao)  # once: the same filter is not added twice


def _is_not_about_torchao(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("<enum ", "Unable to import `torchao`"))


def _without_debug(args: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out wherever it stands before a `--`."""
    end = args.index("--") if "--" in args else len(args)
    kept = [arg for arg in args[:end] if arg != "--debug"] + args[end:]
    return kept, len(kept) < len(args)


def _usage_message(error: Exception) -> str:
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
    context = getattr(error, "ctx", None)
    return f"{message}\n  hint: see `{context.command_path} --help`" if context is not None else message


def _report_unknown(error: Exception, debug: bool) -> int:
    first = clip((str(error).strip() or "no message").splitlines()[0], 1000)
    return _report(error, f"{type(error).__name__}: {first} (run again with --debug for the traceback)", 1, debug)


def _report(error: Exception, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    with suppress(OSError):
        print(f"error: {clip(message, 2000)}", file=sys.stderr)
    return code
