"""From a request's fields to the engine's ``SamplingParams``, with the bounds the model sets."""

import secrets
from hashlib import blake2b

from ..engine.messages import EngineInfo
from ..generation import BeamSearch, SamplingParams
from .errors import InvalidRequest
from .protocol import GenerationBody

_SEED_MASK = 2**64 - 1


def choice_seed(seed: int | None, choice: int) -> int:
    """The 64-bit seed of one choice: the request's own for the first, distinct ones after it."""
    if seed is None:
        return secrets.randbits(64)
    if choice == 0:
        return seed & _SEED_MASK
    digest = blake2b(f"{seed & _SEED_MASK}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def max_new_tokens(
    body: GenerationBody, prompt_len: int, max_model_len: int, most: int | None = None
) -> int:
    """Tokens the prompt leaves room for, at most what was asked for.

    Args:
        body: The request.
        prompt_len: Tokens of the prompt.
        max_model_len: Of prompt and output.
        most: Tokens of output that the caller's limits allow; None for any number.

    Raises:
        InvalidRequest: The prompt leaves no room, or less than was asked for, or more was asked
            for than the caller may have.
    """
    if most is not None and body.token_limit is not None and body.token_limit > most:
        raise InvalidRequest(
            f"{body.token_limit_field}: {body.token_limit} tokens are more than the {most} that "
            "your limits allow.",
            body.token_limit_field,
        )
    room = max_model_len - prompt_len
    if room < 1:
        raise InvalidRequest(
            f"The prompt has {prompt_len} tokens; this model takes at most {max_model_len - 1} "
            f"and one of output.",
            body.prompt_field,
        )
    if body.token_limit is None:
        bounds = (room, body.default_max_tokens, most)
        return min(each for each in bounds if each is not None)
    if body.token_limit > room:
        raise InvalidRequest(
            f"The prompt's {prompt_len} tokens and {body.token_limit} tokens of output exceed this "
            f"model's length of {max_model_len}.",
            body.token_limit_field,
        )
    return body.token_limit


def _beam_search(body: GenerationBody) -> BeamSearch | None:
    """What is to be searched; a single beam is no search but the greedy choice."""
    if body.num_beams < 2:
        return None
    return BeamSearch(body.num_beams, body.length_penalty, body.n)


def sampling_params(
    body: GenerationBody,
    choice: int,
    max_tokens: int,
    end_token_ids: tuple[int, ...],
    prompt_logprobs: int | None,
    grammar: str | None,
) -> SamplingParams:
    """How choice number ``choice`` of a prompt is sampled."""
    search = _beam_search(body)
    ends = () if body.ignore_eos else end_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        seed=choice_seed(body.seed, choice),
        min_tokens=min(body.min_tokens, max_tokens),
        temperature=0.0 if body.use_beam_search else body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias={int(token_id): bias for token_id, bias in body.logit_bias.items()},
        end_token_ids=ends,
        stop_token_ids=tuple(body.stop_token_ids),
        logprobs=_reported(body, search, len(ends) + len(body.stop_token_ids)),
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
        beams=search,
    )


def _reported(body: GenerationBody, search: BeamSearch | None, num_ends: int) -> int | None:
    """Alternatives per token: what was asked for, or what candidates are chosen by."""
    if search is not None:
        return max(body.num_logprobs or 0, search.width + num_ends)
    if body.num_candidates > body.n:
        return body.num_logprobs or 0
    return body.num_logprobs


def check_token_ids(body: GenerationBody, info: EngineInfo) -> None:
    """Refuse token ids the model does not have.

    Raises:
        InvalidRequest: One of ``logit_bias`` or ``stop_token_ids``.
    """
    check_vocabulary([int(key) for key in body.logit_bias], info, "logit_bias")
    check_vocabulary(body.stop_token_ids, info, "stop_token_ids")


def check_vocabulary(token_ids: list[int], info: EngineInfo, param: str) -> None:
    """Refuse token ids the model does not have.

    Raises:
        InvalidRequest: Naming ``param`` and the largest id.
    """
    if token_ids and (largest := max(token_ids)) >= info.vocab_size:
        raise InvalidRequest(
            f"{param}: token id {largest} is outside the vocabulary of {info.vocab_size}.", param
        )
