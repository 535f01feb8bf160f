"""What a request is called: its client's word for it, in a header or in the body. Pure."""

from __future__ import annotations

from router.errors import InvalidRequest
from router.http_models import Sampled
from router.validate import MAX_REQUEST_ID_CHARS

REQUEST_ID = "X-Request-Id"


def is_id(given: str) -> bool:
    """Whether a request can be called that."""
    return 0 < len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable()


def no_id(name: str, given: str) -> InvalidRequest:
    """The error of a field that holds something else."""
    problem = f"must have 1 to {MAX_REQUEST_ID_CHARS} characters of printable ASCII, got {len(given)}"
    return InvalidRequest(name, problem)


def id_in(asked: Sampled) -> str | None:
    """The id in a body: vLLM's clients call it `request_id`, SGLang's `rid`. Raises `InvalidRequest`."""
    for name, given in (("request_id", asked.request_id), ("rid", asked.rid)):
        if given is not None:
            if not is_id(given):
                raise no_id(name, given)
            return given
    return None
