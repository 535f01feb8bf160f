"use strict";
// Polls /state each second and draws it. Whatever comes from there is set as text, never as markup.

const POLL_MS = 1000;
const SVG = "http://www.w3.org/2000/svg";
const LEGS = {
  route: "routing", admit: "room on the decode node", queue: "queue", fetch: "fetch", prefill: "prefill",
  transfer: "hand-off: transfer", decode_wait: "hand-off: decode wait", decode: "decode",
};
const byId = (id) => document.getElementById(id);

function make(name, attributes = {}, ...children) {
  const isDrawn = ["svg", "rect", "path", "line", "text", "title", "circle"].includes(name);
  const element = isDrawn ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

function seconds(value) {
  if (value === null || value === undefined || value < 0) return "–";
  if (value < 0.01) return `${(value * 1000).toFixed(2)} ms`;
  if (value < 1) return `${(value * 1000).toFixed(0)} ms`;
  return `${value.toFixed(2)} s`;
}
const percent = (value) => (value === null || value === undefined ? "–" : `${(value * 100).toFixed(0)} %`);
const whole = (value) => Math.round(value).toLocaleString("en-US");
const bytes = (value) => (value < 2 ** 30 ? `${(value / 2 ** 20).toFixed(0)} MiB` : `${(value / 2 ** 30).toFixed(1)} GiB`);

function duration(value) {
  const minutes = Math.floor(value / 60), hours = Math.floor(minutes / 60);
  if (hours >= 48) return `${Math.floor(hours / 24)} days`;
  return hours ? `${hours} h ${minutes % 60} min` : minutes ? `${minutes} min` : `${Math.floor(value)} s`;
}

function row(cells) {
  return make("tr", {}, ...cells.map(([value, kind]) => make("td", kind ? { class: kind } : {}, value)));
}

function fill(id, rows, columns, none) {
  const body = byId(id).querySelector("tbody");
  body.replaceChildren(...(rows.length ? rows : [make("tr", {}, make("td", { class: "empty", colspan: columns }, none))]));
}

function use(part, label) {
  const bar = make("meter", { min: 0, max: 1, value: part, "aria-label": label });
  return make("div", { class: "use" }, bar, percent(part));
}

function lately(state) {
  const newest = state.now_s - 10;
  const points = state.series.points.filter((point) => point.t >= newest);
  const sum = (name) => points.reduce((total, point) => total + (point[name] || 0), 0);
  const last = state.series.points[state.series.points.length - 1] || {};
  return { answers: sum("count") / 10, tokens: sum("output_tokens") / 10, ttft: last.ttft_p50, tpot: last.tpot_p50 };
}

function tiles(state) {
  const { totals } = state, now = lately(state);
  const hits = totals.local_hit_tokens + totals.store_hit_tokens;
  const shown = [
    ["in flight", whole(totals.in_flight)],
    ["answers/s", now.answers.toFixed(1)],
    ["output tokens/s", whole(now.tokens)],
    ["TTFT, last", seconds(now.ttft)],
    ["TPOT, last", seconds(now.tpot)],
    ["hit rate in all", percent(totals.prompt_tokens ? hits / totals.prompt_tokens : null)],
    ["answers in all", whole(totals.finished)],
    ["calls failed", whole(totals.failed)],
  ];
  byId("tiles").replaceChildren(
    ...shown.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

const WIDTH = 340, HEIGHT = 110, LEFT = 48, BOTTOM = 92, TOP = 10;

function path(points, state, max, name) {
  const begin = state.now_s - state.series.span_s;
  const x = (t) => LEFT + ((t - begin) / state.series.span_s) * (WIDTH - LEFT);
  const y = (value) => BOTTOM - (Math.min(value, max) / max) * (BOTTOM - TOP);
  return points.filter((point) => point[name] !== null)
    .map((point, index) => `${index ? "L" : "M"}${x(point.t).toFixed(1)} ${y(point[name]).toFixed(1)}`).join("");
}

function chart(title, state, names, format, fixedMax) {
  const { points } = state.series;
  const max = fixedMax || Math.max(1e-6, ...points.flatMap((point) => names.map((name) => point[name] || 0))) * 1.1;
  const last = points.length ? points[points.length - 1][names[0]] : null;
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", preserveAspectRatio: "none",
    "aria-label": `${title}: ${format(last)} now, axis up to ${format(max)}` });
  svg.append(make("line", { class: "axis", x1: LEFT, x2: WIDTH, y1: BOTTOM, y2: BOTTOM }));
  svg.append(make("line", { class: "axis", x1: LEFT, x2: WIDTH, y1: TOP, y2: TOP }));
  svg.append(make("text", { x: 0, y: TOP + 4 }, format(max)), make("text", { x: 0, y: BOTTOM + 4 }, "0"));
  svg.append(make("text", { x: LEFT, y: HEIGHT - 4 }, "−5 min"), make("text", { x: WIDTH - 24, y: HEIGHT - 4 }, "now"));
  names.forEach((name, index) =>
    svg.append(make("path", { class: index ? "line high" : "line", d: path(points, state, max, name) })));
  return make("figure", {}, make("figcaption", {}, `${title}: ${format(last)}`), svg);
}

function charts(state) {
  byId("charts").replaceChildren(
    chart("TTFT", state, ["ttft_p50", "ttft_p95"], seconds),
    chart("TPOT", state, ["tpot_p50", "tpot_p95"], seconds),
    chart("Hit rate", state, ["hit"], percent, 1));
}

function nodes(state) {
  fill("nodes", state.nodes.map((node) => row([
    [node.id, "id"], [node.role], [node.state, node.state], [node.incarnation, "id"], [node.host],
    [whole(node.running), "n"], [whole(node.waiting), "n"], [whole(node.queued_tokens), "n"],
    [whole(node.prefill_tokens_per_s), "n"], [seconds(node.decode_step_s || null), "n"],
    [use(node.cache_use, `cache of ${node.id} in use`)],
  ])), 11, "no node has been seen");
  fill("stores", state.stores.map((store) => row([
    [store.id, "id"], [store.draining ? "draining" : "up", store.draining ? "draining" : "up"], [store.host],
    [bytes(store.bytes), "n"],
    [use(store.num_slots ? store.used_slots / store.num_slots : 0, `slots of store ${store.id} in use`)],
  ])), 5, "no store has been seen");
}

function bars(answer, longest) {
  const words = answer.legs.map(([name, begin, end]) => `${LEGS[name] || name} ${seconds(end - begin)}`).join(", ");
  const svg = make("svg", { viewBox: "0 0 1000 16", preserveAspectRatio: "none", role: "img", "aria-label": words });
  svg.append(make("title", {}, words));
  for (const [name, begin, end] of answer.legs) {
    const x = (begin / longest) * 1000, width = Math.max(1, ((end - begin) / longest) * 1000);
    svg.append(make("rect", { class: name in LEGS ? name : "route", x, y: 1, width, height: 14 }));
  }
  return svg;
}

function answers(state) {
  // One slow answer is not to squeeze the others: bars that are longer than most are cut at the edge.
  const totals = state.answers.map((answer) => answer.total_s).sort((one, other) => one - other);
  const longest = Math.max(1e-6, totals[Math.floor(totals.length * 0.9)] || 0);
  fill("answers", state.answers.map((answer) => {
    const hits = answer.local_hit_tokens + answer.store_hit_tokens;
    const via = answer.prefill_node ? `${answer.prefill_node} → ${answer.decode_node}` : answer.decode_node;
    const moved = answer.migrations ? ` (moved ${answer.migrations}×)` : "";
    return row([
      [answer.id || "–", "id"], [bars(answer, longest), "legs"], [seconds(answer.ttft_s), "n"],
      [answer.output_tokens > 1 ? seconds(answer.tpot_s) : "–", "n"], [seconds(answer.total_s), "n"],
      [whole(answer.prompt_tokens), "n"], [percent(answer.prompt_tokens ? hits / answer.prompt_tokens : null), "n"],
      [whole(answer.output_tokens), "n"], [via + moved], [answer.reason],
    ]);
  }), 10, "nothing was answered yet");
}

function draw(state) {
  byId("model").textContent = state.model;
  document.title = state.model ? `Baton: ${state.model}` : "Baton";
  tiles(state);
  charts(state);
  nodes(state);
  answers(state);
}

function say(words, isLost) {
  const status = byId("status");
  if (status.textContent !== words) status.textContent = words;
  status.className = isLost ? "lost" : "";
}

async function poll() {
  try {
    const answer = await fetch("state", { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const state = await answer.json();
    draw(state);
    const up = state.nodes.filter((node) => node.state === "up").length;
    say(`${up} of ${state.nodes.length} nodes up; router up for ${duration(state.up_s)}`, false);
  } catch (error) {
    say(`the router does not answer (${error.message}); what is shown is old`, true);
  }
  setTimeout(poll, POLL_MS);
}

byId("legend").append(...Object.entries(LEGS).map(([name, words]) => {
  const swatch = make("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" });
  swatch.append(make("rect", { class: name, width: 12, height: 12 }));
  return make("li", {}, swatch, words);
}));
poll();
