// The rows of each table, from what the API answers.

import { sparkline } from "./charts.js";
import { age, cell, clock, duration, short } from "./format.js";

const SILENT_AFTER_S = 90;
const HOT_C = 80; // where a Pi slows itself down
const STREAMS = ["attacked", "recovered", "fused"];
const RUNNING = ["canary", "rolling"];

// --- fleet -----------------------------------------------------------------------------------------------

/** A device's state, and how it is marked. */
export function deviceState({ seen_at_ns: seenAtNs, status }) {
  if (status?.state === "offline") return ["offline", ""];
  if (Date.now() / 1000 - seenAtNs / 1e9 > SILENT_AFTER_S) return ["silent", "bad"];
  return status ? ["online", "good"] : ["no status", ""];
}

function pill(text, kind) {
  const held = document.createElement("td");
  held.append(cell(text, { tag: "span", kind: `state ${kind}` }));
  return held;
}

function deviceRow(device) {
  const { status } = device;
  const dropped = Object.entries(status?.dropped ?? {}).filter(([, count]) => count);
  const total = dropped.reduce((sum, [, count]) => sum + count, 0);
  const reasons = dropped.map(([reason, count]) => `${reason} ${count}`).join(", ");
  const hot = status?.temperature_c ?? null;
  return [
    cell(device.device, { tag: "th" }),
    pill(...deviceState(device)),
    cell(status?.model_name || "–"),
    cell(status?.runtime || "–"),
    cell(age(Math.max(0, Date.now() / 1000 - device.seen_at_ns / 1e9))),
    ...["queued", "sent", "results"].map((name) => cell(status ? status[name].toLocaleString() : "–", { kind: "number" })),
    cell(hot === null ? "–" : `${hot.toFixed(0)} °C`, { kind: hot >= HOT_C ? "number differs" : "number" }),
    cell(total ? `${total.toLocaleString()} (${reasons})` : status ? "0" : "–"),
  ];
}

/** Rows of the fleet, a heading for each site. */
export function fleetRows(devices) {
  const sites = Map.groupBy(devices, (device) => device.site);
  return [...sites].flatMap(([site, members]) => {
    const online = members.filter((device) => deviceState(device)[0] === "online").length;
    const heading = cell(`${site}: ${online} of ${members.length} online`, { tag: "th", kind: "site" });
    heading.colSpan = 10;
    heading.scope = "colgroup";
    return [[heading], ...members.map(deviceRow)];
  });
}

// --- results ---------------------------------------------------------------------------------------------

/** What the device released, as a picture; it was never the image. */
function releasedPicture(released, device) {
  const held = document.createElement("td");
  if (!released) return cell("–"); // stored before this page was opened: the values are not kept
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [released.width, released.height];
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `The ${released.width} by ${released.height} values that ${device} released`);
  const pixels = canvas.getContext("2d").createImageData(released.width, released.height);
  const grey = Uint8Array.from(atob(released.grey), (character) => character.charCodeAt(0));
  grey.forEach((value, index) => pixels.data.set([value, value, value, 255], 4 * index));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  held.append(canvas);
  return held;
}

export function resultRow({ site, device, result, released }, classes) {
  const name = (index) => classes.get(result.model)?.[index] ?? `class ${index}`;
  const streams = STREAMS.map((stream) => {
    const differs = result.streams[stream] !== result.class_index;
    return cell((differs ? "≠ " : "") + name(result.streams[stream]), { kind: differs ? "differs" : "" });
  });
  return [
    cell(clock(result.stored_at_ns / 1e9)),
    cell(`${site} / ${device}`),
    cell(result.sequence, { kind: "number" }),
    releasedPicture(released, device),
    cell(result.class_name, { tag: "th" }),
    cell(result.scores[result.class_index].toFixed(3), { kind: "number" }),
    ...streams,
    cell(duration(Math.max(0, result.stored_at_ns - result.captured_at_ns) / 1e6), { kind: "number" }),
  ];
}

// --- models, roll-outs, dead letters ---------------------------------------------------------------------

/** Models that are served or in the registry: accuracy where labels are known, and what the bundle certifies. */
export function modelRows(models, bundles, accuracy) {
  const held = new Map(bundles.map((bundle) => [bundle.model, bundle]));
  const scores = new Map(accuracy.map((one) => [one.model, one]));
  const served = new Set(models.map((model) => model.model));
  const every = [...models, ...bundles.filter((bundle) => !served.has(bundle.model))];
  return every.map(({ model, name }) => {
    const score = scores.get(model);
    const { release, certificate } = held.get(model)?.manifest ?? {};
    return [
      cell(name, { tag: "th" }),
      cell(model.slice(0, 12), { kind: "code" }),
      pill(served.has(model) ? "served" : "not served", served.has(model) ? "good" : ""),
      cell(score ? `${((100 * score.right) / score.labelled).toFixed(1)} %` : "–", { kind: "number" }),
      cell(score ? score.labelled.toLocaleString() : "–", { kind: "number" }),
      cell(release ? `${release.shape.join("×")} ${release.dtype}${release.sigma ? `, σ ${release.sigma}` : ""}` : "–"),
      cell(certificate ? `error ≥ ${certificate.bound_mse.toPrecision(3)}, picked from a list ≤ ${(100 * certificate.identified).toFixed(0)} %` : "–"),
    ];
  });
}

/** Roll-outs; `halt(id)` is asked to stop one that runs. */
export function rolloutRows(rollouts, halt) {
  return rollouts.map((rollout) => {
    const running = RUNNING.includes(rollout.state);
    const action = document.createElement("td");
    if (running) {
      const button = cell("Halt", { tag: "button" });
      button.type = "button";
      button.id = `halt-${rollout.id}`;
      button.setAttribute("aria-label", `Halt the roll-out of ${rollout.model.slice(0, 12)}`);
      button.addEventListener("click", () => halt(rollout));
      action.append(button);
    }
    const orders = Object.entries(rollout.orders).map(([state, count]) => `${state} ${count}`).join(", ");
    return [
      cell(rollout.model.slice(0, 12), { tag: "th", kind: "code" }),
      pill(rollout.state, running || rollout.state === "done" ? "good" : "bad"),
      cell(rollout.site ?? "every site"),
      cell(`${(100 * rollout.canary_share).toFixed(0)} %`, { kind: "number" }),
      cell(orders || "none yet"),
      cell(rollout.reason || "–"),
      cell(rollout.actor),
      cell(age(Math.max(0, Date.now() / 1000 - rollout.changed_at_ns / 1e9))),
      action,
    ];
  });
}

/** How far a training is, as a bar with words. */
function roundCell({ round = 0, rounds = 0 }) {
  const held = document.createElement("td");
  if (!rounds) return cell("not begun");
  const bar = document.createElement("progress");
  bar.max = rounds;
  bar.value = round;
  bar.setAttribute("aria-label", `${round} of ${rounds} rounds`);
  held.append(bar, ` ${round} of ${rounds}`);
  return held;
}

/** A line for each site: its steps, its last loss, and the loss of its epochs as a small curve. */
function siteList(sites = []) {
  const held = document.createElement("td");
  const list = document.createElement("ul");
  for (const { device, state, steps, of, curve } of sites) {
    const item = document.createElement("li");
    const losses = curve.map((one) => one.loss);
    const last = losses.length ? `, loss ${short(losses.at(-1))}` : "";
    item.append(`${device}: ${steps.toLocaleString()} of ${of.toLocaleString()}${last}${state === "training" ? "" : ` (${state})`} `);
    if (losses.length > 1) item.append(sparkline(losses, `loss of ${device} by epoch`));
    list.append(item);
  }
  held.append(sites.length ? list : "none has joined");
  return held;
}

/** Trainings across sites; `change(training, what)` is asked to stop one or to go on. */
export function trainingRows(trainings, change) {
  return trainings.map((training) => {
    const { name, id, state, reason, actor, progress } = training;
    const action = document.createElement("td");
    const what = { running: "stop", stopped: "resume", failed: "resume" }[state];
    if (what) {
      const button = cell(what === "stop" ? "Stop" : "Resume", { tag: "button" });
      button.type = "button";
      button.id = `${what}-${id}`;
      button.setAttribute("aria-label", `${button.textContent} the training ${name}`);
      button.addEventListener("click", () => change(training, what));
      action.append(button);
    }
    return [
      cell(name, { tag: "th" }),
      cell(id, { kind: "code whole" }),
      pill(state, state === "failed" ? "bad" : state === "stopped" ? "" : "good"),
      roundCell(progress),
      siteList(progress.sites),
      cell(reason || "–"),
      cell(actor),
      cell(age(Math.max(0, Date.now() / 1000 - training.changed_at_ns / 1e9))),
      action,
    ];
  });
}

export function deadLetterRows(letters) {
  return letters.map((letter) => [
    cell(clock(letter.at_ns / 1e9)),
    cell(letter.reason, { tag: "th" }),
    cell(letter.topic, { kind: "code" }),
    cell(letter.head, { kind: "code" }),
  ]);
}
