"""Output that must match a grammar: in mixed batches of the engine, and over the HTTP API."""

import asyncio
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import msgspec
import pytest
from peft import LoraConfig

from deltamux.server.generation import FinishReason, GenerationRequest
from deltamux.server.grammar.check import GrammarCheck
from deltamux.server.grammar.constraint import (
    Choice,
    Constraint,
    ContextFree,
    GrammarRefused,
    JsonSchema,
    Regex,
    grammar_of,
)
from deltamux.server.grammar.matcher import Matcher
from deltamux.server.grammar.vocabulary import Vocabulary, VocabularySource
from deltamux.server.text.reader import describe
from deltamux.server.text.tokenizer import Tokenizer

from ..tiny_models import make_tokenizer
from .harness import EngineHarness, engine_config, make_request
from .peft_oracle import Oracle
from .schemas import SCHEMAS

END = 2
FORMATS = jsonschema.FormatChecker()
YES_OR_MORE = Regex("yes(no)?")


def validate(text: str, schema: dict) -> None:
    jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(describe(make_tokenizer()))


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:
    return VocabularySource.of(tokenizer.source, tokenizer.vocab_size).load()


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> list[Path]:
    oracle, folder = Oracle(model), tmp_path_factory.mktemp("adapters")
    configs = [
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        LoraConfig(r=16, lora_alpha=16, target_modules=["up_proj", "down_proj"]),
        LoraConfig(r=2, lora_alpha=4, target_modules=["k_proj", "o_proj"]),
    ]
    return [
        oracle.save_adapter(config, folder / str(seed), seed, size=0.1)
        for seed, config in enumerate(configs)
    ]


@pytest.fixture
def engine(model) -> Iterator[Callable[..., EngineHarness]]:
    made: list[EngineHarness] = []

    def make(**changes) -> EngineHarness:
        made.append(EngineHarness(engine_config(model, **changes)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def finish(harness: EngineHarness, *requests: GenerationRequest) -> None:
    """Run the requests to their end, waiting for their grammars as the engine process does."""
    harness.submit(*requests)
    while any(harness.received[each.request_id].finish_reason is None for each in requests):
        if not harness.engine.has_work:
            harness.wait_for_load()
        harness.run()


def ask(request_id: str, constraint: Constraint | None, **changes) -> GenerationRequest:
    grammar = None if constraint is None else grammar_of(constraint)
    defaults = {"max_tokens": 1500, "end_token_ids": (END,), "temperature": 1.0}
    prompt = changes.pop("prompt", [5, 6, 7])
    return make_request(request_id, prompt, grammar=grammar, **{**defaults, **changes})


def text_of(harness: EngineHarness, tokenizer: Tokenizer, request_id: str) -> str:
    received = harness.received[request_id]
    assert received.error is None
    return tokenizer.decode(received.token_ids)


def mixture(number: int) -> list[GenerationRequest]:
    """Requests with every schema and without any, sampled and greedy, of adapters and the base."""
    rng, names = random.Random(number), [*SCHEMAS, None]
    return [
        ask(
            f"{index}/{name}",
            None if name is None else JsonSchema(SCHEMAS[name]),
            prompt=[rng.randrange(3, 300) for _ in range(rng.choice([1, 3, 12]))],
            temperature=rng.choice([0.0, 0.7, 1.5]),
            adapter_id=rng.choice([None, 0, 1, 2]),
            max_tokens=1500 if name else 20,
            seed=index,
        )
        for index in range(number)
        for name in [names[index % len(names)]]
    ]


def assert_valid(
    harness: EngineHarness, tokenizer: Tokenizer, requests: list[GenerationRequest]
) -> None:
    for request in requests:
        name = request.request_id.partition("/")[2]
        if name != "None":
            text = text_of(harness, tokenizer, request.request_id)
            assert harness.received[request.request_id].finish_reason is FinishReason.STOP, text
            validate(text, SCHEMAS[name])


def test_every_output_is_valid_whatever_else_is_in_the_batch(engine, adapters, tokenizer):
    """212 requests, 16 schemas, adapters and the base; those without a schema are undisturbed."""
    harness, requests = engine(), mixture(212)
    for adapter_id, path in enumerate(adapters):
        harness.load(adapter_id, path)
    finish(harness, *requests)
    assert_valid(harness, tokenizer, requests)
    alone = engine()
    for adapter_id, path in enumerate(adapters):
        alone.load(adapter_id, path)
    free = [each for each in requests if each.sampling.grammar is None]
    finish(alone, *free)
    assert len(free) == 12
    for each in free:
        received = harness.received[each.request_id]
        assert received.token_ids == alone.received[each.request_id].token_ids


def test_a_preempted_sequence_goes_on_where_it_was(engine, adapters, tokenizer):
    """Recomputed, in a cache too small for all, it gives the same tokens."""
    small, large = engine(memory_budget=200_000, max_num_seqs=12), engine(max_num_seqs=12)
    requests = [ask(f"{i}/uuid", JsonSchema(SCHEMAS["uuid"]), seed=i) for i in range(12)]
    for harness in (small, large):
        finish(harness, *requests)
        assert_valid(harness, tokenizer, requests)
    assert small.preemptions > 0
    for each in requests:
        tokens = [harness.received[each.request_id].token_ids for harness in (small, large)]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("done", [1, 5, 20])
def test_an_output_is_resumed_in_another_engine(engine, done):
    """Token i is drawn from (seed, i), and the matcher goes through what is there already."""
    whole = ask("whole", JsonSchema(SCHEMAS["uuid"]), seed=3)
    first, second = engine(), engine()
    finish(first, whole)
    token_ids = first.received["whole"].token_ids
    resumed = msgspec.structs.replace(whole, request_id="rest", output_token_ids=token_ids[:done])
    finish(second, resumed)
    assert second.received["rest"].token_ids == token_ids[done:]


def test_an_output_that_cannot_be_resumed_is_refused(engine):
    request = ask("r", YES_OR_MORE)
    harness = engine()
    finish(harness, msgspec.structs.replace(request, output_token_ids=[40]))
    assert harness.received["r"].finish_reason is FinishReason.ERROR
    assert "grammar" in harness.received["r"].error


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        (Regex("[a-c]{2,9}é?"), "[a-c]{2,9}é?"),
        (Choice(("yes", "no", 'q"uo\\te\n', "yes indeed", "ü")), '(yes( indeed)?|no|q"uo.te\n|ü)'),
        (ContextFree('root ::= "<" item{1,4} ">"\nitem ::= "a" | "bc"'), "<(a|bc){1,4}>"),
        (ContextFree('start: item | "(" start ")"\nitem: "x" | "y"'), r"\(*[xy]\)*"),
    ],
    ids=["regex", "choice", "GBNF", "Lark"],
)
def test_regular_expressions_choices_and_grammars(engine, tokenizer, constraint, fits, seed):
    harness = engine()
    finish(harness, ask("r", constraint, seed=seed))
    assert re.fullmatch(fits, text_of(harness, tokenizer, "r"))
    assert harness.received["r"].finish_reason is FinishReason.STOP


def test_too_few_tokens_cut_the_output(engine):
    harness = engine()
    finish(harness, ask("r", JsonSchema(SCHEMAS["uuid"]), max_tokens=9))
    assert harness.received["r"].finish_reason is FinishReason.LENGTH
    assert len(harness.received["r"].token_ids) == 9


def test_the_end_comes_where_the_grammar_allows_it_alone(engine, tokenizer):
    """The likeliest token by far is the end, before and behind ``yes``."""
    eager = {"logit_bias": {END: 100.0}, "temperature": 0.0}
    cases = {
        "plain": ({}, "yes", END),
        "min_tokens": ({"min_tokens": len(tokenizer.encode("yes")) + 1}, "yesno", None),
        "ignore_eos": ({"end_token_ids": ()}, "yesno", None),
        "beyond the grammar": ({"min_tokens": 100}, "yesno", None),
    }
    harness = engine()
    finish(
        harness, *(ask(name, YES_OR_MORE, **eager, **more) for name, (more, *_) in cases.items())
    )
    for name, (_, text, stop) in cases.items():
        received = harness.received[name]
        assert received.finish_reason is FinishReason.STOP
        assert text_of(harness, tokenizer, name) == text
        assert (received.token_ids[-1] == END) == (stop == END)


def test_a_bias_cannot_lift_what_is_excluded(engine, tokenizer):
    harness = engine()
    bias = {tokenizer.encode(letter)[0]: 100.0 for letter in "XYZ"}
    finish(harness, ask("r", Regex("[a-z]{4}Z"), logit_bias=bias, logprobs=3))
    assert re.fullmatch("[a-z]{4}Z", text_of(harness, tokenizer, "r"))


def test_log_probabilities_are_those_of_the_model(engine):
    """Read before the mask: their sum over the vocabulary stays one."""
    harness = engine()
    finish(harness, ask("r", Choice(("a", "b")), logprobs=0, temperature=0.0))
    finish(harness, ask("free", None, logprobs=20, temperature=0.0, max_tokens=1))
    assert harness.received["r"].logprobs[0] <= harness.received["free"].logprobs[0]


def test_steps_go_on_while_a_grammar_is_compiled(engine, monkeypatch):
    """And a request that is aborted meanwhile leaves nothing behind."""
    gate, compiled = threading.Event(), Vocabulary.compile

    def slow(vocabulary, grammar):
        gate.wait()
        return compiled(vocabulary, grammar)

    monkeypatch.setattr(Vocabulary, "compile", slow)
    harness = engine()
    harness.submit(ask("waits", YES_OR_MORE), ask("gone", Regex("x+")))
    finish(harness, ask("free", None, max_tokens=5))
    assert not harness.received["waits"].token_ids
    harness.abort("gone")
    gate.set()
    finish(harness, ask("late", YES_OR_MORE))
    assert harness.received["waits"].finish_reason is FinishReason.STOP
    assert not harness.received["gone"].token_ids


def test_a_text_that_becomes_too_costly_ends_that_request_alone(engine, monkeypatch):
    harness = engine()
    mask = Matcher.mask

    def failing(matcher: Matcher) -> bytes:
        found = mask(matcher)
        matcher.error = "too costly"
        return bytes(len(found))

    monkeypatch.setattr(Matcher, "mask", failing)
    finish(harness, ask("costly", YES_OR_MORE), ask("free", None, max_tokens=5))
    assert harness.received["costly"].error == "too costly"
    assert harness.received["free"].finish_reason is FinishReason.LENGTH


def test_a_refused_grammar_ends_its_request(engine):
    harness = engine()
    finish(harness, make_request("r", [5], grammar="start: nothing_of_that_name"))
    assert "nothing_of_that_name" in harness.received["r"].error


def test_a_model_without_an_end_token_ends_where_the_grammar_does(vocabulary):
    plain = make_tokenizer()
    plain.eos_token = None
    endless = VocabularySource.of(describe(plain), 300).load()
    assert endless.end_token_ids == (300,)
    matcher = Matcher(endless.compile(grammar_of(Choice(("a",)))), endless, may_end_early=False)
    assert matcher.mask()
    assert matcher.accept(plain.encode("a")[0])
    assert matcher.is_complete


UNENFORCEABLE = {
    "keyword": (JsonSchema({"not": {"type": "string"}}), "not"),
    "unique items": (JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "leniency": (JsonSchema({"not": {}, "x-guidance": {"lenient": True}}), "not"),
    "type": (JsonSchema({"type": "strang"}), "strang"),
    "format": (JsonSchema({"type": "string", "format": "nonsense"}), "nonsense"),
    "far reference": (JsonSchema({"$ref": "http://elsewhere/x"}), "elsewhere"),
    "contradiction": (JsonSchema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    "look-ahead": (Regex("(?=a)b"), "look"),
    "open class": (Regex("["), "class"),
    "empty": (Regex("a{0}"), "empty"),
    "no rule": (ContextFree("start: foo"), "foo"),
    "GBNF": (ContextFree('root ::= "a" |||| ) x'), ""),
    "too large": (Choice(("x" * 300_000,)), "larger"),
}


@pytest.fixture(scope="module")
def check(tokenizer) -> Iterator[GrammarCheck]:
    made = GrammarCheck(VocabularySource.of(tokenizer.source, tokenizer.vocab_size))
    yield made
    made.close()


def refusal(check: GrammarCheck, constraint: Constraint) -> str:
    with pytest.raises(GrammarRefused) as refused:
        asyncio.run(check(grammar_of(constraint)))
    return str(refused.value)


@pytest.mark.parametrize("name", UNENFORCEABLE)
def test_what_cannot_be_enforced_is_refused_by_name(check, name):
    constraint, word = UNENFORCEABLE[name]
    message = refusal(check, constraint)
    assert word in message
    assert "\n" not in message
    assert len(message) < 1000


def test_what_would_be_compiled_for_ever_is_refused_and_others_go_on(check):
    patterns = [{"type": "string", "pattern": f"a{{{length}}}"} for length in range(1, 40)]
    assert "compiling it takes more than" in refusal(check, JsonSchema({"allOf": patterns}))
    asyncio.run(check(grammar_of(YES_OR_MORE)))
