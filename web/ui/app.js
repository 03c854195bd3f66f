// Signs in, follows the controller's stream, and draws. Everything that is known is in `state`; `actions` change it.

import { h, render } from "/ui/vendor/preact.js";
import { askForLife } from "/ui/lives.js";
import { applied, following, headline } from "/ui/format.js";
import { askCancel, askFor, askInstances, confirm, mayOperate } from "/ui/operations.js";
import { placed } from "/ui/topology.js";
import { Page } from "/ui/view.js";

const LOST_AFTER_MS = 3000; // the controller sends a status four times a second
const RETRY_MS = 1000;
const EVENTS_MAX = 200;
const HOUR_S = 3600;
const DAY_S = 24 * HOUR_S;
const DAY_ROWS = 500;
const DAY_EVERY_MS = 60_000;
const QUORUM_EVERY_MS = 15_000; // each time every etcd member is asked

const state = {
  status: null,
  who: null, // {name, role}; null: not known yet
  quorum: [], // checks of etcd's members and of who could lead
  events: [], // newest first
  incidents: null, // oldest first; null: not told yet
  figures: { columns: [], rows: [] }, // of the last hour
  day: null, // of the last 24 hours, as the history has them
  range: "hour",
  filter: { text: "", unwell: false },
  cursor: { row: 0, column: 0 }, // of the topology
  selected: "", // node
  asked: null, // the operation that somebody is about to ask for; see operations.js
  life: null, // of the request that was asked for last; see lives.js
  said: "", // the last thing that was done, for screen readers too
  link: { state: "connecting", silentS: 0, historyError: "" },
  signIn: { problem: "", provider: "" },
};
let source = null;
let heardAt = performance.now();
let drawing = false;
let afterDrawing = null;

const actions = {
  signIn,
  signOut,
  select: (node) => {
    state.selected = node;
    draw();
  },
  leaveNode: () => {
    state.selected = "";
    draw(focusCursor);
  },
  // `to(cursor)`: two keys may come before the page is drawn anew.
  moveCursor: (to) => {
    state.cursor = to(state.cursor);
    draw(focusCursor);
  },
  filter: (change) => {
    state.filter = { ...state.filter, ...change };
    state.cursor = { row: 0, column: 0 };
    draw();
  },
  range: (range) => {
    state.range = range;
    if (range === "day") readDay();
    draw();
  },
  findLife: async (id) => {
    state.life = { id, busy: true };
    draw();
    const life = await askForLife(id);
    if (state.life?.id !== id) return; // somebody has asked for another one meanwhile
    state.life = life;
    draw();
  },
  ask: (kind, node) => follow(askFor(state.status, kind, node)),
  instances: (typed) => follow(askInstances(state.asked, typed)),
  askCancel: (operation) => follow(askCancel(operation)),
  reason: (reason) => show({ ...state.asked, reason }),
  confirm: () => follow(confirm(state.asked)),
  // A dialog's closing is told a moment later, when another one may be open.
  dismiss: (id) => {
    if (state.asked?.id === id) show(null);
  },
};

function show(asked) {
  state.asked = asked;
  draw();
}

// The steps of asking for one operation, until somebody dismisses it.
async function follow(steps) {
  for await (const step of steps) {
    if (!step.first && state.asked?.id !== step.id) return;
    if (!step.first && !step.over && state.asked.instances !== step.instances) return; // another number was typed
    if (step.said) state.said = step.said;
    show(step.over ? null : step);
  }
}

function draw(then) {
  afterDrawing = then || afterDrawing;
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    render(h(Page, { ...state, actions }), document.getElementById("root"));
    const lost = state.link.state === "lost";
    document.title = `${lost ? "Connection lost" : state.status ? headline(state.status).word : "..."} - KevlarFlow`;
    const then = afterDrawing;
    afterDrawing = null;
    then?.();
  });
}

function focusCursor() {
  document.querySelector('[role="gridcell"][tabindex="0"]')?.focus();
}

async function signIn(token) {
  try {
    const answer = await fetch("/session", { method: "POST", body: JSON.stringify({ token }) });
    if (answer.ok) {
      state.signIn.problem = "";
      state.link.state = "connecting";
      connect();
    } else {
      state.signIn.problem = "This token is not the cluster's.";
      await signedOut();
    }
  } catch {
    state.link.state = "lost"; // the watchdog goes on trying
  }
  draw();
}

async function signOut() {
  try {
    const answer = await fetch("/session", { method: "DELETE" });
    if (answer.ok) return location.reload(); // nothing of the cluster stays on the page
    state.said = "You are not signed out: the controller refused it.";
  } catch {
    state.said = "You are not signed out: the controller did not answer.";
  }
  draw();
}

async function signedOut() {
  source?.close();
  state.link.state = "signed-out";
  try {
    state.signIn.provider = (await (await fetch("/oidc")).json()).provider;
  } catch {
    // A token is still a way in.
  }
  draw();
}

async function askWho() {
  try {
    const answer = await fetch("/session");
    state.who = answer.ok ? await answer.json() : null;
    if (!mayOperate(state.who)) state.asked = null;
  } catch {
    state.who = null; // no button acts until it is known
  }
  draw();
}

function connect() {
  source?.close();
  askWho();
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
  source.addEventListener("status", heard((status) => (state.status = placed(following(state.status, status)))));
  source.addEventListener("difference", heard(takeDifference));
  source.addEventListener("events", heard(takeEvents));
  source.addEventListener("incidents", heard((incidents) => (state.incidents = incidents)));
  source.addEventListener("figures", heard(takeFigures));
  source.addEventListener("history", heard(({ error }) => (state.link.historyError = error)));
}

function takeDifference(difference) {
  const after = applied(state.status, difference);
  if (after) state.status = placed(after);
  else connect(); // something was missed: a new stream begins with the whole
}

function takeEvents(rows) {
  const newest = state.events.length ? state.events[0].id : 0;
  const fresh = rows.filter((row) => row.id > newest).reverse();
  state.events = [...fresh, ...state.events].slice(0, EVENTS_MAX);
}

// A stream begins with all that its controller has; another one may have measured at other moments.
function takeFigures({ columns, rows }) {
  const first = rows[0][0];
  const earlier = state.figures.rows.filter((row) => row[0] < first && row[0] > first - HOUR_S);
  const until = rows[rows.length - 1][0];
  state.figures = { columns, rows: [...earlier, ...rows].filter((row) => row[0] > until - HOUR_S) };
}

async function readDay() {
  try {
    const answer = await fetch(`/admin/v1/figures?seconds=${DAY_S}&rows=${DAY_ROWS}`);
    if (answer.ok) state.day = await answer.json();
    else state.link.historyError = (await answer.json()).error.message;
  } catch {
    // The watchdog says when nobody answers.
  }
  if (state.range === "day") setTimeout(() => state.range === "day" && readDay(), DAY_EVERY_MS);
  draw();
}

async function askQuorum() {
  if (state.link.state === "up" && !document.hidden) {
    try {
      const answer = await fetch("/admin/v1/quorum");
      if (answer.ok) state.quorum = (await answer.json()).checks;
      draw();
    } catch {
      // The watchdog says when nobody answers.
    }
  }
  setTimeout(askQuorum, state.quorum.length ? QUORUM_EVERY_MS : RETRY_MS);
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
    await signedOut();
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
  // Preact leaves what it cannot make part of its own: where the first frame comes late (a tab in the background), the
  // page's first words would stay beside the cluster.
  document.getElementById("root").replaceChildren();
  draw();
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) {
    history.replaceState(null, "", location.pathname); // no secret stays in the address bar or the history
    signIn(token);
  } else {
    connect(); // the cookie may still be good
  }
  setTimeout(watchdog, RETRY_MS);
  askQuorum();
}

start();
