// The stream of events, its token, and its reconnections. EventSource cannot send a token, so it is read with fetch.

import { $, notice, put, state } from "./state.js";

const SILENCE_MS = 6000; // without an event for so long, the connection counts as lost
const HIDDEN_MS = 30000; // a page in the background gives its connection back after so long

export const authorization = () => {
  const token = sessionStorage.getItem("token");
  return token ? { authorization: `Bearer ${token}` } : {};
};
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const once = (target, type) => new Promise((done) => target.addEventListener(type, done, { once: true }));

function status(text, tone) {
  put("status", text, `status ${tone}`);
  document.body.classList.toggle("stale", tone !== "good" && state.samples.length > 0);
}

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
async function listen(take) {
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

// Gives each event to `take`, for ever.
export async function follow(take) {
  for (let wait = 1; ;) {
    let some = false;
    try {
      some = await listen(take);
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

let hidden = null;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hidden);
  if (document.hidden) hidden = setTimeout(() => connection?.abort(), HIDDEN_MS);
});
