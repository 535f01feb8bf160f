"""Amounts of memory as people write them, for options and files. Pure."""

from __future__ import annotations

import re

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """ "512M", "2GiB", "1.5g" or "1048576" as bytes; units are powers of 1024. Raises `ValueError`."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if match is None:
        raise ValueError(f"{text!r} is no amount of memory; write it like 512M or 2G")
    return int(float(match[1]) * UNITS[match[2]])
