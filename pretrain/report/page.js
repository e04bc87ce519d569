// Draws the plots of a report from the data in the page: hover for values, drag to zoom, one horizontal axis for all.
//
// Nothing is fetched. Names and values come from a run and enter the page as text, never as markup. All figures share
// the window and the cursor, so that a spike in one is seen in the others. Keys: arrows move, + and - zoom, Escape
// shows the whole run. A noisy curve is the mean of a window on either side of each step, above an envelope of the lowest and
// highest value in each pixel.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("plots-data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const SCREEN = 252, PRINT = 148, TOP = 20, BOTTOM = 36, RIGHT = 12, GATHERED = 8, MOST_ENDS = 8;
  let HEIGHT = SCREEN;
  const DASHES = ["", "7 3", "2 2.5"];
  const AXES = { steps: "step", tokens: "tokens", hours: "hours inside steps" };
  // Of matplotlib's viridis, every eighth: dark is even, bright is full.
  const VIRIDIS = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];
  // Shares of a run over which a noisy curve is smoothed, and the least number of steps.
  const WINDOWS = [0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3], LEAST = 15;
  const MARKS = { failure: "M0 -5L5 4L-5 4Z", trouble: "M0 -4.5L4.5 0L0 4.5L-4.5 0Z", other: "M-1 -5L1 -5L1 5L-1 5Z" };
  const view = { axis: "steps", window: null, cursor: null, hidden: new Set(), smoothing: 3, all: false, logX: false, logY: false };
  const figures = [];

  // ---- numbers

  function short(exactly, digits = 3) {
    const value = +exactly.toPrecision(digits);
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
    if (view.logX && low <= 0) low = high / 1e4;
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
  const isLog = (figure) => figure.plot.log || (view.logY && figure.isPositive);
  const colour = (curve) => `var(--series-${curve.series + 1})`;

  function part(curve, [from, to]) {
    // One point beyond either end, so that lines leave the window instead of stopping in it.
    const start = Math.max(0, firstAbove(curve.places, from) - 2);
    const stop = Math.min(curve.places.length, firstAbove(curve.places, to) + 1);
    return [start, stop];
  }
  const hasEnvelope = (curve) => curve.noisy && (curve.envelope || (view.smoothing === 0 && curve.lows));
  function heights(figure, window) {
    let low = Infinity, high = -Infinity;
    const plot = figure.plot;
    if (plot.usual && !view.all && view.window === null && !isLog(figure)) return plot.usual;
    for (const curve of shown(figure)) {
      const [start, stop] = part(curve, window), isWhole = hasEnvelope(curve);
      for (let index = start; index < stop; index++) {
        low = Math.min(low, isWhole ? (curve.lows ?? curve.values)[index] : curve.smooth[index]);
        high = Math.max(high, isWhole ? (curve.highs ?? curve.values)[index] : curve.smooth[index]);
      }
    }
    if (!(low <= high)) [low, high] = [0, 1];
    if (isLog(figure)) return low === high ? [low / 2, high * 2] : [low / 1.05, high * 1.05];
    const room = 0.05 * (high - low || Math.abs(high) || 1);
    return [plot.lowest ?? low - room, plot.highest ?? high + room];
  }

  function draw(figure) {
    const { host, plot } = figure, width = host.clientWidth, window = view.window ?? spread();
    if (!width) return; // folded, until it is opened
    const [low, high] = plot.heat ? [0, plot.heat.names.length] : heights(figure, window);
    const marks = plot.heat ? [] : isLog(figure) ? logTicks(low, high) : ticks(low, high, 4);
    const labels = plot.heat ? plot.heat.names : distinct(marks);
    const left = 10 + 6.1 * Math.max(...labels.map((label) => label.length), 2);
    const ends = shown(figure).filter((curve) => curve.name), hasEnds = ends.length > 1 && ends.length <= MOST_ENDS && width >= 400;
    const right = width - (hasEnds ? 24 + 5.6 * Math.max(...ends.map((curve) => cut(curve.name).length)) : RIGHT);
    const scale = isLog(figure) ? Math.log : (value) => value;
    const across = view.logX ? (value) => Math.log(Math.max(value, window[0])) : (value) => value;
    const [begin, length] = [across(window[0]), across(window[1]) - across(window[0])];
    figure.x = (value) => left + ((across(value) - begin) / length) * (right - left);
    figure.back = (pixel) => {
      const there = begin + ((pixel - left) / (right - left)) * length;
      return view.logX ? Math.exp(there) : there;
    };
    figure.y = (value) => HEIGHT - BOTTOM - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (HEIGHT - BOTTOM - TOP);
    figure.left = left;
    figure.right = right;
    figure.svg?.remove();
    const svg = (figure.svg = add(host, "svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, "aria-hidden": "true" }));
    add(svg, "text", { x: left, y: 11, class: "unit" }, plot.unit);
    marks.forEach((value, index) => {
      add(svg, "line", { x1: left, x2: right, y1: figure.y(value), y2: figure.y(value), class: "grid" });
      add(svg, "text", { x: left - 6, y: figure.y(value) + 3.5, "text-anchor": "end" }, labels[index]);
    });
    stages(svg, figure);
    const places = view.logX ? logTicks(...window) : ticks(window[0], window[1], width < 420 ? 4 : 6, view.axis === "steps" ? 1 : 0), named = distinct(places);
    places.forEach((value, index) => {
      add(svg, "line", { x1: figure.x(value), x2: figure.x(value), y1: TOP, y2: HEIGHT - BOTTOM, class: "grid" });
      const anchor = figure.x(value) > width - 30 ? "end" : "middle";
      add(svg, "text", { x: figure.x(value), y: HEIGHT - 21, "text-anchor": anchor, class: "tick" }, named[index]);
    });
    add(svg, "text", { x: (left + right) / 2, y: HEIGHT - 5, "text-anchor": "middle", class: "unit" }, AXES[view.axis]);
    const clip = add(add(svg, "clipPath", { id: `clip-${plot.name}` }), "rect", { x: left, y: TOP - 4, width: Math.max(0, right - left + 4), height: HEIGHT - BOTTOM - TOP + 8 });
    const inside = add(svg, "g", { "clip-path": `url(#${clip.parentNode.id})` });
    if (plot.usual && !view.all && view.window === null && !isLog(figure))
      add(svg, "text", { x: right, y: 11, "text-anchor": "end", class: "cut" }, "begin and spikes are outside");
    if (plot.heat) drawHeat(figure, inside, svg);
    else for (const curve of shown(figure)) drawCurve(figure, inside, curve, window);
    if (plot.limit !== null && plot.limit >= low && plot.limit <= high)
      add(inside, "line", { x1: left, x2: right, y1: figure.y(plot.limit), y2: figure.y(plot.limit), class: "limit" });
    happened(svg, figure);
    if (hasEnds) nameEnds(svg, figure, ends, window);
    figure.pointer = add(svg, "g", {});
    point(figure);
  }
  const cut = (name) => (name.length > 14 ? name.slice(0, 13) + "\u2026" : name);
  // The name of each curve where it ends, apart from each other.
  function nameEnds(parent, figure, curves, window) {
    const height = (curve) => figure.y(curve.smooth[Math.max(0, part(curve, window)[1] - 1)]);
    const found = curves.map((curve) => ({ curve, y: Math.min(Math.max(height(curve), TOP + 4), HEIGHT - BOTTOM) }));
    found.sort((a, b) => a.y - b.y);
    found.forEach((end, number) => (end.y = Math.max(end.y, number ? found[number - 1].y + 12 : 0)));
    const over = Math.max(0, found.at(-1).y - (HEIGHT - BOTTOM));
    for (const { curve, y } of found) {
      add(parent, "line", { x1: figure.right + 3, x2: figure.right + 15, y1: y - over, y2: y - over, stroke: colour(curve), "stroke-width": 2, "stroke-dasharray": DASHES[curve.dash] });
      add(parent, "text", { x: figure.right + 18, y: y - over + 3.5, class: "end" }, cut(curve.name));
    }
  }
  function stages(parent, figure) {
    if (page.runs.length > 1) return;
    page.runs[0].stages.forEach(([first, last, name], number) => {
      const from = Math.max(figure.left, figure.x(fromStep(0, first))), to = Math.min(figure.right, figure.x(fromStep(0, last)));
      if (to <= from) return;
      if (number % 2) add(parent, "rect", { x: from, y: TOP, width: to - from, height: HEIGHT - BOTTOM - TOP, class: "stage" });
      if (to - from > 6.5 * name.length) add(parent, "text", { x: from + 4, y: TOP + 10, class: "stage-name" }, name);
    });
  }
  // What happened, gathered to one mark per kind and GATHERED pixels: [place, kind, number, first and last step, text, run].
  function gather(figure) {
    const found = new Map();
    page.runs.forEach((run, number) => {
      if (view.hidden.has("run " + number)) return;
      for (const [step, kind, count, text] of run.marks) {
        const at = figure.x(fromStep(number, step)), key = `${number} ${kind} ${Math.floor(at / GATHERED)}`;
        if (!(at >= figure.left - 1 && at <= figure.right + 1)) continue;
        const mark = found.get(key) ?? { at, kind, count: 0, first: step, last: step, texts: new Set(), run: number };
        mark.count += count;
        mark.last = step;
        mark.texts.add(text);
        found.set(key, mark);
      }
    });
    return [...found.values()];
  }
  function happened(parent, figure) {
    figure.marks = gather(figure);
    for (const mark of figure.marks) {
      const y = HEIGHT - BOTTOM - 6;
      add(parent, "path", { d: MARKS[mark.kind], transform: `translate(${mark.at.toFixed(1)} ${y})`, class: `happened ${mark.kind}` });
    }
  }

  function drawCurve(figure, parent, curve, window) {
    const [start, stop] = part(curve, window), pixels = figure.right - figure.left;
    if (hasEnvelope(curve)) drawEnvelope(figure, parent, curve, start, stop);
    let path = "", before = -1;
    const every = curve.noisy ? Math.max(1, Math.floor((stop - start) / pixels)) : 1;
    for (let index = start; index < stop; index = index + every < stop || index === stop - 1 ? index + every : stop - 1)
      path += (path ? "L" : "M") + figure.x(curve.places[index]).toFixed(1) + " " + figure.y(curve.smooth[index]).toFixed(1);
    add(parent, "path", { d: path, class: "curve", stroke: colour(curve), "stroke-dasharray": DASHES[curve.dash] });
    if (curve.dots || stop - start === 1)
      for (let index = start; index < stop; index++) {
        const at = figure.x(curve.places[index]);
        if (at - before < 3 && index < stop - 1) continue;
        add(parent, "circle", { cx: at, cy: figure.y(curve.values[index]), r: 2.4, fill: colour(curve) });
        before = at;
      }
  }
  // An area from the lowest to the highest value in each pixel; of fewer values than pixels they themselves, as a line.
  function drawEnvelope(figure, parent, curve, start, stop) {
    const lows = curve.lows ?? curve.values, highs = curve.highs ?? curve.values, columns = [];
    const isLine = !curve.lows && stop - start < figure.right - figure.left;
    for (let index = start; index < stop; index++) {
      const x = isLine ? figure.x(curve.places[index]) : Math.round(figure.x(curve.places[index])), last = columns.at(-1);
      if (last && last[0] === x) {
        last[1] = Math.min(last[1], lows[index]);
        last[2] = Math.max(last[2], highs[index]);
      } else columns.push([x, lows[index], highs[index]]);
    }
    const write = (found, place) => found.map((column) => `${+column[0].toFixed(1)} ${figure.y(column[place]).toFixed(1)}`).join("L");
    const d = isLine ? "M" + write(columns, 1) : `M${write(columns, 2)}L${write([...columns].reverse(), 1)}Z`;
    add(parent, "path", { d, class: isLine ? "faint" : "envelope", stroke: colour(curve), fill: isLine ? "none" : colour(curve) });
  }
  // Means over a centred window, which is shorter at the ends, so that a curve comes neither late nor early.
  function smooth(curve) {
    const share = WINDOWS[view.smoothing], { steps, values } = curve, count = values.length;
    if (!curve.noisy || !share) return void (curve.smooth = values);
    const length = steps[count - 1] - steps[0] + 1, half = (Math.max(LEAST, share * length) * count) / length / 2;
    const sums = [0];
    for (const value of values) sums.push(sums[sums.length - 1] + value);
    curve.smooth = values.map((_, index) => {
      const reach = Math.floor(Math.min(half, index, count - 1 - index));
      return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1);
    });
  }

  function drawHeat(figure, parent, svg) {
    const { heat } = figure.plot, height = (HEIGHT - BOTTOM - TOP) / heat.names.length;
    const every = Math.max(1, Math.ceil(12 / height));
    heat.rows.forEach((row, number) => {
      if (number % every === 0)
        add(svg, "text", { x: figure.left - 6, y: TOP + (number + 0.5) * height + 3.5, "text-anchor": "end" }, heat.names[number]);
    });
    // One picture of a column per pixel: thousands of rectangles would take a second.
    const canvas = document.createElement("canvas"), pen = canvas.getContext("2d"), pixels = Math.max(1, Math.round(figure.right - figure.left));
    canvas.width = pixels;
    canvas.height = heat.names.length;
    for (let pixel = 0, from = 0; pixel <= pixels; pixel++) {
      const column = (at) => firstAbove(figure.edges, figure.back(figure.left + at + 0.5)) - 1;
      if (pixel < pixels && column(pixel) === column(from)) continue;
      heat.rows.forEach((row, number) => {
        const value = row[column(from)] ?? null;
        if (value === null) return;
        pen.fillStyle = shade(heat, value);
        pen.fillRect(from, number, pixel - from, 1);
      });
      from = pixel;
    }
    add(parent, "image", { href: canvas.toDataURL(), x: figure.left, y: TOP, width: figure.right - figure.left, height: HEIGHT - BOTTOM - TOP, preserveAspectRatio: "none", class: "cells" });
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
    if (!figure.pointer) return;
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
    if (page.runs.length > 1) return nearby(figure).slice(0, 4);
    const places = steps.map((step) => fromStep(0, step)), index = nearest(places, view.cursor.place);
    if (rates.length && figure.plot.name !== "rate") found.push(["learning rate", exact(rates[index])]);
    return [...found, ...nearby(figure)].slice(0, 4);
  }
  function nearby(figure) {
    const at = figure.x(view.cursor.place);
    return figure.marks.filter((mark) => Math.abs(mark.at - at) < GATHERED).map((mark) => {
      const where = mark.count > 1 ? `${mark.count} times, steps ${mark.first} to ${mark.last}` : `step ${mark.first}`;
      return [page.runs.length > 1 ? `${page.runs[mark.run].name}, ${where}` : where, [...mark.texts].join(", ")];
    });
  }
  function pointCurves(figure) {
    return shown(figure).map((curve) => {
      const index = nearest(curve.places, view.cursor.place), value = curve.smooth[index];
      const isElsewhere = Math.abs(figure.x(curve.places[index]) - figure.x(view.cursor.place)) > 2;
      add(figure.pointer, "circle", { cx: figure.x(curve.places[index]), cy: figure.y(value), r: 3.6, fill: colour(curve), class: "mark" });
      const where = isElsewhere ? ` at ${place(curve.places[index])}` : "";
      const [low, high] = [curve.lows, curve.highs].map((ends) => (ends ?? curve.values)[index]), name = curve.name || figure.plot.title.toLowerCase();
      const raw = !hasEnvelope(curve) ? "" : low === high ? `, step ${exact(low)}` : `, ${exact(low)} to ${exact(high)}`;
      return { curve, name, text: exact(value) + raw + where };
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
    add(key, "line", { x1: 0, x2: 18, y1: 4, y2: 4, stroke: colour(curve), "stroke-width": 2.4, "stroke-dasharray": DASHES[curve.dash] });
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
    if (named.length < 2) return;
    const box = html(figure.host.parentNode, "div", "legend");
    figure.host.before(box);
    for (const curve of named) {
      const button = html(box, "button", "", "");
      button.type = "button";
      swatch(button, curve);
      button.append(curve.name);
      toggle(button, page.runs.length > 1 ? "run " + curve.run : figure.plot.name + "/" + curve.name);
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
    if (figures.some((figure) => figure.curves.some((curve) => curve.noisy))) {
      const label = html(bar, "label", "hint", "smoothing "), slider = html(label, "input", ""), words = html(label, "span", "", "");
      Object.assign(slider, { type: "range", id: "smoothing", min: 0, max: WINDOWS.length - 1, value: view.smoothing });
      const say = () => (words.textContent = view.smoothing ? ` ${100 * WINDOWS[view.smoothing]}% of the steps` : " none");
      slider.addEventListener("input", () => {
        view.smoothing = +slider.value;
        say();
        figures.forEach((figure) => figure.curves.forEach(smooth));
        figures.forEach(draw);
      });
      say();
    }
    const switches = [["all", "All values"], ["logX", "Log steps"], ["logY", "Log values"]];
    for (const [name, label] of switches) {
      if (name === "all" && !figures.some((figure) => figure.plot.usual)) continue;
      const button = html(bar, "button", `switch ${name}`, label);
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        view[name] = !view[name];
        button.setAttribute("aria-pressed", String(view[name]));
        figures.forEach(draw);
      });
    }
    html(bar, "span", "hint", "Point for values, drag across to zoom, double-click to go back.");
    bar.hidden = false;
  }
  function settle(figure) {
    figure.isPositive = figure.curves.every((curve) => (curve.lows ?? curve.values).every((value) => value > 0));
    figure.curves.forEach(smooth);
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
  document.querySelector("details.others")?.addEventListener("toggle", () => figures.forEach(draw));
  if (figures.length) toolbar();
  zoomTo(null);
  new ResizeObserver(() => figures.forEach(draw)).observe(document.querySelector("main"));
  // On paper plots are as wide as two of them fit, and lower.
  for (const [event, height] of [["beforeprint", PRINT], ["afterprint", SCREEN]])
    addEventListener(event, () => {
      HEIGHT = height;
      document.body.classList.toggle("paper", height === PRINT);
      figures.forEach(draw);
    });
})();
