// The life of one request, searched by its id: where it waited and ran, every pause with its cause, its end.

import { h } from "/ui/vendor/preact.js";
import htm from "/ui/vendor/htm.js";
import { clock, seconds } from "/ui/format.js";

const html = htm.bind(h);
const PATIENCE_MS = 10_000; // gateways report every two seconds, and answer with that

// What the gateways know of a request: {id, found} or {id, problem}.
export async function askForLife(id) {
  try {
    const answer = await fetch(`/admin/v1/requests?id=${encodeURIComponent(id)}`, { signal: AbortSignal.timeout(PATIENCE_MS) });
    const body = await answer.json();
    if (!answer.ok) return { id, problem: body.error.message };
    return { id, found: body };
  } catch (error) {
    return { id, problem: error.name === "TimeoutError" ? "no answer" : "the controller does not answer" };
  }
}

// `life`: null, or {id, busy, found, problem}.
export function Lives({ life, incidents, onFind }) {
  const submit = (event) => {
    event.preventDefault();
    const id = event.target.elements.id.value.trim();
    if (id) onFind(id);
  };
  return html`
    <section aria-label="One request">
      <h2>One request</h2>
      <form class="find" role="search" aria-label="Find a request" onSubmit=${submit}>
        <label for="request-id">Id, as in its answer</label>
        <input id="request-id" name="id" type="search" maxlength="160" required placeholder="cmpl-..." />
        <button>Find</button>
      </form>
      <div role="status">
        ${life?.busy && html`<p class="quiet">Asking the gateways for ${life.id} ...</p>`}
        ${life?.problem && html`<p class="problem">${life.problem}</p>`}
        ${life?.found && html`<${Found} found=${life.found} incidents=${incidents || []} />`}
      </div>
    </section>`;
}

function Found({ found, incidents }) {
  const silent = found.silent.length > 0 && html`<p class="quiet">No answer from ${found.silent.join(", ")}: there may be more.</p>`;
  if (!found.lives.length) return html`<p>No gateway remembers a request ${found.request}.</p>${silent}`;
  return html`${found.lives.map((life) => html`<${Life} key=${life.gateway + life.began_unix_s} life=${life} incidents=${incidents} />`)}${silent}`;
}

function Life({ life, incidents }) {
  const kind = `${life.kind}${life.stream ? ", a stream" : ""}${life.resumed ? ", resumed" : ""}`;
  return html`
    <div class="life">
      <p><b>${life.request}</b> at ${life.gateway}: ${kind}; key ${life.key || "-"}, ${life.prompt_tokens} tokens of prompt${
        life.lasted_s === null ? "" : `, ${life.tokens} given`
      }</p>
      <ol class="events">
        ${story(life, incidents).map(
          ([at, what, words, level], index) => html`<li key=${index}>
            <time>${at === null ? "" : `+${seconds(at)}`}</time>
            <span class=${`tag ${level}`}>${what}</span>
            <span class="message">${words}</span>
          </li>`,
        )}
      </ol>
      ${life.left_out > 0 && html`<p class="quiet">${life.left_out} more places and pauses were not kept.</p>`}
    </div>`;
}

// [seconds after the beginning, what, words, level], in order.
export function story(life, incidents) {
  const choice = (one) => (life.choices > 1 ? `choice ${one.choice}: ` : "");
  const told = [[0, "admitted", clock(life.began_unix_s), ""]];
  for (const place of life.places)
    told.push([place.at_s, "sent", `${choice(place)}to ${place.pipeline}, the scheduler on ${place.node}, epoch ${place.epoch}`, ""]);
  if (life.first_token_s !== null)
    told.push([life.first_token_s, "first token", `queued there and prefilled for ${seconds(life.first_token_s - (life.sent_s || 0))}`, ""]);
  for (const pause of life.pauses) {
    const incident = incidents.find((item) => item.affected.some((one) => one.pipeline === pause.pipeline && one.epoch === pause.epoch));
    const which = incident ? ` (incident of ${incident.node})` : "";
    told.push([pause.at_s, `pause, ${pause.how}`, `${choice(pause)}${seconds(pause.lasted_s)}: ${pause.cause}${which}`, "open"]);
  }
  told.sort((a, b) => a[0] - b[0]);
  if (life.lasted_s === null) told.push([null, "it runs", "", "over"]);
  else told.push([life.lasted_s, `end, HTTP ${life.status}`, life.end, life.status === 200 ? "over" : "down"]);
  return told;
}
