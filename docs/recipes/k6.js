// Load on an OpenAI server with k6 (HTTP soak). k6 reads a stream as one body, so this measures total time and errors;
// for TTFT use `baton bench`, or k6 built with the xk6-sse extension.
//
//   k6 run -e HOST=http://HOST:PORT -e RATE=8 -e DURATION=10m docs/recipes/k6.js
//
// Also: API_KEY, MODEL (default: the first that the server names), MAX_TOKENS (default 64).
import http from "k6/http";
import { check } from "k6";

const rate = Number(__ENV.RATE || 4);

export const options = {
  scenarios: {
    open: {
      executor: "constant-arrival-rate",
      rate: rate,
      timeUnit: "1s",
      duration: __ENV.DURATION || "1m",
      preAllocatedVUs: 50,
      maxVUs: 1000,
    },
  },
  thresholds: { http_req_failed: ["rate<0.01"], dropped_iterations: ["count<1"] },
};

function headers() {
  const found = { "Content-Type": "application/json" };
  if (__ENV.API_KEY) found.Authorization = `Bearer ${__ENV.API_KEY}`;
  return found;
}

export function setup() {
  const models = http.get(`${__ENV.HOST}/v1/models`, { headers: headers() }).json();
  return { model: __ENV.MODEL || models.data[0].id };
}

export default function (data) {
  const prompt = `${__VU} ${__ITER} ${Math.random()} Tell me of it.`; // nothing that a cache has
  const body = { model: data.model, prompt: prompt, max_tokens: Number(__ENV.MAX_TOKENS || 64), stream: true };
  const answer = http.post(`${__ENV.HOST}/v1/completions`, JSON.stringify(body), { headers: headers() });
  check(answer, {
    "status is 200": (r) => r.status === 200,
    "the stream is whole": (r) => r.body && r.body.includes("finish_reason") && r.body.trimEnd().endsWith("[DONE]"),
  });
}
