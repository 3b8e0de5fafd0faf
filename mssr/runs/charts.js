// Hovering and zooming of the curves that mssr/runs/charts.py draws; sizes, ticks and margins are its own.
const W = 400, H = 200, LEFT = 56, RIGHT = 8, TOP = 8, BOTTOM = 22;
const short = (v, digits = 3) => {
  for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(v) >= size) return +(v / size).toPrecision(4) + letter;
  return String(+v.toPrecision(digits));
};
function ticks(low, high, most = 5) {
  let step = 10 ** Math.floor(Math.log10((high - low) / most));
  step *= [1, 2, 5, 10].find((factor) => (high - low) / (step * factor) <= most);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k <= high / step + 1e-9; k++) found.push(k * step);
  return found;
}
function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}
function liven(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), output = figure.querySelector("output");
  const xs = [...new Set(data.series.flatMap((s) => s.x))].sort((a, b) => a - b);
  if (!xs.length) return;
  const full = xs[0] < xs.at(-1) ? [xs[0], xs.at(-1)] : [xs[0] - 1, xs[0] + 1];
  let range = full, at = null, from = null;
  const px = (x) => LEFT + (x - range[0]) / (range[1] - range[0]) * (W - LEFT - RIGHT);
  const inside = (x) => x >= range[0] && x <= range[1];

  function draw() {
    const values = data.series.flatMap((s) => s.x.flatMap((x, i) => inside(x)
      ? [s.line ? s.y[i] : null, s.low[i] ?? null, s.high[i] ?? null].filter((v) => v !== null) : []));
    let low = Math.min(...values), high = Math.max(...values);
    if (!values.length) [low, high] = [0, 1];
    const margin = 0.05 * (high - low) || 0.1 * Math.abs(high) || 1;
    low = data.bounds[0] ?? (low < 0 ? low - margin : Math.max(low - margin, 0));
    high = data.bounds[1] ?? high + margin;
    if (low >= high) high = low + 1;
    const py = (y) => H - BOTTOM - (y - low) / (high - low) * (H - TOP - BOTTOM);
    const clip = (x) => Math.max(range[0], Math.min(range[1], x));
    const plot = element("g", { class: "plot" });
    for (const [, a, b] of data.shaded)
      if (b > range[0] && a < range[1])
        plot.append(element("rect", { class: "shade", x: px(clip(a)), y: TOP, height: H - TOP - BOTTOM,
          width: Math.max(px(clip(b)) - px(clip(a)), 1) }));
    const digits = high - low < 0.01 * Math.max(Math.abs(low), Math.abs(high)) ? 6 : 3;
    for (const y of ticks(low, high))
      plot.append(element("path", { class: "grid", d: `M${LEFT} ${py(y)}H${W - RIGHT}` }),
        element("text", { class: "end", x: LEFT - 4, y: py(y) + 4 }, short(y, digits)));
    for (const x of ticks(...range)) plot.append(element("text", { class: "mid", x: px(x), y: H - 6 }, short(x)));
    data.series.forEach((s, k) => {
      const shown = s.x.map((_, i) => i).filter((i) => inside(s.x[i]));
      if (s.low.length && shown.length) {
        const edge = (part) => shown.map((i) => `${px(s.x[i])} ${py(part[i])}`);
        const d = `M${[...edge(s.high), ...edge(s.low).reverse()].join("L")}Z`;
        plot.append(element("path", { class: `area${s.line ? "" : " alone"} s${k % 8}`, d }));
      }
      let d = "", pen = "M";
      for (const i of s.line ? shown : []) {
        if (s.y[i] === null) { pen = "M"; continue; }
        d += `${pen}${px(s.x[i])} ${py(s.y[i])}`;
        pen = "L";
        if (s.dots || shown.length === 1)
          plot.append(element("circle", { class: `s${k % 8}`, cx: px(s.x[i]), cy: py(s.y[i]), r: 2.5 }));
      }
      if (d) plot.append(element("path", { class: `line s${k % 8}`, d }));
    });
    svg.replaceChildren(plot);
  }
  function show(x) {
    at = x;
    svg.querySelector(".cursor")?.remove();
    if (x === null) { output.textContent = ""; return; }
    svg.append(element("path", { class: "cursor", d: `M${px(x)} ${TOP}V${H - BOTTOM}` }));
    const parts = data.series.flatMap((s) => {
      let i = 0;  // the last point up to x
      while (i + 1 < s.x.length && s.x[i + 1] <= x) i++;
      if (s.x[i] > x || s.y[i] === null) return [];
      const earlier = s.x[i] === x ? "" : ` (${short(s.x[i])})`;
      return [`${s.name} ${+s.y[i].toPrecision(6)}${earlier}`];
    });
    output.textContent = `${data.x} ${short(x)}: ${parts.join(", ")}`;
  }
  const zoom = (a, b) => {
    range = b > a ? [Math.max(a, full[0]), Math.min(b, full[1])] : full;
    draw();
    show(at !== null && inside(at) ? at : null);
  };
  const valueAt = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - RIGHT);
    return range[0] + Math.max(0, Math.min(1, x)) * (range[1] - range[0]);
  };
  const nearest = (x) => xs.filter(inside).reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a, xs.find(inside));

  svg.tabIndex = 0;
  svg.addEventListener("pointermove", (event) => {
    const x = valueAt(event);
    show(nearest(x) ?? null);
    svg.querySelector(".chosen")?.remove();
    if (from !== null && event.pointerType === "mouse")
      svg.append(element("rect", { class: "chosen", x: px(Math.min(from, x)), y: TOP,
        width: Math.abs(px(x) - px(from)), height: H - TOP - BOTTOM }));
  });
  svg.addEventListener("pointerleave", () => { from = null; svg.querySelector(".chosen")?.remove(); show(null); });
  svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") from = valueAt(event); });
  svg.addEventListener("pointerup", (event) => {
    const x = valueAt(event);
    if (from !== null && Math.abs(px(x) - px(from)) > 8) zoom(Math.min(from, x), Math.max(from, x));
    from = null;
  });
  svg.addEventListener("dblclick", () => zoom(0, 0));
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const seen = xs.filter(inside), place = at === null ? -1 : seen.indexOf(at);
    const center = at ?? (range[0] + range[1]) / 2, width = range[1] - range[0];
    const act = {
      ArrowRight: () => show(seen[Math.min(place + 1, seen.length - 1)] ?? null),
      ArrowLeft: () => show(seen[Math.max(place - 1, 0)] ?? null),
      "+": () => zoom(center - width / 4, center + width / 4),
      "-": () => zoom(center - width, center + width),
      Escape: () => zoom(0, 0),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
}
document.querySelectorAll("figure.chart").forEach(liven);
