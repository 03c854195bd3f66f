// The page as a function of what is known. No state lives here.

import { h } from "/ui/vendor/preact.js";
import htm from "/ui/vendor/htm.js";
import { Banner, Lost } from "/ui/banner.js";
import { Charts } from "/ui/charts.js";
import { Events } from "/ui/events.js";
import { Incidents } from "/ui/incidents.js";
import { Lives } from "/ui/lives.js";
import { Asked, mayOperate, Operations } from "/ui/operations.js";
import { Topology } from "/ui/topology.js";

const html = htm.bind(h);

export function Page(known) {
  const { status, link, signIn, actions } = known;
  if (link.state === "signed-out") return html`<${SignIn} ...${signIn} onToken=${actions.signIn} />`;
  if (!status)
    return html`<main><p class="waiting" role="status">
      ${link.state === "lost" ? "The controller does not answer. Trying again ..." : "Connecting to the controller ..."}
    </p></main>`;
  const lost = link.state === "lost";
  return html`
    <div class=${lost ? "stale" : ""}>
      ${lost && html`<${Lost} status=${status} link=${link} />`}
      <${Banner} status=${status} lost=${lost} who=${known.who} quorum=${known.quorum} onSignOut=${actions.signOut} />
      <main>
        <p class="unseen" role="status" aria-live="polite">${known.said}</p>
        <${Incidents} incidents=${known.incidents} error=${link.historyError} />
        <${Topology} ...${known} />
        <${Charts} hour=${known.figures} day=${known.day} range=${known.range} incidents=${known.incidents} onRange=${actions.range} />
        <${Operations} status=${status} who=${known.who} actions=${actions} />
        ${mayOperate(known.who) && html`<${Lives} life=${known.life} incidents=${known.incidents} onFind=${actions.findLife} />`}
        <${Events} events=${known.events} />
      </main>
      ${known.asked && html`<${Asked} key=${known.asked.id} asked=${known.asked} status=${status} actions=${actions} />`}
    </div>`;
}

function SignIn({ problem, provider, onToken }) {
  const submit = (event) => {
    event.preventDefault();
    onToken(event.target.elements.token.value.trim());
  };
  return html`
    <main>
      <form class="signin" onSubmit=${submit}>
        <h1>KevlarFlow</h1>
        ${provider && html`<a class="button" href="/oidc/login">Sign in with ${provider}</a>`}
        <label for="token">Admin token</label>
        <input id="token" name="token" type="password" autocomplete="off" required autofocus />
        <button>Open the dashboard</button>
        ${problem && html`<p class="problem" role="alert">${problem}</p>`}
        <p class="hint">"kfadmin up" prints an address that carries the token.</p>
      </form>
    </main>`;
}
