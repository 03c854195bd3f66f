// One row for each failure: its phases as a bar, what was chosen, what it cost, whose streams it touched.

import { h } from "/ui/vendor/preact.js";
import htm from "/ui/vendor/htm.js";
import { clock, seconds } from "/ui/format.js";

const html = htm.bind(h);
const SHOWN = 10;
const PHASES = [
  ["plan", "plan_s"],
  ["connect", "connect_s"],
  ["restore", "restore_s"],
  ["first token", "first_token_s"],
];

export function Incidents({ incidents, error }) {
  const newest = (incidents || []).slice(-SHOWN).reverse();
  return html`
    <section aria-label="Incidents">
      <h2>Incidents</h2>
      ${error && html`<p class="problem" role="alert">${error}. What happens is still acted on, but not shown here.</p>`}
      ${incidents && !newest.length && !error && html`<p class="quiet">No failure in the history.</p>`}
      ${newest.length > 0 &&
      html`<ul class="legend phases-legend" aria-label="Phases">
          ${["detect", ...PHASES.map(([name]) => name)].map((name) => html`<li><i class=${phaseClass(name)}></i>${name}</li>`)}
        </ul>
        <ol class="incidents">${newest.map((item) => html`<${Incident} key=${item.id} incident=${item} />`)}</ol>`}
      ${incidents && incidents.length > SHOWN &&
      html`<p class="quiet">Older ones: <code>kfadmin incidents --limit ${incidents.length}</code></p>`}
    </section>`;
}

// The phases of one pipeline's recovery that are known, in order: [name, seconds].
export function phasesOf(incident, one) {
  return [["detect", incident.detect_s], ...PHASES.map(([name, key]) => [name, one[key]])].filter(
    ([, value]) => typeof value === "number",
  );
}

// "over", "under way" or "down", and in words.
export function outcome(incident) {
  if (!incident.affected.length) return { level: "over", words: "it served nothing" };
  const open = incident.affected.filter((one) => !one.ended_unix_s);
  if (open.some((one) => one.down)) return { level: "down", words: "no node is left for a stage" };
  if (open.length) return { level: "open", words: `recovering ${open.map((one) => one.pipeline).join(", ")}` };
  const last = Math.max(...incident.affected.map((one) => one.ended_unix_s));
  return { level: "over", words: `serves again after ${seconds(last - incident.began_unix_s)}` };
}

function Incident({ incident }) {
  const { level, words } = outcome(incident);
  const streams = incident.affected.reduce((sum, one) => sum + one.streams, 0);
  return html`
    <li class=${`incident ${level}`}>
      <div class="what">
        <time datetime=${new Date(incident.began_unix_s * 1000).toISOString()}>${clock(incident.began_unix_s)}</time>
        ${" "}<b>${incident.node} failed</b> <span class=${`tag ${level}`}>${words}</span>
        ${incident.affected.length > 0 &&
        html` <span class="quiet">${streams} ${streams === 1 ? "stream" : "streams"} touched${level === "open" ? " so far" : ""}</span>`}
        <p class="quiet cause">${incident.cause}</p>
      </div>
      ${incident.affected.map((one) => html`<${Recovery} key=${one.pipeline} incident=${incident} one=${one} />`)}
    </li>`;
}

function Recovery({ incident, one }) {
  const phases = phasesOf(incident, one);
  const total = phases.reduce((sum, [, value]) => sum + value, 0);
  const words = phases.map(([name, value]) => `${name} ${seconds(value)}`).join(", ");
  const recomputed = one.ended_unix_s ? `, ${one.tokens_recomputed} tokens computed again` : "";
  return html`
    <div class="recovery">
      <p><b>${one.pipeline}</b> ${one.chosen} <span class="quiet">epoch ${one.epoch}${recomputed}</span></p>
      <div class=${`phases${one.ended_unix_s ? "" : " open"}`} role="img" aria-label=${`${words}${one.ended_unix_s ? `; in all ${seconds(total)}` : ""}`}>
        ${phases.map(([name, value]) => html`<i class=${phaseClass(name)} key=${name} style=${{ flexGrow: total ? (100 * value) / total : 1 }}></i>`)}
      </div>
      <p class="quiet" aria-hidden="true">${words}</p>
    </div>`;
}

function phaseClass(name) {
  return `phase-${name.replace(" ", "-")}`;
}
