"""The click group behind `pipeline`: reports expected errors, and Ctrl-C, as one message, without a traceback."""

import io
import sys

import click

from pipeline.common.errors import PipelineError, killed_worker_error, out_of_memory_error, too_many_open_files

INTERRUPTED = 128 + 2
"""A shell's exit code of a command that Ctrl-C ended."""


class Group(click.Group):
    def invoke(self, context: click.Context):
        if isinstance(sys.stdout, io.TextIOWrapper):  # into a file, too, lines stay in order with those of stderr
            sys.stdout.reconfigure(line_buffering=True)
        try:
            return super().invoke(context)
        except (PipelineError, OSError, RuntimeError, MemoryError) as error:
            message = too_many_open_files(error) or out_of_memory_error(error)
            if message is None and isinstance(error, PipelineError):
                message = error
            if message is None and isinstance(error, RuntimeError):
                message = killed_worker_error(error)
            if message is None:
                raise
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again: it resumes, or starts over", err=True)
            context.exit(INTERRUPTED)
        click.echo(f"error: {message}", err=True)
        context.exit(message.exit_code)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands as click does, but wrap their descriptions instead of cutting them short."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, command.get_short_help_str(sys.maxsize)) for name, command in commands.items() if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
