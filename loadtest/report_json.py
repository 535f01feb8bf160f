"""Results as JSON: figures under vLLM's names, and every request; and reading such files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from loadtest.arrival import Ramp
from loadtest.config import BenchConfig
from loadtest.record import RequestRecord
from loadtest.report import Distribution, Report
from loadtest.sweep import Step

FORMAT = "baton-bench/1"
_MAX_FILE_BYTES = 1 << 30


class BadResult(ValueError):
    """A file that is not a result of `baton bench`."""


def as_json(report: Report, percentiles: Sequence[float] = (99.0,)) -> dict[str, Any]:
    """The figures; times as `mean_ttft_ms`, `p99_ttft_ms`, and 101 quantiles as `ttft_quantiles_ms`."""
    figures: dict[str, Any] = {}
    for field in fields(report):
        value = getattr(report, field.name)
        if isinstance(value, Distribution):
            figures |= _times(field.name, value, percentiles)
        else:
            figures[field.name] = value
    return figures


def _times(name: str, times: Distribution, percentiles: Sequence[float]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        f"num_{name}": times.count,
        f"mean_{name}_ms": times.mean_ms,
        f"median_{name}_ms": times.median_ms,
        f"std_{name}_ms": times.std_ms,
        f"max_{name}_ms": times.max_ms,
        f"{name}_quantiles_ms": times.quantiles_ms,
    }
    return figures | {f"p{percent:g}_{name}_ms": times.percentile_ms(percent) for percent in {99.0, *percentiles}}


def config_as_json(config: BenchConfig) -> dict[str, Any]:
    """What was run, without the key."""
    load, data = config.load, config.data
    rate = asdict(load.rate) if isinstance(load.rate, Ramp) else _finite(load.rate)
    return {
        "backend": config.backend,
        "address": config.target.address,
        "request_rate": rate,
        "burstiness": load.burstiness,
        "constant_rate": load.constant,
        "max_concurrency": load.max_in_flight,
        "seed": config.seed,
        "warmup": config.warmup,
        "goodput": config.slo.words() if config.slo else None,
        "cancel_rate": config.cancel_rate,
        "bad_clients": config.bad_clients,
        **asdict(config.sampling),
        **{name: str(value) if isinstance(value, Path) else value for name, value in asdict(data).items()},
    }


def _finite(rate: float) -> float | str:
    return "inf" if math.isinf(rate) else rate


def result_of(config: BenchConfig, model: str, report: Report, records: Sequence[RequestRecord]) -> dict[str, Any]:
    """The result of one run, with every request."""
    head = {"format": FORMAT, "model": model, "config": config_as_json(config)}
    return head | as_json(report, config.percentiles) | {"requests": [asdict(record) for record in records]}


def sweep_result_of(config: BenchConfig, model: str, steps: Sequence[Step], best_per_s: float | None) -> dict[str, Any]:
    """The result of a sweep: the figures of each step."""
    assert config.sweep is not None
    rows = [{"request_rate": step.rate_per_s} | as_json(step.report, config.percentiles) for step in steps]
    sweep = {"share": config.sweep.share, "best_request_rate": best_per_s, "steps": rows}
    return {"format": FORMAT, "model": model, "config": config_as_json(config), "sweep": sweep}


def write_json(result: dict[str, Any], file: Path, with_requests: bool) -> None:
    """Writes one line. Raises OSError."""
    content = result if with_requests else {name: value for name, value in result.items() if name != "requests"}
    file.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def read_result(file: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises `BadResult`, OSError."""
    if file.stat().st_size > _MAX_FILE_BYTES:
        raise BadResult(f"{file} is larger than {_MAX_FILE_BYTES} bytes")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadResult(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadResult(f"{file} is no result of `baton bench` (no format {FORMAT})")
    return content
