"""How the commands of ``deltamux bench`` refuse: one line, and exit status 2."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import click

from .errors import BenchmarkError

_PACKAGES = ("httpx", "httpx_aiohttp", "rich", "matplotlib")
"""Of the extra ``bench``."""


_Command = TypeVar("_Command", bound=Callable[..., object])


def count_option(
    flag: str, default: int, least: int, help_text: str
) -> Callable[[_Command], _Command]:
    """An option that is a number of things."""
    return click.option(
        flag,
        type=click.IntRange(least),
        default=default,
        metavar="N",
        show_default=True,
        help=help_text,
    )


class _UseError(click.ClickException):
    """One line and exit status 2."""

    exit_code = 2


class OneLineCommand(click.Command):
    """Refuses an option in one line, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with another error."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _UseError(error.format_message()) from error


@contextmanager
def errors_of_use() -> Iterator[None]:
    """Turns what a benchmark refuses into one line and exit status 2."""
    try:
        yield
    except BenchmarkError as error:
        raise _UseError(str(error)) from error
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _PACKAGES:
            raise
        raise _UseError(
            f"{error.name} is not installed; run: pip install 'deltamux[bench]'"
        ) from error
