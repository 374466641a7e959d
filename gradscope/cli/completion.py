"""``gradscope completion``: the script that a shell needs to complete commands, options and choices."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from gradscope.errors import ExitCode

VARIABLE = "_GRADSCOPE_COMPLETE"


@click.command("completion", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> int:
    """Print the completion script of a shell.

    \b
    Examples:
      eval "$(gradscope completion bash)"    # in ~/.bashrc
      gradscope completion zsh > ~/.zfunc/_gradscope
      gradscope completion fish > ~/.config/fish/completions/gradscope.fish
    """
    completion = get_completion_class(shell)
    assert completion is not None  # the choices are click's own
    source = completion(context.find_root().command, {}, "gradscope", VARIABLE).source()
    click.echo(source)
    return int(ExitCode.CLEAN)
