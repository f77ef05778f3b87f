// Shows the values of the figures at the pointer, or with the arrow keys. Without scripts the page still shows all figures.
const { runs, panels } = JSON.parse(document.getElementById("curves").textContent);
const reading = document.querySelector(".reading");
const SVG = "http://www.w3.org/2000/svg";

const shown = (run) => document.getElementById(`show-${run}`).checked;
const number = (value) => Math.abs(value) >= 1e15 || (value && Math.abs(value) < 1e-3)
  ? value.toExponential(2) : value.toLocaleString("en", { maximumSignificantDigits: 5 });

function axis(low, high, start, end, log) {
  const of = log ? Math.log : (value) => value;
  return (value) => start + (of(value) - of(low)) / (of(high) - of(low)) * (end - start);
}

for (const plot of document.querySelectorAll("[data-panel]")) {
  const panel = panels[plot.dataset.panel];
  const svg = plot.querySelector("svg");
  const [left, top, right, bottom] = panel.box;
  const px = axis(...panel.x, left, right, panel.log[0]);
  const py = axis(...panel.y, bottom, top, panel.log[1]);
  const marks = svg.appendChild(document.createElementNS(SVG, "g"));
  let place = null;

  // Find the nearest point of each visible run: by x on curves, by distance among single points.
  function nearest(x, y) {
    const found = panel.curves.filter((curve) => shown(curve.run)).map((curve) => {
      let best = 0;
      curve.x.forEach((value, index) => {
        if (Math.abs(px(value) - x) < Math.abs(px(curve.x[best]) - x)) best = index;
      });
      return { run: curve.run, x: curve.x[best], y: curve.y[best] };
    });
    if (!panel.single) return found;
    const far = (point) => Math.hypot(px(point.x) - x, py(point.y) - y);
    return found.sort((a, b) => far(a) - far(b)).slice(0, 1);
  }

  function read(x, y, clientX, clientY) {
    const points = nearest(x, y);
    marks.replaceChildren();
    if (!points.length) return leave();
    const anchor = points.reduce((a, b) => Math.abs(px(a.x) - x) <= Math.abs(px(b.x) - x) ? a : b);
    const near = points.filter((point) => Math.abs(px(point.x) - px(anchor.x)) < 6).sort((a, b) => b.y - a.y);
    const line = marks.appendChild(document.createElementNS(SVG, "line"));
    for (const [key, value] of Object.entries({ class: "cross", x1: px(anchor.x), x2: px(anchor.x), y1: top, y2: bottom }))
      line.setAttribute(key, value);
    const title = document.createElement("b");
    title.textContent = `${number(anchor.x)} ${panel.unit}`;
    reading.replaceChildren(title, ...near.map((point) => {
      const dot = marks.appendChild(document.createElementNS(SVG, "circle"));
      const fill = `fill: var(--pair-${runs[point.run].color})`;
      for (const [key, value] of Object.entries({ class: "dot", cx: px(point.x), cy: py(point.y), r: 3.2, style: fill }))
        dot.setAttribute(key, value);
      const row = document.createElement("span"), name = document.createElement("i"), value = document.createElement("b");
      name.textContent = runs[point.run].name;
      name.style.color = `var(--pair-${runs[point.run].color})`;
      value.textContent = number(point.y);
      row.append(name, value);
      return row;
    }));
    reading.hidden = false;
    const box = reading.getBoundingClientRect();
    reading.style.left = `${Math.max(4, Math.min(clientX + 14, innerWidth - box.width - 4))}px`;
    reading.style.top = `${Math.max(4, Math.min(clientY + 14, innerHeight - box.height - 4))}px`;
  }

  function leave() {
    reading.hidden = true;
    marks.replaceChildren();
  }

  const toScreen = (x, y) => new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  plot.addEventListener("pointermove", (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    read(point.x, point.y, event.clientX, event.clientY);
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    place = Math.max(left, Math.min(right, (place ?? (step > 0 ? left : right)) + step * (right - left) / 50));
    const where = toScreen(place, (top + bottom) / 2);
    read(place, (top + bottom) / 2, where.x, where.y);
  });
}
