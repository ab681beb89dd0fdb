// The explorer of hidden positives in a report: what explorer.py packed, drawn and told. Helpers: report.js.
"use strict";

const KINDS = { agnostic: "task-agnostic", specific: "task-specific" };

/** What explorer.py packed: N patches with positives, thresholds, features, negatives and weights. */
class Batch {
  static async unpacked(packed) {
    const bytes = Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Batch(packed, await new Response(stream).arrayBuffer());
  }

  constructor(packed, buffer) {
    Object.assign(this, packed);
    [this.rows, this.columns] = packed.grid;
    this.patches = this.rows * this.columns;
    this.size = this.patches * packed.number;
    this.arrays = {};
    for (const [name, [type, start, length]] of Object.entries(packed.arrays)) {
      this.arrays[name] = new globalThis[type](buffer, start, length);
    }
    for (const kind in KINDS) this.decodeFeatures(kind);
  }

  /** Component by component, zigzag coded, in planes of low and of high bytes. */
  decodeFeatures(kind) {
    const bytes = this.arrays[`${kind}.features`];
    const length = bytes.length / 2;
    const values = new Float32Array(length);
    for (let at = 0; at < length; at++) {
      const code = bytes[at] | (bytes[length + at] << 8);
      values[at] = ((code >>> 1) ^ -(code & 1)) * this.kinds[kind].step;
    }
    this.arrays[`${kind}.features`] = values;
  }

  image(patch) { return Math.floor(patch / this.patches); }
  place(patch) { return [Math.floor((patch % this.patches) / this.columns), patch % this.columns]; }

  bit(name, row, rowBytes, column) {
    return (this.arrays[name][row * rowBytes + (column >> 3)] >> (column & 7)) & 1;
  }

  positive(kind, anchor, patch) {
    if (anchor === patch) return false;
    const [name, rowBytes] = [`${kind}.positives`, (this.size + 7) >> 3];
    return Boolean(this.bit(name, anchor, rowBytes, patch) || (this.symmetric && this.bit(name, patch, rowBytes, anchor)));
  }

  positives(kind, anchor) {
    return Array.from({ length: this.size }, (_, patch) => patch).filter((patch) => this.positive(kind, anchor, patch));
  }

  negative(anchor, patch) {
    const rowBytes = 4 * ((this.size + 31) >> 5);
    return anchor !== patch && Boolean(this.bit("negatives", anchor % this.patches, rowBytes, patch));
  }

  similarities(kind, anchor) {
    const features = this.arrays[`${kind}.features`];
    const result = new Float32Array(this.size);
    for (let row = 0; row < features.length; row += this.size) {
      const own = features[row + anchor];
      if (own) for (let patch = 0; patch < this.size; patch++) result[patch] += own * features[row + patch];
    }
    return result;
  }

  threshold(kind, patch) { return this.arrays[`${kind}.threshold`][patch]; }

  /** Nine weights; undefined outside of the image. */
  window(name, patch) {
    const [row, column] = this.place(patch);
    return Array.from({ length: 9 }, (_, cell) => {
      const [y, x] = [row + Math.floor(cell / 3) - 1, column + (cell % 3) - 1];
      if (y < 0 || y >= this.rows || x < 0 || x >= this.columns) return undefined;
      return (this.arrays[name][9 * patch + cell] / 65535) * this.greatest[name];
    });
  }

  label(patch) { return this.arrays.labels && (this.class_names[this.arrays.labels[patch]] ?? "none"); }

  cluster(number, patch) {
    const value = this.arrays[`clusters.${number}`][patch];
    const name = this.clusterings[number][1][value];
    return name === `cluster ${value}` || this.clusterings[number][0].includes("linear") ? name : `${value}, ${name}`;
  }
}

class Explorer {
  constructor(batch) {
    this.batch = batch;
    this.shown = { agnostic: true, specific: true, negative: false };
    this.heat = "";
    this.anchor = this.cursor = null;
    this.comparing = false;
    const style = getComputedStyle(document.documentElement);
    this.colours = {};
    for (const name of ["agnostic", "specific", "anchor"]) this.colours[name] = style.getPropertyValue(`--${name}`);
    this.figures = all("#explorer figure").map((figure, image) => this.prepared(figure, image));
    this.prepareBar();
    this.choose(batch.anchors[0][0]);
    redrawn(one("#explorer .batch"), () => this.draw());
  }

  prepared(figure, image) {
    const { batch } = this;
    const picture = one("img", figure);
    const name = one("figcaption", figure).textContent;
    const canvas = make("canvas", {
      tabindex: 0, role: "application",
      "aria-label": `${name}, ${batch.rows} by ${batch.columns} patches: arrow keys move to a patch, Enter makes it the anchor`,
      onpointermove: (event) => this.point(this.patchAt(image, event)),
      onpointerleave: () => this.comparing || this.point(null),
      onclick: (event) => this[this.comparing ? "point" : "choose"](this.patchAt(image, event)),
      onfocus: () => canvas.matches(":focus-visible") && this.point(this.entered(image)),
      onblur: () => this.point(null),
      onkeydown: (event) => this.key(image, event),
    });
    const frame = make("div", { class: "frame" });
    picture.before(frame);
    frame.append(picture, canvas);
    const counts = make("span");
    one("figcaption", figure).append(counts);
    return { picture, canvas, counts, name };
  }

  prepareBar() {
    const { anchors, size } = this.batch;
    for (const [patch, title] of anchors) {
      one("#anchors").append(make("button", { type: "button", "data-anchor": patch, onclick: () => this.choose(patch) }, title));
    }
    const random = () => this.choose(Math.floor(Math.random() * size));
    one("#anchors").append(make("button", { type: "button", onclick: random }, "random"));
    one("#layers").addEventListener("change", ({ target }) => {
      if (target.name === "heat") this.heat = target.value;
      else if (target.name === "comparing") this.comparing = target.checked;
      else this.shown[target.name] = target.checked;
      this.draw();
    });
  }

  patchAt(image, event) {
    const { batch, figures } = this;
    const box = figures[image].canvas.getBoundingClientRect();
    const row = clamp(Math.floor(((event.clientY - box.top) / box.height) * batch.rows), 0, batch.rows - 1);
    const column = clamp(Math.floor(((event.clientX - box.left) / box.width) * batch.columns), 0, batch.columns - 1);
    return image * batch.patches + row * batch.columns + column;
  }

  /** Where the keyboard enters an image: at the anchor, or at the patch at its place. */
  entered(image) { return image * this.batch.patches + (this.anchor % this.batch.patches); }

  key(image, event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const { batch } = this;
    const at = this.cursor ?? this.entered(image);
    if (event.key in moves) {
      const moved = (place, axis) => clamp(place + moves[event.key][axis], 0, batch.grid[axis] - 1);
      const [row, column] = batch.place(at).map(moved);
      this.point(image * batch.patches + row * batch.columns + column);
    } else if (event.key === "Enter" || event.key === " ") this.choose(at);
    else return;
    event.preventDefault();
  }

  choose(anchor) {
    const { batch } = this;
    this.anchor = anchor;
    this.positives = {};
    this.similarity = {};
    for (const kind in KINDS) {
      this.positives[kind] = new Set(batch.positives(kind, anchor));
      this.similarity[kind] = batch.similarities(kind, anchor);
    }
    one("#explorer").classList.add("chosen");
    one("#explorer").dataset.anchor = anchor;
    for (const button of all("#anchors [data-anchor]")) {
      button.setAttribute("aria-pressed", Number(button.dataset.anchor) === anchor);
    }
    this.describeAnchor();
    this.point(this.cursor);
    this.draw();
  }

  /** Compare a patch with the anchor; null: none. */
  point(patch) {
    const touched = new Set([this.cursor, patch].filter((at) => at !== null).map((at) => this.batch.image(at)));
    this.cursor = patch;
    this.describePair();
    touched.forEach((image) => this.drawImage(image));
  }

  name(patch) {
    const [row, column] = this.batch.place(patch);
    return `${this.figures[this.batch.image(patch)].name}, row ${row + 1}, column ${column + 1}`;
  }

  describePair() {
    const { batch, anchor, cursor } = this;
    const told = one("#pair p");
    if (cursor === null) {
      const finding = Object.keys(KINDS).map((kind) => plural(this.positives[kind].size, `${KINDS[kind]} positive`));
      told.textContent = `Anchor: ${this.name(anchor)}: ${finding.join(", ")}.\n`
        + "Point at a patch to compare it, click to make it the anchor.";
      return;
    }
    const label = batch.label(cursor);
    const drawn = batch.negative(anchor, cursor) && "drawn as a negative";
    const known = [this.name(cursor), label && `label ${label}`, cursor === anchor && "the anchor", drawn];
    const lines = [known.filter(Boolean).join(" · ")];
    for (const kind of cursor === anchor ? [] : Object.keys(KINDS)) {
      const [own, its] = [batch.threshold(kind, anchor), batch.threshold(kind, cursor)];
      const limit = batch.symmetric ? Math.min(own, its) : own;
      const whose = limit === own ? "the anchor's" : "its";
      const verdict = this.positives[kind].has(cursor) ? `positive by ${whose} threshold` : "no positive";
      const both = batch.symmetric ? ` (the anchor's ${own.toFixed(3)}, its ${its.toFixed(3)})` : "";
      const similarity = this.similarity[kind][cursor].toFixed(2);
      lines.push(`${KINDS[kind]}: similarity ${similarity}, threshold ${limit.toFixed(3)}${both}: ${verdict}`);
    }
    told.textContent = lines.join("\n");
  }

  describeAnchor() {
    const { batch, anchor } = this;
    const [row, column] = batch.place(anchor);
    const crop = make("canvas", { role: "img", "aria-label": "The anchor and its surroundings" });
    const facts = make("dl");
    const fact = (term, value) => value !== undefined && facts.append(make("dt", {}, term), make("dd", {}, value));
    const place = make("small", {}, `row ${row + 1}, column ${column + 1}`);
    fact("label", batch.label(anchor));
    batch.clusterings.forEach(([title], number) => fact(title, batch.cluster(number, anchor)));
    const title = make("h3", {}, this.figures[batch.image(anchor)].name);
    const who = make("div", { class: "who" }, crop, make("div", {}, title, place), facts);
    one("#panel").replaceChildren(who, this.counts(), this.windows(), this.nearest("agnostic"), this.nearest("specific"));
    this.drawCrop(crop, anchor, 2);
  }

  counts() {
    const { batch, anchor } = this;
    const everything = Array.from({ length: batch.size }, (_, patch) => patch);
    const both = [...this.positives.agnostic].filter((patch) => this.positives.specific.has(patch));
    const heads = ["", "threshold", "own image", "other images", ...(batch.arrays.labels ? ["same class"] : [])];
    const note = `Negatives: drawn at the rate ${batch.negative_rate} by the hash of the loss with seed ${batch.seed}; every step`
      + ` draws others.${batch.arrays.labels ? " Same class: of the labelled ones in other images." : ""}`;
    const body = make("tbody", {},
      ...Object.keys(KINDS).map((kind) => this.countsRow(kind, batch.threshold(kind, anchor).toFixed(3), [...this.positives[kind]])),
      this.countsRow("both", "", both),
      this.countsRow("negatives", "", everything.filter((patch) => batch.negative(anchor, patch))));
    const head = make("thead", {}, make("tr", {}, ...heads.map((title) => make("th", { scope: "col" }, title))));
    return make("div", {}, make("table", {}, head, body), make("small", {}, note));
  }

  /** How many of some patches are in the image of the anchor, in how many others, and of its class there. */
  countsRow(kind, threshold, patches) {
    const { batch, anchor } = this;
    const labels = batch.arrays.labels;
    const elsewhere = patches.filter((patch) => batch.image(patch) !== batch.image(anchor));
    const images = new Set(elsewhere.map((patch) => batch.image(patch))).size;
    const cells = [threshold, patches.length - elsewhere.length, images ? `${elsewhere.length} in ${images}` : 0];
    if (labels) {
      const known = elsewhere.filter((patch) => labels[patch] >= 0 && labels[anchor] >= 0);
      const right = known.filter((patch) => labels[patch] === labels[anchor]).length;
      cells.push(known.length ? `${((100 * right) / known.length).toFixed(0)} %` : "–");
    }
    return make("tr", { "data-kind": kind }, make("th", { scope: "row", class: `of-${kind}` }, kind),
      ...cells.map((cell) => make("td", {}, String(cell))));
  }

  windows() {
    const { batch, anchor } = this;
    const most = Math.max(...batch.window("before", anchor).map((value) => value ?? 0), 1e-9);
    const grid = (name, title) => {
      const values = batch.window(name, anchor);
      const texts = values.map((value) => value === undefined ? "–" : value === 0 ? "0" : value.toPrecision(2));
      const cells = values.map((value, cell) =>
        make("span", { class: value ? "" : "dropped", style: `--share:${(value ?? 0) / most}` }, texts[cell]));
      return make("div", {}, make("small", {}, title),
        make("div", { class: "window", role: "img", "aria-label": `${title}: ${texts.join(", ")}` }, ...cells));
    };
    return make("div", {}, make("h3", {}, "Local weights ", make("small", {}, "of the window around the anchor")),
      make("div", { class: "windows" }, grid("before", "before the threshold"), grid("after", "what propagation uses")));
  }

  nearest(kind) {
    const { batch, anchor } = this;
    const similarity = this.similarity[kind];
    const others = [...similarity.keys()].filter((patch) => batch.image(patch) !== batch.image(anchor));
    const near = others.sort((a, b) => similarity[b] - similarity[a]).slice(0, 5);
    if (!near.length) return "";
    const buttons = near.map((patch) => {
      const crop = make("canvas");
      const [title, close] = [this.name(patch), similarity[patch].toFixed(2)];
      requestAnimationFrame(() => this.drawCrop(crop, patch, 1));
      const choose = () => {
        this.choose(patch); // which replaces this button
        this.figures[batch.image(patch)].canvas.focus({ preventScroll: true });
      };
      const label = `${title}: similarity ${close}; make it the anchor`;
      return make("button", { type: "button", title, "aria-label": label, onclick: choose }, crop,
        make("span", {}, close), make("span", {}, batch.label(patch) ?? ""));
    });
    const by = make("small", {}, kind === "agnostic" ? "by features f" : "by codes s′ of the EMA head");
    return make("div", {}, make("h3", {}, "Nearest in other images ", by), make("div", { class: "near" }, ...buttons));
  }

  /** The patch with so many patches around it. */
  drawCrop(canvas, patch, around) {
    const { batch } = this;
    const { picture } = this.figures[batch.image(patch)];
    const [row, column] = batch.place(patch);
    const { context, width, height } = fitted(canvas);
    const [tall, wide] = [picture.naturalHeight / batch.rows, picture.naturalWidth / batch.columns];
    const side = 2 * around + 1;
    const [x, y] = [width / side, height / side];
    context.drawImage(picture, (column - around) * wide, (row - around) * tall, side * wide, side * tall, 0, 0, width, height);
    this.strokeFrame(context, around * x, around * y, x, y, this.colours.anchor, 1);
  }

  strokeFrame(context, x, y, width, height, colour, thick, dash = []) {
    for (const [line, style] of [[thick + 3, "rgb(0 0 0 / 70%)"], [thick + 1.5, "#fff"], [thick, colour]]) {
      context.lineWidth = line;
      context.strokeStyle = style;
      context.setLineDash(line === thick ? dash : []);
      context.strokeRect(x, y, width, height);
    }
    context.setLineDash([]);
  }

  draw() {
    const shown = Object.keys(KINDS).filter((kind) => this.shown[kind]);
    this.figures.forEach(({ counts }, image) => counts.replaceChildren(...shown.flatMap((kind) => {
      const inside = [...this.positives[kind]].filter((patch) => this.batch.image(patch) === image);
      return [make("b", { class: `of-${kind}`, title: KINDS[kind] }, String(inside.length)), " "];
    })));
    const values = this.similarity[this.heat];
    this.least = values?.reduce((least, value) => Math.min(least, value), 1);
    one("#scale").hidden = !this.heat;
    one("#scale span").textContent = this.least?.toFixed(2);
    this.figures.forEach((_, image) => this.drawImage(image));
  }

  drawImage(image) {
    const { batch, anchor, cursor } = this;
    const { picture, canvas } = this.figures[image];
    const { context, width, height } = fitted(canvas);
    if (!width || !picture.complete) return;
    const [wide, tall] = [width / batch.columns, height / batch.rows];
    const box = (patch) => { const [row, column] = batch.place(patch); return [column * wide, row * tall, wide, tall]; };
    const [scaleX, scaleY] = [picture.naturalWidth / width, picture.naturalHeight / height];
    const inImage = (kind) => this.shown[kind] ? [...this.positives[kind]].filter((patch) => batch.image(patch) === image) : [];
    const chosen = { agnostic: inImage("agnostic"), specific: inImage("specific") };
    if (this.heat) this.drawHeat(context, image, box);
    else {
      for (const patch of [...chosen.agnostic, ...chosen.specific, ...(batch.image(anchor) === image ? [anchor] : [])]) {
        const [x, y, w, h] = box(patch);
        context.drawImage(picture, x * scaleX, y * scaleY, w * scaleX, h * scaleY, x, y, w, h);
      }
    }
    const thick = clamp(wide / 8, 1.2, 2.4);
    if (this.shown.negative) this.drawNegatives(context, image, box, thick);
    this.drawOutline(context, chosen.agnostic, wide, tall, thick, thick / 2, this.colours.agnostic);
    this.drawOutline(context, chosen.specific, wide, tall, thick, 1.6 * thick, this.colours.specific);
    if (batch.image(anchor) === image) this.strokeFrame(context, ...box(anchor), this.colours.anchor, 3);
    if (cursor !== null && batch.image(cursor) === image) this.strokeFrame(context, ...box(cursor), "#fff", 2, [4, 3]);
  }

  drawHeat(context, image, box) {
    const values = this.similarity[this.heat];
    for (let patch = image * this.batch.patches; patch < (image + 1) * this.batch.patches; patch++) {
      const [x, y, w, h] = box(patch);
      context.fillStyle = viridis((values[patch] - this.least) / (1 - this.least || 1));
      context.fillRect(Math.floor(x), Math.floor(y), Math.ceil(w) + 1, Math.ceil(h) + 1);
    }
  }

  drawNegatives(context, image, box, thick) {
    for (let patch = image * this.batch.patches; patch < (image + 1) * this.batch.patches; patch++) {
      if (!this.batch.negative(this.anchor, patch)) continue;
      const [x, y, w, h] = box(patch);
      for (const [line, style] of [[thick + 1.5, "rgb(0 0 0 / 60%)"], [thick, "#fff"]]) {
        context.beginPath();
        for (const [from, to] of [[0.36, 0.64], [0.64, 0.36]]) {
          context.moveTo(x + from * w, y + 0.36 * h);
          context.lineTo(x + to * w, y + 0.64 * h);
        }
        context.lineWidth = line;
        context.strokeStyle = style;
        context.stroke();
      }
    }
  }

  /** A line around each region of patches, inside of it. */
  drawOutline(context, patches, wide, tall, thick, inset, colour) {
    const { batch } = this;
    const members = new Set(patches.map((patch) => patch % batch.patches));
    const has = (row, column) => column >= 0 && column < batch.columns && members.has(row * batch.columns + column);
    context.beginPath();
    for (const member of members) {
      const [row, column] = batch.place(member);
      const [left, right, up, down] = [has(row, column - 1), has(row, column + 1), has(row - 1, column), has(row + 1, column)];
      const [x0, x1] = [column * wide + (left ? 0 : inset), (column + 1) * wide - (right ? 0 : inset)];
      const [y0, y1] = [row * tall + (up ? 0 : inset), (row + 1) * tall - (down ? 0 : inset)];
      for (const [drawn, ...line] of [[!up, x0, y0, x1, y0], [!down, x0, y1, x1, y1], [!left, x0, y0, x0, y1], [!right, x1, y0, x1, y1]]) {
        if (drawn) { context.moveTo(line[0], line[1]); context.lineTo(line[2], line[3]); }
      }
    }
    context.lineCap = "square";
    for (const [line, style] of [[thick + 1.4, "rgb(0 0 0 / 50%)"], [thick, colour]]) {
      context.lineWidth = line;
      context.strokeStyle = style;
      context.stroke();
    }
  }
}

function viridis(share) {
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const at = clamp(share, 0, 1) * (stops.length - 1);
  const below = Math.min(Math.floor(at), stops.length - 2);
  const mixed = stops[below].map((value, channel) => Math.round(value + (at - below) * (stops[below + 1][channel] - value)));
  return `rgb(${mixed.join(" ")})`;
}
