"""One HTML page from results of `baton bench`, of one run or several side by side: plots inline, no script, no network.

Pure. Takes the output of `report_json` without trusting it: what is not a number is left out, names are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from loadtest.svg import Axes, Bar, Point, Series, bars, colour, lines

Named = tuple[str, dict[str, Any]]  # what to call a run, and its result

_MAX_BARS = 400  # beyond that, every so manieth request is drawn
_MAX_COLUMNS = 200  # of a plot over time
_TIMES = (
    ("ttft", "Time to first token"),
    ("tpot", "Time per output token"),
    ("itl", "Inter-token latency"),
    ("e2el", "End-to-end latency"),
)
_FIGURES = (
    ("completed", "Successful requests"),
    ("failed", "Failed requests"),
    ("duration_s", "Duration (s)"),
    ("total_input_tokens", "Input tokens"),
    ("total_output_tokens", "Generated tokens"),
    ("request_throughput", "Requests/s"),
    ("request_goodput", "Goodput (requests/s)"),
    ("output_throughput", "Output tokens/s"),
    ("total_token_throughput", "Tokens/s"),
    ("peak_concurrent_requests", "Most in flight"),
    ("prefix_hit_rate", "Prefix hit rate"),
    *(
        (f"{kind}_{name}_ms", f"{words} {name.upper()} (ms)")
        for name, _ in _TIMES
        for kind, words in (("mean", "Mean"), ("median", "Median"), ("p99", "P99"))
    ),
    ("p99_loop_lag_ms", "Client: P99 event loop lag (ms)"),
    ("p99_lateness_ms", "Client: P99 lateness (ms)"),
)
_STYLE = """
:root{--bg:#fff;--fg:#1c1e21;--soft:#667;--grid:#e3e5ea;--card:#f7f8fa;--c0:#2563eb;--c1:#d9480f;--c2:#2b8a3e;
--c3:#9c36b5;--c4:#0c8599;--c5:#e67700;--c6:#c2255c;--c7:#5f3dc4}
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e4e6ea;--soft:#9aa0ab;--grid:#2c3038;--card:#1c1f25;
--c0:#6ea8fe;--c1:#ff922b;--c2:#69db7c;--c3:#da77f2;--c4:#3bc9db;--c5:#ffd43b;--c6:#f783ac;--c7:#9775fa}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1200px;
padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}h3{font-size:.95rem;margin:0 0 .4rem}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:1rem}
.card{background:var(--card);border-radius:8px;padding:1rem}.none,.note{color:var(--soft)}
svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}.grid{stroke:var(--grid)}
.line{fill:none;stroke-width:2}.wait{fill:var(--c5);opacity:.75}.flow{fill:var(--c0)}.fail{fill:var(--c6)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .8rem;text-align:right;
border-bottom:1px solid var(--grid)}td:first-child,th:first-child{text-align:left}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .35em 0 1em}.scroll{overflow-x:auto}
"""


def page(results: Sequence[Named]) -> str:
    """The whole document."""
    runs = [(name, result) for name, result in results if "sweep" not in result]
    sweeps = [(name, result) for name, result in results if "sweep" in result]
    body = [f"<h1>baton bench</h1><p class=note>{escape(_summary(results))}</p>"]
    if runs:
        body += [_legend(runs), _distributions(runs), _figures(runs)]
        body += [_timeline(name, rows) for name, result in runs if (rows := _rows(result))]
    if sweeps:
        body.append(_sweeps(sweeps))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>baton bench</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _summary(results: Sequence[Named]) -> str:
    words = []
    for name, result in results:
        config = result.get("config")
        config = config if isinstance(config, dict) else {}
        words.append(f"{name}: {result.get('model')} at {config.get('address')}, {config.get('kind')} prompts")
    return "; ".join(words)


def _legend(results: Sequence[Named]) -> str:
    keys = (
        f'<span class="key" style="background:{colour(index)}"></span>{escape(name)}'
        for index, (name, _) in enumerate(results)
    )
    return f"<p>{''.join(keys)}</p>"


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _rows(result: dict[str, Any]) -> list[Any]:
    rows = result.get("requests")
    return rows if isinstance(rows, list) else []


def _numbers(values: Any) -> list[float]:
    return (
        [number for value in values if (number := _number(value)) is not None]
        if isinstance(values, list | tuple)
        else []
    )


def _distributions(runs: Sequence[Named]) -> str:
    cards = []
    for key, title in _TIMES:
        series = []
        for name, result in runs:
            quantiles = _numbers(result.get(f"{key}_quantiles_ms"))
            last = max(1, len(quantiles) - 1)
            series.append(Series(name, [(x, 100 * i / last) for i, x in enumerate(quantiles)]))
        values = [x for s in series for x, _ in s.points if x > 0]
        is_wide = bool(values) and max(values) > 30 * min(values)
        plot = lines(series, Axes(f"{key.upper()} (ms)", "% of all", log_x=is_wide, y_max=100.0))
        cards.append(_card(title, plot))
    return f'<h2>Latencies</h2><div class="grid2">{"".join(cards)}</div>'


def _card(title: str, content: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3>{content}</div>'


def _figures(runs: Sequence[Named]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in runs)
    rows = []
    for key, words in _FIGURES:
        numbers = [_number(result.get(key)) for _, result in runs]
        if any(number is not None for number in numbers):
            cells = "".join(f"<td>{'' if number is None else f'{number:,.6g}'}</td>" for number in numbers)
            rows.append(f"<tr><td>{escape(words)}</td>{cells}</tr>")
    table = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
    return f'<h2>Figures</h2><div class="scroll">{table}</div>'


def _timeline(name: str, rows: Sequence[Any]) -> str:
    requests = [bar for row in rows if isinstance(row, dict) and (bar := _bar(row)) is not None]
    shown = requests[:: max(1, -(-len(requests) // _MAX_BARS))]
    names = ((5, "to the first token"), (0, "tokens"), (6, "failed"))
    key = "".join(f'<span class="key" style="background:{colour(i)}"></span>{words}' for i, words in names)
    note = f"<p class=note>{key}; {len(shown)} of {len(requests)} requests are drawn</p>"
    flow = lines([Series("output tokens/s", _tokens_per_s(rows))], Axes("time (s)", "output tokens/s"))
    in_flight = lines([Series("in flight", _in_flight(requests))], Axes("time (s)", "in flight"))
    cards = _card("Requests", bars(shown, "time (s)") + note) + _card("Output", flow) + _card("In flight", in_flight)
    return f'<h2>{escape(name)} over time</h2><div class="grid2">{cards}</div>'


def _bar(row: dict[str, Any]) -> Bar | None:
    sent_s, end_s = _number(row.get("sent_s")), _number(row.get("finished_s"))
    if sent_s is None or end_s is None:
        return None
    times_s = _numbers(row.get("token_times_s"))
    failed = bool(row.get("error")) or not times_s
    first_s = times_s[0] if times_s else end_s
    words = f"request {row.get('index')}: {1e3 * (first_s - sent_s):.1f} ms to the first token, "
    words += f"{1e3 * (end_s - sent_s):.1f} ms in all; {row.get('error') or 'ok'}"
    return Bar(sent_s, first_s, end_s, failed, words)


def _tokens_per_s(rows: Sequence[Any]) -> list[Point]:
    """Output over time; each message has an equal share of its request's tokens."""
    stamps: list[tuple[float, float]] = []
    for row in rows:
        times_s = _numbers(row.get("token_times_s")) if isinstance(row, dict) else []
        tokens = _number(row.get("output_tokens")) if times_s else None
        stamps += [(time_s, (tokens or 0.0) / len(times_s)) for time_s in times_s if time_s >= 0]
    if not stamps:
        return []
    last_s = max(time_s for time_s, _ in stamps)
    bucket_s = max(last_s / _MAX_COLUMNS, 0.25)
    totals: dict[int, float] = {}
    for time_s, tokens_ in stamps:
        totals[int(time_s / bucket_s)] = totals.get(int(time_s / bucket_s), 0.0) + tokens_
    return [((i + 0.5) * bucket_s, totals.get(i, 0.0) / bucket_s) for i in range(int(last_s / bucket_s) + 1)]


def _in_flight(requests: Sequence[Bar]) -> list[Point]:
    """Requests in flight over time: the maximum in each part of the run."""
    steps = sorted([(bar.sent_s, 1) for bar in requests] + [(bar.end_s, -1) for bar in requests])
    if not steps or steps[-1][0] <= 0:
        return []
    width_s = steps[-1][0] / _MAX_COLUMNS
    points: list[Point] = []
    count = position = 0
    for column in range(_MAX_COLUMNS):
        most = count
        while position < len(steps) and steps[position][0] <= (column + 1) * width_s:
            count += steps[position][1]
            most = max(most, count)
            position += 1
        points.append(((column + 0.5) * width_s, float(most)))
    return points


def _sweeps(sweeps: Sequence[Named]) -> str:
    goodput, met, words = [], [], []
    for name, result in sweeps:
        sweep = result["sweep"] if isinstance(result["sweep"], dict) else {}
        steps = [step for step in sweep.get("steps", []) if isinstance(step, dict)]
        goodput.append(Series(name, _against_rate(steps, "request_goodput", 1.0), dots=True))
        met.append(Series(name, _against_rate(steps, "good_share", 100.0), dots=True))
        best, share = _number(sweep.get("best_request_rate")), _number(sweep.get("share")) or 0.0
        found = "none that was tried" if best is None else f"{best:.2f} requests/s"
        words.append(f"{name}: highest rate that meets the objectives for {100 * share:g} % of requests: {found}")
    cards = _card("Goodput against rate", lines(goodput, Axes("requests/s sent", "requests/s that met all")))
    cards += _card("Met against rate", lines(met, Axes("requests/s sent", "% that met all", y_max=100.0)))
    found = "".join(f"<p>{escape(line)}</p>" for line in words)
    return f'<h2>Sweep</h2>{_legend(sweeps)}{found}<div class="grid2">{cards}</div>'


def _against_rate(steps: Sequence[dict[str, Any]], key: str, factor: float) -> list[Point]:
    pairs = [(_number(step.get("request_rate")), _number(step.get(key))) for step in steps]
    return sorted((rate, factor * value) for rate, value in pairs if rate is not None and value is not None)
