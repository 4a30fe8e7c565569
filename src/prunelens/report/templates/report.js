"use strict";
// Hands each figure's data to plotly.js when it comes into view, in the colours of the page.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const touch = matchMedia("(pointer: coarse)").matches;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const layoutOf = (layout) => {
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), tickcolor: colour("--line") };
    return {
      ...layout,
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: colour("--text") },
      dragmode: touch ? false : "zoom",
      hovermode: "closest",
      hoverlabel: { namelength: 60 },
    };
  };

  const draw = (place) => {
    const { data, layout } = figures[place.id];
    Plotly.react(place, data, layoutOf(layout), { displayModeBar: false, responsive: true });
    place.classList.add("drawn");
  };

  const places = [...document.querySelectorAll(".plot")];
  for (const place of places) place.style.minHeight = `${figures[place.id].layout.height}px`;
  if ("IntersectionObserver" in window) {
    const seen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) { seen.unobserve(target); draw(target); }
      }
    }, { rootMargin: "600px" });
    places.forEach((place) => seen.observe(place));
  } else {
    places.forEach(draw);
  }
  dark.addEventListener("change", () => places.filter((p) => p.classList.contains("drawn")).forEach(draw));

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of opened) part.open = false; });
})();
