"use strict";
// Small multiples over the optimisation step. The legend is the read-out: it shows the value at the step under the
// pointer in every chart at once, and the last value otherwise.

const WIDTH = 420, HEIGHT = 200, LEFT = 48, RIGHT = 10, TOP = 8, BOTTOM = 22; // of one chart, in viewBox units
const readers = new Map(); // figure -> the function that shows its values at a step
const readAll = (step) => readers.forEach((show) => show(step));

// Round numbers that cover [low, high]: steps of 1, 2 or 5 times a power of ten.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

// The lines of a chart: every metric of a single run, or one metric of several runs.
function chartLines(spec, series) {
  const alone = DATA.runs.length === 1;
  return DATA.runs.flatMap((run, r) => series.filter(({ key }) => run.series[key]).map(({ key, label }) => {
    const look = alone ? spec.series.findIndex((one) => one.key === key) : r;
    const { steps, values, line } = run.series[key];
    return { key, steps, raw: values, values: (spec.smooth && line) || values, name: alone ? label : run.name, color: `var(--series-${look % 8})`, dash: look < 8 ? "" : "6 3" };
  }));
}

function legend(lines, unit) {
  const values = lines.map(() => element("b"));
  const list = element("ul", { class: "legend" }, ...lines.map((line, i) => element("li", {},
    shape("svg", { viewBox: "0 0 18 8" }, shape("path", { d: "M0 4H18", stroke: line.color, "stroke-width": 3, "stroke-dasharray": line.dash })),
    `${line.name} `, values[i])));
  const show = (step) => lines.forEach((line, i) => {
    const at = line.steps.findLastIndex((one, i) => line.values[i] !== null && (step === null || one <= step));
    values[i].textContent = at < 0 ? "–" : formatted(line.values[at], unit);
  });
  show(null);
  return { list, show };
}

function drawAxes(svg, xRange, yRange, x, y, unit) {
  for (const tick of ticks(...yRange, 4)) {
    svg.append(shape("path", { class: "grid", d: `M${LEFT} ${y(tick)}H${WIDTH - RIGHT}` }));
    svg.append(shape("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, formatted(tick, unit)));
  }
  for (const tick of ticks(...xRange, 6).filter(Number.isInteger)) {
    svg.append(shape("text", { x: x(tick), y: HEIGHT - 6, "text-anchor": "middle" }, String(tick)));
  }
}

function linePath(steps, values, x, y) {
  let pen = "M";
  return steps.map((step, i) => {
    if (values[i] === null) { pen = "M"; return ""; }
    const part = `${pen}${x(step).toFixed(1)} ${y(values[i]).toFixed(1)}`;
    pen = "L";
    return part;
  }).join("");
}

function drawLines(svg, lines, x, y) {
  for (const line of lines) {
    if (line.raw !== line.values) svg.append(shape("path", { class: "raw", d: linePath(line.steps, line.raw, x, y), stroke: line.color }));
    svg.append(shape("path", { class: "line", d: linePath(line.steps, line.values, x, y), stroke: line.color, "stroke-dasharray": line.dash }));
    if (line.steps.length <= 24) line.steps.forEach((step, i) => {
      if (line.values[i] !== null) svg.append(shape("circle", { cx: x(step), cy: y(line.values[i]), r: 2.5, fill: line.color }));
    });
  }
}

// Areas on top of each other; every line is a function of the same steps.
function drawStack(svg, lines, x, y) {
  const base = new Array(lines[0].steps.length).fill(0);
  for (const line of lines) {
    const lower = base.map((value, i) => `L${x(line.steps[i])} ${y(value)}`).reverse().join("");
    line.values.forEach((value, i) => { base[i] += value ?? 0; });
    const upper = base.map((value, i) => `L${x(line.steps[i])} ${y(value)}`).join("");
    svg.append(shape("path", { d: `M${(upper + lower).slice(1)}Z`, fill: line.color, "fill-opacity": 0.75 }));
  }
}

function drawChart(figure, spec, series, stacked) {
  const lines = chartLines(spec, series);
  const missing = (why) => figure.append(element("div", { class: "missing" }, why));
  if (!lines.length) return missing(`not recorded (${series.map((one) => one.key).join(", ")})`);
  const allSteps = lines.flatMap((line) => line.steps);
  const totals = stacked ? lines[0].steps.map((_, i) => lines.reduce((sum, line) => sum + (line.values[i] ?? 0), 0)) : [];
  const allValues = stacked ? totals : lines.flatMap((line) => [...line.raw, ...line.values]).filter((value) => value !== null);
  const xRange = [Math.min(...allSteps), Math.max(...allSteps)];
  if (xRange[0] === xRange[1]) xRange[1] += 1;
  const yRange = [Math.min(spec.low ?? Infinity, ...allValues), Math.max(spec.high ?? -Infinity, ...allValues)];
  if (yRange[0] === yRange[1]) yRange[1] += Math.abs(yRange[0]) || 1;
  const gap = ticks(...yRange, 4)[1] - ticks(...yRange, 4)[0];
  yRange[0] = Math.floor(yRange[0] / gap + 1e-3) * gap; // from round number to round number, but for rounding errors
  yRange[1] = Math.ceil(yRange[1] / gap - 1e-3) * gap;
  const x = (step) => LEFT + (step - xRange[0]) / (xRange[1] - xRange[0]) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value - yRange[0]) / (yRange[1] - yRange[0]) * (HEIGHT - TOP - BOTTOM);

  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img", "aria-label": `${spec.title}: ← and → read it step by step, Enter shows the rollouts` });
  drawAxes(svg, xRange, yRange, x, y, spec.unit);
  if (stacked) drawStack(svg, lines, x, y);
  else drawLines(svg, lines, x, y);
  const cross = shape("path", { class: "cross", visibility: "hidden" });
  svg.append(cross);
  const { list, show } = legend(lines, spec.unit);
  figure.append(svg, list);

  const steps = [...new Set(allSteps)].sort((a, b) => a - b);
  const stepAt = (event) => {
    const box = svg.getBoundingClientRect();
    const step = xRange[0] + ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (xRange[1] - xRange[0]);
    return steps.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best));
  };
  readers.set(figure, (step) => {
    show(step);
    cross.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) cross.setAttribute("d", `M${x(step)} ${TOP}V${HEIGHT - BOTTOM}`);
  });
  let at = null; // the step that is read
  const read = (step) => { at = step; readAll(step); };
  const open = () => document.dispatchEvent(new CustomEvent("step", { detail: at ?? steps.at(-1) }));
  svg.addEventListener("pointermove", (event) => read(stepAt(event)));
  svg.addEventListener("pointerleave", () => read(null));
  svg.addEventListener("click", (event) => { read(stepAt(event)); open(); });
  svg.addEventListener("blur", () => read(null));
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by && event.key !== "Enter") return;
    event.preventDefault();
    if (!by) return open();
    const next = (at === null ? steps.length : steps.indexOf(at)) + by;
    read(steps[Math.max(0, Math.min(steps.length - 1, next))]);
  });
  return { svg, lines };
}

// Several runs and several metrics: one metric at a time, so that a colour means a run in every chart.
const chosenMetrics = new Map(); // chart -> metric

function chartFigure(spec) {
  const caption = element("figcaption", {}, `${spec.title} `, element("small", {}, spec.note));
  const figure = element("figure", { class: "chart", id: spec.id }, caption);
  const single = DATA.runs.length === 1 || spec.series.length === 1;
  const draw = () => {
    const series = single ? spec.series : spec.series.filter(({ key }) => key === (chosenMetrics.get(spec.id) ?? spec.series[0].key));
    figure.replaceChildren(caption);
    const drawn = drawChart(figure, spec, series, spec.stacked && DATA.runs.length === 1);
    if (drawn) figure.append(exportButtons(spec, drawn));
  };
  if (!single) {
    const menu = element("select", { "aria-label": `metric of ${spec.title}` });
    fillMenu(menu, spec.series.map(({ key, label }) => [key, label]), chosenMetrics.get(spec.id) ?? spec.series[0].key);
    menu.addEventListener("change", () => { chosenMetrics.set(spec.id, menu.value); draw(); });
    caption.append(menu);
  }
  draw();
  return figure;
}

function drawCharts() {
  readers.clear();
  document.getElementById("charts")?.replaceChildren(...DATA.shelves.flatMap(({ title, charts }) =>
    [element("h3", {}, title), element("div", { class: "shelf" }, ...charts.map(chartFigure))]));
}
