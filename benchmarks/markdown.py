"""Tables that read well in a terminal and in a page."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, with all cells of a column as wide as its widest; numbers end where others do."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    rules = [
        "-" * (width + 1) + (":" if flush else "-")
        for width, flush in zip(widths, right, strict=True)
    ]
    lines = [_line(header, widths, right), f"|{'|'.join(rules)}|"]
    return "\n".join([*lines, *(_line(row, widths, right) for row in rows)])


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = (
        f" {cell:>{width}} " if flush else f" {cell:<{width}} "
        for cell, width, flush in zip(cells, widths, right, strict=True)
    )
    return f"|{'|'.join(padded)}|"


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell in {"", "-"}
