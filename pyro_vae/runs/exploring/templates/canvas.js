// An image to be drawn on, cell by cell: values 0 to 255 by channel, and which cells were not seen.
const [channels, height, width] = SHAPE;
const find = (what) => element.querySelector(what);
const board = find("canvas"), context = board.getContext("2d"), where = find(".where");
const size = height * width, scale = Math.max(1, Math.floor(336 / Math.max(height, width)));
let cells = new Uint8ClampedArray(channels * size), unseen = new Uint8Array(size);
let last = null, cursor = [Math.floor(width / 2), Math.floor(height / 2)], keys = false;
board.width = width * scale;
board.height = height * scale;
find(".colour").hidden = channels === 1;

function show() {
  for (let place = 0; place < size; place++) {
    const x = (place % width) * scale, y = Math.floor(place / width) * scale;
    const of = (channel) => cells[Math.min(channel, channels - 1) * size + place];
    context.fillStyle = unseen[place] ? "#5a6fb0" : `rgb(${of(0)}, ${of(1)}, ${of(2)})`;
    context.fillRect(x, y, scale, scale);
    if (unseen[place] && scale > 3) {
      context.fillStyle = "#c8d0ee";
      context.fillRect(x + scale / 3, y + scale / 3, scale / 3, scale / 3);
    }
  }
  if (keys) {
    context.strokeStyle = "#e69f00";
    context.lineWidth = 2;
    context.strokeRect(cursor[0] * scale, cursor[1] * scale, scale, scale);
  }
}

function touch(x, y) {
  const tool = find("input[name=tool]:checked").value, radius = find(".width").value / 2;
  const hex = find("input[type=color]").value;
  const colour = [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const away = Math.hypot(column + 0.5 - x, row + 0.5 - y), place = row * width + column;
      if (away > radius + 0.3) continue;
      if (tool === "erase") { unseen[place] = 1; continue; }
      unseen[place] = 0;
      if (tool === "see") continue;
      for (let channel = 0; channel < channels; channel++) {
        const at = channel * size + place, soft = away > radius - 0.3 ? 128 : 255;
        if (tool === "rub") cells[at] = 0;
        else if (channels === 1) cells[at] = Math.max(cells[at], soft);
        else cells[at] = colour[channel];
      }
    }
  }
}

function send() {
  show();
  props.value = { by: "hand", cells: Array.from(cells), unseen: Array.from(unseen) };
  setTimeout(() => trigger("input"), 0);  // after the page has taken the value
}

function at(event) {
  const box = board.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
}

function line(from, to) {
  const steps = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - from[0], to[1] - from[1])));
  for (let step = 0; step <= steps; step++) {
    const share = step / steps;
    touch(from[0] + share * (to[0] - from[0]), from[1] + share * (to[1] - from[1]));
  }
}

board.addEventListener("pointerdown", (event) => {
  board.setPointerCapture(event.pointerId);
  keys = false;
  last = at(event);
  touch(...last);
  show();
});
board.addEventListener("pointermove", (event) => {
  if (last === null) return;
  const next = at(event);
  line(last, next);
  last = next;
  show();
});
for (const end of ["pointerup", "pointercancel"]) {
  board.addEventListener(end, () => { if (last !== null) { last = null; send(); } });
}
board.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key in moves) {
    const [x, y] = moves[event.key];
    cursor = [Math.min(width - 1, Math.max(0, cursor[0] + x)), Math.min(height - 1, Math.max(0, cursor[1] + y))];
    where.textContent = `row ${cursor[1] + 1}, column ${cursor[0] + 1}`;
  } else if (event.key === " ") touch(cursor[0] + 0.5, cursor[1] + 0.5);
  else return;
  event.preventDefault();
  keys = true;
  if (event.key === " ") send(); else show();
});
find(".clear").addEventListener("click", () => { cells.fill(0); unseen.fill(0); send(); });
find(".all").addEventListener("click", () => { unseen.fill(0); send(); });

function load() {
  if (!props.value || props.value.by !== "run") return;
  cells = Uint8ClampedArray.from(props.value.cells);
  unseen = Uint8Array.from(props.value.unseen);
  show();
}
watch("value", load);
load();
show();
