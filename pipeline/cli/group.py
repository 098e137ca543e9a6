"""The click group behind `pipeline`: reports expected errors as one message, without a traceback."""

import click

from pipeline.common.errors import PipelineError, killed_worker_error, out_of_memory_error, too_many_open_files


class Group(click.Group):
    def invoke(self, context: click.Context):
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
        click.echo(f"error: {message}", err=True)
        context.exit(message.exit_code)
