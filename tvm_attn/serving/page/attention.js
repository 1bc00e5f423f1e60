// A view of attention: every head of every layer as a small picture, and one head in detail.
// Needs nothing but the element that it fills, and the colors of page.css.

const LEAST = 0.01; // weaker lines are not drawn
const LISTED = 5;
const ROW = 20; // pixels of a token in the detail
const SVG = "http://www.w3.org/2000/svg";

/**
 * Fills `element` with a view.
 *
 * tokens: the T tokens as text.
 * layers, heads: how many there are.
 * load: load(layer) promises the weights of a layer: `heads` functions of (to, from), each weight a number from 0 to 1
 *     with which token `to` attends to token `from` <= `to`. It is called for each layer in turn, then again when a head
 *     of a layer other than the last one used is chosen, so that one layer at a time is in memory.
 */
export async function show(element, { tokens, layers, heads, load }) {
  const state = { tokens, layers, heads, load, loaded: null, layer: -1, head: -1, token: tokens.length - 1 };
  const grid = make("div", { className: "heads", role: "group", ariaLabel: "Heads; arrow keys choose one" });
  grid.style.setProperty("--heads", heads);
  const pictures = [];
  for (let layer = 0; layer < layers; layer++) {
    for (let head = 0; head < heads; head++) {
      const picture = make("button", { type: "button", className: "head", tabIndex: pictures.length ? -1 : 0 });
      picture.ariaLabel = `Layer ${layer + 1}, head ${head + 1}`;
      picture.title = picture.ariaLabel;
      picture.ariaPressed = "false";
      picture.append(make("canvas", { width: tokens.length, height: tokens.length }));
      pictures.push(picture);
    }
  }
  grid.append(...pictures);
  const detail = make("div", { className: "detail" });
  element.replaceChildren(grid, detail);
  Object.assign(state, { pictures, detail });

  const choose = (index) => chooseHead(state, Math.floor(index / heads), index % heads);
  grid.addEventListener("click", (event) => {
    const index = pictures.indexOf(event.target.closest("button"));
    if (index >= 0) choose(index);
  });
  grid.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: heads, ArrowUp: -heads };
    const next = pictures.indexOf(document.activeElement) + (steps[event.key] ?? NaN);
    if (!(next in pictures)) return;
    event.preventDefault();
    pictures[next].focus();
    choose(next);
  });

  for (let layer = 0; layer < layers; layer++) {
    const weights = await layerOf(state, layer);
    if (!grid.isConnected) return; // another view has taken its place
    for (let head = 0; head < heads; head++) draw(pictures[layer * heads + head], weights[head], tokens.length);
    if (layer === 0) await chooseHead(state, 0, 0);
  }
}

function make(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}

async function layerOf(state, layer) {
  if (state.loaded?.layer !== layer) state.loaded = { layer, weights: state.load(layer) };
  return state.loaded.weights;
}

function draw(picture, weight, size) {
  const canvas = picture.firstChild;
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(picture).color;
  for (let to = 0; to < size; to++) {
    for (let from = 0; from <= to; from++) {
      context.globalAlpha = Math.sqrt(weight(to, from)); // so that weak ones are seen
      if (context.globalAlpha > 0) context.fillRect(from, to, 1, 1);
    }
  }
}

// --- one head ---

async function chooseHead(state, layer, head) {
  state.pictures[state.layer * state.heads + state.head]?.setAttribute("aria-pressed", "false");
  Object.assign(state, { layer, head });
  for (const [index, picture] of state.pictures.entries()) {
    const isChosen = index === layer * state.heads + head;
    picture.tabIndex = isChosen ? 0 : -1;
    if (isChosen) picture.setAttribute("aria-pressed", "true");
  }
  const weights = await layerOf(state, layer);
  if (state.layer === layer && state.head === head) detail(state, weights[head]);
}

function detail(state, weight) {
  const { tokens } = state;
  const title = make("h3", { textContent: `Layer ${state.layer + 1}, head ${state.head + 1}` });
  const said = make("p", { className: "note", ariaLive: "polite" });
  const list = make("div", { className: "to", role: "listbox", tabIndex: 0 });
  list.ariaLabel = "Tokens; arrow keys choose the one whose attention is shown";
  const sources = make("div", { className: "from" });
  sources.setAttribute("aria-hidden", "true"); // `said` has it in words
  const targets = tokens.map((text, index) => {
    sources.append(make("span", { textContent: visible(text) }));
    const option = make("span", { textContent: visible(text), id: `to-${index}`, role: "option" });
    option.setAttribute("aria-selected", "false");
    return option;
  });
  list.append(...targets);
  const lines = document.createElementNS(SVG, "svg");
  lines.setAttribute("class", "lines");
  lines.setAttribute("aria-hidden", "true");
  lines.setAttribute("viewBox", `0 0 100 ${tokens.length * ROW}`);
  lines.setAttribute("preserveAspectRatio", "none");
  lines.style.setProperty("height", `${tokens.length * ROW}px`);
  const box = make("div", { className: "flow" });
  box.append(list, lines, sources);
  state.detail.replaceChildren(title, said, box);

  const select = (token) => {
    targets[state.token].setAttribute("aria-selected", "false");
    state.token = token;
    targets[token].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", targets[token].id);
    const shares = tokens.map((_, from) => (from <= token ? weight(token, from) : 0));
    lines.replaceChildren(...shares.map((share, from) => (share < LEAST ? "" : line(token, from, share))));
    for (const [from, source] of [...sources.children].entries()) source.style.setProperty("--share", shares[from]);
    const best = [...shares.entries()].filter(([, share]) => share >= LEAST / 2).sort((one, two) => two[1] - one[1]);
    const words = best.slice(0, LISTED).map(([from, share]) => `${visible(tokens[from])} ${(share * 100).toFixed(0)} %`);
    said.textContent = `${visible(tokens[token])} (${token + 1} of ${tokens.length}) attends to ${words.join(", ")}`;
  };
  const keep = (token) => {
    select(token);
    const top = token * ROW;
    if (top < box.scrollTop || top + ROW > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
  };
  list.addEventListener("keydown", (event) => {
    const next = { ArrowDown: state.token + 1, ArrowUp: state.token - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    if (next in tokens) keep(next);
  });
  for (const kind of ["pointerover", "click"]) {
    list.addEventListener(kind, (event) => {
      const token = targets.indexOf(event.target);
      if (token >= 0) select(token);
    });
  }
  keep(state.token);
}

function line(to, from, share) {
  const path = document.createElementNS(SVG, "path");
  const [left, right] = [(to + 0.5) * ROW, (from + 0.5) * ROW];
  path.setAttribute("d", `M0 ${left}C50 ${left} 50 ${right} 100 ${right}`);
  path.style.setProperty("opacity", Math.max(Math.sqrt(share), 0.15));
  return path;
}

const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
