// The live page: shows the events of /events. Plain JavaScript in modules, with uPlot for the charts.

import { draw, rebuild } from "./charts.js";
import { demo } from "./controls.js";
import { headline, workers } from "./panels.js";
import { $, put, state } from "./state.js";
import { follow } from "./stream.js";

function choose(name) {
  state.model = name;
  put("name", name ?? "", "model");
  document.title = name === undefined ? "SuperServe" : `SuperServe: ${name}`;
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
    $("model").value = state.model ?? "";
    $("none").hidden = names.length > 0;
    document.querySelector("main").hidden = names.length === 0;
  }
  state.samples.push(...event.samples);
  state.samples.splice(0, state.samples.length - state.about.keep_s);
  state.now = event.now;
  state.end = state.samples.at(-1)?.t ?? 0;
  if (state.model === undefined) return; // no model is loaded now
  if (event.about) rebuild();
  refresh();
}

function refresh() {
  headline();
  workers();
  demo();
  draw();
}

$("model").addEventListener("change", () => {
  choose($("model").value);
  rebuild();
  refresh();
});
document.addEventListener("visibilitychange", draw);
new ResizeObserver(() => {
  for (const { made, plot } of state.charts) {
    if (plot.clientWidth) made.setSize({ width: plot.clientWidth, height: plot.clientHeight }); // else it is hidden
  }
}).observe($("charts"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (!state.model) return;
  rebuild();
  draw();
});
follow(take);
