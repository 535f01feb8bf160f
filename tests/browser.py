"""A headless Chromium over its DevTools protocol: for the tests of pages. None is installed by this repository.

Found in `BATON_CHROMIUM` or on the PATH; Debian's packages are chromium and chromium-headless-shell.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from conftest import eventually

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--mute-audio", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--remote-debugging-address=127.0.0.1", "--remote-debugging-port=0"),
)


def chromium() -> str | None:
    """Where a browser is."""
    return os.environ.get("BATON_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. `problems` are what its console and its network complained of."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.problems: list[str] = []
        self.urls: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        return await asyncio.wait_for(answer, 20)

    async def open(self, url: str, width: int = 1200, height: int = 900) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await self.call("Page.navigate", url=url)

    async def scheme(self, name: str) -> None:
        """What the person prefers: "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def value(self, expression: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        async with asyncio.timeout(20):
            while not await self.value(expression):
                await asyncio.sleep(0.05)

    async def screenshot(self, file: Path) -> None:
        height = await self.value("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": await self.value("innerWidth"), "height": height, "scale": 1}
        answer = await self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    async def close(self) -> None:
        self._reading.cancel()
        await self._socket.close()

    async def _read(self) -> None:
        async for message in self._socket:
            data = message.json()
            if "id" in data:
                self._answers.pop(data["id"]).set_result(data.get("result", data))
            elif data["method"] == "Network.requestWillBeSent":
                self.urls.append(data["params"]["request"]["url"])
            elif data["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(data["params"]["exceptionDetails"]))
            elif data["method"] == "Log.entryAdded" and data["params"]["entry"]["level"] in ("warning", "error"):
                self.problems.append(str(data["params"]["entry"]))


@asynccontextmanager
async def browsing(program: str, folder: Path) -> AsyncIterator[Page]:
    """One tab of a browser of its own, whose profile lies in `folder`."""
    process = await asyncio.create_subprocess_exec(
        *(program, *SWITCHES, f"--user-data-dir={folder}", "about:blank"),
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port_file = folder / "DevToolsActivePort"
        await eventually(lambda: port_file.exists() and port_file.read_text().count("\n"), what="the browser listens")
        origin = f"127.0.0.1:{port_file.read_text().split()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{origin}/json/list") as answer:
                (tab,) = [one for one in await answer.json() if one["type"] == "page"]
            page = Page(await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=1 << 26))
            try:
                yield page
            finally:
                await page.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        await process.wait()
