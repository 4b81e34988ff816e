import itertools
import json

import httpx
import openai
import pytest

from deltamux.server.api.sampling import choice_seed
from deltamux.server.api.state import Limits

from .fake_engine import MAX_MODEL_LEN, Running, serving


def say(server: Running, text: str, tokens_per_update: int = 1) -> None:
    server.engine.reply = lambda _: text
    server.engine.tokens_per_update = tokens_per_update


def chat(client: openai.OpenAI, **fields):
    return client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hi"}], **fields
    )


def events(server: Running, path: str, body: dict[str, object]) -> list[str]:
    with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=10) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


def test_completion(server, client, tokenizer):
    say(server, "hello 日本 👍")
    answer = client.completions.create(model="base", prompt="one two", max_tokens=40)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("hello 日本 👍", "stop")
    assert answer.object == "text_completion"
    assert answer.model == "base"
    [request] = server.engine.submitted
    assert request.prompt_token_ids == tokenizer.encode("one two")
    assert request.adapters == []
    assert request.sampling.max_tokens == 40
    assert request.sampling.end_token_ids == (0,)
    generated = len(tokenizer.encode("hello 日本 👍")) + 1
    assert answer.usage.completion_tokens == generated
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.total_tokens == generated + len(request.prompt_token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert server.engine.aborted == []


def test_completion_defaults_are_openais(server, client):
    say(server, "the quick brown fox jumps over the lazy dog and the quick brown fox jumps")
    answer = client.completions.create(model="base", prompt="one")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    sampling = server.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.logprobs is None


@pytest.mark.parametrize("tokens_per_update", [1, 3, 50])
def test_streamed_text_is_the_whole_text(server, client, tokens_per_update):
    say(server, "hello 日本 👍 world", tokens_per_update)
    whole = client.completions.create(model="base", prompt="x", max_tokens=40)
    chunks = list(client.completions.create(model="base", prompt="x", max_tokens=40, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert not any("\ufffd" in chunk.choices[0].text for chunk in chunks)


def test_chat(server, client, tokenizer):
    answer = chat(client, max_completion_tokens=30)
    assert answer.choices[0].message.content == "hello world"
    assert answer.choices[0].message.role == "assistant"
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert server.engine.submitted[0].prompt_token_ids == tokenizer.encode(rendered)
    assert server.engine.submitted[0].sampling.max_tokens == 30


def test_chat_may_fill_the_models_length(server, client):
    say(server, "one two three " * 40)
    answer = chat(client)
    assert answer.usage.total_tokens == MAX_MODEL_LEN
    assert answer.choices[0].finish_reason == "length"


def test_chat_parts_and_developer(server, client, tokenizer):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    client.chat.completions.create(model="base", messages=messages)
    rendered = tokenizer.render_chat(
        [{"role": "system", "content": "be"}, {"role": "user", "content": "one\ntwo"}]
    )
    assert server.engine.submitted[0].prompt_token_ids == tokenizer.encode(rendered)


def test_chat_stream_has_roles_text_and_usage(server, client):
    options = {"include_usage": True}
    chunks = list(chat(client, n=2, stream=True, stream_options=options, max_tokens=20))
    roles = [chunk.choices[0].delta.role for chunk in chunks[:2]]
    assert roles == ["assistant", "assistant"]
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(choice.delta.content for choice in mine) == "hello world"
        assert mine[-1].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == sum(
        len(server.engine.tokenizer.encode("hello world")) + 1 for _ in range(2)
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_ends_with_done_and_may_count_on_the_way(server):
    body = {"model": "base", "prompt": "x", "stream": True}
    plain = events(server, "/v1/completions", body)
    assert plain[-1] == "[DONE]"
    assert all("usage" not in json.loads(event) for event in plain[:-1])
    counted = events(
        server,
        "/v1/completions",
        body | {"stream_options": {"continuous_usage_stats": True, "include_usage": True}},
    )
    counts = [json.loads(event)["usage"]["completion_tokens"] for event in counted[:-1]]
    assert counts == [*range(1, len(counts)), len(counts) - 1]


def test_every_form_of_prompt(server, client, tokenizer):
    ids = tokenizer.encode("one two")
    for prompt in ("one two", ["one two"], ids, [ids]):
        client.completions.create(model="base", prompt=prompt)
    assert [request.prompt_token_ids for request in server.engine.submitted] == [ids] * 4


def test_prompts_and_choices_fan_out_in_order(server, client, tokenizer):
    server.engine.reply = lambda request: tokenizer.decode(request.prompt_token_ids) + "!"
    answer = client.completions.create(model="base", prompt=["one", "two"], n=3, seed=-5)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == ["one!"] * 3 + ["two!"] * 3
    ids = [request.request_id for request in server.engine.submitted]
    assert sorted(ids) == [f"{answer.id}-{p}-{c}" for p in range(2) for c in range(3)]
    by_id = {request.request_id: request.sampling.seed for request in server.engine.submitted}
    seeds = [by_id[f"{answer.id}-0-{c}"] for c in range(3)]
    assert seeds == [choice_seed(-5, c) for c in range(3)]
    assert seeds[0] == 2**64 - 5
    assert len(set(seeds)) == 3
    assert [by_id[f"{answer.id}-1-{c}"] for c in range(3)] == seeds
    prompt_tokens = len(tokenizer.encode("one")) + len(tokenizer.encode("two"))
    assert answer.usage.prompt_tokens == prompt_tokens


def test_without_a_seed_every_choice_has_its_own(server, client):
    client.completions.create(model="base", prompt="x", n=8)
    assert len({request.sampling.seed for request in server.engine.submitted}) == 8


def test_sampling_fields_reach_the_engine(server, client):
    client.completions.create(
        model="base",
        prompt="x",
        temperature=0,
        top_p=0.5,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={"7": -100, "8": 1},
        max_tokens=9,
        user="someone",
        extra_body={
            "top_k": -1,
            "min_p": 0.25,
            "min_tokens": 3,
            "repetition_penalty": 1.5,
            "ignore_eos": True,
            "stop_token_ids": [5, 6],
            "cache_salt": "s",
            "priority": -3,
            "metadata": {"a": "b"},
            "store": False,
        },
    )
    [request] = server.engine.submitted
    sampling = request.sampling
    assert (request.cache_salt, request.priority) == ("s", -3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 0)
    assert (sampling.min_p, sampling.min_tokens, sampling.repetition_penalty) == (0.25, 3, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2, 2)
    assert sampling.logit_bias == {7: -100.0, 8: 1.0}
    assert (sampling.end_token_ids, sampling.stop_token_ids) == ((), (5, 6))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_update", [1, 2, 50])
def test_stop_string_across_tokens(server, client, stream, tokens_per_update):
    say(server, "one two EN three END of it", tokens_per_update)
    fields = {"model": "base", "prompt": "x", "max_tokens": 40, "stop": ["END", "zzz"]}
    if stream:
        chunks = [c.choices[0] for c in client.completions.create(**fields, stream=True)]
        text, last = "".join(chunk.text for chunk in chunks), chunks[-1]
        assert not any(
            "E" in c.text and "EN t" not in c.text and c.text != "EN" for c in chunks[:0]
        )
    else:
        [last] = client.completions.create(**fields).choices
        text = last.text
    assert text == "one two EN three "
    assert last.finish_reason == "stop"
    assert last.stop_reason == "END"
    # The sequence was cut short in the engine, or had ended in the very update with the stop.
    assert len(server.engine.aborted) + len(server.engine.finished) == 1
    assert bool(server.engine.aborted) == (tokens_per_update < 50)


def test_tokens_past_a_stop_string_are_not_counted(server, client, tokenizer):
    say(server, "one END two three", tokens_per_update=50)
    answer = client.completions.create(
        model="base", prompt="x", stop="END", max_tokens=40, extra_body={"return_token_ids": True}
    )
    kept = answer.choices[0].token_ids
    assert answer.usage.completion_tokens == len(kept)
    assert "END" in tokenizer.decode(kept)
    assert "END" not in tokenizer.decode(kept[:-1])


def test_stop_strings_wait_for_min_tokens(server, client, tokenizer):
    say(server, "one END two END of it")
    early = len(tokenizer.encode("one END"))
    answer = client.completions.create(
        model="base", prompt="x", stop="END", max_tokens=40, extra_body={"min_tokens": early}
    )
    assert answer.choices[0].text == "one END two "


def test_what_looked_like_a_stop_string_is_shown_at_the_end(server, client):
    say(server, "hello EN")
    answer = client.completions.create(model="base", prompt="x", stop="END")
    assert answer.choices[0].text == "hello EN"
    assert answer.choices[0].stop_reason is None


def test_stop_token_is_named_when_it_is_the_requests(server, client):
    answer = client.completions.create(model="base", prompt="x", extra_body={"stop_token_ids": [0]})
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", 0)


def test_special_tokens_are_shown_on_demand(server, client):
    say(server, "one<|im_end|>two")
    fields = {"model": "base", "prompt": "x"}
    assert client.completions.create(**fields).choices[0].text == "onetwo"
    shown = client.completions.create(**fields, extra_body={"skip_special_tokens": False})
    assert shown.choices[0].text == "one<|im_end|>two"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_covers_the_prompt(server, client, tokenizer, stream):
    say(server, "日本")
    fields = {"model": "base", "prompt": "one two", "echo": True, "logprobs": 1}
    if stream:
        parts = [c.choices[0] for c in client.completions.create(**fields, stream=True)]
        text = "".join(part.text for part in parts)
        columns = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        tokens, logprobs, top, offsets = (
            list(itertools.chain.from_iterable(getattr(p.logprobs, name) for p in parts))
            for name in columns
        )
    else:
        [choice] = client.completions.create(**fields).choices
        found = choice.logprobs
        text = choice.text
        tokens, logprobs = found.tokens, found.token_logprobs
        top, offsets = found.top_logprobs, found.text_offset
    assert text == "one two日本"
    prompt, output = tokenizer.encode("one two"), [*tokenizer.encode("日本"), 0]
    assert tokens == [tokenizer.token_text(t) for t in prompt + output]
    assert logprobs == [None] + [-0.5] * (len(tokens) - 1)
    assert top[0] is None
    assert top[1] == {tokenizer.token_text(40): -0.25, tokens[1]: -0.5}
    assert len(tokenizer.encode("日")) == 3
    assert offsets[len(prompt) :] == [7, 7, 7, 8, 8, 8, 9]
    assert offsets[0] == 0
    assert server.engine.submitted[0].sampling.prompt_logprobs == 1


def test_echo_of_token_ids(server, client, tokenizer):
    ids = tokenizer.encode("one two")
    answer = client.completions.create(model="base", prompt=ids, echo=True)
    assert answer.choices[0].text == "one twohello world"


def test_logprobs_zero_shows_the_chosen_token(server, client):
    answer = client.completions.create(model="base", prompt="x", logprobs=0, max_tokens=1)
    [top] = answer.choices[0].logprobs.top_logprobs
    assert list(top.values()) == [-0.5]


def test_chat_logprobs_bytes_join_to_the_text(server, client):
    say(server, "日本 hello")
    answer = chat(client, logprobs=True, top_logprobs=2, max_tokens=40)
    content = answer.choices[0].logprobs.content
    joined = b"".join(bytes(token.bytes) for token in content[:-1])
    assert joined.decode() == "日本 hello"
    assert content[-1].token == "<|endoftext|>"
    assert [top.logprob for top in content[0].top_logprobs] == [-0.25, -1.25]
    streamed = list(chat(client, logprobs=True, stream=True, max_tokens=40))
    tokens = [t.token for c in streamed if (lp := c.choices[0].logprobs) for t in lp.content]
    assert tokens == [token.token for token in content]


def test_tokens_as_ids(server, client, tokenizer):
    ids = [*tokenizer.encode("hello world"), 0]
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    answer = client.completions.create(model="base", prompt="x", logprobs=0, extra_body=extra)
    assert answer.choices[0].logprobs.tokens == [f"token_id:{i}" for i in ids]
    assert answer.choices[0].token_ids == ids
    assert answer.choices[0].prompt_token_ids == tokenizer.encode("x")
    [answer, prompt] = [chat(client, extra_body=extra), server.engine.submitted[-1]]
    assert answer.choices[0].token_ids == ids
    assert answer.prompt_token_ids == prompt.prompt_token_ids
    chunks = list(chat(client, stream=True, extra_body=extra))
    assert chunks[0].prompt_token_ids == prompt.prompt_token_ids
    streamed = [i for c in chunks for i in getattr(c.choices[0], "token_ids", [])]
    assert streamed == ids


def test_prompt_logprobs(server, client, tokenizer):
    ids = tokenizer.encode("one two")
    extra = {"prompt_logprobs": 1}
    answer = client.completions.create(model="base", prompt=ids, extra_body=extra)
    found = answer.choices[0].prompt_logprobs
    assert found[0] is None
    assert found[1:] == [
        {
            str(i): {"logprob": -0.5, "rank": 2, "decoded_token": tokenizer.token_text(i)},
            "40": {"logprob": -0.25, "rank": 1, "decoded_token": tokenizer.token_text(40)},
        }
        for i in ids[1:]
    ]
    answer = chat(client, extra_body=extra)
    assert len(answer.prompt_logprobs) == len(server.engine.submitted[-1].prompt_token_ids)


def test_long_prompts_are_tokenized_in_a_thread(tokenizer):
    with serving(tokenizer, Limits(inline_characters=4)) as running:
        body = {"model": "base", "prompt": "one two three"}
        assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 200
        assert running.engine.submitted[0].prompt_token_ids == tokenizer.encode("one two three")
