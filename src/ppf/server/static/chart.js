// The curve of predicted perplexity over ratios, with what was measured. Drawn by hand: a move of the slider moves one marker.

const HEIGHT = 300;
const EDGE = { left: 52, right: 12, top: 12, bottom: 40 };
const STEPS = [1, 1.5, 2, 3, 5, 7];

function shape(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function quantile(values, share) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.floor(share * (sorted.length - 1))] ?? 0;
}

/** A plot in an element. */
export class Chart {
  constructor(element) {
    this.element = element;
    new ResizeObserver(() => this.draw()).observe(element);
  }

  /** Begins anew: `points` are measured, `dense` is the log-perplexity at ratio 0. */
  take(points, dense, maxRatio) {
    Object.assign(this, { points, dense, maxRatio, curve: [], at: null });
    this.draw();
  }

  /** Predictions by rising ratio: `{ratio, log_ppl, std}`. */
  setCurve(curve) {
    this.curve = curve;
    this.draw();
  }

  /** Moves the marker. */
  mark(ratio, logPpl) {
    this.at = [ratio, logPpl];
    if (!this.here) return;
    const x = this.x(ratio);
    this.here.setAttribute("transform", `translate(${x} 0)`);
    this.now.setAttribute("cy", this.y(logPpl));
  }

  draw() {
    const width = Math.round(this.element.clientWidth);
    if (!width) return;
    this.scale(width);
    const svg = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT });
    this.drawAxes(svg, width);
    for (const { ratio, log_ppl: value, kind } of this.points) {
      if (value > this.top || ratio > this.maxRatio) continue;
      svg.append(shape("circle", { class: kind === "heldout" ? "dot held" : "dot", cx: this.x(ratio), cy: this.y(value), r: 2.5 }));
    }
    this.drawCurve(svg);
    this.here = shape("g", {});
    this.now = shape("circle", { class: "now", r: 7, cx: 0, cy: -20 });
    this.here.append(shape("line", { class: "here", x1: 0, x2: 0, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }), this.now);
    svg.append(this.here);
    this.element.replaceChildren(svg);
    if (this.at) this.mark(...this.at);
  }

  scale(width) {
    const highest = Math.max(this.dense + 0.05, ...this.curve.map(({ log_ppl: value, std }) => value + std));
    const most = quantile(this.points.map((point) => point.log_ppl), 0.97);
    this.top = Math.max(most, highest) + 0.03;
    this.bottom = this.dense - 0.06 * (this.top - this.dense);
    const [across, up] = [width - EDGE.left - EDGE.right, HEIGHT - EDGE.top - EDGE.bottom];
    this.x = (ratio) => EDGE.left + (across * ratio) / this.maxRatio;
    this.y = (value) => EDGE.top + (up * (this.top - value)) / (this.top - this.bottom);
  }

  drawAxes(svg, width) {
    const foot = HEIGHT - EDGE.bottom;
    for (let percent = 0; percent <= 100 * this.maxRatio + 1e-6; percent += width < 500 ? 20 : 10) {
      const x = this.x(percent / 100);
      svg.append(shape("line", { class: "grid", x1: x, x2: x, y1: EDGE.top, y2: foot }));
      svg.append(shape("text", { x, y: foot + 16, "text-anchor": "middle" }, `${percent} %`));
    }
    for (const ppl of this.ticks()) {
      const y = this.y(Math.log(ppl));
      svg.append(shape("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y }));
      svg.append(shape("text", { x: EDGE.left - 6, y: y + 4, "text-anchor": "end" }, String(ppl)));
    }
    svg.append(shape("text", { x: (EDGE.left + width - EDGE.right) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, "prunable parameters gone"));
    const middle = HEIGHT / 2 - EDGE.bottom / 2;
    svg.append(shape("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, "perplexity"));
  }

  /** About five round perplexities between bottom and top. */
  ticks() {
    const [low, high] = [Math.exp(this.bottom), Math.exp(this.top)];
    if (high / low < 6) {
      const rough = (high - low) / 5;
      const unit = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
      const count = Math.floor(high / step) - Math.ceil(low / step) + 1;
      return Array.from({ length: count }, (_, place) => Number(((Math.ceil(low / step) + place) * step).toPrecision(6)));
    }
    const ticks = [];
    for (let unit = 10 ** Math.floor(Math.log10(low)); unit <= high; unit *= 10) {
      for (const step of high / low > 100 ? [1] : STEPS) if (step * unit >= low && step * unit <= high) ticks.push(Number((step * unit).toPrecision(6)));
    }
    return ticks;
  }

  drawCurve(svg) {
    if (!this.curve.length) return;
    const path = (points) => points.map(([x, y], place) => `${place ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
    const edge = (sign) => this.curve.map(({ ratio, log_ppl: value, std }) => [this.x(ratio), this.y(Math.max(value + sign * std, this.bottom))]);
    svg.append(shape("path", { class: "band", d: `${path([...edge(1), ...edge(-1).reverse()])}Z` }));
    svg.append(shape("path", { class: "line", d: path(edge(0)) }));
  }
}
