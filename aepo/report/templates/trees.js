"use strict";
// The rollouts of one question: k paths as rows over a common token axis, each starting where it left its parent, and
// below them the chosen path in full, every token on the colour of its entropy.

const ENTROPY_STEPS = [0.05, 0.2, 0.5, 1, 1.5, 2.5]; // nats; fixed, so that two reports can be compared
const LABEL = 104, SCORE = 150, PROMPT = 34; // pixels: columns left and right, the prompt's block
const NARROW = 600; // below it the columns stand above the tokens
const level = (entropy) => ENTROPY_STEPS.filter((bound) => entropy >= bound).length;
const nats = (value) => (value === null || value === undefined ? "missing" : `${formatted(value)} nats`);
const signed = (value) => (value === null || value === undefined ? "missing" : `${value < 0 ? "−" : "+"}${+Math.abs(value).toPrecision(2)}`);

function decisionText(tree, decision) {
  const born = tree.paths.filter((path) => path.parent === decision.path && path.branch_node === decision.node).map((path) => `path ${path.id}`);
  const rule = DATA.runs[tree.run].rule;
  const penalty = rule.branch_penalty === undefined ? "missing" : formatted(Math.min(1, rule.branch_penalty * decision.consecutive));
  const room = !decision.branched && decision.probability > rule.branch_threshold ? " (no path left to give)" : "";
  const refused = decision.refused ? " (the environment could not be brought into the same state)" : room;
  const outcome = decision.branched ? `branched${born.length ? ` into ${born.join(" and ")}` : ""}` : `did not branch${refused}`;
  return `path ${decision.path} ${outcome} · P ${formatted(decision.probability)}, threshold ${formatted(rule.branch_threshold)}`
    + ` · alpha ${formatted(decision.alpha)} · entropy ${nats(decision.entropy)}, ${signed(decision.delta)} ln V since the start`
    + ` · penalty ${penalty} (${decision.consecutive} branches in a row before)`;
}

// Node ids from the root to the leaf of a path.
function lineage(tree, path) {
  const nodes = [];
  for (let id = path.leaf; id !== null; id = tree.nodes[id].parent) nodes.unshift(id);
  return nodes;
}

// Rows from top to bottom: every path right below its parent, latest branch first, so that no connector crosses a row.
function layout(tree) {
  const chains = tree.paths.map((path) => lineage(tree, path));
  const start = new Map();
  chains.forEach((chain) => chain.reduce((at, id) => {
    start.set(id, at);
    return at + (tree.nodes[id].source === "prompt" ? 0 : tree.nodes[id].texts.length);
  }, 0));
  const end = (id) => start.get(id) + tree.nodes[id].texts.length;
  const rows = [];
  const place = (path) => {
    const from = path.branch_node === null ? 0 : chains[path.id].indexOf(path.branch_node);
    rows.push({ path, chain: chains[path.id], own: chains[path.id].slice(from + 1) });
    tree.paths.filter((other) => other.parent === path.id)
      .sort((a, b) => start.get(b.branch_node) - start.get(a.branch_node)).forEach(place);
  };
  tree.paths.filter((path) => path.parent === null).forEach(place);
  return { rows, start, end, length: Math.max(1, ...chains.map((chain) => end(chain.at(-1)))) };
}

// Where the parts of a row stand: on wide screens label, tokens and score side by side, else tokens below the others.
function measures(width) {
  return width >= NARROW ? { row: 26, text: 17, bar: 6, from: LABEL, to: width - SCORE } : { row: 44, text: 15, bar: 24, from: 6, to: width - 8 };
}

const BAR = 14; // height of the tokens

function drawModelNode(row, node, x, y) {
  const { entropies } = node;
  const bins = Math.min(entropies.length, Math.max(1, Math.floor((x(entropies.length) - x(0)) / 3)));
  for (let bin = 0; bin < bins; bin++) {
    const from = Math.floor(bin * entropies.length / bins), to = Math.floor((bin + 1) * entropies.length / bins);
    const peak = Math.max(...entropies.slice(from, to)); // one uncertain token among sure ones must stay visible
    row.append(withTip(shape("rect", { class: `fill-${level(peak)}`, x: x(from), y, width: x(to) - x(from) + 0.3, height: BAR }),
      `${node.texts.slice(from, to).join("")}\nentropy up to ${nats(peak)}`));
  }
}

const failures = (node) => (node.results ?? []).filter(({ error }) => error);

function callText({ tool, arguments: given, problem }) {
  if (problem) return `${tool || "a call"} that cannot be read: ${problem}`;
  return `${tool}(${Object.entries(given).map(([name, value]) => `${name && `${name}=`}${JSON.stringify(value)}`).join(", ")})`;
}

function resultText(result) {
  return !result ? "result missing" : result.error ? `failed: ${result.error}` : result.text;
}

function drawToolNode(row, node, x, y) {
  const tip = node.calls.map((call, i) => `${callText(call)}\n${resultText(node.results[i])}`).join("\n\n") || node.results.map(resultText).join("\n");
  const name = [...new Set(node.calls.map(({ tool }) => tool))].join(", ") + (node.calls.length > 1 ? ` ×${node.calls.length}` : "");
  const width = Math.max(3, x(node.texts.length) - x(0) - 2);
  row.append(withTip(shape("rect", { class: `tool ${failures(node).length ? "failed" : ""}`, x: x(0) + 1, y: y - 2, rx: 3, width, height: BAR + 4 }), tip));
  if (width > 8 * name.length + 16) row.append(shape("text", { class: "name", x: x(0) + 7, y: y + 11 }, name));
}

function drawOverview(tree, chosen, choose, width) {
  const { rows, start, end, length } = layout(tree);
  const at = measures(width);
  const scale = (at.to - at.from - PROMPT - 8) / length;
  const x = (token) => at.from + PROMPT + 4 + token * scale;
  const height = rows.length * at.row + 22;
  const svg = shape("svg", { class: "tree", viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": "paths" });
  const top = new Map(rows.map(({ path }, i) => [path.id, i * at.row]));
  const middle = (id) => top.get(id) + at.bar + BAR / 2;
  const links = shape("g"), marks = shape("g");
  for (const { path, own } of rows) {
    const y = top.get(path.id), bar = y + at.bar;
    const row = shape("g", { class: `row ${path.id === chosen ? "chosen" : ""}`, tabindex: 0, role: "button", "aria-label": `path ${path.id}`, "data-path": path.id });
    row.append(shape("rect", { class: "hit", x: 0.5, y: y + 0.5, width: width - 1, height: at.row - 1, rx: 5 }));
    row.append(shape("text", { x: 8, y: y + at.text }, `path ${path.id}`));
    if (path.parent === null) row.append(withTip(shape("rect", { class: "prompt", x: at.from, y: bar, width: PROMPT, height: BAR, rx: 2 }), "sampled from the question"));
    else {
      row.append(shape("text", { x: 58, y: y + at.text, class: "quiet" }, `from ${path.parent}`));
      const bend = x(end(path.branch_node));
      links.append(shape("path", { class: "link", d: `M${bend} ${middle(path.parent)}V${middle(path.id) - 4}q0 4 4 4H${bend + 5}` }));
    }
    for (const id of own) {
      const node = tree.nodes[id], place = (token) => x(start.get(id) + token);
      if (node.source === "model") drawModelNode(row, node, place, bar);
      if (node.source === "tool") drawToolNode(row, node, place, bar);
    }
    drawScore(row, tree, path, width - SCORE + 10, y + at.text);
    row.addEventListener("click", () => choose(path.id));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(path.id); } });
    svg.append(row);
  }
  for (const decision of tree.decisions) {
    const cx = x(end(decision.node)), cy = middle(decision.path);
    const mark = decision.branched ? shape("path", { class: "branched", d: `M${cx} ${cy - 6}l6 6l-6 6l-6-6Z` })
      : shape("circle", { class: "kept", cx, cy, r: 3.5 });
    marks.append(withTip(mark, decisionText(tree, decision)));
  }
  svg.append(links, marks);
  for (const token of ticks(0, length, width < NARROW ? 3 : 6)) {
    svg.append(shape("text", { class: "quiet", x: x(token), y: height - 5, "text-anchor": "middle" }, token === 0 ? "0 tokens" : String(token)));
  }
  moveByKeys(svg, ".row");
  return svg;
}

const componentsText = ({ components }) => Object.entries(components ?? {}).map(([name, value]) => `${name} ${formatted(value)}`).join(", ");

function drawScore(row, tree, path, x, y) {
  const reward = tree.rewards?.[path.id];
  if (!reward) { row.append(shape("text", { x, y, class: "quiet" }, "reward missing")); return; }
  const advantage = tree.advantages?.[path.id];
  row.append(withTip(shape("text", { x, y, class: reward.success ? "good" : "bad" }, `${reward.success ? "✓" : "✗"} ${formatted(reward.total)}`),
    `reward ${formatted(reward.total)}\n${componentsText(reward)}`));
  row.append(shape("text", { x: x + 56, y, class: "quiet" }, advantage === undefined ? path.finish_reason : `A ${signed(advantage)}`));
}

function nodeBlock(node) {
  const block = element("div", { class: `node ${node.source} ${failures(node).length ? "failed" : ""}` });
  const text = element("pre", { class: "text" });
  if (node.source !== "tool") block.append(element("div", { class: "who" }, node.source));
  else for (let i = 0; i < Math.max(1, node.results.length); i++) {
    const call = node.calls[i], result = node.results[i];
    const outcome = result ? ` · ${formatted(1000 * result.seconds)} ms${result.error ? ` · failed: ${result.error}` : ""}` : "";
    block.append(element("div", { class: result?.error ? "who bad" : "who" }, `tool: ${call ? callText(call) : "unknown"}${outcome}`));
  }
  if (node.source !== "model") text.textContent = node.texts.join("");
  else node.texts.forEach((piece, i) => {
    const entropy = node.entropies[i], logprob = node.logprobs[i];
    const chance = logprob === undefined || logprob === null ? "" : `\nprobability ${formatted(Math.exp(logprob))}`;
    text.append(withTip(element("span", { class: `back-${level(entropy)}` }, piece), `${JSON.stringify(piece)}\nentropy ${nats(entropy)}${chance}`));
  });
  block.append(text);
  return block;
}

function drawPath(tree, path) {
  const panel = element("div", { class: "panel" });
  const reward = tree.rewards?.[path.id];
  const world = path.environment_reward === undefined || path.environment_reward === null ? "" : ` · the environment says ${formatted(path.environment_reward)}`;
  panel.append(element("div", {}, element("strong", {}, `Path ${path.id}`), ` · ${path.finish_reason}`,
    reward ? ` · reward ${formatted(reward.total)} (${componentsText(reward)})` : "", world));
  const ancestry = new Set(); // the paths whose decisions stand on this one
  for (let id = path.id; id !== null; id = tree.paths[id].parent) ancestry.add(id);
  for (const id of lineage(tree, path)) {
    panel.append(nodeBlock(tree.nodes[id]));
    for (const decision of tree.decisions) {
      if (decision.node !== id || !ancestry.has(decision.path)) continue;
      panel.append(element("div", { class: `decision ${decision.branched ? "yes" : ""}` }, `${decision.branched ? "◆" : "○"} ${decisionText(tree, decision)}`));
    }
    if (id === path.branch_node) panel.append(element("div", { class: "shared" }, `↑ shared with path ${path.parent} · ↓ path ${path.id} on its own`));
  }
  return panel;
}

function entropyScale() {
  const bounds = ["0", ...ENTROPY_STEPS.map(String)];
  const swatch = (style, label) => element("span", {}, element("span", { class: "swatch", style }), label);
  return element("div", { class: "scale" },
    element("span", {}, "model tokens by entropy, nats (from):"),
    element("span", { class: "steps" }, ...bounds.map((bound, i) => element("span", { class: `back-${i}` }, bound))),
    swatch("background: var(--tool-back); outline: 1px solid var(--tool)", "tool result"),
    swatch("background: var(--tool-back); outline: 2px solid var(--bad)", "tool failure"),
    swatch("background: var(--rule)", "prompt"),
    element("span", {}, "◆ branched   ○ rule evaluated, no branch"));
}

function budgetText(tree) {
  if (!tree.budget) return "";
  const { root_entropy: root, tool_entropy: tool, fresh_paths: fresh } = tree.budget;
  return `Pre-monitoring: entropy ${nats(root)} at the start, ${tool === null ? "no tool call" : `${nats(tool)} after tools`}, so ${fresh} of ${tree.paths.length} paths start fresh.`;
}

// The question, its paths, and the chosen one of them. `choose`: what to do when the reader picks another path.
function drawTree(place, tree, chosen, choose) {
  const solved = tree.rewards ? ` · ${tree.rewards.filter((reward) => reward.success).length} of ${tree.paths.length} paths succeed` : "";
  const kind = tree.question.kind && ` · ${tree.question.kind}`;
  const panel = element("div", { class: "panel" }, element("div", { class: "question" }, tree.question.text),
    element("div", { class: "quiet" }, `${tree.question.id} · answer: ${tree.question.answer || "none"}${kind}${solved} · ${tree.paths.filter((path) => path.parent !== null).length} branches`),
    element("div", { class: "quiet" }, budgetText(tree)), entropyScale());
  place.replaceChildren(panel);
  const padding = parseFloat(getComputedStyle(panel).paddingLeft);
  panel.append(drawOverview(tree, chosen, choose, Math.max(240, panel.clientWidth - 2 * padding))); // 0 where nothing is laid out
  place.append(drawPath(tree, tree.paths[chosen]));
}
