// The charts of the last five minutes, drawn by uPlot.
/* global uPlot */

import { $, about, accuracies, ended, milliseconds, number, percent, short, state, sum } from "./state.js";

const GAP_S = 2.5; // a longer distance between two samples is a gap in the lines
const COLOURS = 8; // of the subnet mix

const CHARTS = [
  { title: "Arrivals", unit: "queries/s", lines: [{ label: "", colour: "--c1", fill: true, of: (s) => s.qps, text: (x) => number(x) }] },
  { title: "Served accuracy", unit: "%", range: accuracyRange, lines: [{ label: "", colour: "--c1", of: (s) => (s.accuracy == null ? null : 100 * s.accuracy), text: (x) => number(x, 2) }] },
  { title: "SLO attainment", unit: "%", range: attainmentRange, lines: [{ label: "", colour: "--c3", of: (s) => (ended(s) ? (100 * s.met) / ended(s) : null), text: (x) => (x == null ? "–" : percent(x / 100)) }] },
  { title: "Subnet mix", unit: "% of the answers", mix: true, range: () => [0, 100] },
  { title: "Latency", unit: "ms", slo: true, lines: [
    { label: "p99", colour: "--c2", of: (s) => s.p99_ms, text: milliseconds },
    { label: "p50", colour: "--c1", of: (s) => s.p50_ms, text: milliseconds },
  ] },
  { title: "Queue", unit: "waiting queries", lines: [{ label: "", colour: "--c2", fill: true, of: (s) => s.waiting, text: (x) => number(x) }] },
  { title: "Batch size", unit: "queries, mean", lines: [{ label: "", colour: "--c1", of: (s) => s.batch, text: (x) => number(x, 1) }] },
  { title: "Workers busy", unit: "% of the time", range: () => [0, 100], lines: [{ label: "", colour: "--c3", fill: true, of: (s) => 100 * s.busy, text: (x) => number(x) }] },
];

// Subnets by accuracy, in at most COLOURS groups of neighbours.
function groups() {
  const keys = state.accuracies, count = Math.min(keys.length, COLOURS);
  return Array.from({ length: count }, (_, i) => {
    const some = keys.filter((_, j) => Math.floor((j * count) / keys.length) === i);
    return {
      keys: some,
      colour: `--m${count === 1 ? COLOURS - 1 : Math.round((i * (COLOURS - 1)) / (count - 1))}`,
      label: [...new Set([some[0], some.at(-1)].map((key) => number(100 * key, 1)))].join("–"),
    };
  });
}

function accuracyRange() {
  const low = 100 * state.accuracies[0], high = 100 * state.accuracies.at(-1);
  const pad = Math.max(0.08 * (high - low), 0.25);
  return [Math.max(low - pad, 0), Math.min(high + pad, 100)];
}

function attainmentRange(least) {
  return [least == null || least > 90 ? 90 : least > 50 ? 50 : 0, 100.5];
}

// A round number from x up, so that the scale changes rarely.
function above(x) {
  const power = 10 ** Math.floor(Math.log10(Math.max(x, 1)));
  return power * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= x);
}

function linesOf(chart) {
  if (!chart.mix) return chart.lines;
  const all = groups();
  const share = (s, some) => {
    const total = sum(Object.values(s.mix), (n) => n);
    return total ? (100 * sum(some, (g) => sum(g.keys, (key) => s.mix[key] || 0))) / total : null;
  };
  // The most accurate group is at the bottom. Each line is the sum up to its group, painted over the longer ones.
  return all.map((group, i) => ({
    label: group.label, colour: group.colour, fill: "solid", of: (s) => share(s, all.slice(i)),
    text: (_, s) => (s ? number(share(s, [group])) : "–"),
  }));
}

function make(chart) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const box = document.createElement("div");
  box.className = "chart";
  const head = document.createElement("header");
  const title = document.createElement("h2");
  title.textContent = chart.title;
  const readout = document.createElement("div");
  readout.className = "readout";
  head.append(title, readout);
  const plot = document.createElement("div");
  plot.className = "plot";
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${chart.title}, ${chart.unit}, over the last five minutes`);
  box.append(head, plot);
  $("charts").append(box);

  const lines = linesOf(chart);
  const font = "12px system-ui, sans-serif";
  const axis = { stroke: colour("--soft"), font, ticks: { show: false }, grid: { stroke: colour("--grid"), width: 1 } };
  const yRange = (u, least, most) => {
    if (chart.range) return chart.range(least);
    const high = chart.slo ? Math.max(most || 0, 1.15 * about().slo_ms) : most || 0;
    return [0, above(1.02 * high)];
  };
  const slo = (u) => {
    if (!chart.slo) return;
    const { ctx, bbox } = u;
    const y = Math.round(u.valToPos(about().slo_ms, "y", true)) + 0.5;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("--slo");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.fillText(`SLO ${milliseconds(about().slo_ms)} ms`, bbox.left + 6 * devicePixelRatio, y - 5 * devicePixelRatio);
    ctx.restore();
  };
  const show = (u) => read(readout, chart, lines, u.cursor.idx);
  const made = new uPlot({
    width: plot.clientWidth, height: plot.clientHeight, padding: [8, 14, 0, 0], legend: { show: false },
    cursor: { sync: { key: "time" }, y: false, drag: { x: false, y: false }, points: { show: !chart.mix, size: 6 } },
    scales: {
      x: { time: false, range: () => [state.end - state.about.keep_s, state.end] },
      y: { range: yRange },
    },
    axes: [
      { ...axis, size: 30, gap: 9, splits: () => [5, 4, 3, 2, 1, 0].map((m) => state.end - (m * state.about.keep_s) / 5),
        values: (u, at) => at.map((t) => (t === state.end ? "now" : `−${Math.round((state.end - t) / 60)} min`)) },
      { ...axis, size: 46, gap: 6, space: 32, values: (u, at) => at.map(short) },
    ],
    series: [{}, ...lines.map((line) => ({
      stroke: line.fill === "solid" ? undefined : colour(line.colour), width: line.fill === "solid" ? 0 : 1.75, points: { show: false },
      fill: line.fill === "solid" ? colour(line.colour) : line.fill ? colour(line.colour) + "22" : undefined,
    }))],
    hooks: { draw: [slo], setCursor: [show] },
  }, [[], ...lines.map(() => [])], plot);
  return { chart, lines, made, plot, show: () => show(made) };
}

// The values under the cursor, or else the latest ones.
function read(readout, chart, lines, at) {
  const { samples } = state.columns;
  const sample = at == null ? samples.at(-1) : samples[at];
  const shown = lines.filter((line) => line.colour);
  while (readout.children.length > shown.length + 1) readout.lastChild.remove();
  while (readout.children.length < shown.length + 1) readout.append(document.createElement("span"));
  shown.forEach((line, i) => {
    const span = readout.children[i];
    if (shown.length > 1 && !span.firstElementChild) {
      const swatch = document.createElement("i");
      swatch.className = "swatch";
      span.append(swatch, "");
    }
    if (shown.length > 1) span.firstElementChild.style.background = `var(${line.colour})`;
    const value = line.text(sample ? line.of(sample) : null, sample);
    const text = chart.mix ? (at == null ? line.label : `${line.label}: ${value} %`) : `${line.label} ${value}`;
    if (span.firstElementChild) span.lastChild.data = text;
    else span.textContent = text;
  });
  const ago = at == null ? 0 : Math.round(state.end - state.columns.t[at]);
  const unit = chart.mix ? (at == null ? "% accurate" : "") : chart.unit;
  readout.lastChild.textContent = unit + (ago ? `, ${ago} s ago` : "");
}

function columns() {
  const t = [], samples = [];
  for (const sample of state.samples) {
    if (t.length && sample.t - t.at(-1) > GAP_S) {
      t.push(t.at(-1) + 1);
      samples.push(null);
    }
    t.push(sample.t);
    samples.push(sample.models[state.model] || null);
  }
  return { t, samples };
}

export function rebuild() {
  for (const { made } of state.charts) made.destroy();
  $("charts").replaceChildren();
  state.columns = columns();
  state.accuracies = accuracies();
  state.charts = CHARTS.map(make);
}

export function draw() {
  if (document.hidden || !state.model) return;
  state.columns = columns();
  const { t, samples } = state.columns;
  for (const { lines, made, show } of state.charts) {
    made.setData([t, ...lines.map((line) => samples.map((s) => (s ? line.of(s) : null)))]);
    show();
  }
}
