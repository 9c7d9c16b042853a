"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const chosen = {};

  // "@A" and "@A/0.2" are names of colours, with an opacity.
  function colour(name) {
    const [key, opacity] = name.slice(1).split("/");
    const hex = page.colours[key] ? page.colours[key][dark.matches ? 1 : 0] : "#888888";
    if (!opacity) return hex;
    const part = (i) => parseInt(hex.slice(i, i + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${opacity})`;
  }

  function resolve(node) {
    if (typeof node === "string") return /^@[A-Za-z]+(\/[0-9.]+)?$/.test(node) ? colour(node) : node;
    if (Array.isArray(node)) return node.map(resolve);
    if (node && typeof node === "object") {
      return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, key === "text" ? value : resolve(value)]));
    }
    return node;
  }

  function traces(figure, view) {
    return resolve(view.data).map((trace) => (trace.textref ? { ...trace, text: figure.texts[trace.textref] } : trace));
  }

  function layout(figure, view) {
    const axis = { gridcolor: colour("@grid"), zerolinecolor: colour("@grid"), linecolor: colour("@grid"), automargin: true };
    const given = resolve(view.layout);
    const small = figure.width === "third";
    return {
      ...given,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("@text"), size: small ? 10.5 : 12, family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif" },
      margin: { l: small ? 46 : 60, r: 12, t: 8, b: small ? 40 : 52 },
      showlegend: !small,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11.5 } },
      hoverlabel: { align: "left", bgcolor: colour("@paper"), bordercolor: colour("@muted"), font: { color: colour("@text") } },
      xaxis: { ...axis, ...(given.xaxis || {}), ...(small ? { title: { text: "" } } : {}) },
      yaxis: { ...axis, ...(given.yaxis || {}) },
    };
  }

  function draw(figure) {
    const view = figure.views[chosen[figure.key] ?? figure.first ?? 0];
    const config = { displayModeBar: false, responsive: true };
    return Plotly.react(`plot-${figure.key}`, traces(figure, view), layout(figure, view), config);
  }

  function choices(figure) {
    const place = document.querySelector(`#figure-${figure.key} .choice`);
    if (figure.views.length < 2) {
      place.remove();
      return;
    }
    const label = document.createElement("span");
    label.className = "what";
    label.textContent = place.dataset.label;
    if (place.dataset.label) place.append(label);
    if (figure.views.length > 8) {
      const list = document.createElement("select");
      list.setAttribute("aria-label", place.dataset.label);
      figure.views.forEach((view, number) => list.add(new Option(view.name, number)));
      list.value = figure.first ?? 0;
      list.addEventListener("change", () => { chosen[figure.key] = Number(list.value); draw(figure); });
      place.append(list);
      return;
    }
    figure.views.forEach((view, number) => {
      const button = document.createElement("button");
      button.textContent = view.name;
      button.setAttribute("aria-pressed", number === 0);
      button.addEventListener("click", () => {
        chosen[figure.key] = number;
        place.querySelectorAll("button").forEach((other, i) => other.setAttribute("aria-pressed", i === number));
        draw(figure);
      });
      place.append(button);
    });
  }

  page.figures.forEach(choices);
  // One after the other, so that the page can be read and scrolled while they are drawn.
  const waiting = [...page.figures];
  function next() {
    const figure = waiting.shift();
    if (!figure) {
      document.body.dataset.drawn = page.figures.length;
      return;
    }
    draw(figure);
    setTimeout(next, 0);
  }
  requestAnimationFrame(() => setTimeout(next, 0));
  dark.addEventListener("change", () => page.figures.forEach(draw));
})();
