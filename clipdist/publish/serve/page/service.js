// Requests to the service, and what is seen while one waits or after it has failed.

import { announce, el } from "./dom.js";

const SHOWN_AFTER_MS = 250;
const POLL_MS = 700;

export class ServiceError extends Error {
  constructor(message, status, retrySeconds) {
    super(message);
    Object.assign(this, { status, retrySeconds });
  }
}

// The response, or a ServiceError with the service's own words.
export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service cannot be reached. Is it still running, and the tunnel to it open?", 0);
  }
  if (response.ok) return response;
  const said = await response.json().then((body) => body.error?.message, () => null);
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "0", 10);
  throw new ServiceError(said || `The service answered with status ${response.status}.`, response.status, seconds);
}

// A list gives one field for each of its values; what is null gives none.
export function form(fields) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    for (const one of [value].flat()) if (one != null) body.append(name, one);
  }
  return body;
}

// One request at a time, with a place on the page that shows its position in the queue, or why it failed.
export class Work {
  #controller = null;

  constructor(place) {
    this.place = place;
  }

  cancel() {
    this.#controller?.abort();
    this.place.replaceChildren();
  }

  // What `call(send)` gives, `send(path, options)` being a request. Undefined when it failed or was cancelled, which
  // the page then says, with a button that calls `again`; and when another followed.
  async run(call, again, label = "Try again") {
    this.cancel();
    const { signal } = (this.#controller = new AbortController());
    const ticket = newTicket();
    const shown = this.#waiting(ticket, signal, () => this.#say("stopped", "Cancelled.", again, label));
    const send = (path, { headers, ...options } = {}) =>
      request(path, { method: "POST", ...options, signal, headers: { "X-Ticket": ticket, ...headers } });
    try {
      const answer = await call(send);
      return signal.aborted ? undefined : answer;
    } catch (error) {
      if (!signal.aborted) this.fail(error, again, label);
      return undefined;
    } finally {
      shown.end();
    }
  }

  #waiting(ticket, signal, stopped) {
    const words = el("span", { role: "status" }, "Sending …");
    const cancel = el("button", { class: "small", click: () => { this.cancel(); stopped(); } }, "Cancel");
    const spinner = el("span", { class: "spinner", "aria-hidden": "true" });
    const shown = el("div", { class: "card pad waiting" }, spinner, words, cancel);
    let timer = 0;
    const poll = async () => {
      if (!shown.isConnected) this.#show(shown);
      const answer = await request(`/api/queue/${ticket}`, { signal }).then((response) => response.json(), () => null);
      const position = answer?.position; // without an answer, the request itself will say what is wrong
      const said = position == null ? "Working …" : `Waiting: number ${position} in the queue`;
      if (words.textContent !== said) words.replaceChildren(said);
      if (timer !== null) timer = setTimeout(poll, POLL_MS);
    };
    timer = setTimeout(poll, SHOWN_AFTER_MS);
    const end = () => {
      clearTimeout(timer);
      timer = null;
      shown.remove();
    };
    return { end };
  }

  #show(state) {
    this.place.replaceChildren(state);
    state.scrollIntoView({ block: "nearest" });
  }

  fail(error, again, label) {
    if (!(error instanceof ServiceError)) console.error(error);
    const words = error instanceof ServiceError ? error.message : "This page could not make sense of the answer.";
    this.#say("failed", words, again, label, error.retrySeconds);
  }

  #say(kind, words, again, label, seconds = 0) {
    const button = again && el("button", { class: "small", click: () => again() }, label);
    this.#show(el("div", { class: `card pad ${kind}`, role: "alert" }, el("p", {}, words), button));
    if (button && seconds) countDown(button, label, seconds);
  }
}

// The service asked for this many seconds of patience.
function countDown(button, label, seconds) {
  button.disabled = seconds > 0;
  button.textContent = seconds > 0 ? `${label} in ${seconds} s` : label;
  if (seconds > 0) setTimeout(countDown, 1000, button, label, seconds - 1);
  else announce("You can try again now.");
}

// A random UUID, as crypto.randomUUID gives it on https and localhost alone.
function newTicket() {
  const byte = crypto.getRandomValues(new Uint8Array(16));
  byte[6] = (byte[6] % 16) + 64;
  byte[8] = (byte[8] % 64) + 128;
  const hex = Array.from(byte, (value) => value.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}
