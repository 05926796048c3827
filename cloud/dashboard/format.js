// Numbers, times and table cells as text. What comes from outside is only ever set as text.

export const clock = (atS) => new Date(atS * 1000).toLocaleTimeString([], { hour12: false });
export const short = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

export function duration(ms) {
  if (ms === null) return "–";
  if (ms === 0) return "0 ms";
  if (ms < 1000) return `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
  if (ms < 120000) return `${(ms / 1000).toFixed(1)} s`;
  return `${Math.round(ms / 60000)} min`;
}

export function age(seconds) {
  if (seconds < 2) return "now";
  const [size, unit] = [[86400, "days"], [3600, "h"], [60, "min"]].find(([size]) => seconds >= 2 * size) ?? [1, "s"];
  return `${Math.round(seconds / size)} ${unit} ago`;
}

export function cell(text, { tag = "td", kind = "" } = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (kind) element.className = kind;
  if (tag === "th") element.scope = "row";
  return element;
}

/** Fill a table. The button that holds the focus stays, with its cell: it may be half pressed, or be read out. */
export function fill(body, rows) {
  if (!rows.length) return;
  const button = body.contains(document.activeElement) ? document.activeElement : null;
  let kept = null;
  const made = rows.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells);
    if (button === null || row.querySelector("button")?.id !== button.id) return row;
    kept = button.closest("tr");
    [...row.cells].forEach((one, i) => { if (!kept.cells[i].contains(button)) kept.cells[i].replaceWith(one); });
    return kept;
  });
  if (kept === null) {
    body.replaceChildren(...made);
    if (button !== null) body.closest(".scroll").focus({ preventScroll: true }); // as near as can be
    return;
  }
  for (const row of [...body.rows]) if (row !== kept) row.remove();
  kept.before(...made.slice(0, made.indexOf(kept)));
  kept.after(...made.slice(made.indexOf(kept) + 1));
}

export function setState(element, text, kind) {
  if (element.textContent !== text) element.textContent = text; // spoken only when it changes
  element.className = `state ${kind}`;
}
