"use strict";
// A measure against firing rate, one point per latent (ECharts, drawn on a canvas).
(() => {
  const P = window.prunelens;
  const { html } = P;
  const { useEffect, useRef, useMemo } = window.preactHooks;
  const MANY = 3000; // points drawn in one go
  const SHAPES = { 1: "circle", 0: "triangle", "-1": "rect" };
  let library = null;

  P.Scatter = ({ view, condition, state, go }) => {
    const columns = P.fields(view, condition).filter((column) => column.key !== "firing_rate");
    const column = columns.find(({ name }) => name === state.y) || columns[0];
    const loaded = P.useLoaded(echarts, ["echarts"]);
    if (!view.rate || !column || !condition) return html`<p>There is nothing to draw: this view has no firing rates or no conditions.</p>`;
    return html`<section class="fill" aria-labelledby="scatter-title">
      <div class="row"><h2 id="scatter-title" class="plain">${column.label} against firing rate</h2>
        <${P.Choice} label="Vertical" value=${column.name} options=${columns.map(({ name, label }) => [name, label])}
          onChoose=${(y) => go({ ...state, y }, { replace: true })} /></div>
      ${loaded.value ? html`<${Plot} view=${view} condition=${condition} column=${column} state=${state} go=${go} />` : html`<${P.Waiting} of=${loaded} />`}
    </section>`;
  };

  const echarts = () => {
    library = library || P.script("vendor/echarts.common.min.js").then(() => window.echarts, (error) => { library = null; throw error; });
    return library;
  };

  const Plot = ({ view, condition, column, state, go }) => {
    const place = useRef(null);
    const latest = useRef(null);
    latest.current = (latent) => go({ ...state, latent, own: "" });
    const points = useMemo(() => pointsOf(view, condition, column), [view, condition, column.name]);
    useEffect(() => {
      const chart = window.echarts.init(place.current);
      chart.on("click", ({ seriesIndex, dataIndex }) => latest.current(points.series[seriesIndex].data[dataIndex][2]));
      const draw = () => chart.setOption(option(points, view.rate, column), true);
      const observer = new ResizeObserver(() => chart.resize());
      observer.observe(place.current);
      draw();
      const forget = P.onTheme(draw);
      return () => { forget(); observer.disconnect(); chart.dispose(); };
    }, [points]);
    return html`<p class="count">Click a point to open its latent; turn the wheel to zoom. With the keyboard, the <a
        href=${P.format({ ...state, tab: "latents" })}>list</a> has the same latents and numbers.
        ${points.left > 0 && ` ${P.count(points.left, "latent")} without a value here or that never fired on the text ${points.left === 1 ? "is" : "are"} not drawn.`}</p>
      <div class="plot" ref=${place} role="img" aria-label=${`${P.count(points.drawn, "latent")}: ${column.label} against firing rate`}></div>`;
  };

  const pointsOf = (view, { kept }, { values }) => {
    const series = [1, 0, -1].map((fate) => ({ fate, data: [] }));
    const place = { 1: 0, 0: 1, "-1": 2 };
    const rates = view.rate.values;
    let drawn = 0;
    for (let i = 0; i < view.numLatents; i += 1) {
      if (rates[i] > 0 && Number.isFinite(values[i])) {
        series[place[kept[i]]].data.push([rates[i], values[i], i]);
        drawn += 1;
      }
    }
    return { series: series.filter(({ data }) => data.length), drawn, left: view.numLatents - drawn };
  };

  const option = ({ series }, rate, column) => {
    const [text, soft, line, card] = ["--text", "--soft", "--line", "--card"].map(P.colour);
    const axis = {
      nameLocation: "middle", nameTextStyle: { color: text }, axisLabel: { color: soft },
      axisLine: { lineStyle: { color: line } }, splitLine: { lineStyle: { color: line } },
    };
    return {
      animation: false,
      grid: { left: 64, right: 24, top: 40, bottom: 56 },
      legend: { top: 0, textStyle: { color: text } },
      tooltip: {
        renderMode: "richText", confine: true, backgroundColor: card, borderColor: line, textStyle: { color: text },
        formatter: ({ value: [x, y, latent] }) => `#${latent}\n${P.number(y)} at rate ${P.number(x)}`,
      },
      dataZoom: [{ type: "inside", xAxisIndex: 0, filterMode: "none" }, { type: "inside", yAxisIndex: 0, filterMode: "none" }],
      xAxis: { ...axis, type: "log", name: `${rate.label} (logarithmic)`, nameGap: 32 },
      yAxis: { ...axis, type: "value", name: column.label, nameGap: 44 },
      series: series.map(({ fate, data }) => ({
        type: "scatter", name: P.FATES[fate].word, data, symbol: SHAPES[fate], symbolSize: 6, large: true, largeThreshold: MANY,
        itemStyle: { color: P.colour(`--${P.FATES[fate].style}`), opacity: 0.65 },
      })),
    };
  };
})();
