// The controls of the demo's traffic.

import { $, notice, number, put, state } from "./state.js";
import { authorization } from "./stream.js";

let held = null; // the slider that the visitor is moving

export function demo() {
  const told = state.now.demo?.[state.model];
  $("demo").hidden = !told;
  if (!told) return;
  for (const [id, qps] of [["steady", told.steady_qps], ["burst", told.burst_qps]]) {
    const slider = $(id), fresh = slider.dataset.model !== state.model || Number(slider.max) !== told.most_qps;
    if (fresh) { // another model, or another export under its name
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
