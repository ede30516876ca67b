"use strict";
(() => {
  const style = () => getComputedStyle(document.documentElement);
  const coloured = (value, colours) => {
    if (typeof value === "string") return value.startsWith("--") ? colours.getPropertyValue(value).trim() : value;
    if (Array.isArray(value)) return value.map((each) => coloured(each, colours));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, coloured(each, colours)]));
    }
    return value;
  };
  const draw = () => {
    const colours = style();
    for (const source of document.querySelectorAll('script[type="application/json"]')) {
      const { data, layout } = coloured(JSON.parse(source.textContent), colours);
      Plotly.react(source.previousElementSibling, data, layout, { responsive: true, displayModeBar: false });
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
