"""What values of the command line's options may look like."""

import os
import re

import click

from .config import parse_bytes


class Bytes(click.ParamType[int, object]):
    """A size in bytes, written plainly or as 512MiB."""

    name = "bytes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Parse the text; a number is taken as it is."""
        try:
            return parse_bytes(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class NamedAdapter(click.ParamType[tuple[str, str], object]):
    """NAME=PATH, or a URL for the path; in the environment several, separated like a PATH."""

    name = "name=path"

    def split_envvar_value(self, rv: str) -> list[str]:
        """Split at colons, save those of URLs."""
        return [each for each in re.split(f"{os.pathsep}(?!//)", rv) if each]

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Split at the first equals sign."""
        if isinstance(value, tuple):
            return value
        name, equals, path = str(value).partition("=")
        if not (name and equals and path):
            self.fail(f"{value!r} is not NAME=PATH", param, ctx)
        return name, path


class Sources(click.ParamType[str, object]):
    """The beginning of a source; in the environment several, separated by commas."""

    name = "source"

    def split_envvar_value(self, rv: str) -> list[str]:
        """Split at commas."""
        return [each.strip() for each in rv.split(",") if each.strip()]
