"use strict";
// The rollouts of one question: k paths as rows over a common token axis, each starting where it left its parent, and
// below them the chosen path in full, every token on the colour of its entropy.

const ENTROPY_STEPS = [0.05, 0.2, 0.5, 1, 1.5, 2.5]; // nats; fixed, so that two reports can be compared
const ROW = 26, LABEL = 104, SCORE = 150, PROMPT = 34; // pixels: row height, columns left and right, the prompt's block
const tooltip = document.getElementById("tooltip");

const level = (entropy) => ENTROPY_STEPS.filter((bound) => entropy >= bound).length;
const nats = (value) => (value === null || value === undefined ? "missing" : `${formatted(value)} nats`);
const signed = (value) => (value === null || value === undefined ? "missing" : `${value < 0 ? "−" : "+"}${+Math.abs(value).toPrecision(2)}`);

function withTip(node, text) {
  node.dataset.tip = text;
  return node;
}

document.addEventListener("pointermove", (event) => {
  const target = event.target.closest?.("[data-tip]");
  tooltip.hidden = !target;
  if (!target) return;
  tooltip.textContent = target.dataset.tip;
  const { width, height } = tooltip.getBoundingClientRect();
  tooltip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - width - 4))}px`;
  tooltip.style.top = `${event.clientY + 16 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 16}px`;
});

function decisionText(tree, decision) {
  const born = tree.paths.filter((path) => path.parent === decision.path && path.branch_node === decision.node).map((path) => `path ${path.id}`);
  const rule = DATA.runs[tree.run].rule;
  const penalty = rule.branch_penalty === undefined ? "missing" : formatted(Math.min(1, rule.branch_penalty * decision.consecutive));
  const room = !decision.branched && decision.probability > rule.branch_threshold ? " (no path left to give)" : "";
  const outcome = decision.branched ? `branched${born.length ? ` into ${born.join(" and ")}` : ""}` : `did not branch${room}`;
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

function drawModelNode(row, node, x, y) {
  const { entropies } = node;
  const bins = Math.min(entropies.length, Math.max(1, Math.floor((x(entropies.length) - x(0)) / 3)));
  for (let bin = 0; bin < bins; bin++) {
    const from = Math.floor(bin * entropies.length / bins), to = Math.floor((bin + 1) * entropies.length / bins);
    const peak = Math.max(...entropies.slice(from, to)); // one uncertain token among sure ones must stay visible
    row.append(withTip(shape("rect", { class: `fill-${level(peak)}`, x: x(from), y: y + 6, width: x(to) - x(from) + 0.3, height: ROW - 12 }),
      `${node.texts.slice(from, to).join("")}\nentropy up to ${nats(peak)}`));
  }
}

function drawToolNode(row, node, x, y) {
  const failed = node.result?.error;
  const title = `${node.call?.tool ?? "tool"}(${node.call?.argument ?? ""})\n${failed ? `failed: ${failed}` : node.result?.text ?? "result missing"}`;
  const width = Math.max(3, x(node.texts.length) - x(0) - 2), name = node.call?.tool ?? "";
  row.append(withTip(shape("rect", { class: `tool ${failed ? "failed" : ""}`, x: x(0) + 1, y: y + 4, rx: 3, width, height: ROW - 8 }), title));
  if (width > 8 * name.length + 16) row.append(shape("text", { class: "name", x: x(0) + 7, y: y + 17 }, name));
}

function drawOverview(tree, chosen, choose, width) {
  const { rows, start, end, length } = layout(tree);
  const scale = (width - LABEL - SCORE - PROMPT - 8) / length;
  const x = (token) => LABEL + PROMPT + 4 + token * scale;
  const height = rows.length * ROW + 22;
  const svg = shape("svg", { class: "tree", viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": "paths" });
  const top = new Map(rows.map(({ path }, i) => [path.id, i * ROW]));
  const links = shape("g"), marks = shape("g");
  for (const { path, own } of rows) {
    const y = top.get(path.id);
    const row = shape("g", { class: `row ${path.id === chosen ? "chosen" : ""}`, tabindex: 0, role: "button", "aria-label": `path ${path.id}` });
    row.append(shape("rect", { class: "hit", x: 0.5, y: y + 0.5, width: width - 1, height: ROW - 1, rx: 5 }));
    row.append(shape("text", { x: 8, y: y + 17 }, `path ${path.id}`));
    if (path.parent === null) row.append(withTip(shape("rect", { class: "prompt", x: LABEL, y: y + 6, width: PROMPT, height: ROW - 12, rx: 2 }), "sampled from the question"));
    else {
      row.append(shape("text", { x: 58, y: y + 17, class: "quiet" }, `from ${path.parent}`));
      const bend = x(end(path.branch_node));
      links.append(shape("path", { class: "link", d: `M${bend} ${top.get(path.parent) + ROW / 2}V${y + ROW / 2 - 4}q0 4 4 4H${bend + 5}` }));
    }
    for (const id of own) {
      const node = tree.nodes[id], at = (token) => x(start.get(id) + token);
      if (node.source === "model") drawModelNode(row, node, at, y);
      if (node.source === "tool") drawToolNode(row, node, at, y);
    }
    drawScore(row, tree, path, width - SCORE + 10, y + 17);
    row.addEventListener("click", () => choose(path.id));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(path.id); } });
    svg.append(row);
  }
  for (const decision of tree.decisions) {
    const cx = x(end(decision.node)), cy = top.get(decision.path) + ROW / 2;
    const mark = decision.branched ? shape("path", { class: "branched", d: `M${cx} ${cy - 6}l6 6l-6 6l-6-6Z` })
      : shape("circle", { class: "kept", cx, cy, r: 3.5 });
    marks.append(withTip(mark, decisionText(tree, decision)));
  }
  svg.append(links, marks);
  for (const token of ticks(0, length, 6)) {
    svg.append(shape("text", { class: "quiet", x: x(token), y: height - 5, "text-anchor": "middle" }, token === 0 ? "0 tokens" : String(token)));
  }
  return svg;
}

function drawScore(row, tree, path, x, y) {
  const reward = tree.rewards?.[path.id];
  if (!reward) { row.append(shape("text", { x, y, class: "quiet" }, "reward missing")); return; }
  const advantage = tree.advantages?.[path.id];
  row.append(withTip(shape("text", { x, y, class: reward.success ? "good" : "bad" }, `${reward.success ? "✓" : "✗"} ${formatted(reward.total)}`),
    `reward ${formatted(reward.total)}\n${Object.entries(reward.components).map(([name, value]) => `${name}: ${formatted(value)}`).join("\n")}`));
  row.append(shape("text", { x: x + 56, y, class: "quiet" }, advantage === undefined ? path.finish_reason : `A ${signed(advantage)}`));
}

function nodeBlock(tree, node) {
  const failed = node.result?.error;
  const block = element("div", { class: `node ${node.source} ${failed ? "failed" : ""}` });
  const text = element("pre", { class: "text" });
  if (node.source === "tool") {
    const seconds = node.result ? ` · ${formatted(1000 * node.result.seconds)} ms` : "";
    block.append(element("div", { class: failed ? "who bad" : "who" }, `tool: ${node.call?.tool ?? "unknown"}${seconds}${failed ? ` · failed: ${failed}` : ""}`));
  } else block.append(element("div", { class: "who" }, node.source === "prompt" ? "prompt" : "model"));
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
  panel.append(element("div", {}, element("strong", {}, `Path ${path.id}`), ` · ${path.finish_reason}`,
    reward ? ` · reward ${formatted(reward.total)} (${Object.entries(reward.components).map(([name, value]) => `${name} ${formatted(value)}`).join(", ")})` : ""));
  const ancestry = new Set(); // the paths whose decisions stand on this one
  for (let id = path.id; id !== null; id = tree.paths[id].parent) ancestry.add(id);
  for (const id of lineage(tree, path)) {
    panel.append(nodeBlock(tree, tree.nodes[id]));
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

function drawTree(place, tree, chosen) {
  const solved = tree.rewards ? ` · ${tree.rewards.filter((reward) => reward.success).length} of ${tree.paths.length} paths succeed` : "";
  const panel = element("div", { class: "panel" }, element("div", { class: "question" }, tree.question.text),
    element("div", { class: "quiet" }, `answer: ${tree.question.answer} · ${tree.question.kind}${solved} · ${tree.paths.filter((path) => path.parent !== null).length} branches`),
    element("div", { class: "quiet" }, budgetText(tree)), entropyScale());
  place.replaceChildren(panel);
  panel.append(drawOverview(tree, chosen, (path) => drawTree(place, tree, path), panel.clientWidth - 32));
  place.append(drawPath(tree, tree.paths[chosen]));
}

function rolloutBrowser() {
  const root = document.getElementById("trees");
  if (!DATA.trees.length) { root.append(element("p", { class: "quiet" }, "No rollout was saved in this run (log.trees_every).")); return; }
  const name = (tree) => `${DATA.runs.length > 1 ? `${DATA.runs[tree.run].name}, ` : ""}step ${tree.step}`;
  const groups = [...new Map(DATA.trees.map((tree) => [name(tree), DATA.trees.filter((other) => name(other) === name(tree))])).values()];
  const stepMenu = element("select", { "aria-label": "step" }, ...groups.map((group, i) => element("option", { value: i }, name(group[0]))));
  const questionMenu = element("select", { "aria-label": "question" });
  const place = element("div");
  const best = (tree) => Math.max(0, tree.paths.findIndex((path) => path.parent !== null)); // a branched path shows most
  const show = () => { const tree = groups[stepMenu.value][questionMenu.value]; drawTree(place, tree, best(tree)); };
  const fillQuestions = () => {
    questionMenu.replaceChildren(...groups[stepMenu.value].map((tree, i) => element("option", { value: i }, tree.question.text)));
    show();
  };
  const move = (by) => { stepMenu.value = Math.min(groups.length - 1, Math.max(0, +stepMenu.value + by)); fillQuestions(); };
  const earlier = element("button", { type: "button" }, "◀ earlier"), later = element("button", { type: "button" }, "later ▶");
  earlier.addEventListener("click", () => move(-1));
  later.addEventListener("click", () => move(1));
  stepMenu.addEventListener("change", fillQuestions);
  questionMenu.addEventListener("change", show);
  addEventListener("resize", show);
  document.addEventListener("step", ({ detail }) => {
    const distance = (group) => Math.abs(group[0].step - detail);
    stepMenu.value = groups.reduce((nearest, group, i) => (distance(group) < distance(groups[nearest]) ? i : nearest), 0);
    fillQuestions();
    root.scrollIntoView({ behavior: "smooth" });
  });
  root.append(element("div", { class: "controls" }, stepMenu, questionMenu, earlier, later), place);
  stepMenu.value = groups.length - 1;
  fillQuestions();
}

rolloutBrowser();
