"use strict";
// A chart as a file: SVG that stands by itself, or its numbers as CSV.

function exportButtons(spec, { svg, lines }) {
  const tip = (what) => ({ "aria-label": `${spec.title} as ${what}` });
  return element("div", { class: "export" },
    button("SVG", () => download(`${spec.id}.svg`, "image/svg+xml", standaloneSvg(spec.title, svg, lines)), tip("SVG")),
    button("CSV", () => download(`${spec.id}.csv`, "text/csv", csv(lines)), tip("CSV")));
}

// As measured, one row per step; of a chart with a moving mean, that too.
function csv(lines) {
  const several = DATA.runs.length > 1;
  const columns = lines.flatMap((line) => {
    const name = several ? `${line.name} ${line.key}` : line.key;
    const at = (values) => new Map(line.steps.map((step, i) => [step, values[i]]));
    return [[name, at(line.raw)], ...(line.raw === line.values ? [] : [[`${name} (moving mean)`, at(line.values)]])];
  });
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return [["step", ...columns.map(([name]) => quoted(name))],
    ...steps.map((step) => [step, ...columns.map(([, values]) => values.get(step) ?? "")])].map((row) => `${row.join(",")}\n`).join("");
}

// A copy with title, legend and the styles that the page's style sheet gives it.
function standaloneSvg(title, svg, lines) {
  const kept = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "font-size", "font-family", "visibility"];
  const copy = svg.cloneNode(true), originals = svg.querySelectorAll("*");
  copy.querySelectorAll("*").forEach((node, i) => {
    const style = getComputedStyle(originals[i]);
    for (const name of kept) node.setAttribute(name, style.getPropertyValue(name));
  });
  const page = getComputedStyle(document.documentElement);
  const text = (content, x, y, size) => shape("text", { x, y, "font-size": size, "font-family": "sans-serif", fill: page.getPropertyValue("--text") }, content);
  const whole = shape("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${WIDTH} ${HEIGHT + 32 + 16 * lines.length}` },
    shape("rect", { width: "100%", height: "100%", fill: page.getPropertyValue("--card") }), text(title, 8, 18, 14),
    shape("g", { transform: "translate(0 24)" }, ...copy.childNodes));
  lines.forEach((line, i) => {
    const y = HEIGHT + 40 + 16 * i, color = page.getPropertyValue(line.color.slice(4, -1));
    whole.append(shape("path", { d: `M8 ${y - 4}H26`, stroke: color, "stroke-width": 3, "stroke-dasharray": line.dash }), text(line.name, 32, y, 12));
  });
  return new XMLSerializer().serializeToString(whole);
}
