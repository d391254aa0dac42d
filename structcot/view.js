"use strict";

// Everything that comes from the records reaches the page as text nodes and attribute values, never as markup.
const byId = (id) => document.getElementById(id);
const facts = JSON.parse(byId("facts").textContent);
const KNOWN_TYPES = 7;
const HEIGHTS = [7, 10, 14, 20, 12, 16, 18, 9];
const BACKTRACKING = facts.types.indexOf("backtracking");
const isComparison = facts.files.length > 1;
const ROW_PIXELS = isComparison ? 104 : 82;
const SLICE_MS = 12;
// A search for one letter would mark thousands of places of one text and make its page slow; they are all counted.
const MAX_MARKS = 500;
const SVG = "http://www.w3.org/2000/svg";

const list = byId("list");
const rows = byId("rows");
const detail = byId("detail");
const tip = byId("tip");

const count = (number) => number.toLocaleString("en");
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const styleOf = (type) => `t${Math.min(type, KNOWN_TYPES)}`;
// Signs that act unseen are shown by their pictures, one for one, so that offsets stay true.
const picture = (sign) => (sign === "\x7f" ? "\u2421" : String.fromCharCode(0x2400 + sign.charCodeAt(0)));
const visible = (text) => text.replace(/[\0-\x08\x0b\x0c\x0e-\x1f\x7f]/g, picture);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = visible(text);
  return element;
}

function drawn(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// ---- The records

function unfold(row) {
  const trace = Object.fromEntries(facts.fields.map((name, place) => [name, row[place]]));
  const [start, end] = trace.bounds;
  const num = trace.steps.length / 3;
  Object.assign(trace, { num, starts: new Int32Array(num), ends: new Int32Array(num), types: new Uint16Array(num), length: end - start });
  let place = start;
  let turned = 0;
  for (let step = 0; step < num; step++) {
    trace.starts[step] = place + trace.steps[3 * step];
    place = trace.ends[step] = trace.starts[step] + trace.steps[3 * step + 1];
    trace.types[step] = trace.steps[3 * step + 2];
    if (trace.types[step] === BACKTRACKING) turned += trace.ends[step] - trace.starts[step];
  }
  delete trace.steps;
  trace.has = new Set(trace.types);
  trace.backtracking = trace.length ? turned / trace.length : 0;
  return trace;
}

function pairUp(trace, other, flat) {
  trace.other = other;
  other.other = trace;
  trace.kinds = facts.kinds.map(() => 0);
  for (const side of [trace, other]) Object.assign(side, { partner: new Int32Array(side.num).fill(-1), kind: new Uint8Array(side.num) });
  for (let at = 0; at < flat.length; at += 3) {
    const [kind, here, there] = [flat[at], flat[at + 1], flat[at + 2]];
    trace.kinds[kind]++;
    if (here >= 0) [trace.partner[here], trace.kind[here]] = [there, kind];
    if (there >= 0) [other.partner[there], other.kind[there]] = [here, kind];
  }
  trace.differences = trace.num + other.num ? 1 - (2 * trace.kinds[0]) / (trace.num + other.num) : 0;
}

const traces = [...document.querySelectorAll("script.record")].map((node, index) => {
  const [row, otherRow, links] = JSON.parse(node.textContent);
  node.remove();
  const trace = unfold(row);
  if (links) pairUp(trace, unfold(otherRow), links);
  const start = trace.question || trace.text.slice(trace.bounds[0], trace.bounds[0] + 300);
  return Object.assign(trace, { index, hits: 0, title: start.slice(0, 300).replace(/\s+/g, " ").trim() });
});

const sidesOf = (trace) => (trace.other ? [trace, trace.other] : [trace]);
const state = (trace) => (trace.is_closed ? "finished" : trace.defect === "no thought tags" ? "no tags" : "not finished");

const gradeOf = (trace) => ({ 1: "\u2713 correct", 0: "\u2717 wrong" })[trace.is_correct] ?? "";

// ---- Strips

function stretched(name, height) {
  return drawn("svg", { viewBox: `0 0 1000 ${height}`, preserveAspectRatio: "none", class: name, "aria-hidden": "true" });
}

function stepPath(trace, wanted, scale, height) {
  const start = trace.bounds[0];
  let path = "";
  for (let step = 0; step < trace.num; step++) {
    if (!wanted(step)) continue;
    const left = (trace.starts[step] - start) * scale;
    const width = (trace.ends[step] - trace.starts[step]) * scale;
    // A thin seam parts wide neighbours of one type; a narrow step is never thinner than can be seen.
    path += `M${left.toFixed(2)} 20h${Math.max(1.2, width > 4 ? width - 0.8 : width).toFixed(2)}V${20 - height}H${left.toFixed(2)}z`;
  }
  return path;
}

function strip(trace, side = 0, longest = trace.length) {
  const svg = stretched(`strip${side ? " flip" : ""}`, 20);
  const scale = 1000 / Math.max(1, longest);
  svg.append(drawn("rect", { class: "floor", width: Math.max(1, trace.length * scale), y: 19, height: 1 }));
  for (const type of trace.has) {
    const path = stepPath(trace, (step) => trace.types[step] === type, scale, HEIGHTS[Math.min(type, KNOWN_TYPES)]);
    svg.append(drawn("path", { class: styleOf(type), d: path }));
  }
  Object.assign(svg, { trace, scale });
  return svg;
}

function stepUnder(event) {
  const svg = event.target.closest?.(".strip");
  if (!svg) return null;
  const box = svg.getBoundingClientRect();
  const { trace, scale } = svg;
  const place = trace.bounds[0] + ((event.clientX - box.left) / box.width) * 1000 / scale;
  let low = 0;
  let high = trace.num;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (trace.ends[middle] <= place) low = middle + 1;
    else high = middle;
  }
  return low < trace.num && trace.starts[low] <= place ? { trace, step: low } : null;
}

function describe(trace, step) {
  const size = trace.ends[step] - trace.starts[step];
  const fate = trace.other ? `, ${fateOf(trace, step)}` : "";
  return `Step ${count(step + 1)} of ${count(trace.num)}: ${facts.types[trace.types[step]]}, ${plural(size, "character")}${fate}`;
}

function fateOf(trace, step) {
  const kind = facts.kinds[trace.kind[step]];
  const partner = trace.partner[step];
  return partner >= 0 ? `${kind}, there step ${count(partner + 1)}` : kind;
}

document.addEventListener("pointermove", (event) => {
  const under = event.pointerType === "touch" ? null : stepUnder(event);
  tip.hidden = !under;
  if (!under) return;
  const { trace, step } = under;
  const start = trace.text.slice(trace.starts[step], Math.min(trace.ends[step], trace.starts[step] + 90));
  tip.textContent = visible(`${describe(trace, step)}: ${start.trim()}`);
  const right = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 16 + tip.offsetHeight < innerHeight;
  tip.style.transform = `translate(${Math.max(4, right)}px, ${below ? event.clientY + 16 : event.clientY - tip.offsetHeight - 10}px)`;
  if (detail.contains(event.target)) light(trace, step);
});

// ---- The list: only the rows in view are in the document

let shown = traces.map((_, index) => index);
let current = -1;
let isOpen = false;
const rendered = new Map();

function rowOf(index, place) {
  const trace = traces[index];
  const row = make("div", "row");
  row.id = `row-${index + 1}`;
  row.setAttribute("role", "option");
  const line = make("div", "title");
  line.append(make("b", "", count(index + 1)), make("span", "", trace.title || "(no text)"));
  const meta = make("div", "meta");
  if (trace.hits) meta.append(make("span", "hits", plural(trace.hits, "hit")));
  if (gradeOf(trace)) meta.append(make("span", trace.is_correct ? "good" : "bad", gradeOf(trace)));
  meta.append(make("span", trace.is_closed ? "" : "bad", state(trace)), make("span", "", plural(trace.num, "step")));
  meta.append(make("span", "", plural(trace.length, "character")));
  for (const [kind, number] of (trace.kinds ?? []).entries()) {
    if (kind && number) meta.append(make("span", "", `${count(number)} ${facts.kinds[kind]}`));
  }
  if (isComparison && !trace.other) meta.append(make("span", "bad", trace.side ? "only in the other file" : "only in the first file"));
  if (trace.defect) meta.append(make("span", "bad", trace.defect));
  meta.append(make("span", "faint", [trace.name, trace.source].filter(Boolean).join(", ")));
  const longest = Math.max(...sidesOf(trace).map((side) => side.length));
  row.append(line, meta, ...sidesOf(trace).map((side, which) => strip(side, which, longest)));
  row.onclick = (event) => {
    open(index);
    const under = stepUnder(event);
    if (under) goTo(under.trace, under.step);
  };
  row.setAttribute("aria-posinset", place + 1);
  row.setAttribute("aria-setsize", shown.length);
  return row;
}

function renderRows() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_PIXELS) - 4);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW_PIXELS) + 4);
  const wanted = new Set();
  for (let place = first; place < last; place++) wanted.add(place);
  for (const [place, row] of rendered) {
    if (wanted.has(place)) continue;
    row.remove();
    rendered.delete(place);
  }
  for (const place of wanted) {
    const index = shown[place];
    let row = rendered.get(place);
    if (!row) {
      row = rowOf(index, place);
      row.style.transform = `translateY(${place * ROW_PIXELS}px)`;
      rendered.set(place, row);
      rows.append(row);
    }
    row.classList.toggle("current", index === current);
    row.setAttribute("aria-selected", index === current);
  }
  if (byId(`row-${current + 1}`)) list.setAttribute("aria-activedescendant", `row-${current + 1}`);
  else list.removeAttribute("aria-activedescendant");
}

function refill() {
  rendered.clear();
  rows.replaceChildren();
  rows.style.height = `${shown.length * ROW_PIXELS}px`;
  const nothing = traces.length ? "No trace fits the search and the filters." : "There are no traces in the file.";
  if (!shown.length) rows.append(make("p", "empty", nothing));
  renderRows();
}

function reveal(index) {
  const place = shown.indexOf(index);
  if (place < 0) return;
  const top = place * ROW_PIXELS;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW_PIXELS > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_PIXELS - list.clientHeight;
}

list.addEventListener("scroll", renderRows, { passive: true });
new ResizeObserver(renderRows).observe(list);

function choose(index) {
  current = index;
  reveal(index);
  renderRows();
  if (isOpen) open(index);
}

function move(by) {
  if (!shown.length) return;
  const place = shown.indexOf(current);
  choose(shown[Math.max(0, Math.min(shown.length - 1, place < 0 ? 0 : place + by))]);
}

// ---- Filters, sorting and search

const pressed = new Set();
let pattern = null;
let searching = 0;

const ORDERS = {
  file: null,
  longest: (one, other) => other.length - one.length,
  shortest: (one, other) => one.length - other.length,
  "most-steps": (one, other) => other.num - one.num,
  "fewest-steps": (one, other) => one.num - other.num,
  backtracking: (one, other) => other.backtracking - one.backtracking,
  differences: (one, other) => (other.differences ?? -1) - (one.differences ?? -1),
};
const STATES = {
  finished: (trace) => trace.is_closed,
  unfinished: (trace) => state(trace) === "not finished",
  defect: (trace) => trace.defect,
};
const MATCHES = {
  differ: (trace) => trace.other && trace.differences > 0,
  same: (trace) => trace.other && trace.differences === 0,
  here: (trace) => !trace.other && !trace.side,
  there: (trace) => trace.side,
};

function fits(trace) {
  const least = Number(byId("least").value) || 0;
  const [shownState, grade, match] = [byId("state").value, byId("grade").value, byId("match")?.value];
  if (shownState && !STATES[shownState](trace)) return false;
  if (grade && trace.is_correct !== Number(grade)) return false;
  if (match && !MATCHES[match](trace)) return false;
  if (pattern && !trace.hits) return false;
  return trace.num >= least && [...pressed].every((type) => trace.has.has(type));
}

function apply(isSearching = false) {
  const order = ORDERS[byId("sort").value];
  const fitting = traces.filter(fits);
  if (order) fitting.sort(order);
  shown = fitting.map((trace) => trace.index);
  const hits = fitting.reduce((sum, trace) => sum + trace.hits, 0);
  const part = shown.length === traces.length ? "" : `${count(shown.length)} of `;
  const found = pattern ? `, ${plural(hits, "hit")}` : "";
  byId("count").textContent = part + plural(traces.length, "trace") + found + (isSearching ? ", searching\u2026" : "");
  refill();
}

function hitsIn(text) {
  const hits = [];
  if (!pattern) return hits;
  for (const hit of text.matchAll(pattern)) {
    if (hits.length === 2 * MAX_MARKS) break;
    hits.push(hit.index, hit.index + hit[0].length);
  }
  return hits;
}

function numHits(text) {
  let number = 0;
  for (pattern.lastIndex = 0; pattern.exec(text); ) number++;
  return number;
}

// The texts are read in short slices, so that keys are answered while a search runs; the next one stops it.
function search() {
  const words = byId("query").value;
  const run = ++searching;
  pattern = words ? new RegExp(words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "gi") : null;
  let next = 0;
  let told = performance.now();
  for (const trace of traces) trace.hits = 0;
  const slice = () => {
    if (run !== searching) return;
    const begun = performance.now();
    while (pattern && next < traces.length && performance.now() - begun < SLICE_MS) {
      const trace = traces[next++];
      trace.hits = numHits(trace.question) + sidesOf(trace).reduce((sum, side) => sum + numHits(side.text), 0);
    }
    if (pattern && next < traces.length) {
      if (performance.now() - told > 150) {
        apply(true);
        told = performance.now();
      }
      setTimeout(slice);
      return;
    }
    list.scrollTop = 0;
    apply();
    if (isOpen) fill(traces[current]);
  };
  slice();
}

let pause = 0;
byId("query").addEventListener("input", () => {
  clearTimeout(pause);
  pause = setTimeout(search, 120);
});
for (const id of ["sort", "state", "grade", "match", "least"]) {
  byId(id)?.addEventListener("input", () => {
    list.scrollTop = 0;
    apply();
  });
}

facts.types.forEach((name, type) => {
  const number = traces.filter((trace) => trace.has.has(type)).length;
  const button = make("button", `type ${styleOf(type)}`);
  button.type = "button";
  button.title = `Only traces with a step of this type: ${plural(number, "trace")}`;
  button.setAttribute("aria-pressed", "false");
  const swatch = drawn("svg", { viewBox: "0 0 10 20", class: "swatch", "aria-hidden": "true" });
  const height = HEIGHTS[Math.min(type, KNOWN_TYPES)];
  swatch.append(drawn("rect", { class: styleOf(type), y: 20 - height, width: 10, height }));
  button.append(swatch, make("span", "", name), make("small", "", count(number)));
  button.onclick = () => {
    if (!pressed.delete(type)) pressed.add(type);
    button.setAttribute("aria-pressed", pressed.has(type));
    list.scrollTop = 0;
    apply();
  };
  byId("types").append(button);
});

// ---- One trace

function writeText(parent, text, start, end, hits) {
  let place = start;
  for (let at = 0; at < hits.length && hits[at] < end; at += 2) {
    if (hits[at + 1] <= start) continue;
    const [from, to] = [Math.max(start, hits[at]), Math.min(end, hits[at + 1])];
    parent.append(visible(text.slice(place, from)), make("mark", "", text.slice(from, to)));
    place = to;
  }
  parent.append(visible(text.slice(place, end)));
  return parent;
}

// Hits are in order: each piece looks only at those that begin before it ends, and the pieces before it have used up the earlier ones.
function writer(text) {
  const hits = hitsIn(text);
  let used = 0;
  return (parent, start, end) => {
    while (used < hits.length && hits[used + 1] <= start) used += 2;
    let last = used;
    while (last < hits.length && hits[last] < end) last += 2;
    return writeText(parent, text, start, end, hits.slice(used, last));
  };
}

function stepBlock(trace, step, write) {
  const block = make("div", `step ${styleOf(trace.types[step])}`);
  const label = make("div", "label");
  label.append(make("b", "", facts.types[trace.types[step]]), make("small", "", count(step + 1)));
  if (trace.other) {
    label.append(make("small", `kind k-${facts.kinds[trace.kind[step]]}`, fateOf(trace, step)));
    block.classList.add(`k-${facts.kinds[trace.kind[step]]}`);
  }
  // White space at either end of a step belongs to it, but would only be a gap in its block.
  const text = trace.text.slice(trace.starts[step], trace.ends[step]);
  const from = trace.starts[step] + text.length - text.trimStart().length;
  block.append(label, write(make("div", "text"), from, from + text.trim().length));
  block.tabIndex = step ? -1 : 0;
  Object.assign(block, { trace, step });
  return block;
}

function outside(parent, trace, write, start, end) {
  if (trace.text.slice(start, end).trim()) parent.append(write(make("div", "outside"), start, end));
}

function textOf(trace, title) {
  const [thoughtStart, thoughtEnd, solutionStart, solutionEnd] = trace.bounds;
  const write = writer(trace.text);
  const column = make("section", "column");
  if (title) column.append(make("p", "file", title));
  outside(column, trace, write, 0, thoughtStart);
  column.append(make("h3", "", "Thought"));
  trace.blocks = [];
  let place = thoughtStart;
  for (let step = 0; step < trace.num; step++) {
    outside(column, trace, write, place, trace.starts[step]);
    trace.blocks.push(stepBlock(trace, step, write));
    column.append(trace.blocks[step]);
    place = trace.ends[step];
  }
  outside(column, trace, write, place, thoughtEnd);
  outside(column, trace, write, thoughtEnd, Math.max(thoughtEnd, solutionStart));
  if (solutionEnd > solutionStart) {
    column.append(make("h3", "", "Solution"), write(make("div", "solution text"), solutionStart, solutionEnd));
  }
  outside(column, trace, write, Math.max(thoughtEnd, solutionEnd), trace.text.length);
  return column;
}

const centre = (trace, step, scale) => (((trace.starts[step] + trace.ends[step]) / 2 - trace.bounds[0]) * scale).toFixed(1);

function linkPath(trace, step, scale) {
  return `M${centre(trace, step, scale)} 0L${centre(trace.other, trace.partner[step], scale)} 40`;
}

function bands(trace, scale, side) {
  const svg = stretched(`bands${side ? " flip" : ""}`, 20);
  for (let kind = 1; kind < facts.kinds.length; kind++) {
    const path = stepPath(trace, (step) => trace.kind[step] === kind, scale, 20);
    if (path) svg.append(drawn("path", { class: `k-${facts.kinds[kind]}`, d: path }));
  }
  return svg;
}

function drawing(trace) {
  const figure = make("figure", "picture");
  if (!trace.other) {
    figure.append(strip(trace));
    return figure;
  }
  const longest = Math.max(trace.length, trace.other.length, 1);
  const scale = 1000 / longest;
  const links = stretched("links", 40);
  const paths = { moved: "", changed: "" };
  for (let step = 0; step < trace.num; step++) {
    const kind = facts.kinds[trace.kind[step]];
    if (kind in paths) paths[kind] += linkPath(trace, step, scale);
  }
  for (const [kind, path] of Object.entries(paths)) links.append(drawn("path", { class: `k-${kind}`, d: path }));
  links.append(drawn("path", { class: "lit" }));
  const [here, there] = sidesOf(trace).map((side, which) => [strip(side, which, longest), bands(side, scale, which)]);
  figure.append(...here, links, there[1], there[0]);
  const legend = make("figcaption", "kinds");
  facts.kinds.forEach((kind, number) => legend.append(make("span", `kind k-${kind}`, `${count(trace.kinds[number])} ${kind}`)));
  figure.append(legend);
  return figure;
}

function button(text, label, act) {
  const made = make("button", "", text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.onclick = act;
  return made;
}

function heading(trace) {
  const head = make("div", "bar");
  head.append(button("\u2190 List", "Back to the list", close), make("h2", "", `Trace ${count(trace.index + 1)}`));
  head.append(button("\u2191", "Previous trace", () => move(-1)), button("\u2193", "Next trace", () => move(1)));
  const sizes = [plural(trace.num, "step"), plural(trace.length, "character"), `${(100 * trace.backtracking).toFixed(1)} % backtracking`];
  const meta = make("p", "meta", [state(trace), gradeOf(trace), ...sizes, trace.name, trace.source].filter(Boolean).join(" \u00b7 "));
  const wrong = sidesOf(trace).flatMap((side) => [side.defect, side.note].filter(Boolean).map((text) => `${side.source}: ${text}.`));
  return [head, meta, ...wrong.map((text) => make("p", "warning", text))];
}

function fill(trace) {
  for (const side of detail.trace ? sidesOf(detail.trace) : []) side.blocks = null;
  const columns = make("div", "columns");
  const names = isComparison ? facts.files.map((name, place) => `${place ? "Other" : "First"}: ${name}`) : [""];
  columns.append(...sidesOf(trace).map((side, which) => textOf(side, trace.other ? names[which] : names[trace.side])));
  const question = make("details", "question");
  question.open = !trace.other;
  question.append(make("summary", "", "Question"), writer(trace.question)(make("div", "text"), 0, trace.question.length));
  const isCut = trace.hits > MAX_MARKS ? ` At most ${count(MAX_MARKS)} hits of a text are marked.` : "";
  const readout = make("p", "readout", `Point at a step, or walk through them with [ and ].${isCut}`);
  readout.setAttribute("role", "status");
  detail.replaceChildren(...heading(trace), drawing(trace), readout, ...(trace.question ? [question] : []), columns);
  detail.classList.toggle("pair", Boolean(trace.other));
  Object.assign(detail, { trace, readout, columns });
}

function open(index) {
  const hadFocus = detail.contains(document.activeElement);
  const wasOpen = isOpen;
  [current, isOpen] = [index, true];
  document.body.classList.add("open");
  detail.hidden = false;
  fill(traces[index]);
  detail.scrollTop = 0;
  if (hadFocus) detail.focus({ preventScroll: true });
  history.replaceState(null, "", `#trace=${index + 1}`);
  if (!wasOpen) reveal(index);
  renderRows();
}

function close() {
  isOpen = false;
  document.body.classList.remove("open");
  detail.hidden = true;
  detail.replaceChildren();
  history.replaceState(null, "", "#");
  reveal(current);
  renderRows();
  list.focus();
}

// ---- Steps: what is pointed at lights up, with its partner

let lit = [];

function light(trace, step) {
  for (const block of lit) block.classList.remove("lit");
  const partner = trace.other ? trace.partner[step] : -1;
  lit = [trace.blocks?.[step], partner >= 0 ? trace.other.blocks?.[partner] : null].filter(Boolean);
  for (const block of lit) block.classList.add("lit");
  if (detail.readout) detail.readout.textContent = visible(describe(trace, step));
  const path = detail.querySelector(".links .lit");
  if (!path) return;
  const first = detail.trace;
  const here = trace === first ? step : partner;
  path.setAttribute("d", partner >= 0 ? linkPath(first, here, 1000 / Math.max(first.length, first.other.length, 1)) : "");
}

function goTo(trace, step, hasFocus = false) {
  const block = trace.blocks[step];
  block.scrollIntoView({ block: "center" });
  if (hasFocus) block.focus({ preventScroll: true });
  light(trace, step);
}

function goToPartner(trace, step) {
  if (trace.other && trace.partner[step] >= 0) goTo(trace.other, trace.partner[step]);
}

function walk(by) {
  const block = document.activeElement?.closest?.(".step");
  const trace = block?.trace ?? detail.trace;
  if (!trace.num) return;
  const step = block ? block.step + by : 0;
  goTo(trace, Math.max(0, Math.min(trace.num - 1, step)), true);
}

function walkHits(by) {
  const marks = [...detail.querySelectorAll("mark")];
  if (!marks.length) return;
  const last = marks.findIndex((mark) => mark.classList.contains("here"));
  const hit = last < 0 ? (by > 0 ? 0 : marks.length - 1) : (last + by + marks.length) % marks.length;
  marks[last]?.classList.remove("here");
  marks[hit].classList.add("here");
  marks[hit].closest("details")?.setAttribute("open", "");
  marks[hit].scrollIntoView({ block: "center" });
  detail.readout.textContent = `Hit ${count(hit + 1)} of ${count(marks.length)}`;
}

for (const kind of ["pointerover", "focusin"]) {
  detail.addEventListener(kind, (event) => {
    const block = event.target.closest(".step");
    if (block) light(block.trace, block.step);
  });
}
detail.addEventListener("click", (event) => {
  const under = stepUnder(event);
  if (under) {
    goTo(under.trace, under.step);
    goToPartner(under.trace, under.step);
    return;
  }
  const block = event.target.closest(".step");
  if (block && getSelection().isCollapsed) goToPartner(block.trace, block.step);
});

// ---- Keys

const inPage = () => Math.max(1, Math.floor(list.clientHeight / ROW_PIXELS) - 1);
const ANYWHERE = {
  j: () => move(1),
  k: () => move(-1),
  "/": () => byId("query").focus(),
  "?": () => byId("keys").showModal(),
  n: () => isOpen && walkHits(1),
  p: () => isOpen && walkHits(-1),
  "[": () => isOpen && walk(-1),
  "]": () => isOpen && walk(1),
  Escape: () => {
    if (isOpen) return close();
    byId("query").value = "";
    search();
  },
};
const IN_LIST = {
  ArrowDown: () => move(1),
  ArrowUp: () => move(-1),
  PageDown: () => move(inPage()),
  PageUp: () => move(-inPage()),
  Home: () => move(-traces.length),
  End: () => move(traces.length),
  Enter: () => {
    if (current < 0) move(0);
    if (current < 0) return;
    open(current);
    detail.focus({ preventScroll: true });
  },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  const at = event.target;
  if (at.matches("input, select")) {
    if (event.key === "Escape" || (event.key === "Enter" && at.id === "query")) {
      event.preventDefault();
      list.focus();
    }
    return;
  }
  const isInList = at === list || at === document.body;
  let act = ANYWHERE[event.key] ?? (isInList ? IN_LIST[event.key] : undefined);
  if (event.key === "Enter" && at.matches(".step")) act = () => goToPartner(at.trace, at.step);
  if (!act) return;
  event.preventDefault();
  act();
});
byId("help").onclick = ANYWHERE["?"];

// ---- Start

function openFromAddress() {
  const index = Number(/^#trace=(\d+)$/.exec(location.hash)?.[1]) - 1;
  if (index in traces && !(isOpen && index === current)) open(index);
}

if (facts.num_unusable) {
  const box = byId("unusable");
  box.hidden = false;
  box.querySelector("summary").textContent = `${plural(facts.num_unusable, "line")} without a trace`;
  box.querySelector("ul").append(...facts.unusable.map(([source, reason]) => make("li", "", `${source}: ${reason}`)));
  const rest = facts.num_unusable - facts.unusable.length;
  if (rest) box.querySelector("ul").append(make("li", "", `and ${count(rest)} more`));
}
byId("grade-label").hidden = traces.every((trace) => trace.is_correct < 0);
detail.tabIndex = -1;
document.documentElement.style.setProperty("--row", `${ROW_PIXELS}px`);
apply();
window.addEventListener("hashchange", openFromAddress);
openFromAddress();
