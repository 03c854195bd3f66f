// The page as functions of what is known. No state lives here.

import { h } from "/ui/vendor/preact.js";
import htm from "/ui/vendor/htm.js";
import { clock, deadNodes, details, headline, lagText, seconds, underWay } from "/ui/format.js";

const html = htm.bind(h);

export function Page({ status, events, link, signIn }) {
  if (link.state === "signed-out") return html`<${SignIn} ...${signIn} />`;
  if (!status)
    return html`<p class="waiting" role="status">
      ${link.state === "lost" ? "The controller does not answer. Trying again ..." : "Connecting to the controller ..."}
    </p>`;
  const dead = deadNodes(status);
  return html`
    <div class=${link.state === "lost" ? "stale" : ""}>
      ${link.state === "lost" && html`<${Lost} status=${status} link=${link} />`}
      <${Banner} status=${status} lost=${link.state === "lost"} />
      <main>
        <section aria-label="Pipelines">
          <h2>Pipelines</h2>
          ${status.pipelines.map((item) => drawPipeline(item, status.mode, dead))}
        </section>
        <${Operations} operations=${status.operations} />
        <section aria-label="Nodes">
          <h2>Nodes</h2>
          <${Legend} />
          <div class="nodes">${status.nodes.map((item) => drawNode(item, underWay(item, status.operations)))}</div>
        </section>
        <${Events} events=${events} error=${link.historyError} />
      </main>
    </div>`;
}

// What did not change is not drawn again: Preact leaves alone what it is given twice.
const drawn = new WeakMap();

// The view of `item`, made anew if it or `beside`, whatever else is shown with it, is another one.
function unlessDrawn(item, beside, make) {
  const last = drawn.get(item);
  if (last && last.beside === beside) return last.view;
  const view = make();
  drawn.set(item, { beside, view });
  return view;
}

function drawNode(node, doing) {
  return unlessDrawn(node, doing, () => html`<${Node} key=${node.node} node=${node} doing=${doing} />`);
}

function drawPipeline(pipeline, mode, dead) {
  const named = pipeline.stages.flatMap((stage) => stage.serving.map((member) => member.node));
  const beside = [mode, ...named.filter((node) => dead.has(node))].join(" ");
  return unlessDrawn(
    pipeline,
    beside,
    () => html`<${Pipeline} key=${pipeline.id} pipeline=${pipeline} mode=${mode} dead=${dead} />`,
  );
}

function SignIn({ problem, onToken }) {
  const submit = (event) => {
    event.preventDefault();
    onToken(event.target.elements.token.value.trim());
  };
  return html`
    <form class="signin" onSubmit=${submit}>
      <h1>KevlarFlow</h1>
      <label for="token">Admin token</label>
      <input id="token" name="token" type="password" autocomplete="off" required autofocus />
      <button>Open the dashboard</button>
      ${problem && html`<p class="problem" role="alert">${problem}</p>`}
      <p class="hint">"kfadmin up" prints an address that carries the token.</p>
    </form>`;
}

function Lost({ status, link }) {
  const others = status.controllers.filter((item) => item.id !== status.answered_by);
  return html`
    <div class="lost" role="alert">
      <strong>Connection to controller ${status.answered_by} lost.</strong>
      ${" "}What you see is ${seconds(link.silentS)} old. Trying again ...
      ${others.length > 0 &&
      html`${" "}Another controller:${others.map((item) => html` <a href=${`//${item.admin_address}/`}>${item.id}</a>`)}`}
    </div>`;
}

function Banner({ status, lost }) {
  const { level, word, some, found } = headline(status);
  return html`
    <header class=${`banner ${lost ? "unknown" : level}`}>
      <div class="verdict" role="status">
        <h1>${lost && html`<small>Last known: </small>`}${word}</h1>
        <p>${some}. Model <b>${status.model}</b>, cluster <b>${status.cluster}</b>, mode <b>${status.mode}</b>.</p>
        ${found.length > 0 &&
        html`<ul class="findings">${found.map((item) => html`<li key=${item.text} class=${item.level}>${item.text}</li>`)}</ul>`}
      </div>
      <dl class="facts">
        <${Fact} name="Leader" value=${status.leader || "none"} level=${status.leader ? "" : "warn"} />
        <${Fact} name="Controllers" value=${status.controllers.map((c) => html`<${Candidate} item=${c} me=${status.answered_by} />`)} />
        <${Fact} name="Automation" value=${status.paused ? "paused" : "on"} level=${status.paused ? "warn" : ""} />
        <${Fact} name="Topology" value=${`#${status.counter}`} />
        <${Fact} name="etcd heard" value=${`${seconds(status.etcd_age_s)} ago`} level=${status.etcd_age_s > 3 ? "warn" : ""} />
        <${Fact} name="Gateways" value=${status.gateways.map((g) => g.id).join(" ") || "none"} level=${status.gateways.length ? "" : "warn"} />
      </dl>
    </header>`;
}

function Fact({ name, value, level }) {
  return html`<div class=${level || ""}><dt>${name}</dt><dd>${value}</dd></div>`;
}

function Candidate({ item, me }) {
  const title = `${item.admin_address}, pid ${item.pid}${item.id === me ? ", answers this page" : ""}`;
  return html`<span class=${item.id === me ? "me" : ""} title=${title}>${item.id}${item.leader ? "★" : ""}</span> `;
}

function Pipeline({ pipeline, mode, dead }) {
  const { move } = pipeline;
  return html`
    <article class=${`pipeline ${pipeline.state}`}>
      <header>
        <h3>${pipeline.id}</h3>
        <span class=${`tag ${pipeline.state}`}>${pipeline.state}</span>
        <span class="quiet">epoch ${pipeline.epoch}</span>
        <span class="quiet">${pipeline.running} running</span>
        <span class="quiet">${pipeline.waiting} waiting</span>
        ${move && html`<span class="tag moving">stage ${move.stage} to ${move.to.node}: ${move.phase}</span>`}
      </header>
      <ol class="stages">
        ${pipeline.stages.map((stage, index) => html`<${Stage} key=${index} index=${index} stage=${stage} move=${move} mode=${mode} dead=${dead} />`)}
      </ol>
    </article>`;
}

function Stage({ index, stage, move, mode, dead }) {
  const down = stage.serving.every((member) => dead.has(member.node)); // while paused the dead stay named
  const moving = move && move.stage === index;
  const bare = mode === "replicate" && !down && stage.replicas.length === 0;
  const kind = down ? "down" : stage.borrowed ? "borrowed" : "home";
  return html`
    <li class=${`stage ${kind}${moving ? " is-moving" : ""}`}>
      <span class="where">stage ${index}${index === 0 ? ", scheduler" : ""}</span>
      <span class="who">${down ? "down" : stage.serving.map((member) => member.node).join(" ")}</span>
      ${stage.borrowed && html`<span class="note">borrowed; home is ${stage.homes.join(" ")}</span>`}
      ${down && html`<span class="note">home is ${stage.homes.join(" ")}</span>`}
      ${moving && html`<span class="note going">${move.phase} to ${move.to.node}</span>`}
      ${!down && html`<span class=${bare ? "note" : "replica"}>${lagText(stage, mode)}</span>`}
    </li>`;
}

function Operations({ operations }) {
  const shown = [...operations]
    .sort((a, b) => b.created_unix_s - a.created_unix_s)
    .filter((item) => item.state === "running" || Date.now() / 1000 - item.finished_unix_s < 600)
    .slice(0, 8);
  if (!shown.length) return null;
  return html`
    <section aria-label="Operations">
      <h2>Operations</h2>
      <ul class="operations">
        ${shown.map(
          (item) => html`<li key=${item.id}>
            <span class=${`tag ${item.state}`}>${item.state}</span> <b>${item.kind} ${item.node}</b>
            ${item.substitute && ` with ${item.substitute}`} <span>${item.message}</span>
            ${item.targets.length > 0 && html` <progress max=${item.targets.length} value=${item.turn} />`}
            <span class="quiet"> ${item.id}, ${clock(item.created_unix_s)}</span>
          </li>`,
        )}
      </ul>
    </section>`;
}

function Legend() {
  return html`<p class="legend">KV blocks: <i class="own"></i> own <i class="replica"></i> replicas <i class="free"></i> free</p>`;
}

function Node({ node, doing }) {
  const total = Math.max(node.blocks_total, 1);
  const own = Math.min(node.blocks_used, total);
  const replica = Math.min(node.blocks_replica, total - own);
  const width = (blocks) => ({ width: `${(100 * blocks) / total}%` });
  const bar = `${own} own, ${replica} replicas, ${node.blocks_total - own - replica} free of ${node.blocks_total} blocks`;
  const gone = node.state === "red" || node.state === "absent";
  return html`
    <article class=${`node ${node.state}`}>
      <header>
        <h3>${node.node}</h3>
        <span class=${`tag ${node.state}`}>${node.state === "red" ? "dead" : node.state}</span>
        ${node.cordoned && html`<span class="tag cordoned">cordoned</span>`}
        ${doing && html`<span class="tag running">${doing}</span>`}
        <span class="quiet">stage ${node.stage < 0 ? "?" : node.stage}</span>
      </header>
      ${!gone && html`<div class="bar" role="img" aria-label=${bar} title=${bar}>
        <i class="own" style=${width(own)}></i><i class="replica" style=${width(replica)}></i>
      </div>`}
      <p>${node.serving.length ? html`serves <b>${node.serving.join(" ")}</b>` : "serves nothing"}</p>
      ${node.evidence && html`<p class="evidence">${node.evidence}</p>`}
      ${!gone && html`<p class="quiet">pid ${node.pid}, heard ${node.silent_s < 1 ? "just now" : `${seconds(node.silent_s)} ago`}</p>`}
    </article>`;
}

function Events({ events, error }) {
  return html`
    <section aria-label="Events">
      <h2>Events</h2>
      ${error && html`<p class="problem" role="alert">${error}. What happens is still acted on, but not shown here.</p>`}
      ${events.length === 0 && !error && html`<p class="quiet">Nothing has happened yet.</p>`}
      <ol class="events">${events.map((event) => unlessDrawn(event, "", () => html`<${EventRow} key=${event.id} event=${event} />`))}</ol>
    </section>`;
}

function EventRow({ event }) {
  const facts = details(event);
  return html`
    <li class=${event.kind}>
      <time datetime=${new Date(event.unix_s * 1000).toISOString()}>${clock(event.unix_s)}</time>
      <span class=${`tag kind-${event.kind}`}>${event.kind}</span>
      <b>${event.subject}</b>
      <span class="message">${event.message}</span>
      ${facts.length > 0 &&
      html`<span class="details">${facts.map(
        (fact) => html`<span class=${fact.isDuration ? "duration" : ""} key=${fact.label}>${fact.label} ${fact.value}</span>`,
      )}</span>`}
    </li>`;
}
