"""Tool calls found in what models write, in pieces of any size."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.server.tools.formats import FORMATS, ToolFormat
from deltamux.server.tools.parser import Parsed, ToolParser

from .tool_outputs import OUTPUTS, PARIS_JSON


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", OUTPUTS)
def test_calls_are_found_however_the_output_is_cut(name, size):
    form, output, text, calls = OUTPUTS[name]
    parsed = parsed_in_pieces(form, output, size)
    assert (parsed.text, parsed.calls) == (text, calls)


def parsed_in_pieces(form: ToolFormat, output: str, size: int) -> Parsed:
    parser, parsed = ToolParser(form), Parsed()
    for start in range(0, len(output), size):
        parsed += parser.push(output[start : start + size])
    return parsed + Parsed(parser.flush())


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral, new", "llama", "hermes, cut off"])
def test_arguments_come_in_pieces_behind_their_name(name):
    form, output, _, _ = OUTPUTS[name]
    first, *rest = parsed_in_pieces(form, output, 1).parts
    assert (first.name is not None, first.arguments) == (True, "")
    assert len(rest) >= 10
    assert all(len(part.arguments) <= 1 for part in rest)


@given(data=st.data())
def test_any_output_is_read_alike_however_it_is_cut(data):
    """Also what is no JSON, no call, or torn: nothing raises, and nothing depends on the pieces."""
    form = data.draw(st.sampled_from([*FORMATS.values()]))
    signs = ["{", "}", "[", "]", '"', "\\", ":", ",", " ", "a", "1", "\n", "<", "ü"]
    parts = [form.begin, form.end, '{"name": "f", ', f'"{form.arguments}": ', PARIS_JSON, *signs]
    output = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=30)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(output)), max_size=8)))
    parser, cut = ToolParser(form), Parsed()
    for start, end in pairwise([0, *cuts, len(output)]):
        cut += parser.push(output[start:end])
    cut += Parsed(parser.flush())
    whole = parsed_in_pieces(form, output, max(len(output), 1))
    assert (cut.text, cut.calls) == (whole.text, whole.calls)
