"use strict";
// One page, no other files. What models wrote reaches the document as text only (textContent).

const LOOK_MS = 3000;
const KEYS = {
  arrowleft: ["left"], arrowright: ["right"], t: ["tie"], b: ["both_bad"], s: ["skip"],
};
const GRADED = {
  1: ["left", "clear"], 2: ["left", "slight"], 3: ["tie"], 4: ["right", "slight"], 5: ["right", "clear"], b: ["both_bad"], s: ["skip"], t: ["tie"],
};
const at = (id) => document.getElementById(id);

// The link carries the token behind the #, which no browser sends anywhere; it stays in this tab.
const linked = new URLSearchParams(location.hash.slice(1)).get("token");
if (linked) {
  sessionStorage.setItem("token", linked);
  history.replaceState(null, "", location.pathname);
}

let name = localStorage.getItem("name") || "";
let state = null;
let since = 0;
let busy = false;
let unreached = false;
// An answer that may or may not have arrived is sent again as it was, under the same submission.
let unsent = JSON.parse(sessionStorage.getItem("unsent") || "null");

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function ask(path, body) {
  const reply = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: { Authorization: `Bearer ${sessionStorage.getItem("token") || ""}`, ...(body ? { "Content-Type": "application/json" } : {}) },
    body: body ? JSON.stringify(body) : undefined,
  });
  const said = await reply.json();
  if (!reply.ok) throw new Refused(reply.status, said.error);
  return said;
}

function notice(text) { at("notice").textContent = text; }

async function look() {
  if (busy || !name) return;
  busy = true;
  try {
    if (unsent) await deliver();
    else {
      const held = state && state.question ? `&holding=${encodeURIComponent(state.question.id)}` : "";
      show(await ask(`api/state?annotator=${encodeURIComponent(name)}${held}`));
    }
    if (unreached) notice("");
    unreached = false;
  } catch (problem) { failed(problem); } finally { busy = false; }
}

function failed(problem) {
  unreached = true;
  if (problem instanceof Refused) notice(problem.message);
  else notice("The page is not reached: it was stopped, or there is no connection. Trying again.");
}

async function deliver() {
  try {
    show(await ask("api/answer", unsent));
  } catch (problem) {
    if (!(problem instanceof Refused) || problem.status === 401 || problem.status >= 500) throw problem;
    keep(null);  // it does not count, and sending it again would not change that
    notice(problem.message);
    show(await ask(`api/state?annotator=${encodeURIComponent(name)}`));
    return;
  }
  keep(null);
}

function keep(answer) {
  unsent = answer;
  if (answer) sessionStorage.setItem("unsent", JSON.stringify(answer));
  else sessionStorage.removeItem("unsent");
}

function identifier() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function answer(choice, strength) {
  if (busy || !state || !state.question || unsent) return;
  busy = true;
  mark(choice);
  keep({ question: state.question.id, annotator: name, choice, strength: strength || null, submission: identifier(),
    seconds: (performance.now() - since) / 1000 });
  try {
    notice("");
    await deliver();
  } catch (problem) { failed(problem); } finally { busy = false; mark(""); }
}

async function undo() {
  if (busy || !state || !state.undo || unsent) return;
  busy = true;
  try {
    notice("");
    show(await ask("api/undo", { annotator: name, submission: state.undo }));
  } catch (problem) { failed(problem); } finally { busy = false; }
}

function mark(choice) {
  at("left-card").classList.toggle("chosen", choice === "left" || choice === "tie");
  at("right-card").classList.toggle("chosen", choice === "right" || choice === "tie");
}

function turn(message) {
  const element = document.createElement("div"), role = document.createElement("span"), said = document.createElement("div");
  element.className = "turn"; role.className = "role"; said.className = "said";
  role.textContent = message.role; said.textContent = message.content;
  element.append(role, said);
  return element;
}

function show(found) {
  const shown = state && state.question ? state.question.id : null;
  state = found;
  const question = found.question;
  at("ask").hidden = at("keys").hidden = !question;
  at("empty").hidden = Boolean(question);
  if (!question && found.undo) at("keys").hidden = false;  // the last answer may still be taken back
  at("counts").textContent = `${found.mine} by you · ${found.answered} answered · ${found.open} open` +
    (found.waiting ? `, ${found.waiting} of them awaited` : "");
  const agreed = found.agreement;
  at("agreement").textContent = agreed.answers
    ? `agreement ${Math.round(agreed.share * 100)} %` + (agreed.kappa === null ? "" : `, kappa ${agreed.kappa.toFixed(2)}`) + ` (${agreed.answers})`
    : "";
  at("who").textContent = name;
  at("undo").disabled = !found.undo;
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = !question;
  if (!question || question.id === shown) return;
  since = performance.now();
  at("prompt").replaceChildren(...question.messages.map(turn));
  for (const side of ["left", "right"]) {
    at(side).textContent = question[side];
    at(side).scrollTop = 0;
  }
  at("prompt").scrollTop = at("prompt").scrollHeight;
  at("plain").hidden = question.strength;
  at("graded").hidden = !question.strength;
  more();
}

function more() {
  for (const side of ["left", "right"]) {
    const text = at(side);
    at(`${side}-card`).classList.toggle("more", text.scrollTop + text.clientHeight < text.scrollHeight - 4);
  }
}

function enter() {
  at("enter").hidden = false;
  at("ask").hidden = at("keys").hidden = at("empty").hidden = true;
  at("name").value = name;
  at("name").focus();
}

document.addEventListener("keydown", (event) => {
  if (!at("enter").hidden || event.altKey || event.repeat && !event.key.startsWith("Arrow")) return;
  const key = event.key.toLowerCase();
  if (key === "u" && !event.ctrlKey && !event.metaKey || key === "z" && (event.ctrlKey || event.metaKey) || key === "backspace") {
    event.preventDefault();
    undo();
    return;
  }
  if (event.ctrlKey || event.metaKey || !state || !state.question) return;
  if (key === "arrowup" || key === "arrowdown") {
    event.preventDefault();
    for (const side of ["left", "right"]) at(side).scrollTop += key === "arrowdown" ? 60 : -60;
    return;
  }
  const chosen = (state.question.strength ? GRADED : KEYS)[key];
  if (chosen && !event.repeat) {
    event.preventDefault();
    answer(...chosen);
  }
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => { button.blur(); answer(button.dataset.choice, button.dataset.strength); });
}
for (const side of ["left", "right"]) at(side).addEventListener("scroll", more);
addEventListener("resize", more);
at("undo").addEventListener("click", () => { at("undo").blur(); undo(); });
at("who").addEventListener("click", enter);
at("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  name = at("name").value.trim();
  localStorage.setItem("name", name);
  at("enter").hidden = true;
  state = null;
  look();
});

if (name) look(); else enter();
setInterval(look, LOOK_MS);
