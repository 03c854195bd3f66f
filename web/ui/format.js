// Pure functions from the cluster's status to words. Nothing here touches the page.

export function seconds(value) {
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 99.5) return `${value.toFixed(1)} s`;
  if (value < 5940) return `${Math.round(value / 60)} min`;
  return `${Math.round(value / 3600)} h`;
}

export function clock(unixS) {
  const date = new Date(unixS * 1000);
  const sameDay = date.toDateString() === new Date().toDateString();
  const time = date.toLocaleTimeString([], { hour12: false });
  return sameDay ? time : `${date.toLocaleDateString()} ${time}`;
}

// "silent_s: 0.21" -> "silent 210 ms"; what the message says already, and points in time, are left out.
export function details(event) {
  return Object.entries(event.details)
    .filter(([key, value]) => !key.endsWith("unix_s") && !(typeof value === "string" && event.message.includes(value)))
    .map(([key, value]) => {
      const isDuration = key.endsWith("_s") && typeof value === "number";
      const label = key.replace(/_s$/, "").replaceAll("_", " ");
      return { label, value: isDuration ? seconds(value) : String(value), isDuration };
    });
}

export function lagText(stage, mode) {
  if (!stage.serving.length) return "nobody serves";
  if (mode !== "replicate") return "no replicas in this mode";
  if (!stage.replicas.length) return "unprotected";
  const targets = stage.replicas.map((member) => member.node).join(", ");
  if (stage.lag_tokens < 0) return `replica ${targets}, lag unknown`;
  return `replica ${targets}, ${stage.lag_tokens ? `${stage.lag_tokens} tokens behind` : "up to date"}`;
}

const ORDER = { ok: 0, warn: 1, bad: 2 };

// Everything that is not as it should be, the worst first: what somebody who was woken reads first.
export function findings(status) {
  const found = [];
  const add = (level, text) => found.push({ level, text });
  if (!status.available) add("bad", "No pipeline serves: requests wait, then fail.");
  const dead = deadNodes(status);
  for (const pipeline of status.pipelines) {
    const empty = pipeline.stages.flatMap((stage, index) => (stage.serving.some((m) => !dead.has(m.node)) ? [] : [index]));
    if (pipeline.state === "down") add("bad", `${pipeline.id} is down: ${pipeline.stages.length ? `nobody serves stage ${empty.join(", ")}` : "it has no stages"}.`);
    if (pipeline.state === "forming") add("warn", `${pipeline.id} is forming: it waits for stage ${empty.join(", ")}.`);
    pipeline.stages.forEach((stage, index) => {
      if (stage.borrowed)
        add("warn", `${pipeline.id} stage ${index} is served by borrowed ${stage.serving.map((m) => m.node).join(", ")}.`);
      else if (status.mode === "replicate" && stage.serving.length && !stage.replicas.length)
        add("warn", `${pipeline.id} stage ${index} is unprotected: no replica.`);
    });
    if (pipeline.closing) add("warn", `${pipeline.id} takes no new request, and goes when its streams have ended.`);
    if (pipeline.move) {
      const { stage, to, phase, reason } = pipeline.move;
      add("warn", `${pipeline.id} moves stage ${stage} to ${to.node} (${phase}; ${reason}).`);
    }
  }
  for (const node of status.nodes) {
    const why = node.evidence ? `: ${node.evidence}` : "";
    if (node.state === "red") add("bad", `${node.node} is dead${why}.`);
    if (node.state === "absent") add("warn", `${node.node} is not there${why}.`);
    if (node.state === "yellow") add("warn", `${node.node} is suspected${why}.`);
    if (node.cordoned) add("warn", `${node.node} is cordoned.`);
    if (node.leaving) add("warn", `${node.node} is to end: what it serves moves away.`);
  }
  if (!status.leader) add("warn", "No controller leads: streams go on, but nothing is repaired.");
  if (status.etcd_age_s > 3)
    add("warn", `etcd has been silent for ${seconds(status.etcd_age_s)}: streams go on, nothing is changed.`);
  for (const text of [...mixtures(status), ...status.blemishes, ...status.troubles]) add("warn", text);
  if (status.paused) add("bad", "Automation is paused: nothing is repaired or moved until it is resumed.");
  return found.sort((a, b) => ORDER[b.level] - ORDER[a.level]);
}

const NAMED_MAX = 8; // names in one line

// What processes differ in that ought to be equal: their code, their settings, and the numerics of one stage's nodes.
export function mixtures(status) {
  const alive = status.nodes.filter((node) => node.pid && node.state !== "red");
  const named = (items, name) => items.map((item) => [item[name], item]);
  const every = [...named(alive, "node"), ...named(status.controllers, "id"), ...named(status.gateways, "id")];
  const told = [];
  for (const [what, key] of [["Versions", "version"], ["Settings", "settings"]]) {
    const groups = grouped(every, key);
    if (groups.length > 1) told.push(`${what} are mixed: ${whoHasWhat(groups)}.`);
  }
  for (const stage of [...new Set(alive.map((node) => node.stage))].sort((a, b) => a - b)) {
    const groups = grouped(named(alive.filter((node) => node.stage === stage), "node"), "numerics");
    if (groups.length > 1)
      told.push(`Numerics are mixed in stage ${stage}: ${whoHasWhat(groups)}. KV is copied only between equal ones.`);
  }
  return told;
}

// [value, names], the most frequent first; who does not tell is left out.
function grouped(named, key) {
  const groups = new Map();
  for (const [name, item] of named) {
    if (item[key]) groups.set(item[key], [...(groups.get(item[key]) || []), name]);
  }
  return [...groups].sort((a, b) => b[1].length - a[1].length);
}

function whoHasWhat(groups) {
  const some = (names) =>
    names.slice(0, NAMED_MAX).join(", ") + (names.length > NAMED_MAX ? ` and ${names.length - NAMED_MAX} more` : "");
  return groups.map(([value, names]) => `${value} in ${some(names)}`).join("; ");
}

export function deadNodes(status) {
  return new Set(status.nodes.filter((node) => ["red", "absent"].includes(node.state)).map((node) => node.node));
}

// What an operation that is under way does to one node, or "".
export function underWay(node, operations) {
  const mine = (item) => (item.kind === "restart" ? item.targets[item.turn]?.member.node : item.node) === node.node;
  return operations.find((item) => item.state === "running" && mine(item))?.kind || "";
}

// The status after a difference, with the same objects where nothing changed; null: it is not the next one.
export function applied(status, difference) {
  if (!status || status.version !== difference.from) return null;
  const nodes = new Map(difference.nodes.map((node) => [node.node, node]));
  const pipelines = new Map(difference.pipelines.map((pipeline) => [pipeline.id, pipeline]));
  return {
    ...status,
    ...difference.fields,
    version: difference.to,
    nodes: nodes.size ? status.nodes.map((node) => nodes.get(node.node) || node) : status.nodes,
    pipelines: pipelines.size ? status.pipelines.map((item) => pipelines.get(item.id) || item) : status.pipelines,
  };
}

// A whole status that follows another one (who reads slowly gets the whole again), with the same objects where nothing
// changed: only what has changed is drawn again.
export function following(before, after) {
  if (!before) return after;
  const same = (name, key) => {
    const known = new Map(before[name].map((item) => [item[key], item]));
    return after[name].map((item) => {
      const last = known.get(item[key]);
      return last && JSON.stringify(last) === JSON.stringify(item) ? last : item;
    });
  };
  return { ...after, nodes: same("nodes", "node"), pipelines: same("pipelines", "id") };
}

export function headline(status) {
  const found = findings(status);
  const serving = status.pipelines.filter((pipeline) => !["down", "forming"].includes(pipeline.state)).length;
  const some = `${serving} of ${status.pipelines.length} pipelines serve`;
  if (!status.available) return { level: "bad", word: "Unavailable", some, found };
  if (serving < status.pipelines.length) return { level: "bad", word: "Serving, reduced", some, found };
  if (found.length) return { level: "warn", word: "Serving, degraded", some, found };
  return { level: "ok", word: "All is well", some, found };
}
