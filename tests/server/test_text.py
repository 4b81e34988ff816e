import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from deltamux.server.text.chat_template import ChatTemplateError
from deltamux.server.text.detokenizer import Detokenizer
from deltamux.server.text.reader import describe, read_tokenizer
from deltamux.server.text.stop_strings import StopStrings
from deltamux.server.text.tokenizer import Tokenizer
from deltamux.server.text.tokenizer_source import TokenizerError

from .fake_engine import byte_level_tokenizer

TEXTS = [
    "plain words, nothing else",
    "émigré naïve Å",
    "日本語のテキスト 中文 한국어",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 done",
    "combining e\u0301 a\u0308\u0323 z\u0338",
    "\U0001d518\U0001d52b \U0010ffff\u0000\t\n  spaces   ",
    "a real \ufffd inside \ufffd\ufffd",
    "",
]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return byte_level_tokenizer()


def sentencepiece_fast() -> PreTrainedTokenizerFast:
    """Byte fallback and a leading space that the first word loses, as Llama 2 has them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁hello", "▁world", "h", "e", "l", "o", "w", "r", "d", "é", "日"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return Tokenizer(describe(sentencepiece_fast()))


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, prompt)
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_pieces_join_to_the_text_and_never_split_a_character(name, text, request):
    tokenizer = request.getfixturevalue(name)
    token_ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, token_ids, [])
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert tokenizer.decode(token_ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_every_character_comes_with_the_token_that_completes_it(byte_level):
    token_ids = byte_level.encode("a日b")
    assert len(token_ids) == 5
    detokenizer = Detokenizer(byte_level.decode)
    assert [detokenizer.push(token_id) for token_id in token_ids] == ["a", "", "", "日", "b"]


def test_random_byte_level_tokens_join_to_their_decoding(byte_level):
    generator = random.Random(7)
    for _ in range(60):
        high = generator.choice([260, byte_level.vocab_size, byte_level.vocab_size + 20])
        token_ids = [generator.randrange(high) for _ in range(generator.randrange(120))]
        assert "".join(pieces_of(byte_level, token_ids, [])) == byte_level.decode(token_ids)


@pytest.mark.parametrize("byte", [0x80, 0xE4, 0xF0, 0xFF])
def test_an_endless_run_of_broken_bytes_costs_bounded_work(byte_level, byte):
    longest = 0

    def decode(token_ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return byte_level.decode(token_ids)

    [token_id] = [i for i in range(300) if byte_level.token_bytes(i) == bytes([byte])]
    tail = byte_level.encode("日本 end")
    token_ids = [token_id] * 500 + tail
    detokenizer = Detokenizer(decode)
    pieces = [*map(detokenizer.push, token_ids), detokenizer.flush()]
    assert "".join(pieces) == byte_level.decode(token_ids)
    assert longest < 32


@given(text=st.text(max_size=40), prompt=st.text(max_size=20))
@settings(max_examples=150, deadline=None)
def test_output_continues_the_prompt(text, prompt):
    for tokenizer in (_BYTE_LEVEL, _SENTENCEPIECE):
        prompt_ids = tokenizer.encode("x " + prompt)
        whole = tokenizer.encode("x " + prompt + text)
        if whole[: len(prompt_ids)] != prompt_ids:
            continue
        pieces = pieces_of(tokenizer, whole[len(prompt_ids) :], prompt_ids)
        assert "".join(pieces) == tokenizer.decode(whole)[len(tokenizer.decode(prompt_ids)) :]


_BYTE_LEVEL = byte_level_tokenizer()
_SENTENCEPIECE = Tokenizer(describe(sentencepiece_fast()))


def test_a_word_after_the_prompt_keeps_its_leading_space(sentencepiece):
    hello, world = sentencepiece.encode("hello")[:1], sentencepiece._backend.token_to_id("▁world")
    assert "".join(pieces_of(sentencepiece, [world], hello)) == " world"
    assert "".join(pieces_of(sentencepiece, [world], [])) == "world"


def test_a_prompt_may_end_inside_a_character(byte_level, sentencepiece):
    for tokenizer in (byte_level, sentencepiece):
        [*start, last] = tokenizer.encode("ab中")
        assert pieces_of(tokenizer, [last], start) == ["中", ""]
        assert pieces_of(tokenizer, [], start) == [""]


def test_a_prompt_may_end_in_a_real_replacement_character(byte_level):
    prompt, x = byte_level.encode("ab\ufffd"), byte_level.encode("x")
    assert pieces_of(byte_level, x, prompt) == ["x", ""]
    assert pieces_of(byte_level, [], prompt) == [""]


def test_tokens_without_text_keep_the_context(sentencepiece):
    hello, world = sentencepiece.encode("hello"), sentencepiece._backend.token_to_id("▁world")
    pieces = pieces_of(sentencepiece, [2] * 40 + [world], hello)
    assert "".join(pieces) == " world"


def test_special_tokens_are_shown_only_on_demand(byte_level):
    token_ids = [*byte_level.encode("one"), 1, *byte_level.encode(" two")]
    shown = Detokenizer(lambda ids: byte_level.decode(ids, False))
    assert "".join(map(shown.push, token_ids)) == "one<|im_start|> two"
    assert "".join(pieces_of(byte_level, token_ids, [])) == "one two"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_token_bytes_join_to_the_text(name, text, request):
    tokenizer = request.getfixturevalue(name)
    joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
    leading_space = name == "sentencepiece" and text
    assert joined == (b" " if leading_space else b"") + text.encode()


def test_ids_without_a_token_have_no_text(byte_level):
    assert (
        byte_level.token_text(10**6) == byte_level.token(10**6) == byte_level.decode([10**6]) == ""
    )


@given(
    text=st.text("abcE", max_size=30),
    stops=st.lists(st.text("abcE", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_do_not_depend_on_the_split(text, stops, cuts):
    matcher = StopStrings(stops)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown, stop = "", None
    for start, end in itertools.pairwise(bounds):
        piece = matcher.push(text[start:end])
        shown += piece.text
        assert not any(one in shown for one in stops)
        if (stop := piece.stop) is not None:
            break
    if stop is None:
        assert shown + matcher.flush() == text
        assert not any(one in text for one in stops)
        return
    ends = [text.find(one) + len(one) for one in stops if one in text]
    assert len(shown) + len(stop) == min(ends)
    assert text.startswith(shown + stop)
    longest = max(len(one) for one in stops if text[: min(ends)].endswith(one))
    assert len(stop) == longest


def test_text_that_may_become_a_stop_string_is_held_back():
    matcher = StopStrings(["<end>", "END"])
    assert matcher.push("a<en").text == "a"
    assert matcher.push("t").text == "<ent"
    assert matcher.push(" EN").text == " "
    assert matcher.flush() == "EN"


def test_chat_template(byte_level):
    turns = [{"role": "user", "content": "hi"}]
    assert byte_level.render_chat(turns) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert byte_level.render_chat(turns, add_generation_prompt=False).endswith("<|im_end|>\n")
    with pytest.raises(ChatTemplateError, match="refuses this: no"):
        byte_level.render_chat([{"role": "user", "content": "forbidden"}])
    with pytest.raises(ChatTemplateError, match="chat_template_kwargs may not set 'tokenize'"):
        byte_level.render_chat(turns, template_arguments={"tokenize": True})
    with pytest.raises(ChatTemplateError, match="no chat template"):
        byte_level_tokenizer(template=None).render_chat(turns)


@pytest.mark.parametrize("ids", [2, [2, 0], None])
def test_end_tokens_come_from_the_folder(tmp_path, ids):
    sentencepiece_fast().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = Tokenizer(read_tokenizer(tmp_path))
    assert tokenizer.end_token_ids == ((0, 2) if ids == [2, 0] else (2,))
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="No tokenizer can be read"):
        read_tokenizer(tmp_path / "missing")
    with pytest.raises(TokenizerError, match="no fast"):
        describe(object())
