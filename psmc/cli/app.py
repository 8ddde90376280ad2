"""`psmc`: the list of commands, and what an error means for the exit code.

0 all is well; 1 a spec or a check failed; 2 the command line itself is wrong; 70 a bug of psmc; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import click

from psmc import __version__
from psmc.cli import console
from psmc.diagnostics import Diagnostic, PsmcError

COMMANDS = ("check", "compile", "explain", "test", "tune", "verify", "fmt", "new")
OK, FAILED, USAGE, BUG, INTERRUPTED = 0, 1, 2, 70, 130


class _Commands(click.Group):
    """Commands are imported when they are run, so that `psmc check` starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"psmc.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            close = get_close_matches(name, COMMANDS, 1, 0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"the commands are {', '.join(COMMANDS)}."
            if name.endswith(".psm"):
                hint = f"did you mean 'psmc check {name}'?"
            ctx.fail(f"there is no command '{name}': {hint}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample:\n  psmc new decay && psmc check decay.psm && psmc compile decay.psm",
)
@click.version_option(__version__, "--version", "-V", message="psmc %(version)s")
def cli() -> None:
    """A compiler for sequence models: spec in, proof and fast differentiable kernels out.

    A .psm file says in some ten lines how two states of a scan combine. psmc proves that this is associative, derives
    the backward pass, and writes a standalone Python module that trains in parallel and decodes token by token.
    """


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: never a traceback for what a user can cause."""
    console.prepare()
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command line."""
    try:
        code = cli.main(args=None if argv is None else list(argv), prog_name="psmc", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except PsmcError as error:
        console.report(*error.diagnostics)
        return FAILED
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        _usage(error)
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        console.complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        console.report(_bug(error))
        return BUG


def _usage(error: click.ClickException) -> None:
    context = error.ctx if isinstance(error, click.UsageError) else None
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        console.complain(error.format_message())
        return
    if context is not None:
        console.complain(context.get_usage())
    console.complain(f"error: {error.format_message()}")
    if context is not None:
        console.complain(f"'{context.command_path} --help' has an example.")


def _bug(error: Exception) -> Diagnostic:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}psmc{os.sep}" in f.filename] or frames
    where = f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else "an unknown place"
    debug = bool(os.environ.get("PSMC_DEBUG"))
    if debug:
        traceback.print_exception(error)
    said = " ".join(str(error).split())[:300]
    return Diagnostic(
        "PSM900",
        f"a bug of psmc: {type(error).__name__} at {where}" + (f": {said}" if said else "."),
        notes=("nothing is wrong with your command: psmc should have handled this.",),
        helps=("please report it, with the spec" + ("." if debug else "; PSMC_DEBUG=1 shows the traceback."),),
    )
