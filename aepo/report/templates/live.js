"use strict";
// Follows a run: asks the server for a newer page, and takes over its head and its data. What the reader has chosen,
// opened, typed and scrolled to stays.

const PERIOD = 2000; // milliseconds
const liveLine = document.getElementById("live");
let liveTag = liveLine.dataset.tag, news = "follows the run";

const say = (text, wrong = false) => {
  liveLine.textContent = `live · ${text}`;
  liveLine.classList.toggle("bad", wrong);
};

function takeHead(fresh) {
  const head = document.getElementById("head"), newHead = fresh.getElementById("head");
  const focused = head.contains(document.activeElement) ? document.activeElement.closest("details")?.id : null;
  for (const details of head.querySelectorAll("details")) {
    const same = newHead.querySelector(`#${details.id}`);
    if (same) same.open = details.open;
  }
  head.replaceWith(newHead);
  if (focused) newHead.querySelector(`#${focused} summary`)?.focus();
}

// What is being read keeps its place on the screen, although what stands above it may have grown.
function keepingPlace(change) {
  const blocks = [...document.querySelectorAll("section")].filter((block) => block.getBoundingClientRect().top < innerHeight / 2);
  const anchor = scrollY > 0 ? blocks.at(-1) : null;
  const before = anchor?.getBoundingClientRect().top;
  change();
  if (anchor) scrollBy({ top: anchor.getBoundingClientRect().top - before, behavior: "instant" });
}

function takeOver(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  const data = fresh.getElementById("data");
  if (!data) { news = "the run has begun anew: its first step is awaited"; return; }
  keepingPlace(() => {
    DATA = JSON.parse(data.textContent);
    document.title = fresh.title;
    takeHead(fresh);
    drawPage();
  });
  news = `updated ${new Date().toLocaleTimeString()}`;
}

async function ask() {
  try {
    const answer = await fetch("/", { headers: { "If-None-Match": liveTag }, cache: "no-store" });
    if (answer.ok) {
      takeOver(await answer.text());
      liveTag = answer.headers.get("ETag");
    }
    if (answer.ok || answer.status === 304) say(news);
    else say(`the server says: ${await answer.text()}`, true);
  } catch {
    say("no answer: has aepo report --live ended? What is shown is the last state.", true);
  }
  setTimeout(ask, PERIOD);
}

setTimeout(ask, PERIOD);
