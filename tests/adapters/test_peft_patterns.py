"""Patterns match what PEFT matches, and no file can make them take long."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from deltamux.adapters.errors import AdapterCorrupt, AdapterUnsupported
from deltamux.adapters.formats.peft_patterns import (
    MAX_EXPRESSIONS,
    MAX_PATH_LENGTH,
    MAX_PATTERNS,
    MAX_SHAPES,
    Patterns,
)

HOSTILE_PATHS = [
    "a." * 63 + "b",
    "." * MAX_PATH_LENGTH,
    "a" * MAX_PATH_LENGTH,
    "a.aa." * 25 + "b",
]


def read(*patterns: str, num_paths: int = 500) -> Patterns:
    return Patterns.read({"rank_pattern": dict.fromkeys(patterns, 4)}, "rank_pattern", num_paths)


NAMES = st.sampled_from(["q", "q_proj", "up-proj", "0", "10", "attn", "", "qq"])
LITERALS = st.lists(NAMES, min_size=1, max_size=3).flatmap(
    lambda names: st.lists(
        st.sampled_from([".", r"\.", "_"]), min_size=len(names), max_size=len(names)
    ).map(lambda dots: "".join(map(str.__add__, names, dots))[:-1])
)
EXPRESSIONS = st.sampled_from(
    [
        ".*_proj",
        ".*q.*",
        ".*?q",
        r".*\.0\..*",
        "q.*",
        "(q|k)_proj",
        r"layers\.[0-4]\.q",
        r"\d+",
        "q_proj|0",
        "^q.q",
        r".*\.(0|10)",
        "q?q",
        r"attn$",
        "(?:q|attn).0",
    ]
)


@settings(max_examples=500, deadline=None)
@given(
    patterns=st.lists(LITERALS.filter(lambda p: not p.endswith("\\")) | EXPRESSIONS, max_size=6),
    path=st.lists(NAMES, min_size=1, max_size=5).map(".".join).filter(bool),
)
def test_the_first_match_is_pefts(patterns, path):
    # get_pattern_key returns the path itself where nothing matches, so the path is no pattern here
    unlike = [pattern for pattern in patterns if pattern != path]
    expected = get_pattern_key(unlike, path)
    found = read(*unlike).first_match(path)
    assert (path if found is None else found) == expected


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("self_attn.q_proj", "self_attn_q_proj"),
        (r"layers\.0\.self_attn\.q_proj", "model.layers.0.self_attn.q_proj"),
        (r"layers\.[0-4]\.self_attn\.q_proj", "model.layers.3.self_attn.q_proj"),
        (r"(model\.)?layers\.\d+\.mlp\.(gate|up|down)_proj", "layers.31.mlp.up_proj"),
        (r".*\.layers\.(0|1|2|3|4|5)\.self_attn\.q_proj", "model.layers.5.self_attn.q_proj"),
        ("^model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        (r".*\.0\.mlp\..*_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_what_people_write(pattern, path):
    assert read(pattern).first_match(path) == pattern
    assert read(pattern).first_match(path + "x") is None


@pytest.mark.parametrize(
    "pattern",
    [
        ".*.*.*x",
        "(a*)*b",
        "(a|b)+c",
        "(?:a|aa){2,}",
        ".{0,99}.{0,99}",
        "a?" * 10,
        "(|||)(|||)(|||).*x",
        "(" * 4 + "a" + ")" * 4,
        f"({'|' * 300})?x",
        "a)|(b",
        r"(.*)\1",
        "(?=.*x)a",
        "(?<!a)b",
        "(?P<n>a)",
        "a.*+b",
    ],
)
def test_patterns_with_many_ways_to_match(pattern):
    with pytest.raises(AdapterUnsupported, match="'rank_pattern' holds the pattern"):
        read(pattern)


@pytest.mark.parametrize("pattern", ["[", "q_proj)", "*q", "a{9999999999999999999}", "(?-)"])
def test_what_is_no_expression(pattern):
    with pytest.raises((AdapterCorrupt, AdapterUnsupported), match="rank_pattern"):
        read(pattern)


@pytest.mark.parametrize(
    "pattern",
    [".*x", "[a.]*x", f"({'|' * 15}).*x", f"({'|' * 21})({'|' * 21})x", ".?" * 9 + "x"],
)
def test_the_slowest_that_is_allowed(pattern):
    patterns = read(pattern)
    for path in HOSTILE_PATHS:
        started = time.process_time()
        assert patterns.first_match(path) is None
        assert time.process_time() - started < 0.05


def test_thousands_of_paths_are_looked_up():
    """As PEFT writes them when every module has a rank of its own (AdaLoRA, rank reduction)."""
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    paths = [f"model.layers.{i}.{name}" for i in range(MAX_PATTERNS // 4) for name in names]
    patterns = read(*paths, num_paths=len(paths))
    started = time.process_time()
    assert [patterns.first_match(path) for path in paths] == paths
    assert patterns.first_match("model.layers.7.mlp.gate_proj") is None
    assert time.process_time() - started < 2


def test_only_some_expressions():
    allowed = [f"[a]{i}" for i in range(MAX_EXPRESSIONS)]
    assert read(*allowed).first_match("a7") == "[a]7"
    with pytest.raises(AdapterUnsupported, match=f"'rank_pattern' holds {MAX_EXPRESSIONS + 1} "):
        read(*allowed, "[b]")


def test_only_some_shapes():
    allowed = ["x" * length for length in range(1, MAX_SHAPES + 1)]
    assert read(*allowed).first_match("a.xxx") == "xxx"
    with pytest.raises(AdapterUnsupported, match=f"{MAX_SHAPES + 1} shapes"):
        read(*allowed, "x.x")


def test_only_so_many_modules():
    assert read(r"m.*\.q_proj", num_paths=50_000)
    with pytest.raises(AdapterUnsupported, match="too long to match 1000000 modules"):
        read(r"m.*\.q_proj", num_paths=1_000_000)
