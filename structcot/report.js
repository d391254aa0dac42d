"use strict";

// Charts: the pointer or the arrow keys choose a position; its texts replace those of the last step in the legend.
const readouts = JSON.parse(document.getElementById("chart-data").textContent);

function nearest(sorted, value) {
  let low = 0;
  let high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return value - sorted[low] < sorted[high] - value ? low : high;
}

function enliven(plot) {
  const { x, at, texts } = readouts[plot.dataset.chart];
  const cross = plot.querySelector(".cross");
  const legend = plot.parentElement.querySelector(".legend");
  const fields = [legend.querySelector(".at"), ...legend.querySelectorAll("b")];
  const atRest = fields.map((field) => field.textContent);
  let current = x.length - 1;

  function show(index) {
    current = Math.max(0, Math.min(x.length - 1, index));
    const here = [at[current], ...texts.map((series) => series[current])];
    fields.forEach((field, place) => (field.textContent = here[place]));
    cross.style.left = `${x[current]}%`;
    cross.hidden = false;
    plot.setAttribute("aria-valuenow", current);
    plot.setAttribute("aria-valuetext", legend.textContent);
  }
  function rest() {
    fields.forEach((field, place) => (field.textContent = atRest[place]));
    cross.hidden = true;
  }

  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-valuemin", 0);
  plot.setAttribute("aria-valuemax", x.length - 1);
  plot.setAttribute("aria-valuenow", current);
  plot.setAttribute("aria-valuetext", legend.textContent);
  for (const kind of ["pointerdown", "pointermove"]) {
    plot.addEventListener(kind, (event) => {
      const box = plot.getBoundingClientRect();
      show(nearest(x, (100 * (event.clientX - box.left)) / box.width));
    });
  }
  plot.addEventListener("pointerleave", rest);
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", (event) => {
    const far = Math.ceil(x.length / 20);
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -far, PageUp: far, Home: -x.length, End: x.length };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(cross.hidden && event.key === "ArrowLeft" ? current : current + moves[event.key]);
  });
}

document.querySelectorAll(".plot").forEach(enliven);

// The data proof: a token says its number, its id and what it is trained as.
const box = document.querySelector(".tokens");
if (box) {
  const tokens = [...box.querySelectorAll(".run > span")];
  const readout = document.querySelector(".token-readout");
  let current = -1;
  const choose = (index) => {
    tokens[current]?.classList.remove("current");
    current = Math.max(0, Math.min(tokens.length - 1, index));
    const token = tokens[current];
    token.classList.add("current");
    readout.textContent = `${token.title}, ${token.parentElement.dataset.kind}: ${JSON.stringify(token.textContent)}`;
  };
  for (const kind of ["pointerover", "click"]) {
    box.addEventListener(kind, (event) => {
      const token = event.target.closest(".run > span");
      if (token) choose(tokens.indexOf(token));
    });
  }
  box.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    choose(current + move);
    tokens[current].scrollIntoView({ block: "nearest" });
  });
}
