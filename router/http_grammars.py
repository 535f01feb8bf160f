"""The one grammar that a request may name, in each of the ways that clients know. Pure."""

from __future__ import annotations

import json
from typing import Any

from batonpb import common_pb2
from router.errors import InvalidRequest
from router.http_body import too_deep
from router.http_models import JsonSchema, ResponseFormat, Sampled


def hold_to_grammar(sampling: common_pb2.SamplingParams, request: Sampled, renamed: dict[str, str]) -> None:
    """The one grammar that a request may name, in whichever of the three ways clients know."""
    found = [*_formats(request.response_format), *_structures(request), *_guides(request)]
    if len(found) > 1:
        raise InvalidRequest(found[1][0], f"and {found[0][0]} cannot both be set: one grammar at most")
    for name, kind, value in found:
        renamed |= {"grammar": name, "json_schema": name, "regex": name, "choice": name, "json_object": name}
        if kind == "choice":
            sampling.choice.choices.extend(value)
            sampling.choice.SetInParent()
        elif kind == "json_schema":
            sampling.json_schema = value if isinstance(value, str) else json_text(value, name)
        else:
            setattr(sampling, kind, value)


Grammar = tuple[str, str, Any]  # the client's field, SamplingParams' field, the value


def _formats(form: ResponseFormat | None) -> list[Grammar]:
    if form is None or form.type == "text":
        return []
    if form.type == "json_object":
        return [("response_format", "json_object", True)]
    if not isinstance(form.json_schema, JsonSchema):
        raise InvalidRequest("response_format", "needs json_schema where its type is json_schema")
    return [("response_format", "json_schema", form.json_schema.json_schema)]


def _structures(request: Sampled) -> list[Grammar]:
    given = request.structured_outputs
    if given is None:
        return []
    kinds: dict[str, object] = {"json_schema": given.json_, "regex": given.regex, "choice": given.choice}
    kinds["json_object"] = given.json_object or None
    return [("structured_outputs", kind, value) for kind, value in kinds.items() if value is not None]


def _guides(request: Sampled) -> list[Grammar]:
    guides = {
        "guided_json": ("json_schema", request.guided_json),
        "guided_regex": ("regex", request.guided_regex),
        "guided_choice": ("choice", request.guided_choice),
        "regex": ("regex", request.regex),
        "json_schema": ("json_schema", request.json_schema),
    }
    return [(name, kind, value) for name, (kind, value) in guides.items() if value is not None]


def json_text(value: object, name: str) -> str:
    """JSON's text again, in the order in which it came."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise too_deep() from None
    except ValueError as error:
        raise InvalidRequest(name, f"holds a number that JSON has not: {error}") from None
