"""``POST /tokenize`` and ``POST /detokenize``, with vLLM's bodies and answers."""

import asyncio

from fastapi import APIRouter

from ..tenants.tenant import Caller
from .caller import Calling
from .prompts import chat_prompt, check_characters, encode
from .protocol import DetokenizeBody, TokenizeBody
from .sampling import check_vocabulary
from .security import json_only
from .state import AppState, State

router = APIRouter()


@router.post("/tokenize", dependencies=[json_only])
async def tokenize(body: TokenizeBody, state: State, caller: Calling) -> dict[str, object]:
    """Token ids of a text or of a conversation."""
    _check_model(body.model, state, caller)
    token_ids = await _token_ids(body, state)
    names = [state.tokenizer.token(token_id) for token_id in token_ids]
    return {
        "count": len(token_ids),
        "max_model_len": state.require_info().max_model_len,
        "tokens": token_ids,
        "token_strs": names if body.return_token_strs else None,
    }


@router.post("/detokenize", dependencies=[json_only])
async def detokenize(body: DetokenizeBody, state: State, caller: Calling) -> dict[str, str]:
    """Text of token ids, special tokens included."""
    _check_model(body.model, state, caller)
    check_vocabulary(body.tokens, state.require_info(), "tokens")
    text = await asyncio.to_thread(state.tokenizer.decode, body.tokens, False)
    return {"prompt": text}


async def _token_ids(body: TokenizeBody, state: AppState) -> list[int]:
    conversation = body.conversation
    if conversation is not None:
        return (await chat_prompt(conversation, state, body.add_special_tokens or False)).token_ids
    text = body.prompt or ""
    check_characters(len(text), state, "prompt")
    return await encode(text, body.add_special_tokens is not False, state)


def _check_model(model: str | None, state: AppState, caller: Caller) -> None:
    if model is not None:
        state.registry.catalog.resolve(model, caller)
