// Line charts in SVG, without a library: they must work in a network that has no other.

import { clock } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 560;
const PLOT = { left: 52, right: 556, top: 10, bottom: 156 };

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

const xAt = (index, count) => PLOT.left + ((PLOT.right - PLOT.left) * index) / (count - 1);

/** Draw `lines` over `times` into `svg`; `hovered` is the index under the pointer, or null. */
export function drawChart(svg, times, lines, { unit, area, hovered }) {
  const top = ceiling(Math.max(0, ...lines.flatMap((line) => line.values)));
  const yAt = (value) => PLOT.bottom - ((PLOT.bottom - PLOT.top) * value) / top;
  const count = times.length;
  const x = (index) => xAt(index, count).toFixed(1);
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const y = yAt(share * top);
    parts.push(shape("line", { class: "grid", x1: PLOT.left, x2: PLOT.right, y1: y, y2: y }));
    parts.push(shape("text", { x: PLOT.left - 6, y: y + 4, "text-anchor": "end" }, unit(share * top)));
  }
  for (const [index, anchor] of [[0, "start"], [Math.floor(count / 2), "middle"], [count - 1, "end"]]) {
    parts.push(shape("text", { x: x(index), y: 174, "text-anchor": anchor }, clock(times[index])));
  }
  for (const { kind, values } of lines) {
    for (const run of runs(values)) {
      const path = run.map((index) => `${x(index)},${yAt(values[index]).toFixed(1)}`).join(" L");
      if (area) {
        const ends = `L${x(run.at(-1))},${PLOT.bottom} L${x(run[0])},${PLOT.bottom} Z`;
        parts.push(shape("path", { class: "area", d: `M${path} ${ends}` }));
      }
      // A run of one point still shows: a line of no length has round ends.
      parts.push(shape("path", { class: kind, d: `M${path}${run.length === 1 ? " h0.01" : ""}` }));
    }
  }
  if (hovered !== null) {
    parts.push(shape("line", { class: "cursor", x1: x(hovered), x2: x(hovered), y1: PLOT.top, y2: PLOT.bottom }));
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

/** Index of the value under the pointer, of `count` values. */
export function indexAt(event, count) {
  const box = event.currentTarget.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * WIDTH;
  const index = Math.round(((x - PLOT.left) / (PLOT.right - PLOT.left)) * (count - 1));
  return Math.min(count - 1, Math.max(0, index));
}

/** A small curve of `values`, down to 0; `label` says what they are, and the values follow for who cannot see it. */
export function sparkline(values, label) {
  const [width, height] = [96, 20];
  const top = Math.max(...values) || 1;
  const told = `${label}: ${values.map((value) => value.toFixed(2)).join(", ")}`;
  const svg = shape("svg", { class: "sparkline", role: "img", "aria-label": told, viewBox: `0 0 ${width} ${height}` });
  const points = values.map((value, index) =>
    `${((width * index) / (values.length - 1)).toFixed(1)},${(height - 1 - ((height - 2) * value) / top).toFixed(1)}`);
  svg.append(shape("polyline", { points: points.join(" ") }));
  return svg;
}
