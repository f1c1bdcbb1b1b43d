// Draws charts into the elements that name one (data-chart), in the colours of the page, when they come into view.
"use strict";

// Plotly writes some styles as attributes, which this page's Content-Security-Policy forbids; by this way it allows them.
{
  const setAttribute = SVGElement.prototype.setAttribute;
  SVGElement.prototype.setAttribute = function (name, value) {
    if (name === "style") this.style.cssText = value;
    else setAttribute.call(this, name, value);
  };
}

window.Charts = (() => {
  const LIGHT = ["#0b62c4", "#c2410c", "#14804a", "#8b2fb8", "#a16207", "#0e7490", "#be185d", "#475569"];
  const DARK = ["#6cb0ff", "#ff9b63", "#63d297", "#d79bf5", "#ecc94b", "#5cd0e2", "#ff8fc0", "#a9b8cc"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const charts = new Map(); // name -> figure: {data, layout}
  const seen = new Set(); // elements that are, or were, in view
  let printing = false;

  const isDark = () => dark.matches && !printing;
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function themed(figure, element) {
    const colours = isDark() ? DARK : LIGHT;
    let lines = 0;
    const data = figure.data.map((trace) => {
      const made = structuredClone(trace);
      if (made.type === "scatter" && !(made.line && made.line.width === 0)) {
        const place = made.meta && made.meta.colour !== undefined ? made.meta.colour : lines;
        made.line = { color: colours[place % 8], width: 2, dash: DASHES[Math.floor(place / 8) % 4], ...made.line };
        lines += 1;
      }
      if (made.type === "bar") made.marker = { color: colours[(made.meta.colour) % 8], line: { width: 0 }, ...made.marker };
      if (made.fill) made.fillcolor = isDark() ? "rgba(108,176,255,.18)" : "rgba(11,98,196,.13)";
      return made;
    });
    const legend = figure.layout.showlegend ?? figure.data.length > 1;
    const axis = { gridcolor: variable("--grid"), linecolor: variable("--line"), zeroline: false, automargin: true };
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: { family: "system-ui, sans-serif", size: 12.5, color: printing ? "#222" : variable("--soft") },
      margin: { l: 52, r: 12, t: legend ? 34 : 12, b: 40 }, hovermode: "x unified", showlegend: legend,
      hoverlabel: { bgcolor: variable("--surface"), bordercolor: variable("--line"), font: { color: variable("--text") } },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" }, ...figure.layout,
      xaxis: { ...axis, ...figure.layout.xaxis }, yaxis: { ...axis, ...figure.layout.yaxis },
    };
    if (printing) Object.assign(layout, { autosize: false, width: 680, height: element.clientHeight }); // A4 between its margins
    return [data, layout];
  }

  function draw(element) {
    const figure = charts.get(element.dataset.chart);
    if (!figure || !window.Plotly) return;
    const [data, layout] = themed(figure, element);
    if (matchMedia("(max-width: 40rem)").matches) layout.legend = { ...layout.legend, font: { size: 11 } };
    Plotly.react(element, data, layout, { displayModeBar: false, responsive: true, scrollZoom: false });
    element.dataset.drawn = "yes";
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !seen.has(entry.target)) {
        seen.add(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "300px" });

  const elements = () => document.querySelectorAll("[data-chart]");

  // New figures, by name; those in view are drawn anew, the others when they come into view.
  function set(figures) {
    for (const [name, figure] of Object.entries(figures)) charts.set(name, figure);
    for (const element of elements()) {
      if (seen.has(element)) draw(element);
      else watcher.observe(element);
    }
  }

  // A part of the page may come with a chart that was not there before, after the figures or ahead of them.
  document.addEventListener("part", () => elements().forEach((element) => watcher.observe(element)));

  const redraw = (all) => elements().forEach((element) => { if (all || seen.has(element)) draw(element); });
  dark.addEventListener("change", () => redraw(false));
  addEventListener("beforeprint", () => { printing = true; redraw(true); });
  addEventListener("afterprint", () => { printing = false; redraw(true); });

  // A chart that shows one of several measures: the radio buttons of its section choose which.
  document.addEventListener("change", (event) => {
    if (!event.target.matches("[data-measure]")) return;
    for (const element of elements()) {
      if (element.dataset.charts) {
        element.dataset.chart = `${element.dataset.charts}-${event.target.value}`;
        if (seen.has(element)) draw(element);
      }
    }
  });

  return { set, redraw, drawn: () => [...elements()].filter((element) => element.dataset.drawn).length };
})();
