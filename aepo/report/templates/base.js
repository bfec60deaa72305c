"use strict";
// What all parts of the page need: the data, elements, numbers for people, tooltips, menus, downloads.
// Text reaches the page only as text nodes and attributes, never as markup.

let DATA = JSON.parse(document.getElementById("data").textContent);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function shape(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function button(label, action, attributes = {}) {
  const node = element("button", { type: "button", ...attributes }, label);
  node.addEventListener("click", action);
  return node;
}

// A number as `formatted` in aepo/report/charts.py writes it.
function formatted(value, unit) {
  if (value === null || value === undefined) return "missing";
  if (unit === "%") return `${+(100 * value).toPrecision(Math.abs(value) < 0.1 ? 2 : 3)}%`;
  if (unit === "s") return `${formatted(value)} s`;
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(1);
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(+value.toPrecision(3));
}

const tooltip = document.getElementById("tooltip");

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

// One of several buttons is pressed. `choices`: [name, label]; `count(name)`: how many there are of it.
function chips(title, choices, state, key, changed) {
  const group = element("div", { class: "chips", role: "group", "aria-label": title });
  const draw = (count) => {
    choices.forEach(([name, label], i) => {
      group.children[i].textContent = `${label} ${count(name)}`;
      group.children[i].setAttribute("aria-pressed", state[key] === name);
    });
  };
  group.append(...choices.map(([name, label]) => button(label, () => { state[key] = name; changed(); })));
  return { group, draw };
}

function searchBox(title, state, changed) {
  const box = element("input", { type: "search", placeholder: title, "aria-label": title });
  box.addEventListener("input", () => { state.words = box.value.toLowerCase().split(/\s+/).filter(Boolean); changed(); });
  return box;
}

const hasWords = (text, words) => words.every((word) => text.includes(word));

// Fills a menu, and keeps what is chosen in it where it is still there.
function fillMenu(menu, options, chosen) {
  menu.replaceChildren(...options.map(([value, label]) => element("option", { value }, label)));
  menu.value = chosen;
  menu.hidden = options.length < 2;
}

// ↑ and ↓ move between the entries of a list.
function moveByKeys(list, selector) {
  list.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    const entries = [...list.querySelectorAll(selector)];
    const next = entries[entries.indexOf(document.activeElement.closest(selector)) + by];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
}

// The first entries of a long list, and a button for more.
function fillList(list, items, entry, size = 200) {
  const more = (from) => {
    list.append(...items.slice(from, from + size).map(entry));
    const rest = items.length - from - size;
    if (rest <= 0) return;
    const next = button(`${rest} more`, () => { next.remove(); more(from + size); });
    list.append(next);
  };
  list.replaceChildren();
  more(0);
}

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
