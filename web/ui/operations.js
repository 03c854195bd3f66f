// Operations: those under way, and the dialog that asks for one: pre-flight, plan, the same as a line of kfadmin.
//
// What somebody is about to ask for is `asked`: {id, kind, node, state, epoch, checks, plan, problem, reason}; its state
// goes from "checking" to "checked" or "refused", and with the click on the button to "sending". To scale it also has
// `instances` (how many are wanted) and `now` (how many there are), and is "choosing" until the two differ.

import { Component, createRef, h } from "/ui/vendor/preact.js";
import htm from "/ui/vendor/htm.js";
import { clock } from "/ui/format.js";

const html = htm.bind(h);
const SHOWN = 8;
const SHOWN_S = 600; // after its end
const INSTANCES_MAX = 4096;
const PATH = "/admin/v1/operations";

// kind -> what the button says, and what it means
const NODE_KINDS = {
  drain: ["Drain", "Moves what it serves, and the copies that it holds, to others; it stays cordoned. No stream ends."],
  cordon: ["Cordon", "It gets no new duty. What it serves stays."],
  undrain: ["Undrain", "Lifts the cordon and gives it its duties back."],
  replace: ["Replace", "A fresh process of it takes its place. No stream ends."],
};
const GROUP_KINDS = {
  pause: ["Pause automation", "Nothing is repaired, moved or handed back until it is resumed. Streams go on."],
  resume: ["Resume automation", "What died meanwhile is repaired; operations go on."],
  scale: ["Scale instances", "Adds instances, or removes the last ones, while all of them serve. No stream ends for it."],
  "transfer-leader": ["Transfer leadership", "The next candidate leads. No stream notices."],
};
const RESTARTS = {
  nodes: ["Restart nodes", "One process after the other; the next one waits until the copies have caught up."],
  controllers: ["Restart controllers", "One after the other; the leader comes last."],
  gateways: ["Restart gateways", "One after the other; their clients go on at another one, or with Last-Event-ID."],
};

export function mayOperate(who) {
  return who?.role === "operator" || who?.role === "admin";
}

// The kinds that a button is shown for.
export function kindsFor(node) {
  return node.cordoned ? ["undrain", "replace"] : ["drain", "cordon", "replace"];
}

// What an operation says on its button and in the dialog's title.
export function verb(kind, node) {
  const [words] = NODE_KINDS[kind] || GROUP_KINDS[kind] || RESTARTS[node] || [kind];
  return NODE_KINDS[kind] ? `${words} ${node}` : words;
}

function meaning({ kind, node }) {
  return (NODE_KINDS[kind] || GROUP_KINDS[kind] || RESTARTS[node] || ["", ""])[1];
}

const QUIET = /^[A-Za-z0-9._-]+$/;
const quoted = (text) => (QUIET.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

// The same as a line of kfadmin.
export function commandLine({ kind, node, instances, cancels, epoch, reason }) {
  if (cancels) return `kfadmin cancel ${cancels}`;
  const why = reason ? ` --reason ${quoted(reason)}` : "";
  const what = node || String(instances ?? "");
  return `kfadmin ${kind}${what ? ` ${quoted(what)}` : ""} --if-epoch ${epoch}${why}`;
}

function fresh(kind, node) {
  const random = [...crypto.getRandomValues(new Uint8Array(4))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return [kind, node, random].filter(Boolean).join("-");
}

async function send(method, path, body) {
  try {
    const answer = await fetch(path, { method, body: body && JSON.stringify(body), signal: AbortSignal.timeout(10_000) });
    const told = await answer.json();
    return told.error ? { problem: told.error.message } : told;
  } catch {
    return { problem: "The controller did not answer. Whether it has begun is seen among the operations." };
  }
}

function request({ id, kind, node, instances, epoch, reason }, dryRun) {
  return { id, kind, node, if_epoch: epoch, ...(instances ? { instances } : {}), ...(dryRun ? { dry_run: true } : {}), ...(reason ? { reason } : {}) };
}

const failed = (checks) => (checks || []).some((check) => check.level === "fail");

export async function* askFor(status, kind, node) {
  const asked = { id: fresh(kind, node), kind, node, epoch: status.counter, state: "checking", checks: [], plan: [], reason: "" };
  if (kind === "scale") {
    const now = status.pipelines.filter((pipeline) => !pipeline.closing).length;
    yield { ...asked, first: true, state: "choosing", instances: now, now };
    return;
  }
  yield { ...asked, first: true };
  yield await checked(asked);
}

async function checked(asked) {
  const { problem, checks = [], plan = [] } = await send("POST", PATH, request(asked, true));
  return { ...asked, state: problem || failed(checks) ? "refused" : "checked", problem, checks, plan };
}

// Another number of instances, as it was typed: each has a pre-flight of its own.
export async function* askInstances(before, typed) {
  const whole = /^[1-9][0-9]*$/.test(typed) && Number(typed) <= INSTANCES_MAX;
  const asked = { ...before, instances: whole ? Number(typed) : typed, problem: "", checks: [], plan: [] };
  const differs = whole && asked.instances !== asked.now;
  yield { ...asked, first: true, state: differs ? "checking" : "choosing" };
  if (differs) yield await checked({ ...asked, first: false });
}

export async function* askCancel(operation) {
  const what = `${operation.kind} ${operation.node}`.trim();
  const plan = ["What has been switched stays switched."];
  yield { first: true, id: fresh("cancel", operation.id), cancels: operation.id, what, state: "checked", checks: [], plan };
}

export async function* confirm(asked) {
  yield { ...asked, state: "sending", first: false };
  if (asked.cancels) {
    const { problem } = await send("DELETE", `${PATH}/${encodeURIComponent(asked.cancels)}`);
    yield problem ? { ...asked, state: "refused", problem } : { id: asked.id, over: true, said: `${asked.what} was cancelled.` };
    return;
  }
  const answer = await send("POST", PATH, request(asked, false));
  if (answer.accepted) yield { id: asked.id, over: true, said: `${verb(asked.kind, asked.node)}: it has begun, as ${asked.id}.` };
  else yield { ...asked, state: "refused", problem: answer.problem, checks: answer.checks || [] };
}

export function Operations({ status, who, actions }) {
  const shown = [...status.operations]
    .sort((a, b) => b.created_unix_s - a.created_unix_s)
    .filter((item) => item.state === "running" || Date.now() / 1000 - item.finished_unix_s < SHOWN_S)
    .slice(0, SHOWN);
  const may = mayOperate(who);
  if (!shown.length && !may) return null;
  const button = (kind, node = "") =>
    html`<button type="button" key=${kind + node} onClick=${() => actions.ask(kind, node)}>${verb(kind, node)}</button>`;
  return html`
    <section aria-label="Operations">
      <h2>Operations</h2>
      ${may &&
      html`<div class="buttons" role="group" aria-label="For the whole cluster">
        ${button(status.paused ? "resume" : "pause")} ${button("scale")} ${status.controllers.length > 1 && button("transfer-leader")}
        ${Object.keys(RESTARTS).map((scope) => button("restart", scope))}
      </div>`}
      ${shown.length > 0 &&
      html`<ul class="operations">
        ${shown.map(
          (item) => html`<li key=${item.id}>
            <span class=${`tag ${item.state}`}>${item.state}</span> <b>${item.kind} ${item.node || item.instances || ""}</b>
            ${item.substitute && ` with ${item.substitute}`} <span>${item.message}</span>
            ${item.targets.length > 0 &&
            html` <progress aria-label=${`${item.kind} ${item.node}`} max=${item.targets.length} value=${item.turn} />`}
            <span class="quiet"> ${item.id}, ${clock(item.created_unix_s)}</span>
            ${may && item.state === "running" &&
            html` <button type="button" onClick=${() => actions.askCancel(item)} aria-label=${`Cancel ${item.kind} ${item.node}`}>Cancel</button>`}
          </li>`,
        )}
      </ul>`}
    </section>`;
}

// A modal dialog: the browser keeps the focus in it, and closes it on Escape.
export class Asked extends Component {
  box = createRef();

  componentDidMount() {
    this.before = document.activeElement;
    this.box.current.showModal();
  }

  componentWillUnmount() {
    this.before?.focus?.();
  }

  render() {
    const { asked, actions } = this.props;
    const title = asked.cancels ? `Cancel ${asked.what}` : verb(asked.kind, asked.node);
    const ready = asked.state === "checked";
    const submit = (event) => {
      event.preventDefault();
      if (ready) actions.confirm();
    };
    return html`
      <dialog class="asked" ref=${this.box} aria-labelledby="asked-title" onClose=${() => actions.dismiss(asked.id)}>
        <form onSubmit=${submit}>
          <h2 id="asked-title">${title}</h2>
          <p>${meaning(asked)}</p>
          ${asked.now !== undefined &&
          html`<label for="instances">Instances (there are ${asked.now})</label>
            <input id="instances" inputmode="numeric" autocomplete="off" value=${asked.instances} onInput=${(event) => actions.instances(event.target.value.trim())} />`}
          <div role="status">
            ${asked.state === "choosing" && html`<p class="quiet">Choose another number, 1 to ${INSTANCES_MAX}.</p>`}
            ${asked.state === "checking" && html`<p class="quiet">Checking whether it would be safe ...</p>`}
            ${asked.problem && html`<p class="problem">${asked.problem}</p>`}
            ${asked.checks.length > 0 &&
            html`<h3>Pre-flight</h3>
              <ul class="checks">
                ${asked.checks.map((check) => html`<li class=${check.level}><b>${check.level}</b> ${check.name}: ${check.message}</li>`)}
              </ul>`}
            ${asked.state === "refused" && html`<p class="problem"><b>Refused; nothing was changed.</b></p>`}
          </div>
          ${asked.plan.length > 0 && html`<h3>Plan</h3><ol class="plan">${asked.plan.map((step) => html`<li>${step}</li>`)}</ol>`}
          ${ready && !asked.cancels &&
          html`<label for="reason">Reason, for the audit</label>
            <input id="reason" maxlength="500" autocomplete="off" value=${asked.reason} onInput=${(event) => actions.reason(event.target.value)} />`}
          <h3>The same in a terminal</h3>
          <p><code class="command">${commandLine(asked)}</code></p>
          <div class="buttons">
            <button class="main" disabled=${!ready}>${asked.state === "sending" ? "Sending ..." : title}</button>
            <button type="button" onClick=${() => this.box.current.close()}>${asked.cancels ? "Leave it running" : "Do nothing"}</button>
          </div>
        </form>
      </dialog>`;
  }
}
