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

export function fill(body, rows) {
  if (rows.length) {
    body.replaceChildren(...rows.map((cells) => {
      const row = document.createElement("tr");
      row.append(...cells);
      return row;
    }));
  }
}

export function setState(element, text, kind) {
  if (element.textContent !== text) element.textContent = text; // spoken only when it changes
  element.className = `state ${kind}`;
}
