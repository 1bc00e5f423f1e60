"""`/tokenize`, `/detokenize` and `/tokenizer_info`, with the fields that vLLM gives them."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tvm_attn.errors import TokenizerError
from tvm_attn.serving.body import MOST_BYTES, read_body
from tvm_attn.serving.errors import ApiError
from tvm_attn.serving.logprobs import token_text
from tvm_attn.serving.service import Service


async def tokenize(http: HttpRequest) -> Response:
    """`{"prompt": text}` gives the ids of its tokens; with `return_token_strs` their texts too."""
    service: Service = http.app.state.service
    body = await read_body(http)
    service.check_name(body)
    text, wants_texts = body.text("prompt"), body.boolean("return_token_strs")
    if text is None:
        raise body.wrong("prompt", "a string")
    tokenizer = service.tokenizer
    try:
        ids = tokenizer.encode(text)
    except TokenizerError as error:
        raise ApiError(400, str(error), "prompt", "invalid_value") from None
    texts = [token_text(tokenizer, token_id) for token_id in ids] if wants_texts else None
    context = service.model.config.n_positions
    return JSONResponse({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": texts})


async def detokenize(http: HttpRequest) -> Response:
    """`{"tokens": ids}` gives their text."""
    service: Service = http.app.state.service
    body = await read_body(http)
    service.check_name(body)
    if body.get("tokens") is None:
        raise body.wrong("tokens", "a list of token ids")
    ids = body.ids("tokens", MOST_BYTES)
    return JSONResponse({"prompt": service.tokenizer.decode(ids)})


async def tokenizer_info(http: HttpRequest) -> Response:
    """The special tokens, as lm-eval's remote tokenizer reads them."""
    service: Service = http.app.state.service
    config, tokenizer = service.model.config, service.tokenizer
    end = config.eos_token_ids[0] if config.eos_token_ids else None
    start = end if config.bos_token_id is None else config.bos_token_id
    names = {
        name: None if token_id is None else token_text(tokenizer, token_id)
        for name, token_id in (("bos_token", start), ("eos_token", end))
    }
    return JSONResponse({**names, "pad_token": None, "chat_template": None})
