"""The page that describes the HTTP API, OpenAPI 3.1: requests from the models that check them, answers written out."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.http_models import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

Json = dict[str, Any]

STRING: Json = {"type": "string"}
INTEGER: Json = {"type": "integer"}
NULLABLE_STRING: Json = {"type": ["string", "null"]}
FINISH: Json = {"enum": ["stop", "length", "tool_calls"]}
REFUSALS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "No API key, or one that is nobody's.",
    "404": "No such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not application/json, or compressed.",
    "429": "No room, or the request's own limits would be broken; see Retry-After and retry-after-ms.",
    "500": "The router failed.",
    "503": "No node serves now; see Retry-After.",
    "504": "The deadline of X-Request-Timeout-Ms has passed.",
}


def openapi(version: str) -> Json:
    """The whole page."""
    bodies: list[type[BaseModel]] = [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]
    refs, definitions = models_json_schema(
        [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
    )
    body = {model: refs[(model, "validation")] for model in bodies}
    model_id = {"name": "model", "in": "path", "required": True, "schema": STRING | {"minLength": 1}}
    paths = {
        "/v1/chat/completions": {"post": _post("Answers a chat.", body[ChatRequest], "ChatCompletion", streams=True)},
        "/v1/completions": {"post": _post("Goes on from a text.", body[CompletionRequest], "Completion", streams=True)},
        "/tokenize": {"post": _post("Token ids of a text or a chat.", body[TokenizeRequest], "Tokens")},
        "/detokenize": {"post": _post("The text of token ids.", body[DetokenizeRequest], "Text")},
        "/v1/models": {"get": _get("The model that is served.", "ModelList", ("401", "500", "503"))},
        "/v1/models/{model}": {
            "parameters": [model_id],
            "get": _get("One model.", "Model", ("401", "404", "500", "503")),
        },
        "/health": {"get": _get("The process lives.", "Status", (), is_open=True)},
        "/ready": {"get": _get("There is a node to serve requests.", "Status", ("503",), is_open=True)},
        "/version": {"get": _get("Baton's version.", "Version", (), is_open=True)},
    }
    schemas = definitions.get("$defs", {}) | _answers()
    security = {"key": {"type": "http", "scheme": "bearer", "description": "Where the router has tenants."}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": version, "description": "OpenAI's API, from a Baton router."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": security},
        "security": [{"key": []}, {}],
    }


def _post(words: str, body: Json, answer: str, streams: bool = False) -> Json:
    content: Json = {"application/json": {"schema": _ref(answer)}}
    if streams:
        event = "`data: {...}` events and `data: [DONE]`; an event with `error` in the place of the latter."
        content["text/event-stream"] = {"schema": {"description": event}}
    refusals = {status: _answer(text, "Error") for status, text in REFUSALS.items()}
    return {
        "summary": words,
        "parameters": [_header("X-Request-Id"), _header("X-Request-Timeout-Ms")],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": words, "headers": _ID_HEADER, "content": content}} | refusals,
    }


def _get(words: str, answer: str, refusals: tuple[str, ...], is_open: bool = False) -> Json:
    responses = {"200": _answer(words, answer)}
    responses |= {status: _answer(REFUSALS[status], "Error") for status in ("400", *refusals)}
    return {"summary": words, "responses": responses} | ({"security": []} if is_open else {})


def _header(name: str) -> Json:
    schema = {
        "X-Request-Id": STRING | {"minLength": 1, "maxLength": 128, "pattern": "^[!-~]+$"},
        "X-Request-Timeout-Ms": INTEGER | {"minimum": 1, "maximum": 2**31},
    }
    return {"name": name, "in": "header", "required": False, "schema": schema[name]}


def _answer(words: str, schema: str) -> Json:
    return {"description": words, "headers": _ID_HEADER, "content": {"application/json": {"schema": _ref(schema)}}}


_ID_HEADER: Json = {"X-Request-Id": {"schema": STRING, "description": "The call's, or one that the router made."}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**fields: Json) -> Json:
    return {"type": "object", "required": list(fields), "properties": fields, "additionalProperties": False}


def _perhaps(whole: Json, **fields: Json) -> Json:
    """An object that may have more fields."""
    return whole | {"properties": whole["properties"] | fields}


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


def _nullable(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _answers() -> Json:
    number: Json = {"type": "number"}
    usage = _object(
        prompt_tokens=INTEGER,
        completion_tokens=INTEGER,
        total_tokens=INTEGER,
        prompt_tokens_details=_object(cached_tokens=INTEGER),
    )
    alternative = _object(token=STRING, logprob=number, bytes=_array(INTEGER))
    entry = _object(token=STRING, logprob=number, bytes=_array(INTEGER), top_logprobs=_array(alternative))
    call = _object(id=STRING, type={"const": "function"}, function=_object(name=STRING, arguments=STRING))
    message = _object(role={"const": "assistant"}, content=NULLABLE_STRING, refusal={"type": "null"})
    message["properties"]["tool_calls"] = _array(call)
    chat_choice = _object(
        index=INTEGER,
        message=message,
        logprobs=_nullable(_object(content=_array(entry), refusal={"type": "null"})),
        finish_reason=FINISH,
    )
    lists = _object(
        tokens=_array(STRING),
        token_logprobs=_array({"type": ["number", "null"]}),
        top_logprobs=_nullable(_array(_nullable({"type": "object", "additionalProperties": number}))),
        text_offset=_array(INTEGER),
    )
    known = _object(logprob=number, rank=INTEGER, decoded_token=STRING)
    of_prompt = _array(_nullable({"type": "object", "additionalProperties": known}))
    choice = _object(index=INTEGER, text=STRING, logprobs=_nullable(lists), finish_reason=FINISH)
    choice = _perhaps(choice, prompt_logprobs=of_prompt)
    card = _object(
        id=STRING,
        object={"const": "model"},
        created=INTEGER,
        owned_by=STRING,
        root=STRING,
        parent={"type": "null"},
        max_model_len=INTEGER,
    )
    error = _object(message=STRING, type=STRING, param=NULLABLE_STRING, code=NULLABLE_STRING)
    head: dict[str, Json] = {"id": STRING, "created": INTEGER, "model": STRING, "usage": usage}
    return {
        "ChatCompletion": _perhaps(
            _object(**head, object={"const": "chat.completion"}, choices=_array(chat_choice)), prompt_logprobs=of_prompt
        ),
        "Completion": _object(**head, object={"const": "text_completion"}, choices=_array(choice)),
        "Tokens": _object(count=INTEGER, max_model_len=INTEGER, tokens=_array(INTEGER), token_strs={"type": "null"}),
        "Text": _object(prompt=STRING),
        "Model": card,
        "ModelList": _object(object={"const": "list"}, data=_array(_ref("Model"))),
        "Status": _object(status=STRING),
        "Version": _object(version=STRING),
        "Error": _object(error=error),
    }
