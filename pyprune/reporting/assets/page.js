"use strict";
// Every chart is drawn from the table below it: what is seen is what the table says.
(() => {
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dashes = [[], [6, 4], [2, 3], [9, 3, 2, 3]];
  const valueOf = (cell) => {
    const data = cell && cell.querySelector("data");
    return data === null || data === undefined || data.value === "" ? null : Number(data.value);
  };
  const textOf = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString());

  function columns(figure) {
    const table = figure.querySelector("table");
    const head = [...table.tHead.rows[0].cells];
    const rows = [...table.tBodies[0].rows];
    const plotted = head.map((cell, k) => (k === 0 || cell.dataset.plot !== undefined ? k : -1)).filter((k) => k >= 0);
    return {
      labels: plotted.map((k) => head[k].textContent),
      data: plotted.map((k) => rows.map((row) => valueOf(row.cells[k]))),
    };
  }

  function draw(figure) {
    const plot = figure.querySelector(".plot");
    const { labels, data } = columns(figure);
    const time = figure.dataset.x === "time";
    const log = figure.dataset.scale === "log" && data.slice(1).every((c) => c.every((v) => v === null || v > 0));
    const few = data[0].length <= 40;
    const axis = (label, more) => ({
      label, labelSize: 22, labelFont: "13px system-ui, sans-serif", font: "12px system-ui, sans-serif",
      stroke: () => style("--soft"), grid: { stroke: () => style("--line"), width: 1 },
      ticks: { stroke: () => style("--line"), width: 1, size: 4 }, ...more,
    });
    const options = {
      width: Math.max(plot.clientWidth, 240), height: plot.clientWidth < 500 ? 260 : 320,
      padding: [12, 12, 0, 0],
      cursor: { points: { size: 8 }, drag: { x: true, y: false } },
      scales: { x: { time, range: spread }, y: log ? { distr: 3, range: (u, low, high) => [low / 1.2, high * 1.2] } : {} },
      axes: [
        axis(labels[0], time ? {} : { incrs: figure.dataset.x === "whole" ? [1, 2, 5, 10, 20, 50, 100] : undefined }),
        axis(figure.dataset.y || "", {
          size: 58, values: (u, ticks) => ticks.map((v) => (v === null || (log && !round(v)) ? "" : Number(v.toPrecision(3)).toString())),
        }),
      ],
      legend: { markers: {
        fill: (u, k) => (k && k <= 8 ? style("--s" + ((k - 1) % 8)) : "transparent"),
        stroke: (u, k) => (k ? style("--s" + ((k - 1) % 8)) : "transparent"), dash: (u, k) => (k > 8 ? "dashed" : "solid"), width: 2,
      } },
      series: [
        { label: labels[0], value: (u, v) => (time && v !== null ? new Date(v * 1000).toISOString().slice(0, 16).replace("T", " ") : textOf(v)) },
        ...labels.slice(1).map((label, k) => ({
          label, width: 2, spanGaps: true, stroke: () => style("--s" + (k % 8)), fill: undefined,
          dash: dashes[Math.floor(k / 8) % dashes.length],
          points: { show: few, size: 6, fill: () => style("--s" + (k % 8)) },
          value: (u, v) => textOf(v),
        })),
      ],
    };
    plot.querySelectorAll(".uplot").forEach((old) => old.remove());
    const chart = new uPlot(options, data, plot);
    figure.dataset.drawn = JSON.stringify(data);
    return chart;
  }

  // One figure and zeros: what a logarithmic scale is labelled with, its ends are not.
  function round(value) {
    const digits = value / 10 ** Math.floor(Math.log10(value) + 1e-9);
    return Math.abs(digits - Math.round(digits)) < 1e-6;
  }

  // A margin at both ends, so that the first and the last point are not cut.
  function spread(u, low, high) {
    const margin = (high - low || 1) * 0.02;
    return [low - margin, high + margin];
  }

  const figures = [...document.querySelectorAll("figure.chart")].filter((f) => f.querySelector("tbody tr"));
  const charts = new Map(figures.map((figure) => [figure, draw(figure)]));

  for (const [figure] of charts) {
    const plot = figure.querySelector(".plot");
    let place = -1;
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const chart = charts.get(figure);
      place = Math.min(Math.max(place + step, 0), chart.data[0].length - 1);
      const first = chart.data.slice(1).find((column) => column[place] !== null);
      chart.setCursor({
        left: chart.valToPos(chart.data[0][place], "x"), top: first ? chart.valToPos(first[place], "y") : 0,
      });
    });
  }
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    for (const figure of figures) charts.set(figure, draw(figure));
  });
  // What was folded away had no width when it was drawn.
  for (const fold of document.querySelectorAll("details")) {
    fold.addEventListener("toggle", () => {
      for (const figure of figures) if (fold.open && fold.contains(figure)) charts.set(figure, draw(figure));
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const chart of charts.values()) chart.redraw();
  });
})();
