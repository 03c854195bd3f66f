// Signs in, follows the controller's stream, and draws. Everything that is known is in `state`.

import { h, render } from "/ui/vendor/preact.js";
import { applied, headline } from "/ui/format.js";
import { Page } from "/ui/view.js";

const LOST_AFTER_MS = 3000; // the controller sends a status four times a second
const RETRY_MS = 1000;
const EVENTS_MAX = 200;

const state = {
  status: null,
  events: [], // newest first
  link: { state: "connecting", silentS: 0, historyError: "" },
  signIn: { problem: "", onToken: signIn },
};
let source = null;
let heardAt = performance.now();
let drawing = false;

function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    render(h(Page, state), document.getElementById("root"));
    const lost = state.link.state === "lost";
    document.title = `${lost ? "Connection lost" : state.status ? headline(state.status).word : "..."} - KevlarFlow`;
  });
}

async function signIn(token) {
  try {
    const answer = await fetch("/session", { method: "POST", body: JSON.stringify({ token }) });
    if (answer.ok) {
      state.signIn.problem = "";
      state.link.state = "connecting";
      connect();
    } else {
      state.link.state = "signed-out";
      state.signIn.problem = "This token is not the cluster's.";
    }
  } catch {
    state.link.state = "lost"; // the watchdog goes on trying
  }
  draw();
}

function connect() {
  source?.close();
  const after = state.events.length ? state.events[0].id : 0;
  source = new EventSource(`/admin/v1/stream?after=${after}`);
  source.onerror = () => {
    if (source.readyState === EventSource.CLOSED) probe(); // refused rather than broken
  };
  const heard = (apply) => (message) => {
    heardAt = performance.now();
    state.link.state = "up";
    apply(JSON.parse(message.data));
    draw();
  };
  source.addEventListener("status", heard((status) => (state.status = status)));
  source.addEventListener("difference", heard(takeDifference));
  source.addEventListener("events", heard(takeEvents));
  source.addEventListener("history", heard(({ error }) => (state.link.historyError = error)));
}

function takeDifference(difference) {
  const after = applied(state.status, difference);
  if (after) state.status = after;
  else connect(); // something was missed: a new stream begins with the whole
}

function takeEvents(rows) {
  const newest = state.events.length ? state.events[0].id : 0;
  const fresh = rows.filter((row) => row.id > newest).reverse();
  state.events = [...fresh, ...state.events].slice(0, EVENTS_MAX);
}

// The browser reopens a broken stream, but neither notices a silent one nor says why one was refused.
async function watchdog() {
  if (state.link.state !== "signed-out" && silentMs() > LOST_AFTER_MS) await probe();
  setTimeout(watchdog, RETRY_MS);
}

async function probe() {
  let status = 0;
  try {
    status = (await fetch("/admin/v1/status", { signal: AbortSignal.timeout(RETRY_MS * 2) })).status;
  } catch {
    // Nobody answered; status 0 says so.
  }
  if (status === 401) {
    source?.close();
    state.link.state = "signed-out";
  } else if (silentMs() > LOST_AFTER_MS) {
    state.link.state = "lost";
    state.link.silentS = silentMs() / 1000;
    if (status === 200) connect();
  }
  draw();
}

function silentMs() {
  return performance.now() - heardAt;
}

function start() {
  draw();
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) {
    history.replaceState(null, "", location.pathname); // no secret stays in the address bar or the history
    signIn(token);
  } else {
    connect(); // the cookie may still be good
  }
  setTimeout(watchdog, RETRY_MS);
}

start();
