"use strict";
// Which saved rollouts there are: filters, free search, a list with the rewards of every question as small bars, and
// beside it the chosen one. Opens at the newest step that has a learning signal: paths with different rewards.

const FILTERS = [
  ["all", "all", () => true],
  ["mixed", "different rewards", (tree) => tree.mixed],
  ["failed", "no success", (tree) => tree.failed],
  ["tool", "tool failure", (tree) => tree.toolFailures > 0],
];

// What the reader has chosen. key, path null: nothing yet, then the page chooses, also of what a live run adds.
const view = { step: "all", filter: "all", words: [], key: null, path: null };

function prepareTrees() {
  const seen = new Map();
  for (const tree of DATA.trees) {
    const name = JSON.stringify([DATA.runs[tree.run].name, tree.step, tree.question.id]);
    seen.set(name, (seen.get(name) ?? 0) + 1);
    tree.key = `${name}${seen.get(name)}`;
    const totals = (tree.rewards ?? []).map(({ total }) => total);
    tree.mixed = totals.some((total) => total !== totals[0]);
    tree.failed = totals.length > 0 && !tree.rewards.some(({ success }) => success);
    tree.toolFailures = tree.nodes.reduce((count, node) => count + failures(node).length, 0);
  }
  DATA.trees.sort((a, b) => b.step - a.step || a.run - b.run); // newest first; stable within a step
}

const stepName = (tree) => `${DATA.runs.length > 1 ? `${DATA.runs[tree.run].name}, ` : ""}step ${tree.step}`;

function searchText(tree) {
  const { id, text, answer, kind } = tree.question;
  const written = tree.nodes.flatMap((node) => (node.source === "prompt" ? [] : [node.texts.join("")]));
  tree.searchText ??= [id, text, answer, kind, ...written].join("\n").toLowerCase();
  return tree.searchText;
}

// The path to show first: one that has the words searched for, else a branched one, which shows most.
function firstPath(tree) {
  const written = (path) => lineage(tree, path).map((id) => tree.nodes[id].texts.join("")).join("").toLowerCase();
  const found = view.words.length ? tree.paths.findIndex((path) => hasWords(written(path), view.words)) : -1;
  return found >= 0 ? found : Math.max(0, tree.paths.findIndex((path) => path.parent !== null));
}

function rewardBars(tree, [low, high]) {
  const bars = (tree.rewards ?? []).map(({ total, success }) => element("i", {
    class: success ? "yes" : "no", style: `height: ${4 + 12 * ((total ?? low) - low) / (high - low || 1)}px`,
  }));
  const text = tree.rewards ? `rewards ${tree.rewards.map(({ total }) => formatted(total)).join(", ")}` : "rewards missing";
  return withTip(element("span", { class: "bars", role: "img", "aria-label": text }, ...bars), text);
}

// As a table of plain values, without tokens.
function exported(trees) {
  return trees.map((tree) => ({
    run: DATA.runs[tree.run].name, step: tree.step, question: tree.question,
    paths: tree.paths.map((path) => {
      const nodes = lineage(tree, path).map((id) => tree.nodes[id]);
      return {
        id: path.id, parent: path.parent, finish_reason: path.finish_reason, environment_reward: path.environment_reward ?? null,
        reward: tree.rewards?.[path.id] ?? null, advantage: tree.advantages?.[path.id] ?? null,
        calls: nodes.flatMap((node) => (node.calls ?? []).map((call, i) => ({ ...call, result: node.results[i] ?? null }))),
        text: nodes.filter(({ source }) => source !== "prompt").map((node) => node.texts.join("")).join(""),
      };
    }),
  }));
}

class RolloutBrowser {
  constructor(root) {
    this.stepMenu = element("select", { "aria-label": "step" });
    this.stepMenu.addEventListener("change", () => this.goToStep(this.stepMenu.value));
    this.steps = element("span", { class: "steps" }, this.stepMenu, button("◀ earlier", () => this.move(1)), button("later ▶", () => this.move(-1)));
    this.filters = chips("filter", FILTERS, view, "filter", () => this.drawList());
    this.box = searchBox("search questions, answers, paths ( / )", view, () => this.drawList());
    this.save = button("save JSON", () => download("rollouts.json", "application/json", JSON.stringify(exported(this.listed), null, 1)));
    this.list = element("div", { class: "list", role: "group", "aria-label": "questions" });
    this.place = element("div", { class: "place" });
    moveByKeys(this.list, "button");
    root.replaceChildren(element("div", { class: "controls" }, this.steps, this.filters.group, this.box, this.save),
      element("div", { class: "browser" }, this.list, this.place));
    addEventListener("resize", () => this.drawTree());
    document.addEventListener("step", ({ detail }) => this.goNear(detail));
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.matches?.("input, select")) return;
      event.preventDefault();
      this.box.focus();
    });
  }

  // After new data: what is chosen, or on the screen and so being read, stays; a tree that is as it was is not drawn again.
  update() {
    const { top, bottom } = this.place.getBoundingClientRect();
    if (this.tree && top < innerHeight && bottom > 0) view.key ??= this.tree.key;
    prepareTrees();
    this.names = [...new Set(DATA.trees.map(stepName))];
    if (!this.names.includes(view.step)) view.step = "all";
    fillMenu(this.stepMenu, [["all", "all steps"], ...this.names.map((name) => [name, name])], view.step);
    this.steps.hidden = this.names.length < 2;
    const totals = DATA.trees.flatMap((tree) => tree.rewards ?? []).map(({ total }) => total ?? 0);
    this.range = [totals.reduce((a, b) => Math.min(a, b), 0), totals.reduce((a, b) => Math.max(a, b), 0)];
    this.drawList();
  }

  drawList() {
    const inStep = DATA.trees.filter((tree) => view.step === "all" || stepName(tree) === view.step);
    const found = inStep.filter((tree) => hasWords(searchText(tree), view.words));
    const matches = Object.fromEntries(FILTERS.map(([name, , test]) => [name, found.filter(test)]));
    this.listed = matches[view.filter];
    this.filters.draw((name) => matches[name].length);
    this.save.setAttribute("aria-label", `the ${this.listed.length} listed rollouts as JSON`);
    const { scrollTop } = this.list;
    const focused = this.list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    fillList(this.list, this.listed, (tree) => this.entry(tree));
    this.list.scrollTop = scrollTop;
    if (focused) this.entryOf(focused)?.focus();
    this.drawTree();
  }

  entry(tree) {
    const notes = [this.names.length > 1 ? stepName(tree) : "", tree.question.kind, tree.toolFailures ? `${tree.toolFailures} tool failure${tree.toolFailures > 1 ? "s" : ""}` : ""];
    const entry = button("", () => this.choose(tree.key), { "data-key": tree.key });
    entry.append(element("span", { class: "ask" }, tree.question.text), rewardBars(tree, this.range), element("small", {}, notes.filter(Boolean).join(" · ")));
    return entry;
  }

  entryOf(key) {
    return [...this.list.children].find((node) => node.dataset.key === key);
  }

  choose(key, path = null) {
    view.key = key;
    view.path = path;
    this.drawTree();
  }

  // The chosen tree while it is listed, else the newest one with a signal, else the newest one.
  chosenTree() {
    return this.listed.find((tree) => tree.key === view.key) ?? this.listed.find((tree) => tree.mixed) ?? this.listed[0];
  }

  drawTree() {
    const tree = this.tree = this.chosenTree();
    for (const node of this.list.children) node.setAttribute("aria-current", node.dataset.key === tree?.key);
    if (!tree) {
      this.shown = null;
      const why = DATA.trees.length ? "No saved rollout is like that." : "No rollout was saved in this run (log.trees_every).";
      this.place.replaceChildren(element("p", { class: "quiet" }, why));
      return;
    }
    const path = tree.key === view.key && view.path !== null ? view.path : firstPath(tree);
    const shown = JSON.stringify([tree.key, path, this.place.clientWidth, tree.rewards, tree.nodes.length]);
    if (shown === this.shown) return;
    this.shown = shown;
    const focused = document.activeElement?.closest?.(".row") !== null;
    drawTree(this.place, tree, path, (id) => this.choose(tree.key, id));
    if (focused) this.place.querySelector(`[data-path="${path}"]`)?.focus();
  }

  goToStep(name) {
    view.step = name;
    view.key = null;
    this.stepMenu.value = name;
    this.drawList();
  }

  // Later steps stand first.
  move(by) {
    const at = this.names.indexOf(view.step === "all" ? stepName(this.chosenTree() ?? DATA.trees[0]) : view.step);
    this.goToStep(this.names[Math.max(0, Math.min(this.names.length - 1, at + by))]);
  }

  goNear(step) {
    if (!DATA.trees.length) return;
    const distance = (tree) => Math.abs(tree.step - step);
    this.goToStep(stepName(DATA.trees.reduce((nearest, tree) => (distance(tree) < distance(nearest) ? tree : nearest))));
    this.place.closest("section").scrollIntoView({ behavior: "smooth" });
  }
}
