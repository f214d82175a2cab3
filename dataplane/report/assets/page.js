"use strict";
(async () => {
  // Every name on this page comes from files that anybody may have written: it reaches the document
  // only as text, never as markup.
  const $ = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const stop = (text) => document.body.replaceChildren(make("p", { class: "stop" }, text));
  const many = (count, one, more = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;

  // --- what the page holds ------------------------------------------------------------------------
  if (!("DecompressionStream" in window)) {
    stop("This browser cannot unpack the page. Chrome or Edge 80, Firefox 113 and Safari 16.4 can, and all later ones.");
    return;
  }
  const TYPES = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array };
  const [data, arrays] = await (async () => {
    const packed = atob($("data").textContent.trim());
    const bytes = new Uint8Array(packed.length);
    for (let at = 0; at < packed.length; at++) bytes[at] = packed.charCodeAt(at);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const plain = await new Response(stream).arrayBuffer();
    const length = new DataView(plain).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(new Uint8Array(plain, 4, length)));
    const found = {};
    let at = 4 + length;
    for (const [name, type, count] of head.arrays) {
      at += (4 - (at % 4)) % 4;
      found[name] = new TYPES[type](plain, at, count);
      at += found[name].byteLength;
    }
    return [head, found];
  })();
  $("data").remove();

  const { places, namespaces, ports, policies, verdicts } = data;
  const N = places.length;
  const ALL = ports.length; // the overview of every port
  const ALLOWED = 0, EGRESS = 1, INGRESS = 2, BOTH = 3, SELF = 4, UNJUDGED = 5, PARTLY = 6;
  const STATES = [
    { colour: "--allowed", word: "allowed", mark: "", legend: "allowed" },
    { colour: "--egress", word: "denied by the source's egress", mark: "E", legend: "denied by the source's egress" },
    { colour: "--ingress", word: "denied by the destination's ingress", mark: "I", legend: "denied by the destination's ingress" },
    { colour: "--both", word: "denied by both ends", mark: "EI", legend: "denied by both" },
    { colour: "--self", word: "itself, always allowed", mark: "", legend: "itself" },
    { colour: "--unjudged", word: "not judged: both are outside the cluster", mark: "–", legend: "not judged" },
    { colour: "--partly", word: "allowed on some ports only", mark: "½", legend: "allowed on some ports" },
  ];
  const namespaceOf = (index) => (places[index].s < 0 ? "outside" : namespaces[places[index].s]);
  const fullName = (index) => (places[index].s < 0 ? places[index].n : `${namespaces[places[index].s]}/${places[index].n}`);

  const marks = ports.map((_, port) => arrays[`marks${port}`]);
  if (ports.length > 1) marks.push(overview());
  function overview() {
    const cells = new Uint8Array(N * N);
    for (let at = 0; at < cells.length; at++) {
      let open = 0, denied = 0;
      const first = marks[0][at];
      if (first < SELF) {
        for (let port = 0; port < ports.length; port++) {
          if (marks[port][at] === ALLOWED) open++;
          else denied |= marks[port][at];
        }
        cells[at] = open === ports.length ? ALLOWED : open ? PARTLY : denied;
      } else cells[at] = first;
    }
    return cells;
  }

  // --- what is shown ------------------------------------------------------------------------------
  const SIZES = [1, 2, 3, 4, 6, 8, 10, 13, 16, 20, 24, 30, 38];
  const READABLE = 16; // px of a cell whose row and column can be read with ease
  const NAMES_FROM = 10; // px of a cell from which pods' names fit beside it
  const GRID_FROM = 6;
  const MARKS_FROM = 16;
  const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
  const SMALL = FONT.replace("12px", "10px");
  const BOLD = `600 ${FONT}`;
  const map = $("map"), canvas = $("canvas"), context = canvas.getContext("2d");
  const view = {
    port: ports.length > 1 ? ALL : 0, rows: [], columns: [], cell: 1, fitted: true,
    cursor: null, hover: null, open: null, left: 0, top: 0, image: null,
  };
  let colours = {};

  function readColours() {
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(name).trim();
    colours = { card: get("--card"), band: get("--band"), ink: get("--ink"), soft: get("--soft"), line: get("--line"),
      accent: get("--accent"), hover: get("--hover"), dark: get("--mark-dark"), light: get("--mark-light") };
    colours.states = STATES.map((state) => get(state.colour));
    colours.numbers = new Uint32Array(colours.states.map((text) => {
      const number = parseInt(text.slice(1), 16);
      return (255 << 24) | ((number & 255) << 16) | (number & 0xff00) | (number >> 16);
    }));
    // The darker or lighter of two inks, whichever stands out from the cell.
    colours.inks = colours.states.map((text) => {
      const number = parseInt(text.slice(1), 16);
      const light = 0.299 * (number >> 16) + 0.587 * ((number >> 8) & 255) + 0.114 * (number & 255);
      return light > 140 ? colours.dark : colours.light;
    });
  }

  function paint() { // one pixel a cell; the browser scales it
    const { rows, columns } = view;
    if (!rows.length || !columns.length) { view.image = null; return; }
    const image = new ImageData(columns.length, rows.length);
    const pixels = new Uint32Array(image.data.buffer), cells = marks[view.port];
    let at = 0;
    for (const row of rows) for (const column of columns) pixels[at++] = colours.numbers[cells[row * N + column]];
    view.image = document.createElement("canvas");
    view.image.width = columns.length;
    view.image.height = rows.length;
    view.image.getContext("2d").putImageData(image, 0, 0);
  }

  function groups(indices) { // runs of one namespace
    const found = [];
    indices.forEach((index, at) => {
      const last = found[found.length - 1];
      if (last && last.s === places[index].s) last.end = at + 1;
      else found.push({ s: places[index].s, name: namespaceOf(index), start: at, end: at + 1 });
    });
    return found;
  }

  const widths = new Map();
  function width(text, font) {
    const key = `${font}\n${text}`;
    if (!widths.has(key)) { context.font = font; widths.set(key, context.measureText(text).width); }
    return widths.get(key);
  }
  function shortened(text, room, font) {
    if (width(text, font) <= room) return text;
    context.font = font;
    let low = 0, high = text.length;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (context.measureText(`${text.slice(0, middle)}…`).width <= room) low = middle; else high = middle - 1;
    }
    return low ? `${text.slice(0, low)}…` : "";
  }
  const widest = (texts, font, limit) => {
    let most = 0;
    for (const text of texts) { most = Math.max(most, width(text, font)); if (most >= limit) return limit; }
    return Math.ceil(most);
  };

  function measure() { // room for the names, and the size of the whole
    const { rows, columns, cell } = view;
    const named = cell >= NAMES_FROM;
    const spaces = [...new Set([...view.rowGroups, ...view.columnGroups].map((group) => group.name))];
    const space = Math.max(widest(spaces, BOLD, 150), Math.ceil(width("from ↓", FONT))) + 14;
    view.named = named;
    view.leftSpace = space;
    view.leftName = named ? widest(rows.map((index) => places[index].n), BOLD, 210) + 14 : 0;
    const flat = view.columnGroups.every((group) => (group.end - group.start) * cell >= width(group.name, BOLD) + 10);
    view.flat = flat;
    view.topSpace = flat ? 22 : space;
    view.topName = named ? widest(columns.map((index) => places[index].n), BOLD, 150) + 14 : 0;
    view.left = view.leftSpace + view.leftName;
    view.top = view.topSpace + view.topName;
    view.wide = view.left + columns.length * cell;
    view.high = view.top + rows.length * cell;
  }

  // The largest cells that `enough` is satisfied with; 0 when even the smallest are too large. Names take
  // room themselves, so it is found by trying.
  function largest(enough, most = Infinity) {
    let found = 0;
    for (const size of SIZES) {
      if (size > most) break;
      view.cell = size;
      measure();
      if (!enough()) break;
      found = size;
    }
    return found;
  }

  function fit({ whole = false } = {}) {
    const room = roomForMap();
    const across = () => view.wide + 2 <= room.width, down = () => view.high + 2 <= room.height;
    let size = largest(() => across() && down());
    if (!size) {
      view.cell = 0.5;
      measure();
      size = Math.max(0.05, Math.min((room.width - view.left - 2) / view.columns.length, (room.height - view.top - 2) / view.rows.length));
    }
    view.wholeSize = size;
    // Names are worth scrolling down for, where all columns fit beside each other.
    if (!whole && size < READABLE) {
      const readable = largest(across, READABLE);
      if (readable === READABLE) size = readable;
    }
    view.cell = size;
    view.fitted = true;
    layout();
  }

  function roomForMap() {
    const panel = $("panel"), style = getComputedStyle($("main"));
    const aside = panel.hidden || style.flexDirection === "column" ? 0 : parseFloat(getComputedStyle(panel).minWidth) + parseFloat(style.columnGap);
    const width = $("main").clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - aside;
    return { width, height: $("main").clientHeight - parseFloat(style.paddingBottom) };
  }

  function layout() {
    measure();
    $("space").style.width = `${view.wide}px`;
    $("space").style.height = `${view.high}px`;
    // The frame is as large as what is in it, and a bar that one side needs takes room of the other.
    const room = roomForMap(), bars = 16;
    const wide = view.wide + 2, high = view.high + 2;
    map.style.width = `${Math.max(120, Math.min(room.width, wide + (high > room.height ? bars : 0)))}px`;
    map.style.height = `${Math.max(120, Math.min(room.height, high + (wide > room.width ? bars : 0)))}px`;
    $("out").disabled = view.cell <= view.wholeSize;
    $("in").disabled = view.cell >= SIZES[SIZES.length - 1];
    $("fit").disabled = view.cell === view.wholeSize;
    later();
  }

  function zoom(step, x = map.clientWidth / 2, y = map.clientHeight / 2) {
    const before = view.cell;
    const column = (map.scrollLeft + Math.max(0, x - view.left)) / before;
    const row = (map.scrollTop + Math.max(0, y - view.top)) / before;
    if (step > 0) {
      const larger = SIZES.find((size) => size > before);
      if (!larger) return;
      view.cell = larger;
    } else {
      if (before <= view.wholeSize) return;
      view.cell = Math.max(view.wholeSize, SIZES.findLast((size) => size < before) ?? 0);
    }
    view.fitted = false;
    layout();
    map.scrollLeft = column * view.cell - Math.max(0, x - view.left);
    map.scrollTop = row * view.cell - Math.max(0, y - view.top);
  }

  let waiting = false;
  function later() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1, w = map.clientWidth, h = map.clientHeight;
    if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
      canvas.width = Math.round(w * ratio);
      canvas.height = Math.round(h * ratio);
      canvas.style.width = `${w}px`;
      canvas.style.height = `${h}px`;
      // While it was larger than the frame it kept scroll bars there, which are gone now.
      if (map.clientWidth !== w || map.clientHeight !== h) { later(); return; }
    }
    const c = context, { cell, left, top, rows, columns } = view;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.fillStyle = colours.card;
    c.fillRect(0, 0, w, h);
    $("empty").hidden = Boolean(view.image);
    if (!view.image) { document.body.dataset.drawn = "empty"; return; }
    const sx = map.scrollLeft, sy = map.scrollTop;
    const firstColumn = Math.floor(sx / cell), lastColumn = Math.min(columns.length, Math.ceil((sx + w - left) / cell));
    const firstRow = Math.floor(sy / cell), lastRow = Math.min(rows.length, Math.ceil((sy + h - top) / cell));

    c.save();
    c.beginPath();
    c.rect(left, top, w - left, h - top);
    c.clip();
    c.imageSmoothingEnabled = cell < 1;
    c.imageSmoothingQuality = "high";
    c.drawImage(view.image, firstColumn, firstRow, lastColumn - firstColumn, lastRow - firstRow,
      left + firstColumn * cell - sx, top + firstRow * cell - sy, (lastColumn - firstColumn) * cell, (lastRow - firstRow) * cell);
    const right = left + lastColumn * cell - sx, bottom = top + lastRow * cell - sy;
    if (cell >= GRID_FROM) {
      c.strokeStyle = colours.card;
      c.lineWidth = 1;
      c.beginPath();
      for (let column = firstColumn; column <= lastColumn; column++) {
        const x = Math.round(left + column * cell - sx) + 0.5; c.moveTo(x, top); c.lineTo(x, bottom);
      }
      for (let row = firstRow; row <= lastRow; row++) {
        const y = Math.round(top + row * cell - sy) + 0.5; c.moveTo(left, y); c.lineTo(right, y);
      }
      c.stroke();
    }
    if (cell >= MARKS_FROM) {
      c.font = cell >= 20 ? "bold 11px sans-serif" : "bold 9px sans-serif";
      c.textAlign = "center";
      c.textBaseline = "middle";
      const cells = marks[view.port];
      for (let row = firstRow; row < lastRow; row++) for (let column = firstColumn; column < lastColumn; column++) {
        const state = cells[rows[row] * N + columns[column]];
        if (STATES[state].mark) {
          c.fillStyle = colours.inks[state];
          c.fillText(STATES[state].mark, left + (column + 0.5) * cell - sx + 0.5, top + (row + 0.5) * cell - sy + 1);
        }
      }
    }
    // Namespaces end where these lines are.
    if (cell * Math.min(rows.length, columns.length) > 60 && view.rowGroups.length * 4 < h) {
      c.strokeStyle = colours.ink;
      c.globalAlpha = cell >= GRID_FROM ? 0.75 : 0.35;
      c.lineWidth = 1;
      c.beginPath();
      for (const group of view.columnGroups) {
        const x = Math.round(left + group.end * cell - sx) + 0.5;
        if (group.end < columns.length && x > left && x < w) { c.moveTo(x, top); c.lineTo(x, bottom); }
      }
      for (const group of view.rowGroups) {
        const y = Math.round(top + group.end * cell - sy) + 0.5;
        if (group.end < rows.length && y > top && y < h) { c.moveTo(left, y); c.lineTo(right, y); }
      }
      c.stroke();
      c.globalAlpha = 1;
    }
    for (const [spot, colour, dashed] of [[view.hover, colours.hover, true], [view.cursor, colours.ink, false]]) {
      if (!spot) continue;
      const x = left + spot.column * cell - sx, y = top + spot.row * cell - sy, size = Math.max(cell, 5);
      if (dashed) {
        c.globalAlpha = 0.13;
        c.fillStyle = colour;
        c.fillRect(left, y - (size - cell) / 2, right - left, size);
        c.fillRect(x - (size - cell) / 2, top, size, bottom - top);
        c.globalAlpha = 1;
      }
      c.lineWidth = dashed ? 1.5 : 5;
      c.strokeStyle = dashed ? colour : colours.card;
      c.strokeRect(x - (size - cell) / 2 - 1, y - (size - cell) / 2 - 1, size + 3, size + 3);
      if (!dashed) {
        c.strokeStyle = colour;
        c.lineWidth = 2;
        c.strokeRect(x - (size - cell) / 2 - 0.5, y - (size - cell) / 2 - 0.5, size + 2, size + 2);
      }
    }
    c.restore();
    headers(firstRow, lastRow, firstColumn, lastColumn, w, h, sx, sy);
    // Where cells are, for whoever drives the page by a program.
    Object.assign(map.dataset, { left, top, cell, port: view.port === ALL ? "all" : ports[view.port] });
    document.body.dataset.drawn = `${rows.length}x${columns.length}`;
  }

  function headers(firstRow, lastRow, firstColumn, lastColumn, w, h, sx, sy) {
    const c = context, { cell, left, top, rows, columns } = view;
    c.textBaseline = "middle";
    side(view.rowGroups, rows, false, top, h, sy, firstRow, lastRow);
    side(view.columnGroups, columns, true, left, w, sx, firstColumn, lastColumn);
    c.fillStyle = colours.card;
    c.fillRect(0, 0, left, top);
    c.strokeStyle = colours.line;
    c.lineWidth = 1;
    c.beginPath();
    c.moveTo(0, top - 0.5); c.lineTo(w, top - 0.5);
    c.moveTo(left - 0.5, 0); c.lineTo(left - 0.5, h);
    c.stroke();
    c.fillStyle = colours.soft;
    c.font = FONT;
    c.textAlign = "right";
    if (top >= 40) c.fillText("to →", left - 7, top / 2 - 9);
    if (top >= 22) c.fillText("from ↓", left - 7, top - 11);
  }

  // One header: namespaces outside, pods' names (when cells are large enough) next to the cells.
  function side(list, indices, across, near, far, scroll, first, last) {
    const c = context, { cell } = view;
    const space = across ? view.topSpace : view.leftSpace, deep = across ? view.top : view.left;
    const spot = view.hover ?? view.cursor, marked = spot ? (across ? spot.column : spot.row) : -1;
    c.save();
    c.beginPath();
    if (across) c.rect(near, 0, far - near, deep); else c.rect(0, near, deep, far - near);
    c.clip();
    list.forEach((group, number) => {
      const from = Math.max(near, near + group.start * cell - scroll), to = Math.min(far, near + group.end * cell - scroll);
      if (to <= near || from >= far) return;
      c.fillStyle = number % 2 ? colours.card : colours.band;
      if (across) c.fillRect(from, 0, to - from, deep); else c.fillRect(0, from, deep, to - from);
      const mine = marked >= group.start && marked < group.end;
      c.fillStyle = mine ? colours.accent : colours.ink;
      const size = to - from;
      if (across && view.flat) {
        c.textAlign = "left";
        c.font = BOLD;
        c.fillText(shortened(group.name, size - 8, BOLD), from + 5, space / 2);
      } else if (size >= 11 || mine) {
        if (mine && size < 11) { // too narrow for a name of its own: it borrows from its neighbours
          c.fillStyle = colours.card;
          if (across) c.fillRect((from + to) / 2 - 8, 0, 16, deep); else c.fillRect(0, (from + to) / 2 - 8, deep, 16);
          c.fillStyle = colours.accent;
        }
        const text = shortened(group.name, space - 12, BOLD);
        c.font = BOLD;
        const one = view.named ? Math.min(size, cell) / 2 : size / 2;
        if (across) {
          c.save();
          c.translate(from + one, space - 6);
          c.rotate(-Math.PI / 2);
          c.textAlign = "left";
          c.fillText(text, 0, 0.5);
          c.restore();
        } else {
          c.textAlign = "left";
          c.fillText(text, 7, from + one + 0.5);
        }
      }
      c.strokeStyle = colours.line;
      c.lineWidth = 1;
      if (size >= 4) {
        c.beginPath();
        if (across) { c.moveTo(Math.round(to) + 0.5, 0); c.lineTo(Math.round(to) + 0.5, deep); }
        else { c.moveTo(0, Math.round(to) + 0.5); c.lineTo(deep, Math.round(to) + 0.5); }
        c.stroke();
      }
    });
    if (view.named) {
      const font = cell >= 12 ? FONT : SMALL;
      for (let at = first; at < last; at++) {
        const middle = near + (at + 0.5) * cell - scroll;
        c.font = at === marked ? `600 ${font}` : font;
        c.fillStyle = at === marked ? colours.accent : colours.ink;
        const text = shortened(places[indices[at]].n, (across ? view.topName : view.leftName) - 10, c.font);
        if (across) {
          c.save();
          c.translate(middle, deep - 6);
          c.rotate(-Math.PI / 2);
          c.textAlign = "left";
          c.fillText(text, 0, 0.5);
          c.restore();
        } else {
          c.textAlign = "right";
          c.fillText(text, deep - 7, middle + 0.5);
        }
      }
    }
    c.restore();
  }

  // --- searching ----------------------------------------------------------------------------------
  const labelTexts = data.labels.map((set) => set.map(([key, value]) => `${key}=${value}`.toLowerCase()));
  function portNamed(term) {
    const wanted = term.toUpperCase();
    return ports.findIndex((port) => port.toUpperCase() === wanted);
  }
  function search(text) { // every word must hold; a port among them chooses that port
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const terms = words.filter((word) => portNamed(word) < 0);
    const chosen = words.map(portNamed).find((port) => port >= 0);
    const found = [];
    for (let index = 0; index < N; index++) {
      const place = places[index], name = fullName(index).toLowerCase(), labels = labelTexts[place.l];
      const holds = (term) => term.includes("=")
        ? labels.some((label) => label === term || (term.endsWith("=") && label.startsWith(term)))
        : name.includes(term) || place.a === term;
      if (terms.every(holds)) found.push(index);
    }
    return { found, port: chosen };
  }

  function refresh({ keepPort = false } = {}) {
    const from = search($("from").value), to = search($("to").value);
    const chosen = from.port ?? to.port;
    if (!keepPort && chosen !== undefined && chosen !== view.port) {
      view.port = chosen;
      document.querySelector(`#ports input[value="${chosen}"]`).checked = true;
    }
    view.rows = from.found;
    view.columns = to.found;
    view.rowGroups = groups(view.rows);
    view.columnGroups = groups(view.columns);
    view.cursor = view.hover = null;
    if (view.open) view.cursor = spotOf(view.open);
    $("tip").hidden = true;
    paint();
    fit();
    map.scrollTo(0, 0);
    count();
    legend();
  }

  function count() {
    const cells = marks[view.port], { rows, columns } = view;
    let open = 0, closed = 0, partly = 0;
    for (const row of rows) for (const column of columns) {
      const state = cells[row * N + column];
      if (state === ALLOWED) open++; else if (state === PARTLY) partly++; else if (state < SELF) closed++;
    }
    const filtered = rows.length < N || columns.length < N;
    const parts = [
      filtered ? `${rows.length.toLocaleString("en")} of ${many(N, "source")}, ${columns.length.toLocaleString("en")} of ${many(N, "destination")}` : `all ${many(N, "source")} and ${N === 1 ? "destination" : "destinations"}`,
      `${many(open, "pair")} allowed`,
    ];
    if (partly) parts.push(`${partly.toLocaleString("en")} on some ports`);
    parts.push(`${closed.toLocaleString("en")} denied`);
    $("shown").replaceChildren(`Showing ${parts.join(" · ")}. `, make("span", { class: "soft" }, "Click a cell to see why."));
    $("shown").classList.toggle("filtered", filtered);
    $("reset").disabled = !filtered && !$("from").value && !$("to").value;
    $("empty").textContent = `Nothing here matches ${!rows.length ? `From “${$("from").value}”` : `To “${$("to").value}”`}.`;
  }

  function legend() {
    const there = new Set();
    for (const state of marks[view.port]) there.add(state);
    const items = STATES.map((state, number) => [state, number])
      .filter(([, number]) => there.has(number) || number === EGRESS || number === INGRESS || number === ALLOWED)
      .sort((one, other) => order.indexOf(one[1]) - order.indexOf(other[1]))
      .map(([state]) => {
        const swatch = make("span", { class: "swatch" });
        swatch.style.background = `var(${state.colour})`;
        return make("li", {}, swatch, state.mark ? `${state.legend} (${state.mark})` : state.legend);
      });
    $("legend").replaceChildren(...items);
  }
  const order = [ALLOWED, PARTLY, EGRESS, INGRESS, BOTH, SELF, UNJUDGED];

  // --- pointing -----------------------------------------------------------------------------------
  function at(event) {
    const box = map.getBoundingClientRect();
    const x = event.clientX - box.left - map.clientLeft, y = event.clientY - box.top - map.clientTop;
    if (x < view.left || y < view.top || x >= map.clientWidth || y >= map.clientHeight) return null;
    const column = Math.floor((x - view.left + map.scrollLeft) / view.cell);
    const row = Math.floor((y - view.top + map.scrollTop) / view.cell);
    return column < view.columns.length && row < view.rows.length ? { row, column } : null;
  }
  const stateAt = (source, destination, port = view.port) => marks[port][source * N + destination];
  function tell({ row, column }) {
    const source = view.rows[row], destination = view.columns[column];
    const port = view.port === ALL ? "all ports" : ports[view.port];
    const word = view.port === ALL && stateAt(source, destination) === ALLOWED ? "allowed on every port"
      : STATES[stateAt(source, destination)].word;
    return `${fullName(source)} → ${fullName(destination)}, ${port}: ${word}`;
  }
  map.addEventListener("mousemove", (event) => {
    const spot = at(event);
    if (spot?.row !== view.hover?.row || spot?.column !== view.hover?.column) { view.hover = spot; later(); }
    const tip = $("tip");
    tip.hidden = !spot;
    if (!spot) return;
    tip.textContent = tell(spot);
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
  });
  map.addEventListener("mouseleave", () => { view.hover = null; $("tip").hidden = true; later(); });
  map.addEventListener("scroll", later, { passive: true });
  map.addEventListener("click", (event) => {
    const spot = at(event);
    if (!spot) return;
    view.cursor = spot;
    explain(view.rows[spot.row], view.columns[spot.column]);
  });
  map.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const box = map.getBoundingClientRect();
    zoom(event.deltaY < 0 ? 1 : -1, event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });

  function spotOf({ source, destination }) {
    const row = view.rows.indexOf(source), column = view.columns.indexOf(destination);
    return row < 0 || column < 0 ? null : { row, column };
  }
  function reveal({ row, column }) {
    const x = column * view.cell, y = row * view.cell;
    if (x < map.scrollLeft) map.scrollLeft = x;
    if (y < map.scrollTop) map.scrollTop = y;
    map.scrollLeft = Math.max(map.scrollLeft, x + view.cell + view.left - map.clientWidth + 4);
    map.scrollTop = Math.max(map.scrollTop, y + view.cell + view.top - map.clientHeight + 4);
  }
  function move(rows, columns) {
    if (!view.rows.length || !view.columns.length) return;
    const now = view.cursor ?? { row: 0, column: 0 };
    const step = view.cursor ? 1 : 0;
    view.cursor = {
      row: Math.max(0, Math.min(view.rows.length - 1, now.row + step * rows)),
      column: Math.max(0, Math.min(view.columns.length - 1, now.column + step * columns)),
    };
    view.hover = null;
    $("tip").hidden = true;
    reveal(view.cursor);
    $("here").textContent = tell(view.cursor);
    later();
  }
  const FAR = 1e9;
  const KEYS = {
    ArrowUp: () => move(-1, 0), ArrowDown: () => move(1, 0), ArrowLeft: () => move(0, -1), ArrowRight: () => move(0, 1),
    PageUp: () => move(-10, 0), PageDown: () => move(10, 0), Home: () => move(0, -FAR), End: () => move(0, FAR),
    Enter: () => choose(), " ": () => choose(), "+": () => zoomAtCursor(1), "=": () => zoomAtCursor(1), "-": () => zoomAtCursor(-1),
    0: () => fit({ whole: true }), Escape: () => close(),
  };
  function choose() {
    if (view.cursor) explain(view.rows[view.cursor.row], view.columns[view.cursor.column]);
    else move(0, 0);
  }
  function zoomAtCursor(step) {
    zoom(step);
    if (view.cursor) reveal(view.cursor);
  }
  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
    event.preventDefault();
    const jump = event.shiftKey && event.key.startsWith("Arrow");
    for (let step = 0; step < (jump ? 10 : 1); step++) KEYS[event.key]();
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLInputElement && event.target.type === "search";
    if (event.key === "Escape" && !map.contains(event.target) && !typing) close();
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      $("from").focus();
    }
  });

  // --- why ----------------------------------------------------------------------------------------
  const named = (text) => make("span", { class: "name" }, text);
  const { texts, candidates, answers } = data;
  function endOf(side, port, source, destination) {
    const own = side === "egress" ? source : destination, other = side === "egress" ? destination : source;
    const look = (kind) => {
      const of = arrays[`${kind}Of${port}`], lines = arrays[`${kind}Lines${port}`];
      return lines[of[own] * N + other];
    };
    return { own, other, verdict: verdicts[look(side)], answer: answers[look(`${side}Why`)] ?? null };
  }

  function end(side, port, source, destination) {
    const { own, other, verdict, answer } = endOf(side, port, source, destination);
    const [allow, reason, policy, rule] = verdict;
    const isolating = data.sets[places[own][side === "egress" ? "e" : "i"]];
    const word = allow ? "allowed" : "denied";
    const box = make("div", { class: `end ${side} ${allow ? "allow" : "deny"}`, "data-end": side },
      make("h3", {}, make("span", {}, side === "egress" ? "Egress of " : "Ingress of ", named(fullName(own))),
        make("span", { class: "word" }, word)),
      make("p", { class: "reason" }, data.reasons[side][reason]));
    const list = make("dl");
    if (policy >= 0) {
      const place = answer === null ? null : make("code", {}, texts[answer]);
      list.append(make("dt", {}, "Decided by"), make("dd", { class: "by" }, named(policies[policy]), " ", place),
        make("dt", {}, "which opens"), make("dd", { class: "opens" }, texts[rule]));
    }
    if (isolating.length) {
      list.append(make("dt", {}, "Isolated by"),
        make("dd", { class: "isolating" }, ...listed(isolating.map((each) => policies[each]), 8)));
    }
    if (list.childElementCount) box.append(list);
    if (!allow) box.append(...misses(side, answer, own, other));
    return box;
  }

  function listed(names, most) {
    const parts = [];
    names.slice(0, most).forEach((name, number) => parts.push(...(number ? [", "] : []), named(name)));
    if (names.length > most) parts.push(` and ${names.length - most} more`);
    return parts;
  }

  function misses(side, answer, own, other) {
    if (answer === null) {
      return [make("p", { class: "soft small unexplained" },
        "With so many different policies the page explains the nearest misses only. The command below says why each rule did not match here.")];
    }
    const subject = (about) => ["", `${fullName(other)} `, `${places[other].a} `, `${fullName(own)} `][about];
    const list = make("ul", { class: "rules" });
    const [rules, more] = answer;
    for (const number of rules) {
      const [policy, field, about, text] = candidates[number];
      list.append(make("li", {}, make("div", { class: "small" }, named(policies[policy]), " ", make("code", {}, texts[field])),
        make("div", { class: "miss" }, `${subject(about)}${texts[text]}`)));
    }
    list.append(...more.map((text) => make("li", { class: "soft small" }, texts[text])));
    return [make("p", { class: "soft small" }, "What could have allowed it, and why it did not:"), list];
  }

  // For a shell: a name that is more than letters and the like is quoted.
  const quoted = (text) => (/^[A-Za-z0-9_.,:/@%+=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  const argument = (index) => quoted(places[index].s < 0 ? places[index].a : fullName(index));

  function onePort(port, source, destination) {
    const state = stateAt(source, destination, port);
    const part = make("section", { "data-port": ports[port] });
    const swatch = make("span", { class: "swatch" });
    swatch.style.background = `var(${STATES[state].colour})`;
    const title = state === ALLOWED ? "allowed" : STATES[state].word;
    part.append(make("h3", {}, make("span", {}, ports[port]), make("span", { class: "word" }, swatch, ` ${title}`)));
    if (state === SELF) {
      part.append(make("p", { class: "reason" }, "A pod may always talk to itself: those packets never leave it."));
      return part;
    }
    if (state === UNJUDGED) {
      part.append(make("p", { class: "reason" }, "Neither is a pod here, so no policy has a say."));
      return part;
    }
    part.append(end("egress", port, source, destination), end("ingress", port, source, destination));
    const asked = [data.command, `--from ${argument(source)}`, `--to ${argument(destination)}`, `--port ${ports[port]}`, `--family ${data.family}`];
    const command = asked.join(" ");
    const shown = asked.flatMap((text) => [" ", make("span", {}, text)]).slice(1);
    const copy = make("button", { type: "button", class: "copy small" }, "Copy");
    copy.addEventListener("click", () => copyText(command, copy));
    part.append(make("p", { class: "soft small asked" }, "Ask again, in a terminal: ", copy), make("pre", { class: "command" }, ...shown));
    return part;
  }

  async function copyText(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // some browsers give no clipboard to pages from files
      const area = make("textarea", { readonly: "" });
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  function about(index, word) {
    const place = places[index];
    const line = make("dd", {}, named(fullName(index)), " ");
    if (place.s >= 0) line.append(make("span", { class: "soft" }, place.a), place.h ? make("span", { class: "soft" }, " (on its node's network: no policy isolates it)") : "");
    else line.append(make("span", { class: "soft" }, "outside the cluster"));
    const chips = data.labels[place.l].map(([key, value]) => make("span", { class: "chip name" }, `${key}=${value}`));
    if (chips.length) line.append(make("br"), ...chips);
    return [make("dt", {}, word), line];
  }

  function explain(source, destination) {
    view.open = { source, destination };
    const panel = $("panel");
    const x = make("button", { type: "button", class: "close", "aria-label": "Close" }, "×");
    x.addEventListener("click", close);
    panel.replaceChildren(x, make("h2", {}, named(fullName(source)), " → ", named(fullName(destination))),
      make("dl", {}, ...about(source, "from"), ...about(destination, "to")));
    const shown = view.port === ALL ? ports.map((_, port) => port) : [view.port];
    // A pair that is not judged, or a pod with itself, is so on every port.
    const once = stateAt(source, destination) === SELF || stateAt(source, destination) === UNJUDGED;
    for (const port of once ? shown.slice(0, 1) : shown) panel.append(onePort(port, source, destination));
    panel.hidden = false;
    panel.scrollTop = 0;
    $("tip").hidden = true;
    layout();
    $("here").textContent = tell({ row: view.rows.indexOf(source), column: view.columns.indexOf(destination) });
    if (view.cursor) reveal(view.cursor);
    later();
  }
  function close() {
    if ($("panel").hidden) return;
    $("panel").hidden = true;
    view.open = null;
    layout();
    map.focus({ preventScroll: true });
  }

  // --- the page around it -------------------------------------------------------------------------
  function facts() {
    $("files").textContent = data.files.join(", ");
    const fact = (count, text) => make("li", {}, make("b", {}, count.toLocaleString("en")), ` ${text}`);
    const pods = places.filter((place) => place.s >= 0).length, outside = N - pods;
    const items = [fact(pods, pods === 1 ? "pod" : "pods"), fact(namespaces.length, namespaces.length === 1 ? "namespace" : "namespaces"),
      fact(policies.length, policies.length === 1 ? "policy" : "policies")];
    if (outside) items.push(fact(outside, outside === 1 ? "address outside" : "addresses outside"));
    ports.slice(0, 4).forEach((port, number) => {
      const [allowed, denied] = data.counts[number];
      items.push(make("li", {}, `${port}: `, make("b", {}, allowed.toLocaleString("en")), " pairs allowed, ", make("b", {}, denied.toLocaleString("en")), " denied"));
    });
    items.push(make("li", {}, `IPv${data.family}`));
    if (data.leftOut.length) {
      const shown = data.leftOut.slice(0, 5).join(", ") + (data.leftOut.length > 5 ? " …" : "");
      items.push(make("li", {}, `left out, without an IPv${data.family} address: ${shown}`));
    }
    items.push(make("li", {}, `made by podgate ${data.version}`));
    $("facts").replaceChildren(...items);
  }
  function portButtons() {
    const choice = (text, number) => {
      const input = make("input", { type: "radio", name: "port", value: number });
      input.checked = number === view.port;
      input.addEventListener("change", () => choosePort(number));
      return make("label", {}, input, make("span", {}, text));
    };
    if (ports.length > 1) $("ports").append(choice("All ports", ALL));
    ports.forEach((port, number) => $("ports").append(choice(port, number)));
  }
  function choosePort(number) {
    view.port = number;
    paint();
    count();
    legend();
    later();
    if (view.open) explain(view.open.source, view.open.destination);
  }
  function resized() {
    if (view.fitted) fit({ whole: view.cell === view.wholeSize }); else layout();
  }
  for (const id of ["from", "to"]) $(id).addEventListener("input", () => refresh());
  $("tools").addEventListener("submit", (event) => event.preventDefault());
  $("swap").addEventListener("click", () => {
    [$("from").value, $("to").value] = [$("to").value, $("from").value];
    refresh();
  });
  $("reset").addEventListener("click", () => {
    $("from").value = $("to").value = "";
    refresh();
    $("from").focus();
  });
  $("in").addEventListener("click", () => zoom(1));
  $("out").addEventListener("click", () => zoom(-1));
  $("fit").addEventListener("click", () => fit({ whole: true }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); paint(); later(); });
  new ResizeObserver(() => resized()).observe($("main"));

  readColours();
  facts();
  portButtons();
  refresh();
})();
