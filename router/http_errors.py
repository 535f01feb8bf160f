"""What a failure looks like over HTTP: a status, OpenAI's error object, and when to come again. Pure.

{"error": {"message": ..., "type": ..., "param": the field of the JSON body or null, "code": ... or null}}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from router.errors import (
    ClusterBusy,
    ClusterUnavailable,
    DeadlinePassed,
    InvalidRequest,
    RouterError,
    TryLater,
    Unauthenticated,
    UnknownRequest,
)

INVALID = "invalid_request_error"
SERVER = "server_error"
BODY = "body"  # the whole of it, no field
BUSY_RETRY_S = 1.0  # nobody knows when a full cluster has room
UNAVAILABLE_RETRY_S = 2.0  # about as long as a restarted node needs to be seen, where its model is small
# How the core's names for what was sent are called in a JSON body, whatever the endpoint.
NAMES = {
    "text": "prompt",
    "tokens": "prompt",
    "chat": "messages",
    "tool_name": "tool_choice",
    "single_tool_call": "parallel_tool_calls",
}
# What lies inside a prompt or a tool is named after it; these are fields by themselves.
WHOLE = (
    *("prompt", "messages", "tools", "tool_choice"),
    *("chat_template_kwargs", "reasoning_effort", "add_generation_prompt", "continue_final_message"),
)


class RefusedCall(RouterError):
    """A call that HTTP itself says no to, before it is a request: unknown route, too large, not JSON."""

    def __init__(self, status: int, problem: str, code: str | None = None, headers: Mapping[str, str] = {}) -> None:
        super().__init__(problem)
        self.status = status
        self.code = code
        self.headers = dict(headers)


@dataclass(frozen=True)
class Failure:
    """One error answer."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, object]:
        words = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": words}


def failure_of(error: Exception, renamed: Mapping[str, str]) -> Failure:
    """What a client reads of an error. `renamed` maps names of the core to those that the client used."""
    message = str(error)
    match error:
        case RefusedCall():
            return Failure(error.status, message, INVALID, code=error.code, headers=error.headers)
        case InvalidRequest():
            return _invalid(error, renamed)
        case Unauthenticated():
            headers = {"WWW-Authenticate": "Bearer"}
            return Failure(401, message, INVALID, code="invalid_api_key", headers=headers)
        case TryLater():
            return _try_later(message, _snake(type(error).__name__), error.retry_after_s)
        case ClusterBusy():
            return _try_later(message, "cluster_busy", BUSY_RETRY_S)
        case UnknownRequest():
            return Failure(404, message, INVALID, code="request_not_found")
        case ClusterUnavailable():
            headers = retry_headers(UNAVAILABLE_RETRY_S)
            return Failure(503, message, SERVER, code="cluster_unavailable", headers=headers)
        case DeadlinePassed():
            return Failure(504, message, SERVER, code="deadline_exceeded")
    return Failure(500, "the router failed; its log says more", SERVER, code="internal_error")


def _try_later(message: str, code: str, retry_after_s: float) -> Failure:
    return Failure(429, message, "rate_limit_error", code=code, headers=retry_headers(retry_after_s))


def retry_headers(retry_after_s: float) -> dict[str, str]:
    """Whole seconds, as HTTP has them, and milliseconds, which OpenAI's clients look at first."""
    return {
        "Retry-After": str(max(1, math.ceil(retry_after_s))),
        "retry-after-ms": str(max(1, math.ceil(retry_after_s * 1000))),
    }


def _snake(name: str) -> str:
    """would_be_late of WouldBeLate."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _invalid(error: InvalidRequest, renamed: Mapping[str, str]) -> Failure:
    problem = str(error).removeprefix(f"{error.field}: ")
    if error.field == BODY:
        return Failure(400, f"the body {problem}", INVALID)
    param = param_of(error.field, renamed)
    message = f"{param}: {problem}"
    if error.field == "model":
        return Failure(404, message, INVALID, param, "model_not_found")
    return Failure(400, message, INVALID, param)


def param_of(field: str, renamed: Mapping[str, str]) -> str:
    """A field of the core, such as sampling.temperature or prompt.chat.messages.role, as JSON's field is called."""
    names = [renamed.get(name) or NAMES.get(name, name) for name in field.split(".")]
    whole = [renamed.get(name, name) for name in names]
    whole = [name for name in whole if name in WHOLE or name == renamed.get("grammar")]
    if whole:
        return whole[-1]
    return ".".join(names).removeprefix("sampling.")
