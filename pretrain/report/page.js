// Draws the plots of a report from the data in the page: hover for values, drag to zoom, one horizontal axis for all.
//
// Nothing is fetched. Names and values come from a run and enter the page as text, never as markup. All figures share
// the window and the cursor, so that a spike in one is seen in the others. Keys: arrows move, + and - zoom, Escape
// shows the whole run.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("plots-data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 252, TOP = 20, BOTTOM = 36, RIGHT = 12;
  const DASHES = ["", "7 3", "2 2.5"];
  const AXES = { steps: "step", tokens: "tokens", hours: "hours inside steps" };
  // Of matplotlib's viridis, every eighth: dark is even, bright is full.
  const VIRIDIS = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];
  const view = { axis: "steps", window: null, cursor: null, hidden: new Set() };
  const figures = [];

  // ---- numbers

  function short(value, digits = 3) {
    for (const [size, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size) return trim((value / size).toPrecision(digits)) + letter;
    return Math.abs(value) < 1e-3 && value !== 0 ? trimPower(value.toExponential(digits - 2)) : trim(value.toPrecision(digits));
  }
  // Labels of one axis: in as many digits as make no two of them the same.
  function distinct(values) {
    for (let digits = 3; ; digits++) {
      const labels = values.map((value) => short(value, digits));
      if (new Set(labels).size === values.length || digits === 6) return labels;
    }
  }
  function exact(value) {
    if (Math.abs(value) >= 1e5) return Math.round(value).toLocaleString("en-US");
    return Math.abs(value) < 1e-3 && value !== 0 ? trimPower(value.toExponential(3)) : trim(value.toPrecision(5));
  }
  const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);
  const trimPower = (text) => text.replace(/\.?0+e/, "e").replace("e+", "e");
  function place(value) {
    return view.axis === "hours" ? trim(value.toFixed(3)) : Math.round(value).toLocaleString("en-US");
  }

  function ticks(low, high, count, smallest = 0) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max([1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power, smallest);
    const found = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step);
    return found;
  }
  function logTicks(low, high) {
    if (high / low < 20) return ticks(low, high, 5).filter((value) => value > 0);
    const found = [], factors = high / low > 1e4 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of factors) {
        const value = factor * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    return found;
  }

  // ---- places on the horizontal axis

  function firstAbove(sorted, value) {
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] > value) high = middle;
      else low = middle + 1;
    }
    return low;
  }
  function fromStep(run, step) {
    const table = page.runs[run], to = table[view.axis];
    if (view.axis === "steps" || !to.length) return step;
    const next = Math.min(Math.max(firstAbove(table.steps, step), 1), table.steps.length - 1);
    if (next < 1) return to[0];
    const share = (step - table.steps[next - 1]) / (table.steps[next] - table.steps[next - 1]);
    return to[next - 1] + share * (to[next] - to[next - 1]);
  }
  function nearest(sorted, value) {
    const above = firstAbove(sorted, value);
    if (above === 0) return 0;
    if (above === sorted.length) return above - 1;
    return value - sorted[above - 1] < sorted[above] - value ? above - 1 : above;
  }
  function spread() {
    let low = Infinity, high = -Infinity;
    for (const figure of figures) {
      for (const curve of shown(figure)) {
        low = Math.min(low, curve.places[0]);
        high = Math.max(high, curve.places[curve.places.length - 1]);
      }
    }
    if (!(low <= high)) return [0, 1];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }
  const isHidden = (figure, curve) => view.hidden.has("run " + curve.run) || view.hidden.has(figure.plot.name + "/" + curve.name);
  const shown = (figure) => figure.curves.filter((curve) => curve.places.length && !isHidden(figure, curve));

  // ---- drawing

  function add(parent, name, attributes, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }
  function html(parent, name, className, text) {
    const element = document.createElement(name);
    element.className = className;
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }
  const colour = (curve) => `var(--series-${curve.series + 1})`;

  function part(curve, [from, to]) {
    // One point beyond either end, so that lines leave the window instead of stopping in it.
    const start = Math.max(0, firstAbove(curve.places, from) - 2);
    const stop = Math.min(curve.places.length, firstAbove(curve.places, to) + 1);
    return [start, stop];
  }
  function heights(figure, window) {
    let low = Infinity, high = -Infinity;
    for (const curve of shown(figure)) {
      const [start, stop] = part(curve, window);
      for (let index = start; index < stop; index++) {
        low = Math.min(low, curve.values[index]);
        high = Math.max(high, curve.values[index]);
      }
    }
    if (!(low <= high)) [low, high] = [0, 1];
    const plot = figure.plot;
    if (plot.log) return low === high ? [low / 2, high * 2] : [low / 1.05, high * 1.05];
    const room = 0.05 * (high - low || Math.abs(high) || 1);
    return [plot.lowest ?? low - room, plot.highest ?? high + room];
  }

  function draw(figure) {
    const { host, plot } = figure, width = host.clientWidth, window = view.window ?? spread();
    const [low, high] = plot.heat ? [0, plot.heat.names.length] : heights(figure, window);
    const marks = plot.heat ? [] : plot.log ? logTicks(low, high) : ticks(low, high, 4);
    const labels = plot.heat ? plot.heat.names : distinct(marks);
    const left = 10 + 6.1 * Math.max(...labels.map((label) => label.length), 2);
    const scale = plot.log ? Math.log : (value) => value;
    figure.x = (value) => left + ((value - window[0]) / (window[1] - window[0])) * (width - left - RIGHT);
    figure.back = (pixel) => window[0] + ((pixel - left) / (width - left - RIGHT)) * (window[1] - window[0]);
    figure.y = (value) => HEIGHT - BOTTOM - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (HEIGHT - BOTTOM - TOP);
    figure.left = left;
    figure.right = width - RIGHT;
    figure.svg?.remove();
    const svg = (figure.svg = add(host, "svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, "aria-hidden": "true" }));
    add(svg, "text", { x: left, y: 11, class: "unit" }, plot.unit);
    marks.forEach((value, index) => {
      add(svg, "line", { x1: left, x2: width - RIGHT, y1: figure.y(value), y2: figure.y(value), class: "grid" });
      add(svg, "text", { x: left - 6, y: figure.y(value) + 3.5, "text-anchor": "end" }, labels[index]);
    });
    const across = ticks(window[0], window[1], width < 420 ? 4 : 6, view.axis === "steps" ? 1 : 0), named = distinct(across);
    across.forEach((value, index) => {
      add(svg, "line", { x1: figure.x(value), x2: figure.x(value), y1: TOP, y2: HEIGHT - BOTTOM, class: "grid" });
      const anchor = figure.x(value) > width - 30 ? "end" : "middle";
      add(svg, "text", { x: figure.x(value), y: HEIGHT - 21, "text-anchor": anchor, class: "tick" }, named[index]);
    });
    add(svg, "text", { x: (left + width - RIGHT) / 2, y: HEIGHT - 5, "text-anchor": "middle", class: "unit" }, AXES[view.axis]);
    const clip = add(add(svg, "clipPath", { id: `clip-${plot.name}` }), "rect", { x: left, y: TOP - 4, width: Math.max(0, width - left - RIGHT + 4), height: HEIGHT - BOTTOM - TOP + 8 });
    const inside = add(svg, "g", { "clip-path": `url(#${clip.parentNode.id})` });
    for (const [step] of plot.events) {
      const at = figure.x(fromStep(0, step));
      add(inside, "line", { x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM, class: "event" });
    }
    if (plot.heat) drawHeat(figure, inside, svg);
    else for (const curve of shown(figure)) drawCurve(figure, inside, curve, window);
    if (plot.limit !== null && plot.limit >= low && plot.limit <= high)
      add(inside, "line", { x1: left, x2: width - RIGHT, y1: figure.y(plot.limit), y2: figure.y(plot.limit), class: "limit" });
    figure.pointer = add(svg, "g", {});
    point(figure);
  }

  function drawCurve(figure, parent, curve, window) {
    const [start, stop] = part(curve, window);
    let path = "";
    for (let index = start; index < stop; index++)
      path += (path ? "L" : "M") + figure.x(curve.places[index]).toFixed(1) + " " + figure.y(curve.values[index]).toFixed(1);
    add(parent, "path", { d: path, class: curve.faint ? "faint" : "curve", stroke: colour(curve), "stroke-dasharray": DASHES[curve.dash] });
    if (curve.dots || stop - start === 1)
      for (let index = start; index < stop; index++)
        add(parent, "circle", { cx: figure.x(curve.places[index]), cy: figure.y(curve.values[index]), r: 2.4, fill: colour(curve) });
  }

  function drawHeat(figure, parent, svg) {
    const { heat } = figure.plot, height = (HEIGHT - BOTTOM - TOP) / heat.names.length;
    const every = Math.max(1, Math.ceil(12 / height));
    heat.rows.forEach((row, number) => {
      if (number % every === 0)
        add(svg, "text", { x: figure.left - 6, y: TOP + (number + 0.5) * height + 3.5, "text-anchor": "end" }, heat.names[number]);
      row.forEach((value, column) => {
        if (value === null) return;
        const from = figure.x(figure.edges[column]), to = figure.x(figure.edges[column + 1]);
        if (to < figure.left || from > figure.right) return;
        add(parent, "rect", { x: from, y: TOP + number * height, width: to - from + 0.4, height: height + 0.4, fill: shade(heat, value) });
      });
    });
  }
  function shade(heat, value) {
    const scale = heat.log ? Math.log : (number) => number;
    const share = (scale(value) - scale(heat.lowest)) / (scale(heat.highest) - scale(heat.lowest));
    const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), below = Math.min(Math.floor(at), VIRIDIS.length - 2);
    const mixed = [1, 3, 5].map((from) => {
      const [a, b] = [VIRIDIS[below], VIRIDIS[below + 1]].map((text) => parseInt(text.slice(from, from + 2), 16));
      return Math.round(a + (b - a) * (at - below));
    });
    return `rgb(${mixed})`;
  }

  // ---- pointing

  function point(figure) {
    figure.pointer.replaceChildren();
    const isPointed = view.cursor !== null && view.cursor.figure === figure;
    figure.tip.hidden = !isPointed;
    if (view.cursor === null) return;
    const at = figure.x(view.cursor.place);
    if (!(at >= figure.left - 1 && at <= figure.right + 1)) return void (figure.tip.hidden = true);
    add(figure.pointer, "line", { x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor" });
    const lines = figure.plot.heat ? pointHeat(figure) : pointCurves(figure);
    if (!isPointed) return;
    figure.tip.replaceChildren();
    html(figure.tip, "div", "at", `${AXES[view.axis]} ${place(view.cursor.place)}`);
    for (const { curve, name, text } of lines) {
      const line = html(figure.tip, "div", "", "");
      if (curve) swatch(line, curve);
      html(line, "span", "name", name);
      html(line, "b", "", text);
    }
    for (const [name, text] of around(figure)) {
      const line = html(figure.tip, "div", "around", "");
      html(line, "span", "name", name);
      html(line, "b", "", text);
    }
    // Beside the line, on the side with more room, and never out of the figure.
    const width = figure.tip.offsetWidth, isRight = at > (figure.left + figure.right) / 2;
    const left = isRight ? at - 12 - width : at + 12;
    figure.tip.style.left = `${Math.max(0, Math.min(left, figure.host.clientWidth - width))}px`;
  }
  // What a reader asks of any curve: the learning rate there, and what happened near the line.
  function around(figure) {
    const { steps, rates } = page.runs[0], found = [];
    if (page.runs.length > 1) return found;
    const places = steps.map((step) => fromStep(0, step)), index = nearest(places, view.cursor.place);
    if (rates.length && figure.plot.name !== "rate") found.push(["learning rate", exact(rates[index])]);
    for (const [step, text] of figure.plot.events)
      if (Math.abs(figure.x(fromStep(0, step)) - figure.x(view.cursor.place)) < 5) found.push([`step ${step}`, text]);
    return found.slice(0, 4);
  }
  function pointCurves(figure) {
    return shown(figure).map((curve) => {
      const index = nearest(curve.places, view.cursor.place), value = curve.values[index];
      const isElsewhere = Math.abs(figure.x(curve.places[index]) - figure.x(view.cursor.place)) > 2;
      if (!curve.faint)
        add(figure.pointer, "circle", { cx: figure.x(curve.places[index]), cy: figure.y(value), r: 3.6, fill: colour(curve), class: "mark" });
      const where = isElsewhere ? ` at ${place(curve.places[index])}` : "";
      return { curve, name: curve.name || figure.plot.title.toLowerCase(), text: exact(value) + where };
    });
  }
  function pointHeat(figure) {
    const { heat } = figure.plot, column = Math.min(Math.max(firstAbove(figure.edges, view.cursor.place) - 1, 0), heat.rows[0].length - 1);
    const rows = heat.names.map((name, number) => ({ name, value: heat.rows[number][column], number })).filter((row) => row.value !== null);
    const pointed = view.cursor.row === undefined ? [] : rows.filter((row) => row.number === view.cursor.row);
    const highest = rows.length ? [rows.reduce((a, b) => (b.value > a.value ? b : a))] : [];
    return [
      ...pointed.map((row) => ({ name: row.name, text: exact(row.value) })),
      ...highest.map((row) => ({ name: `highest: ${row.name}`, text: exact(row.value) })),
    ];
  }
  function swatch(parent, curve) {
    const key = add(parent, "svg", { viewBox: "0 0 18 8", class: "key", "aria-hidden": "true" });
    add(key, "line", { x1: 0, x2: 18, y1: 4, y2: 4, stroke: colour(curve), "stroke-width": curve.faint ? 1 : 2.4, "stroke-opacity": curve.faint ? 0.5 : 1, "stroke-dasharray": DASHES[curve.dash] });
  }
  function setCursor(figure, pixel, pixelY) {
    const wanted = figure.back(pixel), curves = shown(figure);
    let best = wanted;
    if (curves.length) {
      const candidates = curves.map((curve) => curve.places[nearest(curve.places, wanted)]);
      best = candidates.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    }
    view.cursor = { figure, place: best };
    if (figure.plot.heat && pixelY !== undefined) {
      const row = Math.floor((pixelY - TOP) / ((HEIGHT - BOTTOM - TOP) / figure.plot.heat.names.length));
      if (row >= 0 && row < figure.plot.heat.names.length) view.cursor.row = row;
    }
    figures.forEach(point);
  }
  function zoomTo(window) {
    if (window !== null) {
      const [low, high] = spread(), least = view.axis === "steps" ? 2 : (high - low) / 1e6;
      window = [Math.max(low, window[0]), Math.min(high, window[1])];
      if (window[1] - window[0] < least) return;
      if (window[0] <= low && window[1] >= high) window = null;
    }
    view.window = window;
    figures.forEach(draw);
    for (const button of document.querySelectorAll(".whole")) button.disabled = window === null;
  }
  function zoomBy(factor) {
    const [low, high] = view.window ?? spread(), middle = view.cursor?.place ?? (low + high) / 2;
    zoomTo([middle - (middle - low) * factor, middle + (high - middle) * factor]);
  }

  function listen(figure) {
    const { host } = figure;
    let from = null, band = null;
    const position = (event) => {
      const box = host.getBoundingClientRect();
      return [Math.min(Math.max(event.clientX - box.left, figure.left), figure.right), event.clientY - box.top];
    };
    host.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0) {
        from = position(event)[0];
        host.setPointerCapture(event.pointerId);
      }
      setCursor(figure, ...position(event));
    });
    host.addEventListener("pointermove", (event) => {
      const [x, y] = position(event);
      if (from !== null) {
        band ??= add(figure.svg, "rect", { y: TOP, height: HEIGHT - BOTTOM - TOP, class: "band" });
        band.setAttribute("x", Math.min(from, x));
        band.setAttribute("width", Math.abs(x - from));
      }
      setCursor(figure, x, y);
    });
    host.addEventListener("pointerup", (event) => {
      const x = position(event)[0], start = from;
      from = null;
      band?.remove();
      band = null;
      if (start !== null && Math.abs(x - start) > 6) zoomTo([figure.back(Math.min(start, x)), figure.back(Math.max(start, x))]);
    });
    host.addEventListener("pointercancel", () => { from = null; band?.remove(); band = null; });
    host.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "mouse" || from !== null) return;
      view.cursor = null;
      figures.forEach(point);
    });
    host.addEventListener("dblclick", () => zoomTo(null));
    host.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move) stepCursor(figure, move);
      else if (event.key === "+" || event.key === "=") zoomBy(0.5);
      else if (event.key === "-") zoomBy(2);
      else if (event.key === "Escape") zoomTo(null);
      else return;
      event.preventDefault();
    });
  }
  function stepCursor(figure, move) {
    const curve = shown(figure)[0], places = curve ? curve.places : figure.edges;
    if (!places) return;
    const [low, high] = view.window ?? spread();
    const now = view.cursor ? nearest(places, view.cursor.place) + move : nearest(places, (low + high) / 2);
    view.cursor = { figure, place: places[Math.min(Math.max(now, 0), places.length - 1)] };
    figures.forEach(point);
  }

  // ---- legends and buttons

  function legend(figure) {
    const named = figure.curves.filter((curve) => curve.name);
    if (named.length < 2 || page.runs.length > 1) return;
    const box = html(figure.host.parentNode, "div", "legend");
    figure.host.before(box);
    for (const curve of named) {
      const button = html(box, "button", "", "");
      button.type = "button";
      swatch(button, curve);
      button.append(curve.name);
      toggle(button, figure.plot.name + "/" + curve.name);
    }
  }
  function toggle(button, key) {
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const isOn = view.hidden.has(key);
      isOn ? view.hidden.delete(key) : view.hidden.add(key);
      for (const other of document.querySelectorAll("[data-toggles]"))
        if (other.dataset.toggles === key) other.setAttribute("aria-pressed", String(isOn));
      figures.forEach(draw);
    });
    button.dataset.toggles = key;
  }
  function toolbar() {
    const bar = document.getElementById("plots-bar"), select = html(bar, "select", "", "");
    select.setAttribute("aria-label", "horizontal axis");
    for (const axis of ["steps", "tokens", "hours"])
      if (page.runs.every((run) => run[axis].length)) html(select, "option", "", `over ${AXES[axis]}`.replace(/step$/, "steps")).value = axis;
    select.addEventListener("change", () => {
      view.axis = select.value;
      view.window = view.cursor = null;
      figures.forEach(settle);
      zoomTo(null);
    });
    for (const [label, name, action] of [["Zoom in", "in", () => zoomBy(0.5)], ["Zoom out", "out", () => zoomBy(2)], ["Whole run", "whole", () => zoomTo(null)]]) {
      const button = html(bar, "button", name, label);
      button.type = "button";
      button.addEventListener("click", action);
    }
    html(bar, "span", "hint", "Point for values, drag across to zoom, double-click to go back.");
    bar.hidden = false;
  }
  function settle(figure) {
    for (const curve of figure.curves) curve.places = curve.steps.map((step) => fromStep(curve.run, step));
    if (figure.plot.heat) figure.edges = figure.plot.heat.edges.map((edge) => fromStep(0, edge));
  }

  for (const plot of page.plots) {
    const host = document.getElementById(`plot-${plot.name}`);
    const figure = { plot, host, curves: plot.curves, tip: html(host, "div", "tip") };
    figures.push(figure);
    host.tabIndex = 0;
    host.hidden = false;
    settle(figure);
    legend(figure);
    listen(figure);
    if (plot.heat) {
      const scale = html(host.parentNode, "div", "scale", short(plot.heat.lowest));
      html(scale, "i", "").style.background = `linear-gradient(90deg, ${VIRIDIS})`;
      scale.append(`${short(plot.heat.highest)}${plot.heat.log ? ", by ratio" : ""}`);
    }
  }
  for (const button of document.querySelectorAll("button[data-run]")) {
    swatch(button, { series: +button.dataset.series, dash: +button.dataset.dash });
    button.prepend(button.lastChild);
    toggle(button, "run " + button.dataset.run);
  }
  if (figures.length) toolbar();
  zoomTo(null);
  new ResizeObserver(() => figures.forEach(draw)).observe(document.querySelector("main"));
})();
