"""Load on an OpenAI server with Locust: streamed completions, and TTFT beside the whole answer's time.

locust -f docs/recipes/locustfile.py --headless --users 16 --spawn-rate 4 --run-time 5m --host http://HOST:PORT

Environment: API_KEY, MODEL (default: the first that the server names), MAX_TOKENS (default 64).
"""

from __future__ import annotations

import json
import os
import random
import string
import time

from locust import HttpUser, between, events, task

MAX_TOKENS = int(os.environ.get("MAX_TOKENS", "64"))
KEY = os.environ.get("API_KEY", "")


class Reader(HttpUser):
    """Asks something new each time, reads the answer to its end, and thinks for a moment."""

    wait_time = between(0.1, 1.0)

    def on_start(self) -> None:
        self.headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}
        models = self.client.get("/v1/models", headers=self.headers).json()
        self.model = os.environ.get("MODEL") or models["data"][0]["id"]

    @task
    def complete(self) -> None:
        prompt = "".join(random.choices(string.ascii_lowercase + " ", k=200))  # nothing that a cache has
        body = {"model": self.model, "prompt": prompt, "max_tokens": MAX_TOKENS, "stream": True}
        sent_s = time.perf_counter()
        path = "/v1/completions"
        with self.client.post(path, json=body, headers=self.headers, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}")
                return
            first_s, reason, is_done = 0.0, None, False
            for line in response.iter_lines():
                data = line.decode().removeprefix("data: ")
                if data == "[DONE]":
                    is_done = True
                elif data.startswith("{"):
                    choices = json.loads(data).get("choices") or [{}]
                    reason = choices[0].get("finish_reason") or reason
                    first_s = first_s or time.perf_counter()
            if not is_done or not reason:
                response.failure("the stream is not whole")
                return
            # Locust's own time ends with the headers, as the answer is streamed.
            response.request_meta["response_time"] = 1e3 * (time.perf_counter() - sent_s)
        events.request.fire(
            request_type="TTFT",
            name=path,
            response_time=1e3 * (first_s - sent_s),
            response_length=0,
            exception=None,
            context={},
        )
