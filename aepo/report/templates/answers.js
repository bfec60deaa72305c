"use strict";
// Held-out questions over all evaluations: which were learned, which were lost, and what was answered.

const HELDOUT = [
  ["all", "all", () => true],
  ["learned", "learned", (entry) => entry.last > entry.first],
  ["lost", "lost", (entry) => entry.last < entry.first],
  ["failed", "not right at the end", (entry) => entry.last < 1],
];

const heldoutView = { run: "0", filter: "all", words: [], open: new Set() };

// Success at the first and at the last evaluation that asked the question.
function prepareAnswers() {
  for (const { answers } of DATA.runs) for (const entry of answers?.questions ?? []) {
    const known = entry.success.filter((value) => value !== null);
    [entry.first, entry.last] = [known[0], known.at(-1)];
    const written = Object.values(entry.samples).flatMap((samples) => samples.map(({ text }) => text));
    entry.searchText = [entry.id, entry.text, entry.answer, entry.kind, ...written].join("\n").toLowerCase();
  }
}

function successSquares(entry, steps) {
  const squares = entry.success.map((value) => element("i", {
    class: value === null ? "none" : value === 1 ? "yes" : value === 0 ? "no" : "part",
  }));
  const text = steps.map((step, i) => `step ${step}: ${entry.success[i] === null ? "not asked" : formatted(entry.success[i], "%")}`).join("\n");
  return withTip(element("span", { class: "squares", role: "img", "aria-label": text }, ...squares), text);
}

function sampleBlock(sample) {
  const counts = [sample.finish_reason, `reward ${formatted(sample.reward)}`, componentsText(sample),
    sample.tool_calls === null ? "" : `${sample.tool_calls} tool calls${sample.tool_failures ? `, ${sample.tool_failures} failed` : ""}`,
    sample.tokens === null ? "" : `${sample.tokens} tokens`];
  return element("div", { class: "sample" },
    element("div", { class: sample.success ? "good" : "bad" }, `${sample.success ? "✓" : "✗"} ${sample.answer ?? "no answer"}`),
    element("div", { class: "quiet" }, counts.filter(Boolean).join(" · ")),
    element("pre", { class: "text" }, sample.text));
}

// The answers of one evaluation, with a menu for another one.
function evaluationColumn(entry, steps, chosen) {
  const menu = element("select", { "aria-label": "evaluation" }), place = element("div");
  const draw = () => place.replaceChildren(...(entry.samples[menu.value] ?? []).map(sampleBlock));
  menu.append(...steps.map((step) => element("option", { value: step }, `step ${step}`)));
  menu.value = chosen;
  menu.addEventListener("change", draw);
  draw();
  return element("div", {}, menu, place);
}

function heldoutEntry(entry, answers) {
  const { open } = heldoutView;
  const change = entry.last === entry.first ? formatted(entry.last, "%") : `${formatted(entry.first, "%")} → ${formatted(entry.last, "%")}`;
  const details = element("details", { class: "heldout" }, element("summary", {}, element("span", { class: "ask" }, entry.text),
    successSquares(entry, answers.steps), element("small", { class: entry.last > entry.first ? "good" : entry.last < entry.first ? "bad" : "" }, change)));
  details.addEventListener("toggle", () => {
    if (details.open) open.add(entry.id);
    else { open.delete(entry.id); return; }
    if (details.children.length > 1) return;
    const steps = answers.texts.filter((step) => entry.samples[step]);
    const ends = steps.length > 1 ? [steps[0], steps.at(-1)] : steps;
    details.append(element("div", { class: "quiet" }, [entry.id, `expected: ${entry.answer || "none"}`, entry.kind].filter(Boolean).join(" · ")),
      element("div", { class: "compared" }, ...ends.map((step) => evaluationColumn(entry, steps, step))));
  });
  details.open = open.has(entry.id);
  return details;
}

class HeldoutBrowser {
  constructor(root) {
    this.root = root;
    this.menu = element("select", { "aria-label": "run" });
    this.menu.addEventListener("change", () => { heldoutView.run = this.menu.value; this.draw(); });
    this.filters = chips("filter of held-out questions", HELDOUT, heldoutView, "filter", () => this.draw());
    this.box = searchBox("search held-out answers", heldoutView, () => this.draw());
    this.save = button("save JSON", () => download("heldout.json", "application/json",
      JSON.stringify(this.listed.map(({ searchText, ...entry }) => ({ steps: this.answers.steps, ...entry })), null, 1)));
    this.list = element("div");
    moveByKeys(this.list, "summary");
  }

  update() {
    const having = DATA.runs.flatMap(({ name, answers }, i) => (answers ? [[String(i), name]] : []));
    if (!having.length) {
      this.root.replaceChildren(element("p", { class: "quiet" }, "No held-out answers were saved in this run (answers/)."));
      return;
    }
    prepareAnswers();
    if (!DATA.runs[heldoutView.run]?.answers) [[heldoutView.run]] = having;
    fillMenu(this.menu, having, heldoutView.run);
    if (!this.list.isConnected) this.root.replaceChildren(element("div", { class: "controls" }, this.menu, this.filters.group, this.box, this.save), this.list);
    this.draw();
  }

  draw() {
    this.answers = DATA.runs[heldoutView.run].answers;
    const found = this.answers.questions.filter((entry) => hasWords(entry.searchText, heldoutView.words));
    const matches = Object.fromEntries(HELDOUT.map(([name, , test]) => [name, found.filter(test)]));
    this.listed = matches[heldoutView.filter];
    this.filters.draw((name) => matches[name].length);
    this.save.setAttribute("aria-label", `the ${this.listed.length} listed held-out questions as JSON`);
    fillList(this.list, this.listed, (entry) => heldoutEntry(entry, this.answers), 25);
  }
}
