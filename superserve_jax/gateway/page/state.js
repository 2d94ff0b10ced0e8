// What the page knows, and helpers for elements and numbers. The events are described in superserve_jax/gateway/sampling.py.

export const $ = (id) => document.getElementById(id);
export const state = { about: null, samples: [], now: null, model: null, charts: [], columns: null };

export function put(id, text, tone = "") {
  const element = $(id);
  if (element.textContent !== text) element.textContent = text;
  if (element.className !== tone) element.className = tone;
}

export function notice(text) {
  put("notice", text, "notice");
  $("notice").hidden = !text;
}

// -- the chosen model ------------------------------------------------------------------------------------------------------

export const about = () => state.about.models[state.model];
export const ofModel = (samples) => samples.map((sample) => sample.models[state.model]).filter(Boolean);

// The keys of all accuracies: of the subnets that may run, and of the ones that have run before a swap.
export const accuracies = () =>
  [...new Set([...about().accuracies, ...ofModel(state.samples).flatMap((s) => Object.keys(s.mix))])].sort();

// -- numbers ---------------------------------------------------------------------------------------------------------------

export const number = (x, digits = 0) =>
  x == null ? "–" : x.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
export const short = (x) => (x >= 10000 ? number(x / 1000, x % 1000 ? 1 : 0) + "k" : number(x, Number.isInteger(x) ? 0 : 1));
export const milliseconds = (x) => (x == null ? "–" : number(x, x < 10 ? 1 : 0));
// Two decimals, rounded down: only if every query was in time, it says 100.
export const percent = (x) => (x == null ? "–" : x === 1 ? "100" : number(Math.floor(1e4 * x + 1e-6) / 100, 2));
export const sum = (rows, f) => rows.reduce((total, row) => total + f(row), 0);
export const ended = (s) => s.met + s.late + s.lost;
const answers = (s) => s.met + s.late;

export function attainment(rows) {
  const all = sum(rows, ended);
  return all ? sum(rows, (s) => s.met) / all : null;
}

export function accuracy(rows) {
  const answered = rows.filter((s) => s.accuracy != null);
  const all = sum(answered, answers);
  return all ? sum(answered, (s) => s.accuracy * answers(s)) / all : null;
}
