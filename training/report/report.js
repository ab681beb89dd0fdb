// What moves in a report: pictures to compare, tables, curves; it starts explorer.js. Reads the JSON in #data.
"use strict";

const page = JSON.parse(document.getElementById("data").textContent);
const one = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

/** An element with attributes, listeners ("onclick": function) and children; texts are never read as HTML. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const plural = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** Call `draw` now and whenever the size of an element changes. */
function redrawn(element, draw) {
  draw();
  new ResizeObserver(draw).observe(element);
}

/** A canvas of as many pixels as the screen has there; drawing is in units of CSS. */
function fitted(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return { context, width, height };
}

// ------------------------------------------------------------------------------------------------- segmentations

class Comparison {
  constructor(root) {
    this.root = root;
    this.stage = one(".stage", root);
    this.examples = all("#examples .row").map((row, number) => ({
      row, number,
      pictures: all("figure", row).map((figure) => ({ image: one("img", figure), title: one("figcaption", figure).textContent })),
    }));
    this.names = new Map(page.legend.map(([name, colour]) => [colour.join(), name]));
    this.off = new Set();
    this.field = (name) => one(`[name="${name}"]`, root);
    const titles = page.titles;
    for (const side of ["left", "right"]) {
      this.field(side).append(...titles.map((title, number) => make("option", { value: number }, title)));
    }
    const [last, first] = [titles.length - 1, titles.indexOf("Baseline")];
    this.field("left").value = Math.max(first, 0);
    this.field("right").value = clamp(first + 1, 0, last);
    this.prepareOrder();
    this.prepareStage();
    this.prepareLegend();
    for (const example of this.examples) example.row.addEventListener("click", () => this.show(example));
    root.addEventListener("change", () => this.show(this.current));
    this.field("previous").addEventListener("click", () => this.step(-1));
    this.field("next").addEventListener("click", () => this.step(1));
    this.show(this.examples[0]);
  }

  prepareOrder() {
    const order = this.field("order");
    order.append(make("option", { value: "" }, "as in the data"));
    for (const title of Object.keys(page.miou[0])) {
      order.append(make("option", { value: `1 ${title}` }, `worst mIoU first: ${title}`));
      order.append(make("option", { value: `-1 ${title}` }, `best mIoU first: ${title}`));
    }
    order.addEventListener("change", () => {
      const [sign, ...title] = order.value.split(" ");
      const value = ({ number }) => (order.value ? sign * (page.miou[number][title.join(" ")] ?? Infinity) : number);
      this.examples.sort((a, b) => value(a) - value(b) || a.number - b.number);
      one("#examples").append(...this.examples.map(({ row }) => row));
      this.show(this.examples[0]);
    });
  }

  prepareStage() {
    const divider = this.field("divider");
    const move = () => this.stage.style.setProperty("--at", `${divider.value}%`);
    divider.addEventListener("input", move);
    this.stage.addEventListener("pointermove", (event) => {
      const box = this.stage.getBoundingClientRect();
      const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      if (event.buttons || event.pointerType === "mouse") {
        divider.value = 100 * x;
        move();
      }
      this.tell(x, y);
    });
    this.stage.addEventListener("pointerleave", () => this.tell());
  }

  prepareLegend() {
    const legend = one("#segmentations .legend");
    one(".side", this.root).append(legend);
    for (const item of all("li", legend)) {
      const name = item.textContent.trim();
      const toggle = () => {
        const hidden = button.getAttribute("aria-pressed") === "true";
        button.setAttribute("aria-pressed", !hidden);
        this.off[hidden ? "add" : "delete"](name);
        this.show(this.current);
      };
      const button = make("button", { type: "button", "aria-pressed": "true", title: "show or hide", onclick: toggle }, ...item.childNodes);
      item.replaceChildren(button);
    }
  }

  step(by) {
    const at = this.examples.indexOf(this.current) + by;
    this.show(this.examples[(at + this.examples.length) % this.examples.length]);
  }

  show(example) {
    this.current = example;
    for (const { row } of this.examples) row.classList.toggle("current", row === example.row);
    this.layer(one(".over", this.stage), example.pictures[this.field("left").value]);
    this.layer(one(".under", this.stage), example.pictures[this.field("right").value]);
    this.tell();
  }

  /** A photograph as it is; of a map the classes that are not hidden, over the faded photograph. */
  layer(canvas, { image }) {
    const photograph = this.current.pictures[0].image;
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.style.imageRendering = image === photograph ? "auto" : "pixelated";
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    if (image === photograph || !this.off.size) return;
    const map = context.getImageData(0, 0, canvas.width, canvas.height);
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalAlpha = 0.5;
    context.drawImage(photograph, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    const under = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let at = 0; at < map.data.length; at += 4) {
      if (this.off.has(this.names.get(map.data.slice(at, at + 3).join()))) map.data.set(under.data.subarray(at, at + 4), at);
    }
    context.putImageData(map, 0, 0);
  }

  /** What each map says at a point, in shares of width and height; without one its mIoU. */
  tell(x, y) {
    const [photograph, ...maps] = this.current.pictures;
    const score = (title) => page.miou[this.current.number][title];
    const lines = maps.map(({ image }, number) => {
      const title = page.titles[number + 1];
      const scored = score(title) === undefined ? "" : `mIoU ${score(title).toFixed(1)} %`;
      const told = x === undefined ? scored : this.classAt(image, x, y);
      return [make("dt", {}, title), make("dd", {}, told)];
    });
    one(".what", this.root).replaceChildren(make("h3", {}, photograph.title), make("dl", {}, ...lines.flat()));
  }

  classAt(image, x, y) {
    const canvas = make("canvas", { width: 1, height: 1 });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const at = (share, side) => clamp(Math.floor(share * side), 0, side - 1);
    context.drawImage(image, at(x, image.naturalWidth), at(y, image.naturalHeight), 1, 1, 0, 0, 1, 1);
    return this.names.get(context.getImageData(0, 0, 1, 1).data.slice(0, 3).join()) ?? "unknown";
  }
}

// --------------------------------------------------------------------------------------------------------- tables

function sortable(table) {
  const heads = all("thead th", table);
  heads.forEach((head, column) => {
    const value = (row) => {
      const text = row.children[column].textContent.trim();
      return text === "–" ? null : Number.isNaN(Number(text)) ? text : Number(text);
    };
    const button = make("button", { type: "button", title: "sort", onclick: () => {
      const sign = head.getAttribute("aria-sort") === "descending" || (column === 0 && !head.hasAttribute("aria-sort")) ? 1 : -1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = all("tbody tr", table).map((row) => [value(row), row]);
      rows.sort(([a], [b]) => (a === null) - (b === null) || sign * (typeof a === "string" ? a.localeCompare(b) : a - b));
      one("tbody", table).append(...rows.map(([, row]) => row));
    } }, ...head.childNodes);
    head.append(button);
  });
}

/** Children with a title each, of which one is shown. */
function tabbed(container) {
  const parts = [...container.children];
  const buttons = parts.map((part) => make("button", { type: "button", onclick: () => choose(part) }, part.dataset.title));
  const choose = (chosen) => parts.forEach((part, number) => {
    part.hidden = part !== chosen;
    buttons[number].setAttribute("aria-pressed", part === chosen);
  });
  container.prepend(make("div", { class: "tabs", role: "group", "aria-label": "Segmentation" }, ...buttons));
  choose(parts[Math.min(1, parts.length - 1)]);
}

/** Cells that tell their numbers where one points or goes by arrow keys, as shares of columns or rows or as pixels. */
function confusions(container) {
  const told = make("p", { class: "cell", role: "status", "aria-live": "polite" }, "Point at a cell, or go there with the arrow keys.");
  const modes = { column: "share of the labelled class", row: "share of the segmented class", pixels: "pixels" };
  const select = make("select", { name: "normalise", onchange: () => matrices.forEach((matrix) => matrix.show(select.value)) },
    ...Object.entries(modes).map(([value, title]) => make("option", { value }, title)));
  const matrices = all("table", container).map((table) => confusion(table, told));
  container.before(make("div", { class: "bar" }, make("label", {}, "cells are ", select)));
  container.after(told);
}

function confusion(table, told) {
  const columns = all("thead th", table).map((head) => head.textContent);
  const rows = all("tbody tr", table).map((row) => ({ name: one("th", row).textContent, cells: all("td", row) }));
  const pixels = rows.map(({ cells }) => cells.map((cell) => Number(cell.dataset.pixels)));
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const ofColumn = columns.map((_, column) => sum(pixels.map((row) => row[column])));
  const ofRow = pixels.map(sum);
  const share = (row, column, total) => total && (100 * pixels[row][column]) / total;
  const tell = (row, column) => {
    const [a, b] = [share(row, column, ofColumn[column]), share(row, column, ofRow[row])].map((value) => value.toFixed(1));
    told.textContent = `Labelled ${columns[column]}, segmented as ${rows[row].name}: ${pixels[row][column].toLocaleString("en")} pixels, `
      + `${a} % of the label, ${b} % of the segmentation.`;
  };
  rows.forEach(({ cells }, row) => cells.forEach((cell, column) => {
    cell.tabIndex = row || column ? -1 : 0;
    cell.addEventListener("pointerenter", () => tell(row, column));
    cell.addEventListener("focus", () => tell(row, column));
    cell.addEventListener("keydown", (event) => {
      const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
      const next = rows[row + down]?.cells[column + right];
      if (!next || next === cell) return;
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      event.preventDefault();
    });
  }));
  const most = Math.max(...pixels.flat(), 1);
  const show = (mode) => rows.forEach(({ cells }, row) => cells.forEach((cell, column) => {
    const total = mode === "row" ? ofRow[row] : ofColumn[column];
    const percent = mode === "pixels" ? (100 * pixels[row][column]) / most : share(row, column, total);
    cell.style.setProperty("--share", percent);
    const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 2 });
    cell.textContent = mode === "pixels" ? compact.format(pixels[row][column]) : total ? percent.toFixed(0) : "–";
  }));
  return { show };
}

function filtered(bar, rows) {
  const [search, changed] = all("input", bar);
  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    for (const row of rows) {
      const unwanted = changed.checked && !row.classList.contains("changed");
      row.hidden = unwanted || !row.textContent.toLowerCase().includes(wanted);
    }
    one("[role=status]", bar).textContent = `${rows.filter((row) => !row.hidden).length} of ${plural(rows.length, "key")}`;
  };
  bar.addEventListener("input", show);
  show();
}

// --------------------------------------------------------------------------------------------------------- curves

/** The moving average of TensorBoard: exponential, with the weight of the start taken off. */
function smoothed(values, weight) {
  let [last, total] = [0, 0];
  return values.map((value) => {
    last = weight * last + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return last / total;
  });
}

function short(value) {
  const plain = value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5);
  return plain ? String(Number(value.toPrecision(4))) : value.toExponential(1);
}

class Curve {
  constructor({ title, points, every }) {
    this.points = points;
    const [first, last] = [points[0], points.at(-1)].map(([step, value]) => `${short(value)} at step ${step}`);
    const label = `${title}: ${first}, ${last}`;
    this.svg = make("svg", { viewBox: "0 0 320 150", role: "img", tabindex: 0, "aria-label": label });
    this.output = make("output", { "aria-live": "polite" });
    const thinned = every > 1 ? make("small", {}, ` 1 of ${every} points`) : "";
    this.element = make("div", { class: "curve" }, make("h3", {}, title, thinned), this.svg, this.output);
    this.svg.addEventListener("pointermove", (event) => {
      const box = this.svg.getBoundingClientRect();
      const step = this.step(((event.clientX - box.left) / box.width) * 320);
      const distances = points.map(([at]) => Math.abs(at - step));
      this.mark(distances.indexOf(Math.min(...distances)));
    });
    this.svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) { this.mark(clamp((this.at ?? -1) + by, 0, points.length - 1)); event.preventDefault(); }
    });
    for (const leave of ["pointerleave", "blur"]) this.svg.addEventListener(leave, () => this.mark(undefined));
    const [steps, values] = [points.map(([step]) => step), points.map(([, value]) => value)];
    this.range = { steps: [steps[0], steps.at(-1)], values: [Math.min(...values), Math.max(...values)] };
    if (this.range.values[0] === this.range.values[1]) this.range.values = [values[0] - 0.5, values[0] + 0.5];
  }

  x(step) { const [low, high] = this.range.steps; return 44 + (270 * (step - low)) / (high - low || 1); }
  y(value) { const [low, high] = this.range.values; return 122 - (112 * (value - low)) / (high - low); }
  step(x) { const [low, high] = this.range.steps; return low + ((x - 44) / 270) * (high - low); }

  draw(weight) {
    const values = this.points.map(([, value]) => value);
    this.smooth = smoothed(values, weight);
    const place = (of, at) => `${this.x(this.points[at][0]).toFixed(1)} ${this.y(of[at]).toFixed(1)}`;
    const path = (of) => `M${this.points.map((_, at) => place(of, at)).join("L")}`;
    const [low, high] = this.range.values;
    const ticks = [low, (low + high) / 2, high].flatMap((value) => [
      make("line", { class: "grid", x1: 44, x2: 314, y1: this.y(value), y2: this.y(value) }),
      make("text", { x: 38, y: this.y(value) + 4, "text-anchor": "end" }, short(Number(value.toPrecision(3)))),
    ]);
    const [first, last] = this.range.steps;
    const ends = [make("text", { x: 44, y: 142 }, `step ${first}`)];
    if (last > first) ends.push(make("text", { x: 314, y: 142, "text-anchor": "end" }, String(last)));
    const lines = this.points.length > 1
      ? [make("path", { class: "raw", d: path(values) }), make("path", { class: "smooth", d: path(this.smooth) })]
      : [make("circle", { cx: this.x(first), cy: this.y(this.points[0][1]), r: 3 })];
    this.marker = make("line", { class: "at", y1: 8, y2: 122, visibility: "hidden" });
    this.svg.replaceChildren(...ticks, ...ends, ...lines, this.marker);
    this.mark(this.at);
  }

  mark(at) {
    this.at = at;
    this.marker.setAttribute("visibility", at === undefined ? "hidden" : "visible");
    const [step, value] = this.points[at ?? this.points.length - 1];
    for (const end of ["x1", "x2"]) this.marker.setAttribute(end, this.x(step));
    this.output.textContent = `step ${step}: ${short(value)}, smoothed ${short(this.smooth[at ?? this.points.length - 1])}`;
  }
}

// ---------------------------------------------------------------------------------------------------- put together

async function start() {
  document.documentElement.classList.add("scripted");
  await Promise.all(all("img").map((image) => image.decode()));
  all("table.sortable").forEach(sortable);
  all(".choices").forEach((container) => { tabbed(container); confusions(container); });
  if (one("#filter")) filtered(one("#filter"), all(".settings tbody tr"));
  if (one("#compare")) new Comparison(one("#compare"));
  if (one("#curves")) {
    const curves = page.curves.map((curve) => new Curve(curve));
    const weight = one("#curves input");
    const draw = () => {
      one("#curves output").textContent = Number(weight.value).toFixed(2);
      curves.forEach((curve) => curve.draw(Number(weight.value)));
    };
    weight.addEventListener("input", draw);
    draw();
    one("#curves > div").append(...curves.map((curve) => curve.element));
  }
  for (const button of all("[data-copy]")) {
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.copy);
      getSelection().selectAllChildren(text); // to copy by hand where the browser does not allow it
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "copied";
    });
  }
  if (!("DecompressionStream" in globalThis)) one("#explorer")?.replaceChildren("This browser is too old for the explorer.");
  else if (page.explorer) globalThis.explorer = new Explorer(await Batch.unpacked(page.explorer));
  document.documentElement.dataset.ready = "";
}

start();
