// The live page: reads the events of /events, and draws the last five minutes. Plain JavaScript, with uPlot for the charts.
// The events are described in superserve_jax/gateway/sampling.py.
"use strict";

const HEADLINE_S = 5; // length of the headline figures' window
const SILENCE_MS = 6000; // without an event for so long, the connection counts as lost
const HIDDEN_MS = 30000; // a page in the background gives its connection back after so long
const GAP_S = 2.5; // a longer distance between two samples is a gap in the lines
const COLOURS = 8; // of the subnet mix
const ALIVE = ["idle", "deciding", "running", "answering"];

const $ = (id) => document.getElementById(id);
const state = { about: null, samples: [], now: null, model: null, charts: [], columns: null };

// -- numbers ---------------------------------------------------------------------------------------------------------------

const number = (x, digits = 0) =>
  x == null ? "–" : x.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const short = (x) => (x >= 10000 ? number(x / 1000, x % 1000 ? 1 : 0) + "k" : number(x, Number.isInteger(x) ? 0 : 1));
const milliseconds = (x) => (x == null ? "–" : number(x, x < 10 ? 1 : 0));
// Two decimals, rounded down: only if every query was in time, it says 100.
const percent = (x) => (x == null ? "–" : x === 1 ? "100" : number(Math.floor(1e4 * x + 1e-6) / 100, 2));
const sum = (rows, f) => rows.reduce((total, row) => total + f(row), 0);
const ended = (s) => s.met + s.late + s.lost;
const answers = (s) => s.met + s.late;

function attainment(rows) {
  const all = sum(rows, ended);
  return all ? sum(rows, (s) => s.met) / all : null;
}

function accuracy(rows) {
  const answered = rows.filter((s) => s.accuracy != null);
  const all = sum(answered, answers);
  return all ? sum(answered, (s) => s.accuracy * answers(s)) / all : null;
}

// -- the chosen model ------------------------------------------------------------------------------------------------------

const about = () => state.about.models[state.model];
const ofModel = (samples) => samples.map((sample) => sample.models[state.model]).filter(Boolean);

// The keys of all accuracies: of the subnets that may run, and of the ones that have run before a swap.
const accuracies = () =>
  [...new Set([...about().accuracies, ...ofModel(state.samples).flatMap((s) => Object.keys(s.mix))])].sort();

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

// -- charts ----------------------------------------------------------------------------------------------------------------

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

function rebuild() {
  for (const { made } of state.charts) made.destroy();
  $("charts").replaceChildren();
  state.columns = columns();
  state.accuracies = accuracies();
  state.charts = CHARTS.map(make);
}

function draw() {
  if (document.hidden || !state.about) return;
  state.columns = columns();
  const { t, samples } = state.columns;
  for (const { lines, made, show } of state.charts) {
    made.setData([t, ...lines.map((line) => samples.map((s) => (s ? line.of(s) : null)))]);
    show();
  }
}

// -- headline, workers, demo -----------------------------------------------------------------------------------------------

function put(id, text, tone = "") {
  const element = $(id);
  if (element.textContent !== text) element.textContent = text;
  if (element.className !== tone) element.className = tone;
}

function headline() {
  const all = ofModel(state.samples), last = ofModel(state.samples.slice(-HEADLINE_S)), latest = all.at(-1);
  const { slo_ms, accuracies: keys } = about(), now = state.now.models[state.model];
  const met = attainment(last);
  put("attainment", percent(met), met == null || met >= 0.99 ? "" : met >= 0.9 ? "warn-text" : "bad-text");
  put("attainment-note", `SLO ${milliseconds(slo_ms)} ms · 5 min: ${percent(attainment(all))} %`);
  const served = accuracy(last);
  put("accuracy", served == null ? "–" : number(100 * served, 2));
  put("accuracy-note", `subnets: ${number(100 * keys[0], 1)} to ${number(100 * keys.at(-1), 1)} %`);
  put("rate", last.length ? number(sum(last, (s) => s.qps) / last.length) : "–");
  put("rate-note", `peak: ${number(Math.max(0, ...all.map((s) => s.qps)))}`);
  const timed = last.findLast((s) => s.p99_ms != null);
  put("p99", milliseconds(timed?.p99_ms), timed && timed.p99_ms > slo_ms ? "warn-text" : "");
  put("p99-note", `p50: ${milliseconds(timed?.p50_ms)} ms`);
  put("queue", latest ? number(latest.waiting) : "–");
  put("queue-note", `mean batch: ${number(last.findLast((s) => s.batch != null)?.batch, 1)}`);
  const alive = now.workers.filter((w) => ALIVE.includes(w.state)), known = now.workers.filter((w) => w.state !== "removed");
  put("healthy", `${alive.filter((w) => condition(w)[1] === "good").length} / ${known.length}`, now.ready ? "" : "bad-text");
  put("healthy-note", now.ready ? `busy: ${number(last.length ? (100 * sum(last, (s) => s.busy)) / last.length : null)} %` : "not ready");
}

// What to say about a worker, and its tone.
function condition(worker) {
  if (!ALIVE.includes(worker.state)) return [worker.state, worker.state === "removed" ? "" : "bad"];
  if (worker.running_s > 5) return [`busy for ${number(worker.running_s)} s`, "bad"];
  if (worker.out) return [`${worker.out} subnets out of service`, "warn"];
  return worker.slowdown > 1.5 ? ["slow", "warn"] : ["healthy", "good"];
}

function workers() {
  const rows = state.now.models[state.model].workers, body = $("workers");
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((worker, i) => {
    const row = body.rows[i] || body.insertRow();
    const [text, tone] = condition(worker);
    const cells = [
      ["Worker", worker.name], ["State", text], ["Batches", `${number(worker.bps)}/s`],
      ["Speed", worker.slowdown > 1.005 ? `${number(worker.slowdown, 2)}× slower than the profile` : "as profiled"],
      ["Failures", number(worker.failures)], ["Note", worker.error || ""],
    ];
    cells.forEach(([label, value], j) => {
      let cell = row.cells[j];
      if (!cell) {
        cell = row.insertCell();
        cell.dataset.label = label;
        if (label === "Note") cell.className = "note";
        if (label === "State") cell.append(document.createElement("span"));
      }
      const target = label === "State" ? cell.firstChild : cell;
      if (target.textContent !== value) target.textContent = value;
      if (label === "State") target.className = `pill ${tone}`;
    });
  });
}

let held = null; // the slider that the visitor is moving

function demo() {
  const told = state.now.demo?.[state.model];
  $("demo").hidden = !told;
  if (!told) return;
  for (const [id, qps] of [["steady", told.steady_qps], ["burst", told.burst_qps]]) {
    const slider = $(id), fresh = slider.dataset.model !== state.model;
    if (fresh) {
      slider.max = told.most_qps;
      slider.step = told.most_qps / 200;
      slider.dataset.model = state.model;
    }
    if (fresh || (id === "steady" && held !== slider)) slider.value = qps;
    put(`${id}-qps`, `${number(Number(slider.value))} queries/s${id === "burst" ? ` for ${told.burst_s} s` : ""}`);
  }
  $("send").disabled = told.left_s > 0;
  put("send", told.left_s > 0 ? `Burst: ${Math.ceil(told.left_s)} s` : "Send a burst");
}

async function control(values) {
  try {
    const body = JSON.stringify({ model: state.model, ...values });
    const response = await fetch("demo", { method: "POST", body, headers: { ...authorization(), "content-type": "application/json" } });
    const told = await response.json();
    if (!response.ok) throw new Error(told.error);
    state.now.demo[state.model] = told;
    demo();
    notice("");
  } catch (error) {
    notice(`The demo did not take that: ${error.message}`);
  }
}

for (const id of ["steady", "burst"]) {
  $(id).addEventListener("input", () => { held = $(id); demo(); });
  $(id).addEventListener("change", async () => {
    if (id === "steady") await control({ steady_qps: Number($(id).value) });
    held = null;
  });
}
$("send").addEventListener("click", () => control({ burst_qps: Number($("burst").value) }));

// -- events ----------------------------------------------------------------------------------------------------------------

function status(text, tone) {
  put("status", text, `status ${tone}`);
  document.body.classList.toggle("stale", tone !== "good" && state.samples.length > 0);
}

function notice(text) {
  put("notice", text, "notice");
  $("notice").hidden = !text;
}

function choose(name) {
  state.model = name;
  put("name", name, "model");
  document.title = `SuperServe: ${name}`;
}

function take(event) {
  if (event.about) {
    const names = Object.keys(event.about.models);
    state.about = event.about;
    state.samples = [];
    $("choose").hidden = names.length < 2;
    $("name").hidden = names.length > 1;
    $("model").replaceChildren(...names.map((name) => new Option(name, name)));
    if (!names.includes(state.model)) choose(names[0]);
    $("model").value = state.model;
  }
  state.samples.push(...event.samples);
  state.samples.splice(0, state.samples.length - state.about.keep_s);
  state.now = event.now;
  state.end = state.samples.at(-1)?.t ?? 0;
  if (state.model === undefined) return notice("The gateway has no model.");
  if (event.about) rebuild();
  refresh();
}

function refresh() {
  headline();
  workers();
  demo();
  draw();
}

const authorization = () => {
  const token = sessionStorage.getItem("token");
  return token ? { authorization: `Bearer ${token}` } : {};
};
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const once = (target, type) => new Promise((done) => target.addEventListener(type, done, { once: true }));

async function login() {
  status("Token needed", "");
  notice(sessionStorage.getItem("token") ? "The token is wrong." : "");
  $("login").hidden = false;
  await once($("login"), "submit");
  sessionStorage.setItem("token", $("token").value);
  $("login").hidden = true;
}
$("login").addEventListener("submit", (event) => event.preventDefault());

let connection = null;

// Reads events until the connection ends. Returns whether it had any.
async function listen() {
  connection = new AbortController();
  let timer = setTimeout(() => connection.abort(), SILENCE_MS), some = false;
  try {
    const response = await fetch("events", { headers: authorization(), signal: connection.signal, cache: "no-store" });
    if (response.status === 401) {
      await login();
      return true;
    }
    if (!response.ok) throw new Error((await response.json()).error);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = ""; ;) {
      const { done, value } = await reader.read();
      if (done) return some;
      clearTimeout(timer);
      timer = setTimeout(() => connection.abort(), SILENCE_MS);
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        try {
          take(JSON.parse(part.slice("data: ".length)));
        } catch (error) {
          console.error(error); // a mistake in this program must not look like a lost connection
        }
        status("Live", "good");
        some = true;
      }
    }
  } finally {
    clearTimeout(timer);
  }
}

async function main() {
  for (let wait = 1; ;) {
    let some = false;
    try {
      some = await listen();
      notice("");
    } catch (error) {
      notice(error instanceof TypeError || error.name === "AbortError" ? "" : error.message);
    }
    if (document.hidden) await once(document, "visibilitychange");
    wait = some ? 1 : Math.min(2 * wait, 8);
    status("Reconnecting", "bad");
    await pause(1000 * wait);
  }
}

$("model").addEventListener("change", () => {
  choose($("model").value);
  rebuild();
  refresh();
});
let hidden = null;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hidden);
  if (document.hidden) hidden = setTimeout(() => connection?.abort(), HIDDEN_MS);
  else draw();
});
new ResizeObserver(() => {
  for (const { made, plot } of state.charts) made.setSize({ width: plot.clientWidth, height: plot.clientHeight });
}).observe($("charts"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (!state.about) return;
  rebuild();
  draw();
});
main();
