"use strict";
// Every chart is drawn from the table below it: what is seen is what the table says.
(() => {
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (one) => style("--s" + (one.line % 8));
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
    const shown = (cell) => cell.dataset.plot !== undefined || cell.dataset.band !== undefined;
    const drawn = head.map((cell, k) => (k === 0 || shown(cell) ? k : -1)).filter((k) => k >= 0);
    const lines = head.map((cell, k) => (cell.dataset.plot !== undefined ? k : -1)).filter((k) => k >= 0);
    const series = drawn.slice(1).map((k) => {
      const band = head[k].dataset.band;
      return { label: head[k].textContent, edge: band !== undefined, line: lines.indexOf(band === undefined ? k : Number(band)) };
    });
    const bands = [];  // the edges of a band stand beside each other, the lower one first
    for (let k = 1; k < series.length; k += 1) {
      if (series[k].edge && series[k - 1].edge && series[k].line === series[k - 1].line) {
        bands.push({ series: [k + 1, k], fill: style("--s" + (series[k].line % 8)) + "30" });
        k += 1;
      }
    }
    return { first: head[0].textContent, series, bands, data: drawn.map((k) => rows.map((row) => valueOf(row.cells[k]))) };
  }

  function draw(figure) {
    const plot = figure.querySelector(".plot");
    const { first, series, bands, data } = columns(figure);
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
      padding: [12, 24, 0, 0], tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"), bands,
      cursor: { points: { size: 8 }, drag: { x: true, y: false } },
      scales: { x: { time, range: spread }, y: log ? { distr: 3, range: (u, low, high) => [low / 1.2, high * 1.2] } : { range: around } },
      axes: [
        axis(first, time ? { values: moments } : { incrs: figure.dataset.x === "whole" ? [1, 2, 5, 10, 20, 50, 100] : undefined }),
        axis(figure.dataset.y || "", {
          size: 58, values: (u, ticks, axis, space, step) => ticks.map((v) => (v === null || (log && !round(v)) ? "" : tick(v, log ? v : step))),
        }),
      ],
      legend: { markers: {
        fill: (u, k) => (k && series[k - 1].line < 8 ? colour(series[k - 1]) : "transparent"),
        stroke: (u, k) => (k ? colour(series[k - 1]) : "transparent"),
        dash: (u, k) => (k && series[k - 1].line >= 8 ? "dashed" : "solid"), width: 2,
      } },
      series: [
        { label: first, value: (u, v) => (time && v !== null ? new Date(v * 1000).toISOString().slice(0, 16).replace("T", " ") : textOf(v)) },
        ...series.map((one) => ({
          label: one.label, class: one.edge ? "edge" : "line", width: one.edge ? 0 : 2, spanGaps: true,
          stroke: () => colour(one), fill: undefined, dash: dashes[Math.floor(one.line / 8) % dashes.length],
          points: { show: few && !one.edge, size: 6, fill: () => colour(one) },
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

  // As many decimals as tell one tick from the next.
  function tick(value, step) {
    return Number(value.toFixed(Math.min(Math.max(-Math.floor(Math.log10(Math.abs(step) || 1)), 0) + 1, 20))).toString();
  }

  // Times in UTC, as the tables have them; the date where it changes.
  function moments(u, ticks, axis, space, step) {
    let before = "";
    return ticks.map((v) => {
      const [day, clock] = new Date(v * 1000).toISOString().split("T");
      const text = step >= 86400 ? day : clock.slice(0, step >= 60 ? 5 : 8) + (day === before ? "" : "\n" + day);
      before = day;
      return text;
    });
  }

  // Values that hardly differ are drawn as such, not as a cliff.
  function around(u, low, high) {
    const least = 0.01 * Math.max(Math.abs(low), Math.abs(high));
    return high - low < least ? [low - least, high + least] : uPlot.rangeNum(low, high, 0.1, true);
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
