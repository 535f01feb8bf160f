"""Where the Redis URL comes from, and what may be shown of it."""

from __future__ import annotations

import os
from urllib.parse import parse_qsl, urlsplit

REDIS_URL_VARIABLE = "BATON_REDIS_URL"


def redis_url_from(argument: str, option: str) -> str:
    """The argument's URL, or else the environment's, or else "".

    Everybody on the machine can read arguments: raises `ValueError`, without repeating it, for one with a password.
    """
    if has_password(argument):
        raise ValueError(
            f"{option}: a URL with a password goes into the variable {REDIS_URL_VARIABLE}; arguments show in ps"
        )
    return argument or os.environ.get(REDIS_URL_VARIABLE, "")


def has_password(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.password) or any(name == "password" for name, _ in parse_qsl(parts.query))
    except ValueError:  # no URL, as whoever connects with it will say
        return "@" in url
