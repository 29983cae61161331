"use strict";
(() => {
  const {groups, inks, panels, first, last} = JSON.parse(document.getElementById("data").textContent);
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim();
  const ofGroup = g => colour(g === null ? "--ink" : `--g${g % inks}`);
  const faded = (hex, alpha) => hex + Math.round(255 * alpha).toString(16).padStart(2, "0");
  const dashes = {dashed: [7, 4], dotted: [2, 3]};
  const number = v => v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(3));
  const charts = [];

  const columns = panel => {
    // One table [steps, values, low, high] per curve, and [steps, epsilon, low, high] per limit
    const tables = [];
    for (const c of panel.curves) tables.push([c.x, c.y, c.low || c.y, c.high || c.y]);
    for (const l of panel.limits) tables.push([l.x, l.y, l.y.map(v => v * l.band[0]), l.y.map(v => v * l.band[1])]);
    return uPlot.join(tables);
  };

  const draw = figure => {
    const panel = panels[figure.dataset.panel];
    const series = [{}], bands = [];
    const lines = [...panel.curves, ...panel.limits.map(l => ({...l, style: "limit", label: "epsilon"}))];
    for (const line of lines) {
      const ink = () => ofGroup(line.group);
      const at = series.length, limit = line.style === "limit", faint = line.style === "faint";
      const base = {spanGaps: true, points: {show: line.x.length < 3 && !limit}};
      series.push({...base, width: faint ? 1 : limit ? 1.25 : 2, dash: limit ? [6, 4] : dashes[line.style],
        stroke: () => faint ? faded(ink(), 0.4) : ink(), line});
      const edge = {...base, width: 0, stroke: "transparent", points: {show: false}};
      series.push({...edge}, {...edge});
      // uPlot fills what lies between two neighbouring series
      if (limit || line.low) bands.push({series: [at + 2, at + 1], fill: () => faded(ink(), limit || faint ? 0.1 : 0.16)});
    }
    const readout = figure.querySelector("output");
    const tell = u => {
      const place = u.cursor.idx;
      if (place == null) { readout.textContent = ""; return; }
      const said = [`step ${Math.round(u.data[0][place])}`];
      u.series.forEach((s, i) => {
        if (!s.line || !s.show) return;
        let near = null;  // curves have steps of their own: the nearest one that this one has
        for (let d = 0; d < u.data[0].length && near === null; d++)
          for (const j of [place - d, place + d]) if (near === null && u.data[i][j] != null) near = u.data[i][j];
        const name = s.line.group === null ? "" : groups[s.line.group];
        if (near !== null) said.push(`${[name, s.line.label].filter(Boolean).join(" ")} ${number(near)}`);
      });
      readout.textContent = said.join(" · ");
    };
    const axis = {stroke: () => colour("--quiet"), grid: {stroke: () => colour("--line"), width: 1},
      ticks: {show: false}, font: "12px system-ui, sans-serif"};
    const room = figure.querySelector(".plot");
    const y = panel.log
      ? {distr: 3, range: (u, low, high) => [panel.bottom, panel.top]}
      : {range: (u, low, high) => {
          const [a, b] = low === null ? [0, 1] : uPlot.rangeNum(low, high, 0.08, true);
          return [panel.bottom ?? a, panel.top ?? b];
        }};
    const u = new uPlot({
      width: room.clientWidth, height: 230, series, bands, padding: [10, 10, 0, 0], legend: {show: false},
      scales: {x: {time: false, range: (u, a, b) => first === last ? [first - 1, last + 1] : [a ?? first, b ?? last]}, y},
      axes: [{...axis, size: 28, values: (u, at) => at.map(v => v >= 1e4 ? `${+(v / 1e3).toPrecision(4)}k` : v)},
        {...axis, size: 54, values: (u, at) => at.map(v => v === null ? "" : number(v))}],
      cursor: {sync: {key: "steps"}, y: false, points: {size: 7}},
      hooks: {setCursor: [tell]},
    }, columns(panel), room);
    charts.push([u, room]);
    figure.dataset.points = panel.curves.reduce((sum, c) => sum + c.x.length, 0);
  };

  document.querySelectorAll("figure[data-panel]").forEach(draw);
  new ResizeObserver(() => charts.forEach(([u, room]) => {
    if (room.clientWidth !== u.width) u.setSize({width: room.clientWidth, height: 230});
  })).observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(([u]) => u.redraw()));
  document.querySelectorAll(".legend input").forEach(box => box.addEventListener("change", () => {
    const group = +box.value;
    for (const [u] of charts) u.series.forEach((s, i) => {
      if (s.line && s.line.group === group) for (const j of [i, i + 1, i + 2]) u.setSeries(j, {show: box.checked});
    });
  }));
  document.documentElement.dataset.charts = charts.length;
})();
