// Small live line charts, as SVG.

import { h, svg } from "./dom.js";

const HEIGHT = 132;
const SHORTEST_S = 10;
const KEEP_S = 3600;
const PAD = { left: 46, right: 10, top: 8, bottom: 20 };

/**
 * A chart of a few series over the last `span_s` seconds (at most an hour), or as many as there are: no part of it is
 * empty for want of time. `bars`: values are events, each a bar of its own. `series` is `[{name, color}]`, with color a number of
 * base.css; `format` writes a value; `max` fixes the scale; `idle` is shown while there is nothing to show.
 */
export class LineChart {
  #points = []; // {at, values}
  #hovered = null;

  constructor({ title, series, format, span_s, max = null, idle = "No data yet", floor = 1, num_ticks = 3, bars = false }) {
    Object.assign(this, { title, series, format, span_s, max, idle, floor, num_ticks, bars });
    this.legend = h("div", { class: "legend" });
    this.values = series.map(({ name, color }) => {
      const value = h("b", {}, "–");
      this.legend.append(h("span", {}, h("i", { class: `swatch series-${color}` }), `${name} `, value));
      return value;
    });
    this.svg = svg("svg", { class: "chart", role: "img", height: HEIGHT, tabindex: "-1" });
    this.empty = h("p", { class: "chart-empty" }, idle);
    this.tip = h("div", { class: "tip", hidden: true });
    this.stage = h("div", { class: "chart-stage" }, this.svg, this.empty, this.tip);
    this.root = h("section", { class: "panel", "aria-label": title }, h("div", { class: "panel-head" }, h("h2", {}, title), this.legend), this.stage);
    this.stage.addEventListener("pointermove", (event) => this.#hover(event));
    this.stage.addEventListener("pointerleave", () => this.#hover(null));
    new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  /** Adds the values at a time in seconds; null where there is none. */
  add(at, values) {
    this.#points.push({ at, values });
    while (this.#points[0].at < at - KEEP_S - 5) this.#points.shift();
    const last = this.bars ? this.series.map((_, i) => this.#points.findLast((point) => point.values[i] !== null)?.values[i]) : values;
    this.values.forEach((node, i) => (node.textContent = this.#write(last[i])));
    this.draw();
  }

  /** Shows the last `span_s` seconds from now on. */
  show(span_s) {
    this.span_s = span_s;
    this.draw();
  }

  /** What is in the range; where there is more than the width can show, the largest of neighbours. */
  #visible(width) {
    const now = this.#points.at(-1)?.at ?? 0;
    const points = this.#points.filter(({ at }) => at >= now - this.span_s);
    const size = Math.ceil((2 * points.length) / Math.max(1, width));
    if (size < 2) return points;
    const joined = [];
    for (let i = points.length; i > 0; i -= size) joined.unshift(largestOf(points.slice(Math.max(0, i - size), i)));
    return joined;
  }

  #write(value) {
    return value === null || value === undefined ? "–" : this.format(value);
  }

  draw() {
    const width = this.stage.clientWidth;
    if (!width) return;
    this.shown = this.#visible(width);
    const all = this.shown.flatMap(({ values }) => values).filter((value) => value !== null);
    this.empty.hidden = all.length > 0;
    const top = this.max ?? niceCeiling(Math.max(this.floor, ...all));
    const now = this.#points.at(-1)?.at ?? 0;
    const span_s = Math.min(this.span_s, Math.max(SHORTEST_S, now - (this.shown[0]?.at ?? now)));
    const x = (at) => PAD.left + (width - PAD.left - PAD.right) * (1 - (now - at) / span_s);
    const y = (value) => HEIGHT - PAD.bottom - (HEIGHT - PAD.top - PAD.bottom) * Math.min(1, value / top);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("aria-label", this.#summary());
    this.svg.replaceChildren(...this.#grid(width, top, y, span_s), ...this.series.flatMap((_, i) => (this.bars ? this.#bars(i, x, y) : this.#line(i, x, y))), ...this.#cross(x, y, width));
  }

  #summary() {
    const last = this.#points.at(-1);
    if (!last) return `${this.title}: no data yet`;
    return `${this.title}: ${this.series.map(({ name }, i) => `${name} ${this.#write(last.values[i])}`).join(", ")}`;
  }

  #grid(width, top, y, span_s) {
    const nodes = [];
    for (let i = 0; i <= this.num_ticks; i++) {
      const value = (top * i) / this.num_ticks;
      nodes.push(svg("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value) }));
      nodes.push(svg("text", { class: "tick", x: PAD.left - 7, y: y(value) + 4, "text-anchor": "end" }, this.format(value)));
    }
    nodes.push(svg("text", { class: "tick", x: PAD.left, y: HEIGHT - 4 }, span_s < 90 ? `${Math.round(span_s)} s ago` : `${+(span_s / 60).toFixed(1)} min ago`));
    nodes.push(svg("text", { class: "tick", x: width - PAD.right, y: HEIGHT - 4, "text-anchor": "end" }, "now"));
    return nodes;
  }

  #bars(index, x, y) {
    const { color } = this.series[index];
    const events = this.shown.filter(({ values }) => values[index] !== null);
    return events.map(({ at, values }) => {
      const top = y(values[index]);
      return svg("rect", { class: `bar-mark series-${color}`, x: x(at) - 6 + 5 * index, y: top, width: 5, height: Math.max(2, y(0) - top), rx: 1.5 });
    });
  }

  #line(index, x, y) {
    const { color } = this.series[index];
    const runs = [[]];
    for (const { at, values } of this.shown) {
      if (x(at) < PAD.left) continue;
      if (values[index] === null) runs.push([]);
      else runs.at(-1).push(`${x(at).toFixed(1)},${y(values[index]).toFixed(1)}`);
    }
    const nodes = [];
    for (const run of runs.filter((points) => points.length)) {
      const [first, last] = [run[0].split(",")[0], run.at(-1).split(",")[0]];
      if (index === 0) nodes.push(svg("path", { class: `area series-${color}`, d: `M${first},${y(0)}L${run.join("L")}L${last},${y(0)}Z` }));
      nodes.push(svg("path", { class: `line series-${color}`, d: run.length > 1 ? `M${run.join("L")}` : `M${run[0]}h0.1` }));
    }
    return nodes;
  }

  #hover(event) {
    this.#hovered = event ? event.clientX - this.stage.getBoundingClientRect().left : null;
    this.draw();
  }

  #cross(x, y, width) {
    const px = this.#hovered;
    const nearest = px === null ? null : this.shown.reduce((best, point) => (best && Math.abs(x(best.at) - px) <= Math.abs(x(point.at) - px) ? best : point), null);
    this.tip.hidden = !nearest || px < PAD.left || Math.abs(x(nearest.at) - px) > 24;
    if (this.tip.hidden) return [];
    const at = x(nearest.at);
    const ago = Math.round(this.#points.at(-1).at - nearest.at);
    this.tip.replaceChildren(
      h("span", {}, ago ? `${ago} s ago` : "now"),
      ...this.series.map(({ name, color }, i) => h("span", {}, h("i", { class: `swatch series-${color}` }), `${name} ${this.#write(nearest.values[i])}`)),
    );
    this.tip.style.setProperty("left", `${Math.min(at + 10, width - this.tip.offsetWidth - 4)}px`);
    const dots = this.series.flatMap(({ color }, i) =>
      nearest.values[i] === null ? [] : [svg("circle", { class: `dot series-${color}`, cx: at, cy: y(nearest.values[i]), r: 3 })],
    );
    return [svg("line", { class: "cross", x1: at, x2: at, y1: PAD.top, y2: HEIGHT - PAD.bottom }), ...dots];
  }
}

/** One point for several: the last one's time, the largest of each series' values. */
function largestOf(points) {
  const values = points[0].values.map((_, i) => {
    const found = points.map((point) => point.values[i]).filter((value) => value !== null);
    return found.length ? Math.max(...found) : null;
  });
  return { at: points.at(-1).at, values };
}

/** The next number above that a scale of three parts looks well with. */
export function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1.2, 1.5, 3, 6, 9, 12].map((factor) => factor * power).find((candidate) => candidate >= value * 0.999);
}
