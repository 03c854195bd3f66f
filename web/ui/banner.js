// The verdict in words, and who decides.

import { h } from "/ui/vendor/preact.js";
import htm from "/ui/vendor/htm.js";
import { headline, seconds } from "/ui/format.js";

const html = htm.bind(h);
const FINDINGS_SHOWN = 12; // the worst ones come first

export function Lost({ status, link }) {
  const others = status.controllers.filter((item) => item.id !== status.answered_by);
  return html`
    <div class="lost" role="alert">
      <strong>Connection to controller ${status.answered_by} lost.</strong>
      ${" "}What you see is ${seconds(link.silentS)} old. Trying again ...
      ${others.length > 0 &&
      html`${" "}Another controller:${others.map((item) => html` <a href=${`//${item.admin_address}/`}>${item.id}</a>`)}`}
    </div>`;
}

export function Banner({ status, lost, who, quorum, onSignOut }) {
  const { level, word, some, found } = headline(status);
  return html`
    <header class=${`banner ${lost ? "unknown" : level}`}>
      <div class="verdict" role="status">
        <h1>${lost && html`<small>Last known: </small>`}${word}</h1>
        <p>${some}. Model <b>${status.model}</b>, cluster <b>${status.cluster}</b>, mode <b>${status.mode}</b>.</p>
        ${found.length > 0 &&
        html`<ul class="findings">
          ${found.slice(0, FINDINGS_SHOWN).map((item) => html`<li key=${item.text} class=${item.level}>${item.text}</li>`)}
          ${found.length > FINDINGS_SHOWN && html`<li class="warn">and ${found.length - FINDINGS_SHOWN} more: see the topology below.</li>`}
        </ul>`}
      </div>
      <dl class="facts">
        <${Fact} name="Leader" value=${status.leader || "none"} level=${status.leader ? "" : "warn"} />
        <${Fact} name="Controllers" value=${status.controllers.map((c) => html`<${Candidate} item=${c} me=${status.answered_by} />`)} />
        <${Fact} name="Quorum" ...${quorumOf(status, quorum)} />
        <${Fact} name="Automation" value=${status.paused ? "paused" : "on"} level=${status.paused ? "warn" : ""} />
        <${Fact} name="Topology" value=${`#${status.counter}`} />
        <${Fact} name="Gateways" value=${status.gateways.map((g) => g.id).join(" ") || "none"} level=${status.gateways.length ? "" : "warn"} />
        ${who && html`<${Fact} name="You" value=${html`${`${who.name}, ${who.role}`} <button type="button" onClick=${onSignOut}>Sign out</button>`} />`}
      </dl>
    </header>`;
}

// How many of etcd's members are well. One that is silent right now is newer than the last question to the others.
function quorumOf(status, checks) {
  if (status.etcd_age_s > 3) return { value: `etcd silent for ${seconds(status.etcd_age_s)}`, level: "warn" };
  const members = checks.find((check) => check.name === "etcd");
  if (!members) return { value: "not asked yet" };
  return { value: members.message.split(":")[0], level: members.level === "ok" ? "" : "warn" };
}

function Fact({ name, value, level }) {
  return html`<div class=${level || ""}><dt>${name}</dt><dd>${value}</dd></div>`;
}

function Candidate({ item, me }) {
  const title = `${item.admin_address}, pid ${item.pid}${item.id === me ? ", answers this page" : ""}`;
  return html`<span class=${item.id === me ? "me" : ""} title=${title}>${item.id}${item.leader ? "★" : ""}</span> `;
}
