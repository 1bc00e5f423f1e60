// A view of attention: every head of every layer as a small picture, and one head in detail.
// Needs nothing but the element that it fills, and the colors of page.css.

const LEAST = 0.01; // weaker lines are not drawn
const LISTED = 5;
const PICTURE = 128; // most pixels of a small picture's side
const ROW = 20; // pixels of a token in the detail
const SVG = "http://www.w3.org/2000/svg";

/**
 * Fills `element` with a view.
 *
 * tokens: the T tokens as text.
 * layers, heads: the numbers of those that are shown.
 * lens: for the input and after each layer, for each token, the likeliest next tokens, best first, as [text, probability];
 *     empty for none.
 * load: load(layer) promises the weights of a layer as the server writes them. It is called for each layer in turn, then
 *     again when a head of a layer other than the last one used is chosen, so that one layer at a time is in memory.
 */
export async function show(element, { tokens, layers, heads, lens, load }) {
  const grid = make("div", { className: "heads", role: "group", ariaLabel: "Heads; arrow keys choose one" });
  grid.style.setProperty("--heads", heads.length);
  const pictures = [];
  for (const layer of layers) {
    for (const head of heads) {
      const picture = make("button", { type: "button", className: "head", tabIndex: pictures.length ? -1 : 0 });
      picture.ariaLabel = picture.title = `Layer ${layer}, head ${head}`;
      picture.ariaPressed = "false";
      const side = Math.ceil(tokens.length / perPixel(tokens.length));
      picture.append(make("canvas", { width: side, height: side }));
      pictures.push(picture);
    }
  }
  grid.append(...pictures);
  const detail = make("div", { className: "detail" });
  const guesses = make("div", { className: "lens" });
  element.replaceChildren(grid, detail, guesses);
  const state = { tokens, layers, heads, lens, load, pictures, detail, guesses };
  Object.assign(state, { loaded: null, chosen: -1, token: tokens.length - 1 });

  grid.addEventListener("click", (event) => {
    const index = pictures.indexOf(event.target.closest("button"));
    if (index >= 0) choose(state, index);
  });
  grid.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: heads.length, ArrowUp: -heads.length };
    const next = pictures.indexOf(document.activeElement) + (steps[event.key] ?? NaN);
    if (!(next in pictures)) return;
    event.preventDefault();
    pictures[next].focus();
    choose(state, next);
  });

  for (const [row, layer] of layers.entries()) {
    const weights = await weightsOf(state, layer);
    if (!grid.isConnected) return; // another view has taken its place
    for (const column of heads.keys()) draw(pictures[row * heads.length + column], weights[column], tokens.length);
    if (row === 0) await choose(state, 0);
  }
}

function make(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}

/** The weights of a layer: of each head a function of (to, from), with which token `to` attends to `from` <= `to`. */
async function weightsOf(state, layer) {
  if (state.loaded?.layer !== layer) {
    state.loaded = { layer, weights: state.load(layer).then((text) => unpack(text, state)) };
  }
  return state.loaded.weights;
}

/** Base64 of zlib of the rows of each head's lower triangle, one after the other: 16 bits each, in ten-thousandths. */
async function unpack(text, { tokens: { length }, heads }) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const view = new DataView(await new Response(stream).arrayBuffer());
  const size = (length * (length + 1)) / 2;
  return heads.map((_, head) => (to, from) =>
    view.getUint16(2 * (head * size + (to * (to + 1)) / 2 + from), true) / 10000);
}

/** How many tokens a pixel of a small picture stands for, in each direction. */
const perPixel = (size) => Math.ceil(size / PICTURE);

/** Each pixel shows the largest of the weights that it stands for. */
function draw(picture, weight, size) {
  const canvas = picture.firstChild;
  const [side, step] = [canvas.width, perPixel(size)];
  const largest = new Float32Array(side * side);
  for (let to = 0; to < size; to++) {
    const row = Math.floor(to / step) * side;
    for (let from = 0; from <= to; from++) {
      const place = row + Math.floor(from / step);
      largest[place] = Math.max(largest[place], weight(to, from));
    }
  }
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(picture).color;
  for (const [place, share] of largest.entries()) {
    context.globalAlpha = Math.sqrt(share); // so that weak ones are seen
    if (share > 0) context.fillRect(place % side, Math.floor(place / side), 1, 1);
  }
}

// --- one head ---

async function choose(state, index) {
  const { pictures, layers, heads } = state;
  state.chosen = index;
  for (const [place, picture] of pictures.entries()) {
    picture.tabIndex = place === index ? 0 : -1;
    picture.ariaPressed = String(place === index);
  }
  const layer = layers[Math.floor(index / heads.length)];
  const weights = await weightsOf(state, layer);
  if (state.chosen === index) detail(state, weights[index % heads.length]);
}

function detail(state, weight) {
  const { tokens } = state;
  const title = make("h3", { textContent: state.pictures[state.chosen].ariaLabel });
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
    if (state.lens.length) state.guesses.replaceChildren(lensTable(state, token));
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

/** What the model would say after a token, if each layer were the last one. */
function lensTable({ tokens, lens }, token) {
  const table = make("table");
  table.createCaption().textContent = `The next token after ${visible(tokens[token])}, if the layers ended there`;
  for (const [number, guesses] of lens.entries()) {
    const row = table.insertRow();
    row.append(make("th", { scope: "row", textContent: number ? `layer ${number - 1}` : "input" }));
    for (const [text, probability] of guesses[token]) {
      const cell = row.insertCell();
      cell.append(make("span", { textContent: visible(text) }), ` ${(probability * 100).toFixed(0)} %`);
      cell.style.setProperty("--share", probability);
    }
  }
  return table;
}

function line(to, from, share) {
  const path = document.createElementNS(SVG, "path");
  const [left, right] = [(to + 0.5) * ROW, (from + 0.5) * ROW];
  path.setAttribute("d", `M0 ${left}C50 ${left} 50 ${right} 100 ${right}`);
  path.style.setProperty("opacity", Math.max(Math.sqrt(share), 0.15));
  return path;
}

/** A token with characters that show nothing, or turn the text around them, as their numbers. */
const visible = (text) =>
  text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\p{C}\p{Z}]/gu, number) || "∅";

const number = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
