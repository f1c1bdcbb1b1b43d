// Keeps an open page current: takes over the parts that the server says have changed, and touches nothing else.
"use strict";

(() => {
  const line = document.getElementById("line");
  const said = document.getElementById("said");

  // Makes `old` what `fresh` is, keeping the elements that stay: focus, scroll and open folds are kept with them.
  function morph(old, fresh) {
    if (old.hasAttribute("data-kept") || old.isEqualNode(fresh)) return; // kept: what a script has drawn
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name) && !(old.tagName === "DETAILS" && name === "open")) old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    const before = [...old.childNodes];
    const after = [...fresh.childNodes];
    after.forEach((node, place) => {
      const there = before[place];
      if (!there) old.append(node);
      else if (there.nodeType === 1 && node.nodeType === 1 && there.tagName === node.tagName && there.id === node.id) morph(there, node);
      else if (there.nodeType === 3 && node.nodeType === 3) { if (there.data !== node.data) there.data = node.data; }
      else there.replaceWith(node);
    });
    before.slice(after.length).forEach((node) => node.remove());
  }

  function take(part, html) {
    const old = document.getElementById(part);
    if (!old) return;
    const holder = document.createElement("template");
    holder.innerHTML = html;
    morph(old, holder.content.firstElementChild);
    document.dispatchEvent(new CustomEvent("part", { detail: part }));
    tick();
  }

  let newest = "";
  async function drawFigures(version) {
    if (!window.Charts || version === newest) return;
    newest = version;
    const response = await fetch(`/figures.json?v=${encodeURIComponent(version)}`);
    if (response.ok) Charts.set(await response.json());
  }

  const AGO = [[86400, "day"], [3600, "h"], [60, "min"], [1, "s"]];
  function ago(element) {
    const seconds = Math.max(0, Math.round((Date.now() - Date.parse(element.dateTime)) / 1000));
    if (!Number.isFinite(seconds)) return;
    const [size, unit] = AGO.find(([least]) => seconds >= least) || [1, "s"];
    const number = Math.floor(seconds / size);
    const words = seconds < 5 ? "now" : `${number} ${unit}${unit === "day" && number > 1 ? "s" : ""} ago`;
    if (element.textContent !== words) element.textContent = words;
  }
  const tick = () => document.querySelectorAll("time.ago").forEach(ago);
  setInterval(tick, 1000);
  tick();

  function show(words, state) {
    line.textContent = words;
    line.className = `chip ${state}`;
  }

  function connect() {
    const events = new EventSource("/events");
    events.addEventListener("open", () => show("live", "good"));
    events.addEventListener("part", (event) => {
      const { part, html } = JSON.parse(event.data);
      take(part, html);
    });
    events.addEventListener("title", (event) => { document.title = JSON.parse(event.data).title; });
    events.addEventListener("figures", (event) => drawFigures(JSON.parse(event.data).version));
    events.addEventListener("said", (event) => { said.textContent = JSON.parse(event.data).words; });
    events.addEventListener("ended", () => { events.close(); location.reload(); });
    events.addEventListener("error", () => {
      show("no line to this page's server; trying again", "error");
      if (events.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
    });
  }
  drawFigures(document.documentElement.dataset.figures || "");
  connect();
})();
