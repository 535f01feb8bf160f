"""The page with plots: whole, self-contained, and safe with whatever a result says."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest import compare
from loadtest.record import RequestRecord
from loadtest.report import summarise
from loadtest.report_html import page
from loadtest.report_json import FORMAT, BadResult, as_json, read_result, write_json
from loadtest.slo import Slo
from loadtest.svg import Axes, Bar, Series, bars, lines, log_ticks, ticks

VOID = {"meta", "rect", "circle", "line", "polyline", "br"}


def result(num_requests: int = 5, error: str = "") -> dict[str, Any]:
    records = [
        RequestRecord(i, i * 0.1, i * 0.1, i * 0.1 + 0.4, (i * 0.1 + 0.2, i * 0.1 + 0.4), 8, 4, error=error)
        for i in range(num_requests)
    ]
    report = summarise(records, 1.0, [0.001], Slo(ttft_ms=300.0))
    head = {"format": FORMAT, "model": "m", "config": {"address": "a", "kind": "random"}}
    rows = [{**vars(record)} for record in records]
    return json.loads(json.dumps(head | as_json(report) | {"requests": rows}))


def sweep() -> dict[str, Any]:
    steps = [{"request_rate": rate, "request_goodput": rate * 0.9, "good_share": 0.9} for rate in (1.0, 2.0)]
    body = {"share": 0.9, "best_request_rate": 2.0, "steps": steps}
    return {"format": FORMAT, "model": "m", "config": {}, "sweep": body}


class Elements(HTMLParser):
    """All elements, and that each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [f"{name}={value}" for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_a_page_is_whole_and_needs_no_network() -> None:
    text = page([("one", result()), ("two", result(3)), ("swept", sweep())])
    elements = Elements(text)
    assert elements.names.count("svg") == 4 + 2 * 3 + 2
    assert not {"script", "img", "link", "iframe", "object"} & set(elements.names)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme:dark" in text
    for words in ("Latencies", "one over time", "Goodput against rate", "Mean TTFT (ms)", "2.00 requests/s"):
        assert words in text


def test_a_page_of_a_run_that_failed_altogether() -> None:
    text = page([("bad", result(2, error="UNAVAILABLE"))])
    Elements(text)
    assert "nothing was measured" in text and 'class="fail"' in text


def test_what_a_result_says_is_no_markup() -> None:
    evil = '<script>alert("x")</script>'
    content = result(error=evil) | {"model": evil, "mean_ttft_ms": evil}
    content["config"]["address"] = evil
    text = page([(evil, content), ("n", sweep() | {"model": evil})])
    assert "<script" not in text
    Elements(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(key=st.sampled_from([*result(1), "sweep"]), value=json_values)
def test_a_result_that_is_broken_gives_a_page_all_the_same(key: str, value: Any) -> None:
    Elements(page([("x", result(1) | {key: value})]))


@settings(deadline=None)
@given(key=st.sampled_from(["request_rate", "request_goodput", "good_share"]), value=json_values)
def test_a_sweep_that_is_broken_gives_a_page_all_the_same(key: str, value: Any) -> None:
    content = sweep()
    content["sweep"]["steps"][0][key] = value
    Elements(page([("x", content)]))


def test_many_requests_are_thinned_out() -> None:
    text = page([("many", result(2000))])
    assert "400 of 2000 requests are drawn" in text
    assert len(text) < 600_000


@given(high=st.floats(1e-6, 1e12))
def test_ticks_are_few_and_reach_beyond(high: float) -> None:
    found = ticks(high)
    assert found[0] == 0.0 and found[-1] >= high * (1 - 1e-6)
    assert 3 <= len(found) <= 8


@given(low=st.floats(1e-3, 1e6), factor=st.floats(1.0, 1e6))
def test_logarithmic_ticks_reach_around(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert found == sorted(found)
    assert found[0] <= low * (1 + 1e-9) and found[-1] >= low * factor * (1 - 1e-9)


def test_ticks_of_nothing() -> None:
    assert ticks(0.0) == ticks(math.inf) == [0.0, 1.0]


def test_plots_are_well_formed_and_inside() -> None:
    series = [Series("a & b", [(0.0, 1.0), (5.0, 2.0)], dots=True), Series("c", [(1.0, 1.0)])]
    for log_x in (False, True):
        root = ElementTree.fromstring(lines(series, Axes("x < y", "z", log_x)))
        for line in root.iter("polyline"):
            for point in line.attrib["points"].split():
                x, y = (float(part) for part in point.split(","))
                assert 0 <= x <= 560 and 0 <= y <= 280
    ElementTree.fromstring(bars([Bar(0.0, 0.5, 1.0, False, "<ok>"), Bar(0.0, 1.0, 1.0, True, "no")], "time"))
    assert "nothing" in bars([], "time") and "nothing" in lines([Series("a", [])], Axes("x", "y"))


def test_results_are_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    write_json(result(), file, with_requests=True)
    assert read_result(file) == result()
    write_json(result(), file, with_requests=False)
    assert "requests" not in read_result(file)


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("[]", "no result"), ('{"format": "x"}', "no result")])
def test_what_is_no_result(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(BadResult, match=words):
        read_result(file)


def test_the_command_names_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    assert compare.run(parser.parse_args([str(tmp_path / "no.json"), "--out", str(tmp_path / "o.html")])) == 2
    assert "no.json" in capsys.readouterr().err
