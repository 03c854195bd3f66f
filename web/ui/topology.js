// Who serves what: a row for each instance (pipeline), a column for each stage, and the node that was chosen.
//
// A thousand nodes are a thousand small cells. A row is drawn again only if it, one of its nodes, or the cursor in it has
// changed, and the browser lays out only rows that are in sight.

import { Component, h } from "/ui/vendor/preact.js";
import htm from "/ui/vendor/htm.js";
import { deadNodes, lagText, seconds, underWay } from "/ui/format.js";
import { kindsFor, mayOperate, verb } from "/ui/operations.js";

const html = htm.bind(h);
const DENSE_FROM = 24; // instances
const IDLE_SHOWN = 200;

// The status with what this page looks up in it by name.
export function placed(status) {
  return { ...status, byName: new Map(status.nodes.map((node) => [node.node, node])) };
}

export function Topology({ status, filter, cursor, selected, who, actions }) {
  const dead = deadNodes(status);
  const rows = status.pipelines.filter((item) => wanted(item, filter, status, dead));
  const stages = Math.max(0, ...status.pipelines.map((item) => item.stages.length));
  const dense = status.pipelines.length >= DENSE_FROM;
  const node = status.byName.get(selected);
  const at = within(cursor, rows.length, stages);
  return html`
    <section aria-label="Topology">
      <div class="heading">
        <h2>Topology</h2>
        <${Filter} filter=${filter} shown=${rows.length} all=${status.pipelines.length} onChange=${actions.filter} />
      </div>
      <${Legend} mode=${status.mode} />
      <div class=${`topology${node ? " with-node" : ""}`}>
        <div class=${`grid${dense ? " dense" : ""}`} role="grid" aria-label="Instances and their stages"
          aria-rowcount=${rows.length + 1} aria-colcount=${stages + 1} style=${{ "--stages": stages }}
          onKeyDown=${(event) => onKey(event, rows.length, stages, actions)}>
          <${Head} stages=${stages} />
          ${rows.map(
            (item, index) => html`<${Row} key=${item.id} pipeline=${item} index=${index} mode=${status.mode}
              nodes=${nodesOf(item, status)} column=${index === at.row ? at.column : -1}
              selected=${nodesOf(item, status).includes(node) ? selected : ""} actions=${actions} />`,
          )}
          ${!rows.length && html`<div role="row"><p class="quiet" role="gridcell">Nothing matches.</p></div>`}
        </div>
        ${node && html`<${Node} node=${node} status=${status} who=${who} actions=${actions} />`}
      </div>
      <${Idle} nodes=${status.nodes} selected=${selected} filter=${filter} actions=${actions} />
    </section>`;
}

// Of each stage the node that is drawn: who serves it, or its home.
function nodesOf(pipeline, status) {
  return pipeline.stages.map((stage) => status.byName.get(stage.serving[0]?.node ?? stage.homes[0]));
}

function wanted(pipeline, { text, unwell }, status, dead) {
  const nodes = nodesOf(pipeline, status);
  if (unwell && isWell(pipeline, nodes, status.mode, dead)) return false;
  if (!text) return true;
  const names = pipeline.stages.flatMap((stage) => [...stage.homes, ...[...stage.serving, ...stage.replicas].map((m) => m.node)]);
  return [pipeline.id, ...names].some((name) => name.includes(text));
}

function isWell(pipeline, nodes, mode, dead) {
  const bare = mode === "replicate" && pipeline.stages.some((stage) => !stage.replicas.length);
  return pipeline.state === "up" && !bare && nodes.every((node) => node?.state === "green" && !node.cordoned && !dead.has(node.node));
}

function Filter({ filter, shown, all, onChange }) {
  return html`
    <div class="filter" role="search">
      <label for="find">Find</label>
      <input id="find" type="search" placeholder="n2 or p0" value=${filter.text} onInput=${(event) => onChange({ text: event.target.value.trim() })} />
      <label><input type="checkbox" checked=${filter.unwell} onChange=${(event) => onChange({ unwell: event.target.checked })} /> only what is not well</label>
      <span class="quiet" role="status">${shown < all ? `${shown} of ${all} instances` : ""}</span>
    </div>`;
}

function Legend({ mode }) {
  return html`<p class="legend">
    KV blocks: <i class="own"></i> of requests <i class="replica"></i> copies <i class="free"></i> free.
    ${mode === "replicate" && " ⇢ where the copy of a stage's KV is, and how many tokens it is behind."}
  </p>`;
}

const KEYS = {
  ArrowUp: (at) => ({ ...at, row: at.row - 1 }),
  ArrowDown: (at) => ({ ...at, row: at.row + 1 }),
  ArrowLeft: (at) => ({ ...at, column: at.column - 1 }),
  ArrowRight: (at) => ({ ...at, column: at.column + 1 }),
  PageUp: (at) => ({ ...at, row: at.row - 10 }),
  PageDown: (at) => ({ ...at, row: at.row + 10 }),
  Home: (at) => ({ ...at, column: 0 }),
  End: (at) => ({ ...at, column: Infinity }),
};

function within({ row, column }, rows, stages) {
  const clamped = (value, count) => Math.max(0, Math.min(value, count - 1));
  return { row: clamped(row, rows), column: clamped(column, stages) };
}

function onKey(event, rows, stages, actions) {
  if (event.key === "Escape") return actions.leaveNode();
  const key = KEYS[event.key];
  if (!key) return;
  event.preventDefault();
  actions.moveCursor((at) => within(key(within(at, rows, stages)), rows, stages));
}

class Head extends Component {
  shouldComponentUpdate(next) {
    return next.stages !== this.props.stages;
  }

  render() {
    const columns = ["instance", ...Array.from({ length: this.props.stages }, (_, index) => `stage ${index}`)];
    return html`<div class="row head" role="row" aria-rowindex="1">
      ${columns.map((words) => html`<span role="columnheader" key=${words}>${words}</span>`)}
    </div>`;
  }
}

class Row extends Component {
  shouldComponentUpdate(next) {
    const { pipeline, nodes, index, mode, column, selected } = this.props;
    return (
      next.pipeline !== pipeline || next.index !== index || next.mode !== mode || next.column !== column ||
      next.selected !== selected || next.nodes.some((node, at) => node !== nodes[at])
    );
  }

  render() {
    const { pipeline, index, mode, nodes, column, selected, actions } = this.props;
    return html`
      <div class=${`row ${pipeline.state}`} role="row" aria-rowindex=${index + 2}>
        <div class="instance" role="rowheader">
          <b>${pipeline.id}</b> <span class=${`tag ${pipeline.state}`}>${pipeline.state}</span>
          <span class="quiet">epoch ${pipeline.epoch}, ${pipeline.running} running, ${pipeline.waiting} waiting</span>
        </div>
        ${pipeline.stages.map(
          (stage, at) => html`<${Cell} key=${at} place=${`${pipeline.id} stage ${at}`} stage=${stage} node=${nodes[at]} mode=${mode}
            move=${pipeline.move?.stage === at ? pipeline.move : null} focused=${at === column}
            selected=${Boolean(selected) && nodes[at]?.node === selected}
            onChoose=${() => {
              actions.moveCursor(() => ({ row: index, column: at }));
              if (nodes[at]) actions.select(nodes[at].node);
            }} />`,
        )}
      </div>`;
  }
}

function Cell({ place, stage, node, mode, move, focused, selected, onChoose }) {
  const down = !stage.serving.length || ["red", "absent"].includes(node?.state); // while paused the dead stay named
  const bare = mode === "replicate" && !down && !stage.replicas.length;
  const kind = down ? "down" : stage.borrowed ? "borrowed" : node?.state === "yellow" ? "suspect" : "home";
  const who = down ? "down" : stage.serving.map((member) => member.node).join(" ");
  const home = `home is ${stage.homes.join(" ")}`;
  const words = [
    `${place}: ${who}`,
    stage.borrowed ? `borrowed, ${home}` : down ? home : "",
    node?.state === "yellow" ? "suspected" : "",
    node?.cordoned ? "cordoned" : "",
    move ? `${move.phase} to ${move.to.node}` : "",
    down ? "" : lagText(stage, mode),
  ];
  const said = words.filter(Boolean).join(", ");
  const choose = (event) => {
    if (event.type === "click" || event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onChoose();
    }
  };
  return html`
    <div class=${`stage ${kind}${move ? " is-moving" : ""}`} role="gridcell" tabindex=${focused ? 0 : -1} aria-selected=${selected}
      title=${said} onClick=${choose} onKeyDown=${choose}>
      <span class="unseen">${said}</span>
      <span aria-hidden="true" class="who">${who}${node?.cordoned && !down ? html`<small> cordoned</small>` : ""}</span>
      ${stage.borrowed && html`<span aria-hidden="true" class="note">borrowed; ${home}</span>`}
      ${down && html`<span aria-hidden="true" class="note">${home}</span>`}
      ${move && html`<span aria-hidden="true" class="note going">${move.phase} to ${move.to.node}</span>`}
      ${!down && mode === "replicate" && html`<span aria-hidden="true" class=${bare ? "note" : "copies"}>${copies(stage)}</span>`}
      ${node && !down && html`<${Blocks} node=${node} />`}
    </div>`;
}

function copies(stage) {
  if (!stage.replicas.length) return "no copy";
  const lag = stage.lag_tokens < 0 ? "?" : stage.lag_tokens ? `−${stage.lag_tokens}` : "✓";
  return `⇢ ${stage.replicas.map((member) => member.node).join(" ")} ${lag}`;
}

function parts(node) {
  const total = Math.max(node.blocks_total, 1);
  const own = Math.min(node.blocks_used, total);
  return { own, replica: Math.min(node.blocks_replica, total - own), total };
}

function Blocks({ node }) {
  const { own, replica, total } = parts(node);
  const width = (blocks) => ({ width: `${(100 * blocks) / total}%` });
  return html`<span class="bar" aria-hidden="true"><i class="own" style=${width(own)}></i><i class="replica" style=${width(replica)}></i></span>`;
}

function Node({ node, status, who, actions }) {
  const { own, replica, total } = parts(node);
  const gone = ["red", "absent"].includes(node.state);
  const doing = underWay(node, status.operations);
  const facts = [
    ["Serves", node.serving.join(", ") || "nothing"],
    ["Stage", node.stage < 0 ? "unknown" : node.stage],
    ["KV blocks", `${own} of requests, ${replica} of copies, ${total - own - replica} free of ${total}`],
    ["Heard", gone ? "not any more" : node.silent_s < 1 ? "just now" : `${seconds(node.silent_s)} ago`],
    ["Slowness", node.slowness ? `${node.slowness.toFixed(2)} (slow from 1 on)` : "none"],
    ...(node.counters?.ranks_lost ? [["Ranks lost", `${node.counters.ranks_lost} since its start`]] : []),
    ["Process", node.pid ? `pid ${node.pid}, ${node.version || "unknown version"}` : "none"],
    ["Where", Object.entries(node.fault_domain).map(([name, value]) => `${name} ${value}`).join(", ") || node.rpc_address || "unknown"],
  ];
  const onKeyDown = (event) => event.key === "Escape" && actions.leaveNode();
  return html`
    <section class=${`node ${node.state}`} aria-label=${`Node ${node.node}`} onKeyDown=${onKeyDown}>
      <header>
        <h3>${node.node}</h3>
        <span class=${`tag ${node.state}`}>${node.state === "red" ? "dead" : node.state}</span>
        ${node.cordoned && html`<span class="tag cordoned">cordoned</span>`}
        ${doing && html`<span class="tag running">${doing}</span>`}
        <button type="button" class="close" aria-label=${`Close ${node.node}`} onClick=${actions.leaveNode}>✕</button>
      </header>
      ${node.evidence && html`<p class="evidence">${node.evidence}</p>`}
      ${node.troubles.map((text) => html`<p class="evidence" key=${text}>${text}</p>`)}
      <dl>${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
      ${mayOperate(who) &&
      html`<div class="buttons" role="group" aria-label=${`Operations on ${node.node}`}>
        ${kindsFor(node).map(
          (kind) => html`<button type="button" key=${kind} onClick=${() => actions.ask(kind, node.node)}>${verb(kind, node.node)}</button>`,
        )}
      </div>`}
    </section>`;
}

// Spares, and the dead whose places others serve.
function Idle({ nodes, selected, filter, actions }) {
  const idle = nodes.filter((node) => !node.serving.length && (!filter.text || node.node.includes(filter.text)));
  if (!idle.length) return null;
  return html`
    <div class="idle">
      <h3 id="idle">Nodes that serve nothing</h3>
      <ul aria-labelledby="idle">
        ${idle.slice(0, IDLE_SHOWN).map(
          (node) => html`<li key=${node.node}>
            <button type="button" class=${`chip ${node.state}`} aria-pressed=${node.node === selected} onClick=${() => actions.select(node.node)}>
              ${node.node} <small>${node.state === "red" ? "dead" : node.state}${node.cordoned ? ", cordoned" : ""}</small>
            </button>
          </li>`,
        )}
      </ul>
      ${idle.length > IDLE_SHOWN && html`<p class="quiet">and ${idle.length - IDLE_SHOWN} more</p>`}
    </div>`;
}
