// The dashboard: asks the API, follows /v1/events, and draws. What comes from outside is only ever set as text.

const BUCKET_S = 5;
const BUCKETS = 60; // five minutes
const RATE_S = 30;
const MAX_LATENCIES = 400; // kept per bucket, enough for its percentiles
const ROWS = 12;
const DEVICES_EVERY_MS = 2000;
const DRAW_EVERY_MS = 500;
const SILENT_AFTER_S = 90;
const STREAMS = ["attacked", "recovered", "fused"];
const SVG = "http://www.w3.org/2000/svg";
const PLOT = { left: 52, right: 556, top: 10, bottom: 156 };

const byId = (id) => document.getElementById(id);
const buckets = new Map(); // second / BUCKET_S -> { count, latencies }
const classes = new Map(); // model id -> names of its classes
let last = []; // newest first
let missed = 0;
let paused = false;
let changed = true;
let hovered = null; // index of the bucket under the pointer

// --- records ---------------------------------------------------------------------------------------------

function note(record) {
  const { stored_at_ns: storedAtNs, captured_at_ns: capturedAtNs } = record.result;
  const bucket = bucketAt(Math.floor(storedAtNs / 1e9 / BUCKET_S));
  bucket.count += 1;
  if (bucket.latencies.length < MAX_LATENCIES) {
    bucket.latencies.push(Math.max(0, storedAtNs - capturedAtNs) / 1e6);
  }
  if (!paused) {
    last.unshift(record);
    last.length = Math.min(last.length, ROWS);
  }
  changed = true;
}

function bucketAt(number) {
  if (!buckets.has(number)) buckets.set(number, { count: 0, latencies: [] });
  return buckets.get(number);
}

/** The last five minutes, oldest first; forgets what is older. */
function timeline() {
  const now = Math.floor(Date.now() / 1000 / BUCKET_S);
  for (const number of buckets.keys()) if (number <= now - BUCKETS) buckets.delete(number);
  return Array.from({ length: BUCKETS }, (_, i) => {
    const number = now - BUCKETS + 1 + i;
    const bucket = buckets.get(number) ?? { count: 0, latencies: [] };
    const sorted = [...bucket.latencies].sort((a, b) => a - b);
    return { atS: number * BUCKET_S, count: bucket.count, p50: quantile(sorted, 0.5), p95: quantile(sorted, 0.95), sorted };
  });
}

function quantile(sorted, q) {
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : null;
}

// --- text ------------------------------------------------------------------------------------------------

const clock = (atS) => new Date(atS * 1000).toLocaleTimeString([], { hour12: false });
const short = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

function duration(ms) {
  if (ms === null) return "–";
  if (ms === 0) return "0 ms";
  if (ms < 1000) return `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
  if (ms < 120000) return `${(ms / 1000).toFixed(1)} s`;
  return `${Math.round(ms / 60000)} min`;
}

function age(seconds) {
  if (seconds < 2) return "now";
  const [size, unit] = [[86400, "days"], [3600, "h"], [60, "min"]].find(([size]) => seconds >= 2 * size) ?? [1, "s"];
  return `${Math.round(seconds / size)} ${unit} ago`;
}

function cell(text, { tag = "td", kind = "" } = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (kind) element.className = kind;
  if (tag === "th") element.scope = "row";
  return element;
}

function fill(body, rows) {
  if (rows.length) {
    body.replaceChildren(...rows.map((cells) => {
      const row = document.createElement("tr");
      row.append(...cells);
      return row;
    }));
  }
}

function setState(element, text, kind) {
  if (element.textContent !== text) element.textContent = text; // spoken only when it changes
  element.className = `state ${kind}`;
}

// --- charts ----------------------------------------------------------------------------------------------

function shape(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

/** Round number at or above `value`: 1, 2 or 5 times a power of ten. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

const xAt = (index) => PLOT.left + ((PLOT.right - PLOT.left) * index) / (BUCKETS - 1);

function drawChart(svg, times, lines, { unit, area }) {
  const top = ceiling(Math.max(0, ...lines.flatMap((line) => line.values)));
  const yAt = (value) => PLOT.bottom - ((PLOT.bottom - PLOT.top) * value) / top;
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const y = yAt(share * top);
    parts.push(shape("line", { class: "grid", x1: PLOT.left, x2: PLOT.right, y1: y, y2: y }));
    parts.push(shape("text", { x: PLOT.left - 6, y: y + 4, "text-anchor": "end" }, unit(share * top)));
  }
  for (const [index, anchor] of [[0, "start"], [Math.floor(BUCKETS / 2), "middle"], [BUCKETS - 1, "end"]]) {
    parts.push(shape("text", { x: xAt(index), y: 174, "text-anchor": anchor }, clock(times[index])));
  }
  for (const { kind, values } of lines) {
    for (const run of runs(values)) {
      const path = run.map((index) => `${xAt(index).toFixed(1)},${yAt(values[index]).toFixed(1)}`).join(" L");
      if (area) {
        const ends = `L${xAt(run.at(-1)).toFixed(1)},${PLOT.bottom} L${xAt(run[0]).toFixed(1)},${PLOT.bottom} Z`;
        parts.push(shape("path", { class: "area", d: `M${path} ${ends}` }));
      }
      // A run of one point still shows: a line of no length has round ends.
      parts.push(shape("path", { class: kind, d: `M${path}${run.length === 1 ? " h0.01" : ""}` }));
    }
  }
  if (hovered !== null) {
    parts.push(shape("line", { class: "cursor", x1: xAt(hovered), x2: xAt(hovered), y1: PLOT.top, y2: PLOT.bottom }));
  }
  svg.replaceChildren(...parts);
}

/** Indices of neighbouring values that exist: a gap in the data is a gap in the line. */
function runs(values) {
  const found = [];
  values.forEach((value, index) => {
    if (value === null) return;
    if (index && values[index - 1] !== null && found.length) found.at(-1).push(index);
    else found.push([index]);
  });
  return found;
}

function readPointer(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * 560;
  const index = Math.round(((x - PLOT.left) / (PLOT.right - PLOT.left)) * (BUCKETS - 1));
  hovered = Math.min(BUCKETS - 1, Math.max(0, index));
  draw();
}

function drawFigures() {
  const line = timeline();
  const times = line.map((bucket) => bucket.atS);
  const rates = line.map((bucket) => bucket.count / BUCKET_S);
  rates[BUCKETS - 1] = null; // not over yet
  const recent = line.slice(-1 - RATE_S / BUCKET_S, -1).reduce((sum, bucket) => sum + bucket.count, 0) / RATE_S;
  const all = line.flatMap((bucket) => bucket.sorted).sort((a, b) => a - b);
  const [p50, p95] = [quantile(all, 0.5), quantile(all, 0.95)];
  byId("rate").textContent = short(recent);
  byId("p50").textContent = duration(p50);
  byId("p95").textContent = duration(p95);

  drawChart(byId("throughput"), times, [{ kind: "first", values: rates }], { unit: (v) => `${v}`, area: true });
  byId("throughput").setAttribute("aria-label", `Throughput of the last five minutes: now ${short(recent)} results per second`);
  const latencies = [
    { kind: "first", values: line.map((bucket) => bucket.p50) },
    { kind: "second", values: line.map((bucket) => bucket.p95) },
  ];
  drawChart(byId("latency"), times, latencies, { unit: duration, area: false });
  byId("latency").setAttribute("aria-label", `Latency of the last five minutes: p50 ${duration(p50)}, p95 ${duration(p95)}`);
  drawReadouts(hovered === null ? null : line[hovered]);
}

function drawReadouts(bucket) {
  const at = bucket ? `${clock(bucket.atS)}  ` : "";
  byId("throughput-readout").textContent = bucket ? `${at}${short(bucket.count / BUCKET_S)} per second` : "results per second";
  const keys = [["first", "p50"], ["second", "p95"]].map(([kind, name]) =>
    cell(bucket ? `${name} ${duration(bucket[name])}` : name, { tag: "span", kind: `key ${kind}` }));
  byId("latency-readout").replaceChildren(at, ...keys);
}

// --- tables ----------------------------------------------------------------------------------------------

function className(model, index) {
  return classes.get(model)?.[index] ?? `class ${index}`;
}

function resultRow({ site, device, result }) {
  const streams = STREAMS.map((name) => {
    const index = result.streams[name];
    const differs = index !== result.class_index;
    return cell((differs ? "≠ " : "") + className(result.model, index), { kind: differs ? "differs" : "" });
  });
  return [
    cell(clock(result.stored_at_ns / 1e9)),
    cell(`${site} / ${device}`),
    cell(result.sequence, { kind: "number" }),
    cell(result.class_name, { tag: "th" }),
    cell(result.scores[result.class_index].toFixed(3), { kind: "number" }),
    ...streams,
    cell(duration(Math.max(0, result.stored_at_ns - result.captured_at_ns) / 1e6), { kind: "number" }),
  ];
}

function deviceState(seenS, status) {
  if (status?.state === "offline") return ["offline", ""];
  if (seenS > SILENT_AFTER_S) return ["silent", "bad"];
  return status ? ["online", "good"] : ["no status", ""];
}

function deviceRow({ site, device, seen_at_ns: seenAtNs, status }) {
  const seenS = Math.max(0, Date.now() / 1000 - seenAtNs / 1e9);
  const [state, kind] = deviceState(seenS, status);
  const dropped = Object.entries(status?.dropped ?? {}).filter(([, count]) => count);
  const total = dropped.reduce((sum, [, count]) => sum + count, 0);
  const reasons = dropped.map(([reason, count]) => `${reason} ${count}`).join(", ");
  const pill = document.createElement("td");
  pill.append(cell(state, { tag: "span", kind: `state ${kind}` }));
  return [
    cell(site),
    cell(device, { tag: "th" }),
    pill,
    cell(status?.model_name || "–"),
    cell(status?.runtime || "–"),
    cell(age(seenS)),
    ...["queued", "sent", "results"].map((name) => cell(status ? status[name].toLocaleString() : "–", { kind: "number" })),
    cell(total ? `${total.toLocaleString()} (${reasons})` : status ? "0" : "–"),
  ];
}

async function get(path) {
  const answer = await fetch(path);
  return { ok: answer.ok, body: await answer.json() };
}

/** Every device, page by page. */
async function allDevices() {
  const found = [];
  for (let after = ""; ;) {
    const { ok, body } = await get(`v1/devices?limit=1000&after=${encodeURIComponent(after)}`);
    if (!ok) throw new Error(body.detail);
    found.push(...body.devices);
    if (body.devices.length < 1000) return found;
    after = body.next;
  }
}

async function refresh() {
  const service = byId("service");
  try {
    const { ok, body } = await get("readyz");
    setState(service, ok ? "Service: ready" : `Service: ${body.reasons.join("; ")}`, ok ? "good" : "bad");
    const devices = await allDevices();
    const online = devices.filter(({ seen_at_ns: seenAtNs, status }) =>
      deviceState(Date.now() / 1000 - seenAtNs / 1e9, status)[0] === "online");
    byId("online").textContent = online.length;
    byId("known").textContent = `of ${devices.length || "none"} known`;
    fill(byId("devices"), devices.map(deviceRow));
  } catch (error) {
    setState(service, `Service: does not answer (${error.message})`, "bad");
  }
  setTimeout(refresh, DEVICES_EVERY_MS);
}

// --- start -----------------------------------------------------------------------------------------------

function draw() {
  drawFigures();
  if (changed && !paused) fill(byId("results"), last.map(resultRow));
  byId("missed").textContent = missed ? `This page was too slow for ${missed.toLocaleString()} results; they are stored.` : "";
  changed = false;
}

function follow() {
  const events = new EventSource("v1/events");
  const stream = byId("stream");
  events.addEventListener("open", () => setState(stream, "Live events: connected", "good"));
  events.addEventListener("error", () => setState(stream, "Live events: reconnecting", "bad"));
  events.addEventListener("result", (event) => note(JSON.parse(event.data)));
  events.addEventListener("missed", (event) => {
    missed += Number(event.data);
    bucketAt(Math.floor(Date.now() / 1000 / BUCKET_S)).count += Number(event.data);
  });
}

async function start() {
  byId("pause").addEventListener("click", ({ currentTarget }) => {
    paused = !paused;
    currentTarget.setAttribute("aria-pressed", `${paused}`);
  });
  for (const id of ["throughput", "latency"]) {
    byId(id).addEventListener("pointermove", readPointer);
    byId(id).addEventListener("pointerleave", () => { hovered = null; draw(); });
  }
  refresh();
  try {
    const [models, results] = await Promise.all([get("v1/models"), get("v1/results?limit=1000")]);
    for (const { model, classes: names } of models.body.models) classes.set(model, names);
    if (results.ok) results.body.results.forEach(note);
  } finally { // what came before is missing then, what comes is shown
    follow();
    draw();
    setInterval(draw, DRAW_EVERY_MS);
  }
}

start();
