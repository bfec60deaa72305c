"use strict";
// Everything that is drawn from the data, once now and again whenever live.js brings newer data.

const browser = new RolloutBrowser(document.getElementById("trees"));
const heldoutRoot = document.getElementById("heldout");
const heldout = heldoutRoot && new HeldoutBrowser(heldoutRoot);

function drawPage() {
  drawCharts();
  browser.update();
  heldout?.update();
}

drawPage();
