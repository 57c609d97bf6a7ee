"use strict";

// Places of rows by the values of a column, numbers or words; what is no number comes last, either way.
function order(values, descending) {
  const sign = descending ? -1 : 1;
  const places = Array.from(values, (_, place) => place);
  return places.sort((a, b) => {
    const x = values[a], y = values[b];
    if (x === null || y === null) return (x === null) - (y === null) || a - b;
    return sign * (typeof x === "string" ? x.localeCompare(y, "en") : x - y) || a - b;
  });
}

function shown(value, digits) {
  if (typeof value === "string") return value;
  return value === null ? "–" : value.toFixed(digits).replace("-", "−");
}

// Text stays text: nothing here ever reads HTML.
function element(name, text, parent) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// A small chart: one path, made here of numbers alone.
function strip(path, size, about, parent) {
  const space = "http://www.w3.org/2000/svg", chart = document.createElementNS(space, "svg");
  const line = document.createElementNS(space, "path");
  const said = {class: "strip", viewBox: `0 0 ${size.join(" ")}`, width: size[0], height: size[1], role: "img"};
  Object.entries({...said, "aria-label": about}).forEach(([name, value]) => chart.setAttribute(name, value));
  line.setAttribute("d", path);
  chart.append(line);
  parent.append(chart);
}

function datum(cell, content, place) {
  cell.className = "datum";
  const picture = content.pictures[place], values = content.values[place], path = content.lines[place];
  if (path) strip(path, content.size, `test ${content.noun} ${place}`, cell);
  if (picture) {
    const image = element("img", undefined, cell);
    image.src = "data:image/png;base64," + picture;
    image.alt = `test ${content.noun} ${place}`;
  }
  if (values) {
    values.forEach((value, i) => {
      if (content.names[i]) element("b", content.names[i] + " ", cell);
      element("span", value, cell);
    });
  }
}

function sortable(root) {
  const content = JSON.parse(document.getElementById(root.dataset.content).textContent);
  const columns = content.columns, size = columns[0].values.length, most = 50;
  const hasData = [content.pictures, content.values, content.lines].some((each) => Object.keys(each).length);
  const heads = Array.from(root.querySelectorAll("th[aria-sort]"));
  const body = root.querySelector("tbody"), told = root.querySelector(".told");
  const back = root.querySelector(".back"), on = root.querySelector(".on");
  let by = content.sortedBy, descending = false, start = 0, places = order(columns[by].values, descending);

  function show() {
    const rows = document.createDocumentFragment();
    for (const place of places.slice(start, start + most)) {
      const row = element("tr", undefined, rows);
      columns.forEach((column, i) => {
        const cell = element(i ? "td" : "th", shown(column.values[place], column.digits), row);
        if (!i) cell.scope = "row";
      });
      if (hasData) datum(element("td", undefined, row), content, columns[0].values[place]);
    }
    body.replaceChildren(rows);
    heads.forEach((head, i) => {
      head.setAttribute("aria-sort", i !== by ? "none" : descending ? "descending" : "ascending");
      head.querySelector(".arrow").textContent = i !== by ? "" : descending ? "↓" : "↑";
    });
    const last = Math.min(start + most, size), way = descending ? "descending" : "ascending";
    told.textContent = `${start + 1} to ${last} of ${size.toLocaleString("en")} rows, by ${columns[by].title}, ${way}`;
    for (const [button, ends, other] of [[back, start === 0, on], [on, last === size, back]]) {
      if (ends && button === document.activeElement) { other.disabled = false; other.focus(); }
      button.disabled = ends;
    }
  }

  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    descending = i === by && !descending;
    by = i;
    start = 0;
    places = order(columns[by].values, descending);
    show();
  }));
  back.addEventListener("click", () => { start -= most; show(); });
  on.addEventListener("click", () => { start += most; show(); });
  show();
}

function themes(button) {
  const root = document.documentElement, dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  const tell = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; tell(); });
  dark.addEventListener("change", tell);
  tell();
}

if (typeof document !== "undefined") {
  themes(document.getElementById("theme"));
  document.querySelectorAll(".rows").forEach(sortable);
}
