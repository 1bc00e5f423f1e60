// The page of the server: streams a completion with its probabilities, and shows attention.
// It talks to /v1/models, /v1/completions and /attention of the server that it comes from, and to nothing else.

import { show } from "./attention.js";

const find = (id) => document.getElementById(id);
const ALTERNATIVES = 5;
const REASONS = { length: "max tokens reached", stop: "complete" };

let model = null; // its name
let running = null; // the AbortController of the completion
let tokens = []; // of the last completion: {text, parts: [{text, probability, others: [[text, probability]]}]}
let chosen = -1; // index of the token whose alternatives are shown

// --- requests ---

/** POSTs an object, or GETs without one; the response if it is 2xx, else throws an Error with the server's message. */
async function ask(path, object, signal) {
  const headers = {};
  const key = find("key").value;
  if (key) headers.Authorization = `Bearer ${key}`;
  if (object) headers["Content-Type"] = "application/json";
  const options = { headers, signal, method: object ? "POST" : "GET", body: object && JSON.stringify(object) };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  let message = `The server answers ${response.status} ${response.statusText}`.trim();
  try {
    message = (await response.json()).error.message;
  } catch {
    // The answer is not in the API's form.
  }
  const wait = response.headers.get("Retry-After");
  if (wait) message += ` (try again in ${wait} s)`;
  if (response.status === 401) {
    find("access").open = true;
    message = find("key").value ? message : "This server asks for an API key.";
  }
  throw new Error(message);
}

/** The objects of a stream of server-sent events, up to [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server has ended the answer before its end.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const object = JSON.parse(data);
      if (object.error) throw new Error(object.error.message);
      yield object;
    }
  }
}

// --- a completion ---

function options() {
  const request = { prompt: find("prompt").value, stream: true, logprobs: ALTERNATIVES };
  request.stream_options = { include_usage: true };
  if (model) request.model = model;
  for (const field of find("form").querySelectorAll("[name]")) {
    if (field.value !== "") request[field.name] = Number(field.value);
  }
  return request;
}

async function generate() {
  running?.abort();
  const control = (running = new AbortController());
  const request = options();
  clear(request.prompt);
  setRunning(true);
  const run = { begin: performance.now(), first: 0, last: 0, count: 0, reason: "stopped" };
  const waiting = { tokens: [], text: "" };
  try {
    const response = await ask("/v1/completions", request, control.signal);
    for await (const event of events(response)) {
      const choice = event.choices?.[0];
      if (!choice) continue;
      if (choice.finish_reason) run.reason = choice.finish_reason;
      const found = tokensOf(choice);
      if (found.length) {
        run.last = performance.now();
        run.first ||= run.last;
        run.count += found.length;
      }
      waiting.tokens.push(...found);
      waiting.text += choice.text ?? "";
      place(waiting, Boolean(choice.finish_reason));
      find("stats").textContent = figures(run);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      run.reason = "failed";
      complain("error", error);
    }
  }
  if (control !== running) return; // the next one has begun
  place(waiting, true);
  running = null;
  setRunning(false);
  find("stats").textContent = `${figures(run)}, ${REASONS[run.reason] ?? run.reason}`;
  find("say").textContent = `${REASONS[run.reason] ?? run.reason}. ${tokens.map((token) => token.text).join("")}`;
}

function setRunning(isRunning) {
  find("stop").disabled = !isRunning;
  find("tokens").setAttribute("aria-busy", isRunning);
  if (isRunning) find("say").textContent = "Generating";
}

function clear(prompt) {
  tokens = [];
  chosen = -1;
  find("error").hidden = true;
  find("given").textContent = prompt;
  find("tokens").replaceChildren();
  find("tokens").tabIndex = -1;
  find("copy").disabled = true;
  find("alternatives").replaceChildren();
  find("stats").textContent = "Waiting for the first token ...";
}

/** The tokens of a choice of a chunk, with natural logarithms turned into probabilities. */
function tokensOf(choice) {
  const { tokens: texts = [], token_logprobs: logs = [], top_logprobs: tops = [] } = choice.logprobs ?? {};
  return texts.map((text, index) => ({
    text,
    probability: Math.exp(logs[index] ?? NaN),
    others: Object.entries(tops[index] ?? {})
      .map(([other, log]) => [other, Math.exp(log)])
      .sort((one, two) => two[1] - one[1]),
  }));
}

/**
 * Shows the text that has come, as far as its tokens are known. Text may come later than its tokens, when it could have
 * been the beginning of a stop string; and the tokens that share a character have no text of their own.
 */
function place(waiting, isEnd) {
  while (waiting.tokens.length && waiting.tokens[0].text && waiting.text.startsWith(waiting.tokens[0].text)) {
    const token = waiting.tokens.shift();
    waiting.text = waiting.text.slice(token.text.length);
    add(token.text, [token]);
  }
  if (waiting.text) {
    add(waiting.text, waiting.tokens);
    waiting.tokens = [];
    waiting.text = "";
  } else if (isEnd && waiting.tokens.length) {
    add("", waiting.tokens); // an end of text, or what was cut with a stop string
    waiting.tokens = [];
  }
}

function add(text, parts) {
  const element = document.createElement("span");
  const index = tokens.push({ text, parts, element }) - 1;
  element.className = "token";
  element.classList.toggle("lines", /^\n+$/.test(text));
  element.classList.toggle("end", text === "");
  element.id = `token-${index}`;
  element.setAttribute("role", "option");
  element.setAttribute("aria-selected", "false");
  const probability = parts.reduce((product, part) => product * part.probability, 1);
  const known = parts.length > 0 && !Number.isNaN(probability);
  element.setAttribute("aria-label", visible(text) + (known ? `, ${percent(probability)}` : ""));
  element.style.setProperty("--p", known ? probability : 1);
  element.textContent = text;
  const output = find("output");
  const isAtEnd = output.scrollTop + output.clientHeight >= output.scrollHeight - 8;
  find("tokens").append(element);
  if (isAtEnd) output.scrollTop = output.scrollHeight;
  find("tokens").tabIndex = 0;
  find("copy").disabled = false;
}

function figures(run) {
  if (!run.count) return "no tokens";
  const parts = [`${run.count} token${run.count === 1 ? "" : "s"}`, `first after ${milliseconds(run.first - run.begin)}`];
  if (run.count > 1 && run.last > run.first) {
    parts.push(`${(((run.count - 1) * 1000) / (run.last - run.first)).toFixed(1)} tokens/s`);
  }
  return parts.join(", ");
}

const milliseconds = (time) => (time < 1000 ? `${time.toFixed(0)} ms` : `${(time / 1000).toFixed(2)} s`);
const percent = (share) => `${(share * 100).toFixed(share < 0.001 ? 3 : 1)} %`;
const visible = (text) =>
  text === "" ? "(end)" : text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");

function complain(id, error) {
  find(id).textContent = error.message;
  find(id).hidden = false;
}

// --- one token's alternatives ---

function choose(index) {
  if (index < 0 || index >= tokens.length || index === chosen) return;
  tokens[chosen]?.element.setAttribute("aria-selected", "false");
  chosen = index;
  const { element, parts } = tokens[index];
  element.setAttribute("aria-selected", "true");
  find("tokens").setAttribute("aria-activedescendant", element.id);
  find("alternatives").replaceChildren(...(parts.length ? parts.map(table) : [note("The server gave no probabilities.")]));
}

function note(text) {
  const element = document.createElement("p");
  element.className = "note";
  element.textContent = text;
  return element;
}

function table(part) {
  const element = document.createElement("table");
  const known = Number.isNaN(part.probability) ? "" : `, ${percent(part.probability)} likely`;
  element.createCaption().textContent = `${visible(part.text)}${known}`;
  const rows = [...part.others];
  if (known && !rows.some(([text]) => text === part.text)) rows.push([part.text, part.probability]);
  for (const [text, probability] of rows) {
    const row = element.insertRow();
    row.classList.toggle("taken", text === part.text);
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = visible(text);
    row.append(name);
    const number = row.insertCell();
    number.className = "number";
    number.textContent = percent(probability);
    const room = row.insertCell();
    room.className = "room";
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.setProperty("--p", probability);
    room.append(bar);
  }
  return element;
}

function indexOf(event) {
  const element = event.target.closest?.(".token");
  return tokens.findIndex((token) => token.element === element);
}

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

function step(event) {
  const by = STEPS[event.key];
  if (by === undefined || !tokens.length) return;
  event.preventDefault();
  choose(Math.min(Math.max(chosen + by, 0), tokens.length - 1));
  tokens[chosen].element.scrollIntoView({ block: "nearest" });
}

// --- attention ---

/** Shows the attention in the prompt and what has been generated. */
async function attend() {
  const prompt = find("given").textContent + tokens.map((token) => token.text).join("") || find("prompt").value;
  const fetched = async (request) => (await ask("/attention", { prompt, ...request })).json();
  find("attention-error").hidden = true;
  find("attend").disabled = true;
  try {
    const { layers, heads, ...found } = await fetched({});
    const load = async (layer) => (await fetched({ layer })).weights;
    await show(find("view"), { ...found, layers: [...Array(layers).keys()], heads: [...Array(heads).keys()], load });
  } catch (error) {
    complain("attention-error", error);
  }
  find("attend").disabled = false;
}

// --- the page ---

async function loadModel() {
  try {
    const response = await ask("/v1/models");
    model = (await response.json()).data[0].id;
    find("model").textContent = model;
    document.title = `${model} - tvm_attn`;
    find("error").hidden = true;
  } catch (error) {
    complain("error", error);
  }
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
find("stop").addEventListener("click", () => running?.abort());
find("copy").hidden = !navigator.clipboard; // which only trustworthy origins have: https and loopback
find("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(find("given").textContent + tokens.map((token) => token.text).join(""));
  find("say").textContent = "Copied";
});
find("key").addEventListener("change", loadModel);
find("attend").addEventListener("click", attend);
for (const kind of ["pointerover", "click"]) {
  find("tokens").addEventListener(kind, (event) => choose(indexOf(event)));
}
find("tokens").addEventListener("keydown", step);
find("tokens").addEventListener("focus", () => choose(Math.max(chosen, 0)));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    find("form").requestSubmit();
  }
});
loadModel();
