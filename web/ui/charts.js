// What the cluster does, over the last hour or day: uPlot on a canvas, the newest values in words.

import { Component, createRef, h } from "/ui/vendor/preact.js";
import htm from "/ui/vendor/htm.js";
import uPlot from "/ui/vendor/uplot.js";
import { clock, seconds } from "/ui/format.js";

const html = htm.bind(h);
const HEIGHT = 110;
const GAP_S = 30; // between two rows of the last hour: longer, and nothing is drawn across it

const count = (value) => (value >= 1000 ? `${(value / 1000).toFixed(1)}k` : `${Math.round(value)}`);
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
const share = (of) => (row) => (row.blocks_total ? row[of] / row.blocks_total : null);

// title, how a value is written, lines: [label, colour, value of a row]
const CHARTS = [
  ["Time to first token", seconds, [["p50", "--own", (r) => r.first_token_p50_s], ["p99", "--replica", (r) => r.first_token_p99_s]]],
  ["Inter-token latency", seconds, [["p50", "--own", (r) => r.inter_token_p50_s], ["p99", "--replica", (r) => r.inter_token_p99_s]]],
  ["Tokens per second", count, [["to clients", "--own", (r) => r.tokens_per_s]]],
  ["Requests", count, [["running", "--own", (r) => r.running], ["waiting", "--replica", (r) => r.waiting]]],
  ["KV blocks in use", percent, [["requests", "--own", share("blocks_used")], ["copies", "--replica", share("blocks_replica")]]],
  ["Prefix cache hits", percent, [["of prompt tokens", "--own", (r) => r.cache_hit_ratio]]],
];

export function Charts({ hour, day, range, incidents, onRange }) {
  const figures = range === "day" ? day || hour : hour;
  const rows = figures.rows.map((row) => Object.fromEntries(figures.columns.map((name, at) => [name, row[at]])));
  const marks = (incidents || []).map((item) => item.began_unix_s);
  const choice = (value, words) => html`
    <label><input type="radio" name="range" checked=${range === value} onChange=${() => onRange(value)} /> ${words}</label>`;
  return html`
    <section aria-label="Figures">
      <div class="heading">
        <h2>Figures</h2>
        <fieldset class="choice"><legend class="unseen">Time shown</legend>${choice("hour", "last hour")} ${choice("day", "last day")}</fieldset>
      </div>
      ${!rows.length && html`<p class="quiet">The first figures come a few seconds after a controller has started.</p>`}
      <div class="charts">
        ${rows.length > 0 &&
        CHARTS.map(
          ([title, write, lines]) =>
            html`<${Chart} key=${title} title=${title} write=${write} lines=${lines} rows=${rows} source=${figures} marks=${marks} spread=${range === "day"} />`,
        )}
      </div>
    </section>`;
}

function Chart({ title, write, lines, rows, source, marks, spread }) {
  const last = rows[rows.length - 1];
  const newest = lines.map(([label, colour, value]) => [label, colour, value(last)]);
  const words = newest.map(([label, , value]) => `${label} ${typeof value === "number" ? write(value) : "none"}`).join(", ");
  return html`
    <figure class="chart">
      <figcaption>
        <h3>${title}</h3>
        <span class="values">
          ${newest.map(
            ([label, colour, value]) =>
              html`<span key=${label}><i class=${`line ${colour.slice(2)}`}></i>${label} <b>${typeof value === "number" ? write(value) : "–"}</b></span>`,
          )}
        </span>
      </figcaption>
      <${Plot} label=${`${title}: ${words} at ${clock(last.unix_s)}`} write=${write} lines=${lines} rows=${rows} source=${source} marks=${marks} spread=${spread} />
    </figure>`;
}

// The canvas. It draws anew when there are other rows, another width, or other colours.
class Plot extends Component {
  box = createRef();
  dark = matchMedia("(prefers-color-scheme: dark)");

  componentDidMount() {
    this.resized = new ResizeObserver(() => this.plot?.setSize({ width: this.box.current.clientWidth, height: HEIGHT }));
    this.resized.observe(this.box.current);
    this.recoloured = () => this.make();
    this.dark.addEventListener("change", this.recoloured);
    this.make();
  }

  shouldComponentUpdate(next) {
    const { source, marks, label } = this.props;
    return next.source !== source || next.marks.length !== marks.length || next.label !== label;
  }

  componentDidUpdate(before) {
    if (before.source !== this.props.source || before.marks.length !== this.props.marks.length) this.plot.setData(this.data());
  }

  componentWillUnmount() {
    this.resized.disconnect();
    this.dark.removeEventListener("change", this.recoloured);
    this.plot?.destroy();
  }

  data() {
    const { rows, lines, spread } = this.props;
    const columns = [[], ...lines.map(() => [])];
    let before = null;
    for (const row of rows) {
      if (before !== null && !spread && row.unix_s - before > GAP_S) {
        columns.forEach((column, at) => column.push(at ? null : before + 1));
      }
      columns[0].push(row.unix_s);
      lines.forEach(([, , value], at) => columns[at + 1].push(value(row) ?? null));
      before = row.unix_s;
    }
    return columns;
  }

  make() {
    this.plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const { lines, write } = this.props;
    const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const options = {
      width: this.box.current.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { show: false },
      padding: [6, 6, 0, 0],
      scales: { y: { range: (_plot, _low, high) => [0, high > 0 ? high * 1.1 : 1] } },
      axes: [
        { ...axis, size: 22, space: 70, values: (_plot, ticks, _axis, _space, step) => ticks.map((at) => clock(at).slice(-8, step < 60 ? undefined : -3)) },
        { ...axis, size: 52, space: 28, values: (_plot, ticks) => ticks.map(write) },
      ],
      series: [{}, ...lines.map(([label, name]) => ({ label, stroke: colour(name), width: 1.5, points: { size: 3 } }))],
      hooks: { draw: [(plot) => this.mark(plot, colour("--bad"))] },
    };
    this.plot = new uPlot(options, this.data(), this.box.current);
  }

  // When something failed.
  mark(plot, colour) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = colour;
    ctx.setLineDash([4, 3]);
    for (const at of this.props.marks) {
      if (at < plot.scales.x.min || at > plot.scales.x.max) continue;
      const x = Math.round(plot.valToPos(at, "x", true));
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  render() {
    return html`<div class="plot" ref=${this.box} role="img" aria-label=${this.props.label}></div>`;
  }
}
