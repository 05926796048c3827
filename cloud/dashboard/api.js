// The API as the page uses it: the token, questions, and the stream of events.

const KEY = "splitward-token"; // for this tab, until it is closed

export const hasToken = () => sessionStorage.getItem(KEY) !== null;
export const setToken = (token) => sessionStorage.setItem(KEY, token);
export const forgetToken = () => sessionStorage.removeItem(KEY);

/** The service wants a token, or another one. */
export class Unauthorised extends Error {}

function headers(more = {}) {
  const token = sessionStorage.getItem(KEY);
  return token === null ? more : { ...more, Authorization: `Bearer ${token}` };
}

/** What `path` answers: { ok, body }. */
export async function get(path) {
  const answer = await fetch(path, { headers: headers() });
  const body = await answer.json();
  if (answer.status === 401) throw new Unauthorised(body.detail);
  return { ok: answer.ok, body };
}

/** As `get`, with a body to send; throws what the service says against it. */
export async function post(path, value) {
  const answer = await fetch(path, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(value),
  });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail ?? `status ${answer.status}`);
  return body;
}

/** Follow `path` until it ends: `onEvent(kind, data)` for each server-sent event. EventSource cannot carry a token. */
export async function follow(path, onOpen, onEvent) {
  const answer = await fetch(path, { headers: headers() });
  if (answer.status === 401) throw new Unauthorised((await answer.json()).detail);
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  onOpen();
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => [line.split(": ", 1)[0], line.slice(line.indexOf(": ") + 2)]));
      if (fields.event) onEvent(fields.event, fields.data);
    }
  }
}
