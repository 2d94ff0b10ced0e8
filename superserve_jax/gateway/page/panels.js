// The headline figures, and the table of workers.

import { $, about, accuracy, attainment, milliseconds, number, ofModel, percent, put, state, sum } from "./state.js";

const HEADLINE_S = 5; // length of the headline figures' window
const ALIVE = ["idle", "deciding", "running", "answering"];

export function headline() {
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
  put("healthy", `${alive.filter((w) => condition(w)[1] !== "bad").length} / ${known.length}`, now.ready ? "" : "bad-text");
  put("healthy-note", now.ready ? `busy: ${number(last.length ? (100 * sum(last, (s) => s.busy)) / last.length : null)} %` : "not ready");
}

// What to say about a worker, and its tone.
function condition(worker) {
  if (!ALIVE.includes(worker.state)) return [worker.state, worker.state === "removed" ? "" : "bad"];
  if (worker.running_s > 5) return [`busy for ${number(worker.running_s)} s`, "bad"];
  if (worker.out) return [`${worker.out} subnets out of service`, "warn"];
  return worker.slowdown > 1.5 ? ["slow", "warn"] : ["healthy", "good"];
}

export function workers() {
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
