"""`docs/observability.md` names what there is: the router's metrics, the legs, the options; and is found."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY
from prometheus_client.parser import text_string_to_metric_families
from router_fakes import FakeCluster, running
from scraping import check_documented, http

from router.spans import LEGS

PAGE = (REPOSITORY / "docs" / "observability.md").read_text()


async def test_the_routers_metrics_are_those_that_the_page_names(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.open(metrics=True)
        _, body = await http(cluster.metrics_address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    check_documented(PAGE, text_string_to_metric_families(body), common=["model_name"])


def test_the_legs_are_those_that_there_are() -> None:
    assert re.findall(r"^\| `([a-z_]+)` \| (?!role)", PAGE, re.MULTILINE)[: len(LEGS)] == list(LEGS)


def test_the_pictures_are_there() -> None:
    pictures = re.findall(r"\((img/\S+\.png)\)", PAGE)
    assert len(pictures) == 2
    for picture in pictures:
        assert (REPOSITORY / "docs" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_page_is_found(page: str) -> None:
    assert "observability.md)" in (REPOSITORY / page).read_text()
