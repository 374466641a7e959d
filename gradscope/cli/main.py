"""The ``gradscope`` command: finds its subcommands lazily and turns errors into exit codes."""

from __future__ import annotations

import gc
import importlib
import io
import sys

import click

from gradscope._version import __version__
from gradscope.errors import ExitCode, GradscopeError
from gradscope.report.letters import IN_PLAIN_LETTERS

COMMANDS = {
    "scan": ("gradscope.cli.scan", "Find what stops gradients in source code, importing none of it."),
    "trace": ("gradscope.cli.trace", "Run a model once and say whether the gradient arrives."),
    "check": ("gradscope.cli.check", "Scan and trace all that pyproject.toml names, as a gate."),
    "report": ("gradscope.cli.report", "Show saved sessions again, in any format."),
    "explain": ("gradscope.cli.explain", "Explain a rule, or list them all."),
    "completion": ("gradscope.cli.completion", "Print the completion script of a shell."),
}

# A command lives for seconds and makes few cycles. Searching for them through all that torch and
# transformers define, again and again while they are imported and once more on leaving, costs two seconds.
COLLECT_AFTER = 50_000


class LazyGroup(click.Group):
    """A group that imports a command only when it is run, so that ``--help`` stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of ``COMMANDS``."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        # One name for an option in all commands: GRADSCOPE_FAIL_ON, and not GRADSCOPE_SCAN_FAIL_ON.
        command.context_settings.setdefault("auto_envvar_prefix", "GRADSCOPE")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="gradscope")
def group() -> None:
    """Does the gradient arrive? And if not: which line stops it, what else does, and what to do.

    Exit codes: 0 the gradient arrives, 1 findings, 2 usage, 3 the target could not be analysed.
    """


def main() -> None:
    """Run the command line; never show a traceback for an error that the user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=IN_PLAIN_LETTERS)
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
    try:
        code = group.main(prog_name="gradscope", standalone_mode=False)
    except GradscopeError as error:
        click.echo(f"gradscope: {error.message}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("gradscope: interrupted; nothing was written.", err=True)
        code = 130
    gc.freeze()
    sys.exit(int(code) if code is not None else int(ExitCode.CLEAN))
