"use strict";
(() => {
  const {groups, inks, panels, first, last} = JSON.parse(document.getElementById("data").textContent);
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim();
  const faded = (hex, alpha) => hex + Math.round(255 * alpha).toString(16).padStart(2, "0");
  const dashes = {dashed: [7, 4], dotted: [2, 3]};
  const several = groups.length > 1;
  const GAP = 15, MARGIN = 6;  // between labels, and before them, in pixels
  const font = size => `${size}px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif`;
  const pen = document.createElement("canvas").getContext("2d");
  const charts = [];

  // As in numbers.py
  const number = v => {
    const rounded = +v.toPrecision(3), size = Math.abs(rounded);
    if (v !== 0 && (size < 1e-4 || size >= 1e6)) {
      const [mantissa, power] = rounded.toExponential(2).split("e");
      return `${+mantissa}e${+power}`;
    }
    return rounded.toLocaleString("en-US", {maximumFractionDigits: 6});
  };
  const whole = v => v.toLocaleString("en-US");

  // On a logarithmic axis: each 1, 2 and 5 of few decades, each power of ten of more
  const ticks = (low, high) => {
    const decades = Math.log10(high / low), found = [];
    const step = Math.ceil(decades / 6);
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p += step)
      for (const k of decades <= 2.5 ? [1, 2, 5] : [1]) found.push(+`${k}e${p}`);
    return found.filter(v => v >= low * 0.999 && v <= high);
  };

  const columns = panel => {
    // One table [steps, values, low, high] per curve, and [steps, epsilon, epsilon, epsilon] per limit
    const tables = [[[first, last]]];  // all charts reach over the same steps
    for (const c of panel.curves) tables.push([c.x, c.y, c.low || c.y, c.high || c.y]);
    for (const l of panel.limits) tables.push([l.x, l.y, l.y, l.y]);
    return uPlot.join(tables);
  };

  // Of one method each line has a hue of its own; of several the hue is the method's, and dashes tell its lines apart
  const inkOf = (line, panel) => {
    if (line.limit) return colour(line.group === null || !several ? "--ink" : `--g${line.group % inks}`);
    const bold = panel.curves.filter(c => c.style !== "faint");
    return colour(`--g${(several ? line.group : Math.max(0, bold.indexOf(line.curve))) % inks}`);
  };
  // A method's only line is called as the method
  const nameOf = (line, panel) => {
    const method = several && line.group !== null ? groups[line.group] : "";
    const alone = !line.limit && panel.curves.filter(c => c.group === line.group && c.style !== "faint").length === 1;
    return method && alone && line.style !== "faint" ? method : [method, line.label].filter(Boolean).join(" ");
  };
  const textOf = (line, panel) => several && line.style === "faint" ? "" : nameOf(line, panel);
  const linesOf = panel => [...panel.curves.map(c => ({...c, curve: c})),
    ...panel.limits.map(l => ({...l, limit: true, style: "limit"}))];
  const widest = shown => {
    pen.font = font(12);
    return Math.max(0, ...shown.flatMap(p => linesOf(p).map(line => pen.measureText(textOf(line, p)).width)));
  };

  const cut = (text, width) => {
    pen.font = font(12);
    if (pen.measureText(text).width <= width) return text;
    while (text && pen.measureText(`${text}…`).width > width) text = text.slice(0, -1);
    return `${text}…`;
  };

  // The names of the lines beside their ends; where there are too many for the height, the first ones
  const label = u => {
    const {left, top, width, height} = u.bbox, ratio = devicePixelRatio, ctx = u.ctx;
    const shown = [];
    u.series.forEach((s, i) => {
      if (!s.line || !s.show || !s.text) return;
      let at = u.data[0].length - 1;
      while (at >= 0 && (u.data[i][at] == null || u.data[0][at] > u.scales.x.max)) at--;
      if (at < 0) return;
      const y = Math.min(Math.max(u.valToPos(u.data[i][at], "y", true), top), top + height);
      shown.push({text: s.text, ink: s.ink(), end: y, y, first: !!s.line.limit});
    });
    shown.sort((a, b) => b.first - a.first);
    const fit = shown.slice(0, Math.floor(height / ratio / GAP)).sort((a, b) => a.y - b.y);
    fit.forEach((l, i) => { if (i) l.y = Math.max(l.y, fit[i - 1].y + GAP * ratio); });
    let floor = top + height;
    for (const l of fit.slice().reverse()) { l.y = Math.min(l.y, floor); floor = l.y - GAP * ratio; }
    ctx.save();
    ctx.font = font(12 * ratio);
    ctx.textBaseline = "middle";
    ctx.textAlign = "left";
    for (const l of fit) {
      ctx.strokeStyle = ctx.fillStyle = l.ink;
      const right = left + width;
      if (Math.abs(l.y - l.end) > 3 * ratio) {
        ctx.globalAlpha = 0.5;
        ctx.lineWidth = ratio;
        ctx.beginPath();
        ctx.moveTo(right, l.end);
        ctx.lineTo(right + (MARGIN + 2) * ratio, l.y);
        ctx.stroke();
        ctx.globalAlpha = 1;
      }
      ctx.fillText(cut(l.text, u.room - MARGIN - 4), right + (MARGIN + 4) * ratio, l.y);
    }
    ctx.restore();
  };

  // Green where drift may be: below an epsilon that all have in common
  const room = (u, panel) => {
    if (panel.limits.length !== 1) return;
    const {x, y} = panel.limits[0], ctx = u.ctx, {left, top, width, height} = u.bbox;
    ctx.save();
    ctx.beginPath();
    ctx.rect(left, top, width, height);
    ctx.clip();
    ctx.fillStyle = faded(colour("--good"), 0.12);
    ctx.beginPath();
    ctx.moveTo(u.valToPos(x[0], "x", true), top + height);
    x.forEach((v, i) => ctx.lineTo(u.valToPos(v, "x", true), u.valToPos(y[i], "y", true)));
    ctx.lineTo(u.valToPos(x[x.length - 1], "x", true), top + height);
    ctx.fill();
    ctx.restore();
  };

  const draw = figure => {
    const panel = panels[figure.dataset.panel];
    const series = [{}], bands = [];
    for (const line of linesOf(panel)) {
      const ink = () => inkOf(line, panel);
      const at = series.length, limit = line.limit, faint = line.style === "faint";
      const base = {spanGaps: true, points: {show: line.x.length < 3 && !limit}};
      const dash = limit ? [6, 4] : several ? dashes[line.style] : undefined;
      series.push({...base, width: faint ? 1 : limit ? 1.25 : 2, dash,
        stroke: () => faint ? faded(ink(), 0.45) : ink(), line, ink, text: textOf(line, panel)});
      const edge = {...base, width: 0, stroke: "transparent", points: {show: false}};
      series.push({...edge}, {...edge});
      // uPlot fills what lies between two neighbouring series
      if (line.low) bands.push({series: [at + 2, at + 1], fill: () => faded(ink(), faint ? 0.1 : 0.16)});
    }
    const readout = figure.querySelector("output");
    const tell = u => {
      const place = u.cursor.idx;
      if (place == null) { readout.textContent = ""; return; }
      const said = [`step ${whole(Math.round(u.data[0][place]))}`];
      u.series.forEach((s, i) => {
        if (!s.line || !s.show) return;
        let near = null;  // curves have steps of their own: the nearest one that this one has
        for (let d = 0; d < u.data[0].length && near === null; d++)
          for (const j of [place - d, place + d]) if (near === null && u.data[i][j] != null) near = u.data[i][j];
        const name = nameOf(s.line.limit ? {...s.line, label: "epsilon"} : s.line, panel);
        if (near !== null) said.push([name, number(near)].filter(Boolean).join(" "));
      });
      readout.textContent = said.join(" · ");
    };
    const axis = {stroke: () => colour("--quiet"), grid: {stroke: () => colour("--line"), width: 1},
      ticks: {show: false}, font: font(12), labelFont: font(12), labelSize: 18};
    const plot = figure.querySelector(".plot");
    const height = () => panel.large ? (plot.clientWidth < 500 ? 260 : 320) : 220;
    const names = widest(panel.large ? panels.filter(p => p.large) : [panel]);  // large ones end at one step, too
    const right = u => u.room = names ? Math.min(names + MARGIN + 8, 0.34 * u.width) : 14;
    const y = panel.log
      ? {distr: 3, range: () => [panel.bottom, panel.top]}
      : {range: (u, low, high) => {
          const [a, b] = low === null ? [0, 1] : uPlot.rangeNum(low, high, 0.08, true);
          return [panel.bottom ?? a, panel.top ?? b];
        }};
    const u = new uPlot({
      width: plot.clientWidth, height: height(), series, bands, padding: [10, right, 0, 0], legend: {show: false},
      scales: {
        x: {time: false, range: (u, a, b) => first === last ? [first - 1, last + 1] : [a ?? first, b ?? last]}, y,
      },
      axes: [
        {...axis, size: 28, label: "step", space: 70,
          values: (u, at) => at.map(v => Number.isInteger(v) ? whole(v) : "")},
        {...axis, size: 52, label: panel.unit, 
          values: (u, at) => at.map(v => v === null || panel.unit === "steps" && v % 1 ? "" : number(v)),
          ...(panel.log ? {splits: () => ticks(panel.bottom, panel.top), filter: (u, at) => at} : {})},
      ],
      cursor: {sync: {key: "steps"}, y: false, points: {size: 7}},
      hooks: {drawClear: [u => room(u, panel)], draw: [label], setCursor: [tell]},
    }, columns(panel), plot);
    charts.push([u, plot, height]);
    figure.dataset.points = panel.curves.reduce((sum, c) => sum + c.x.length, 0);
    document.documentElement.dataset.charts = charts.length;
  };

  // What is folded has no width: its charts are drawn when it opens
  const within = place => place.querySelectorAll("figure[data-panel]:not([data-points])");
  const visible = figure => !figure.closest("details:not([open])");
  const drawVisible = () => [...within(document)].filter(visible).forEach(draw);
  drawVisible();
  document.querySelectorAll("details").forEach(fold => fold.addEventListener("toggle", drawVisible));
  new ResizeObserver(() => charts.forEach(([u, plot, height]) => {
    if (plot.clientWidth && plot.clientWidth !== u.width) u.setSize({width: plot.clientWidth, height: height()});
  })).observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(([u]) => u.redraw()));
  document.querySelectorAll(".legend input").forEach(box => box.addEventListener("change", () => {
    const group = +box.value;
    for (const [u] of charts) u.series.forEach((s, i) => {
      if (s.line && s.line.group === group) for (const j of [i, i + 1, i + 2]) u.setSeries(j, {show: box.checked});
    });
  }));
})();
