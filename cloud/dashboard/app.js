// The dashboard: asks the API, follows its events, and draws.

import { Unauthorised, follow, forgetToken, get, hasToken, post, setToken } from "./api.js";
import { drawChart, indexAt } from "./charts.js";
import { cell, clock, duration, fill, setState, short } from "./format.js";
import { deadLetterRows, deviceState, fleetRows, modelRows, resultRow, rolloutRows, trainingRows } from "./panels.js";

const BUCKET_S = 5;
const BUCKETS = 60; // five minutes
const RATE_S = 30;
const MAX_LATENCIES = 400; // kept per bucket, enough for its percentiles
const ROWS = 12;
const REFRESH_EVERY_MS = 2000;
const DRAW_EVERY_MS = 500;
const RECONNECT_MS = 3000;

const byId = (id) => document.getElementById(id);
const buckets = new Map(); // second / BUCKET_S -> { count, latencies }
const classes = new Map(); // model id -> names of its classes
const last = []; // newest first
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
  last.unshift(record);
  last.length = Math.min(last.length, ROWS);
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

// --- figures and charts ----------------------------------------------------------------------------------

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

  drawChart(byId("throughput"), times, [{ kind: "first", values: rates }], { unit: (v) => `${v}`, area: true, hovered });
  byId("throughput").setAttribute("aria-label", `Throughput of the last five minutes: now ${short(recent)} results per second`);
  const latencies = [
    { kind: "first", values: line.map((bucket) => bucket.p50) },
    { kind: "second", values: line.map((bucket) => bucket.p95) },
  ];
  drawChart(byId("latency"), times, latencies, { unit: duration, area: false, hovered });
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

function draw() {
  drawFigures();
  if (changed && !paused) {
    fill(byId("results"), last.map((record) => resultRow(record, classes)));
    changed = false;
  }
  byId("missed").textContent = missed ? `This page was too slow for ${missed.toLocaleString()} results; they are stored.` : "";
}

// --- what is asked again and again -----------------------------------------------------------------------

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
    byId("online").textContent = devices.filter((device) => deviceState(device)[0] === "online").length;
    byId("known").textContent = `of ${devices.length || "none"} known`;
    fill(byId("devices"), fleetRows(devices));
    const paths = ["v1/models", "v1/bundles", "v1/accuracy", "v1/rollouts?limit=20", "v1/trainings?limit=20", "v1/dead-letters?limit=20"];
    const [models, bundles, accuracy, rollouts, trainings, letters] = (await Promise.all(paths.map(get))).map((one) => one.body);
    for (const { model, classes: names } of models.models) {
      changed ||= !classes.has(model); // rows that were drawn without its names
      classes.set(model, names);
    }
    fill(byId("models"), modelRows(models.models, bundles.bundles, accuracy.models));
    fill(byId("rollouts"), rolloutRows(rollouts.rollouts, halt));
    fill(byId("trainings"), trainingRows(trainings.trainings, change));
    fill(byId("letters"), deadLetterRows(letters.dead_letters));
    byId("letters-count").textContent = letters.dead_letters.length || "";
  } catch (error) {
    if (error instanceof Unauthorised) return logIn(error.message);
    setState(service, `Service: does not answer (${error.message})`, "bad");
  }
  setTimeout(refresh, REFRESH_EVERY_MS);
}

async function halt(rollout) {
  if (!window.confirm(`Halt the roll-out of ${rollout.model.slice(0, 12)}, and take it back where it was taken?`)) return;
  const said = byId("rollouts-said");
  try {
    await post(`v1/rollouts/${rollout.id}/halt`, { reason: "halted on the dashboard" });
    said.textContent = `The roll-out of ${rollout.model.slice(0, 12)} is halted.`;
  } catch (error) {
    said.textContent = `It could not be halted: ${error.message}`;
  }
}

async function change(training, what) {
  if (what === "stop" && !window.confirm(`Stop the training ${training.name}? Every step is kept.`)) return;
  const said = byId("trainings-said");
  try {
    const { state } = await post(`v1/trainings/${training.id}/${what}`, {});
    said.textContent = `The training ${training.name} is ${state}.`;
  } catch (error) {
    said.textContent = `That could not be done: ${error.message}`;
  }
}

async function listen() {
  const stream = byId("stream");
  for (;;) {
    try {
      await follow("v1/events", () => setState(stream, "Live events: connected", "good"), (kind, data) => {
        if (kind === "result") note(JSON.parse(data));
        if (kind !== "missed") return;
        missed += Number(data);
        bucketAt(Math.floor(Date.now() / 1000 / BUCKET_S)).count += Number(data);
      });
    } catch (error) {
      if (error instanceof Unauthorised) return; // whoever asks for the figures asks for a token
    }
    setState(stream, "Live events: reconnecting", "bad");
    await new Promise((wake) => { setTimeout(wake, RECONNECT_MS); });
  }
}

// --- start -----------------------------------------------------------------------------------------------

/** Ask for a token. */
function logIn(why) {
  byId("login-why").textContent = hasToken() ? `The token was refused: ${why}` : "";
  forgetToken();
  setState(byId("service"), "Service: needs a token", "");
  byId("login").showModal();
}

function prepare() {
  byId("pause").addEventListener("click", ({ currentTarget }) => {
    paused = !paused;
    currentTarget.setAttribute("aria-pressed", `${paused}`);
  });
  for (const id of ["throughput", "latency"]) {
    byId(id).addEventListener("pointermove", (event) => { hovered = indexAt(event, BUCKETS); draw(); });
    byId(id).addEventListener("pointerleave", () => { hovered = null; draw(); });
  }
  byId("login").addEventListener("close", () => { // by Escape, maybe; there is nothing behind it
    if (!hasToken()) byId("login").showModal();
  });
  byId("login-form").addEventListener("submit", () => {
    setToken(byId("token").value.trim());
    window.location.reload(); // nothing of before is counted twice, and one stream is followed
  });
  byId("logout").addEventListener("click", () => { forgetToken(); window.location.reload(); });
  setInterval(draw, DRAW_EVERY_MS);
}

async function begin() {
  byId("logout").hidden = !hasToken();
  try {
    const results = await get("v1/results?limit=1000");
    if (results.ok) results.body.results.forEach(note);
  } catch (error) {
    if (error instanceof Unauthorised) return logIn(error.message);
  }
  refresh();
  listen();
}

prepare();
begin();
