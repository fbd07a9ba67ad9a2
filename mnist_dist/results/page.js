"use strict";

// Curves: the values at the pointer. A figure's data-chart has its axes in units of the viewBox, and its curves.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const [left, top, width, height] = chart.box;
  const scale = (axis, value) => {
    const [low, high] = axis.range.map(axis.log ? Math.log10 : Number);
    return ((axis.log ? Math.log10(value) : value) - low) / (high - low);
  };
  const shown = (axis, value) => axis.percent ? (100 * value).toFixed(2) + " %" : String(Number(value.toPrecision(5)));
  const positions = [...new Set(chart.curves.flatMap(curve => curve.x))].sort((a, b) => a - b);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("class", "pointer");
  svg.append(line);
  const box = document.createElement("div");
  box.className = "values";
  box.hidden = true;
  svg.parentNode.append(box);
  svg.parentNode.classList.add("has-values");
  const hide = () => { box.hidden = true; line.removeAttribute("d"); };
  const show = event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    if (point.x < left - 4 || point.x > left + width + 4) return hide();
    const across = value => left + width * scale(chart.x, value);
    const x = positions.reduce((best, other) =>
      Math.abs(across(other) - point.x) < Math.abs(across(best) - point.x) ? other : best, positions[0]);
    line.setAttribute("d", `M${across(x)} ${top}v${height}`);
    box.replaceChildren();
    const title = document.createElement("strong");
    title.textContent = `${chart.x.label} ${shown(chart.x, x)}`;
    box.append(title);
    const values = chart.curves.map(curve => [curve, curve.y[curve.x.indexOf(x)]]).filter(pair => pair[1] !== undefined);
    for (const [curve, y] of values.sort((a, b) => b[1] - a[1]).slice(0, 12)) {
      const entry = document.createElement("span");
      entry.style.setProperty("--color", curve.color);
      entry.textContent = `${curve.name} ${shown(chart.y, y)}`;
      box.append(entry);
    }
    box.hidden = false;
    const room = svg.parentNode.getBoundingClientRect(), picture = svg.getBoundingClientRect();
    const from = event.clientX - room.left;
    const own = box.getBoundingClientRect().width;
    box.style.left = `${Math.max(0, from > room.width / 2 ? from - own - 12 : from + 12)}px`;
    box.style.top = `${picture.top - room.top + picture.height * top / svg.viewBox.baseVal.height}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

// Tables: a click on a title sorts by that column, numbers from the largest down.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, index) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const texts = new Map(rows.map(row => [row, row.cells[index].textContent.trim()]));
      const number = row => Number(texts.get(row).replace(/,/g, ""));
      const isEmpty = row => /^\u2013?$/.test(texts.get(row));
      const isNumber = rows.every(row => isEmpty(row) || !Number.isNaN(number(row)));
      const was = head.getAttribute("aria-sort");
      const direction = was === "descending" ? "ascending" : was === "ascending" ? "descending"
        : isNumber ? "descending" : "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const compare = (one, other) => isNumber ? number(one) - number(other)
        : texts.get(one).localeCompare(texts.get(other), undefined, { numeric: true });
      // Rows without a value stay below, whatever the direction.
      rows.sort((one, other) => isEmpty(one) - isEmpty(other) || sign * compare(one, other));
      table.tBodies[0].append(...rows);
    });
  });
}
