// Everything that happened, folded away below the incidents that it adds up to.

import { h } from "/ui/vendor/preact.js";
import htm from "/ui/vendor/htm.js";
import { clock, details } from "/ui/format.js";

const html = htm.bind(h);
const drawn = new WeakMap(); // rows that do not change: Preact leaves alone what it is given twice

export function Events({ events }) {
  return html`
    <section aria-label="Events">
      <details class="history">
        <summary><h2>All events <span class="quiet">the newest ${events.length}</span></h2></summary>
        <ol class="events">${events.map(row)}</ol>
      </details>
    </section>`;
}

function row(event) {
  if (!drawn.has(event)) drawn.set(event, html`<${EventRow} key=${event.id} event=${event} />`);
  return drawn.get(event);
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
