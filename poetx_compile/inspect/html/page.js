"use strict";
// The drawn graphs: modules as nested boxes that open and close, runs of equal layers as one box.
// Everything from the model (names, types, code) reaches the page through textContent alone.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const open = new Set([""]);       // keys of the modules that are open, in both graphs
  const alone = new Set();          // keys of layers that are shown apart from their run
  let which = 0;                    // the graph shown, where the model has several
  let matched = new Set(), focused = null, picked = null;

  // --- the model as a tree of modules ------------------------------------------------------------

  function build(boxes) {
    const root = {key: "", name: "", parent: null, depth: 0, kids: new Map(), own: [], first: 0};
    const modules = new Map([["", root]]);
    boxes.forEach((box, i) => {
      let at = root;
      for (const name of box.module) {
        if (!at.kids.has(name)) {
          const key = at.key ? `${at.key}.${name}` : name;
          const kid = {key, name, parent: at, depth: at.depth + 1, kids: new Map(), own: [], first: i};
          at.kids.set(name, kid);
          modules.set(key, kid);
        }
        at = at.kids.get(name);
      }
      at.own.push(i);
      box.home = at;
      box.index = i;
    });
    const count = m => m.total = m.own.length + [...m.kids.values()].reduce((n, k) => n + count(k), 0);
    count(root);
    for (const m of modules.values()) m.shape = shape(m, boxes);
    return {boxes, root, modules};
  }

  function members(module, into = []) {
    into.push(...module.own);
    for (const kid of module.kids.values()) members(kid, into);
    return into;
  }

  // Mark the boxes, and the modules around them, that the graph on the other side has not.
  function mark(graph, other) {
    const sign = box => [box.home.key, box.label, box.type].join("|");
    const left = new Map();
    for (const box of other.boxes) left.set(sign(box), (left.get(sign(box)) ?? 0) + 1);
    for (const box of graph.boxes) {
      const n = left.get(sign(box)) ?? 0;
      if (n) { left.set(sign(box), n - 1); continue; }
      box.changed = true;
      for (let m = box.home; m; m = m.parent) m.changed = true;
    }
  }

  // What makes two layers equal: their ops, types, inner modules and inner wires.
  function shape(module, boxes) {
    if (!/\.\d+$/.test(module.name)) return null;
    const inside = members(module).sort((a, b) => a - b);
    const place = new Map(inside.map((i, n) => [i, n]));
    return inside.map(i => {
      const box = boxes[i];
      const path = box.home.key.slice(module.key.length);
      const reads = box.reads.filter(r => boxes[r].kind !== "rotation" || place.has(r));
      return [box.label, box.type, path, reads.map(r => place.has(r) ? place.get(r) : "x").sort()].join("|");
    }).join("\n");
  }

  // The items of an open module: boxes, modules, and runs of equal layers.
  function itemsOf(module, graph) {
    const items = module.own.map(i => ({kind: "box", id: `#${i}`, box: graph.boxes[i], first: i}));
    const runs = new Map();         // base of a numbered name → the run that its next layer may join
    for (const kid of module.kids.values()) {
      const number = /^(.*)\.(\d+)$/.exec(kid.name), run = number && runs.get(number[1]);
      if (run && run.next === +number[2] && run.shape === kid.shape && !alone.has(kid.key)) {
        run.item.members.push(kid);
        run.next += 1;
        continue;
      }
      const item = {kind: "module", id: kid.key, module: kid, members: [kid], first: kid.first};
      items.push(item);
      if (!number) continue;
      if (alone.has(kid.key)) runs.delete(number[1]);
      else runs.set(number[1], {next: +number[2] + 1, shape: kid.shape, item});
    }
    for (const item of items) if (item.id === "rotations") item.first = -1; // they read parameters alone
    return items.sort((a, b) => a.first - b.first);
  }

  // --- where everything goes -----------------------------------------------------------------------

  const COLOURED = ["product", "weight", "rotation", "activation"];
  const PAD = 12, HEAD = 26, GAP = 18, ROW = 30, STUB = 16;
  const width = (text, size) => text.length * size * 0.61;

  // Which items of which open modules are joined, from the wires between boxes.
  function connect(graph) {
    const itemAt = new Map();       // key of a module → its item, shown or in a run
    const inner = new Map();        // key of an open module → {items, wires, enter, leave}
    inner.boxes = graph.boxes;
    const visit = module => {
      const items = itemsOf(module, graph);
      inner.set(module.key, {items, wires: new Map(), enter: new Map(), leave: new Set()});
      for (const item of items) {
        if (item.kind === "box") itemAt.set(item.id, item);
        else for (const m of item.members) itemAt.set(m.key, item);
        if (item.kind === "module" && open.has(item.id)) visit(item.module);
      }
    };
    visit(graph.root);
    const chain = box => {          // the box and the modules around it, innermost first
      const found = [];
      for (let m = box.home; m; m = m.parent) found.push(m);
      return found;
    };
    const child = (box, module) => { // the item of `module` that has the box
      let below = null;
      for (let m = box.home; m && m !== module; m = m.parent) below = m;
      return itemAt.get(below ? below.key : `#${box.index}`);
    };
    for (const to of graph.boxes) {
      for (const r of to.reads) {
        const from = graph.boxes[r], above = new Set(chain(from));
        const meet = chain(to).find(m => above.has(m));
        const level = inner.get(meet.key);
        const faint = from.kind === "rotation";
        if (level) {
          const a = child(from, meet), b = child(to, meet);
          if (a && b && a !== b) {
            const key = `${a.id}>${b.id}`, wire = level.wires.get(key);
            if (wire) wire.faint &&= faint;
            else level.wires.set(key, {from: a, to: b, faint, type: from.type});
          }
        }
        for (let m = to.home; m !== meet; m = m.parent) {
          const item = inner.has(m.key) && child(to, m);
          if (!item) continue;
          const {enter} = inner.get(m.key), before = enter.get(item);
          enter.set(item, {from: from.home.key || from.label, faint: faint && (!before || before.faint)});
        }
        for (let m = from.home; m !== meet; m = m.parent) {
          const item = inner.has(m.key) && child(from, m);
          if (item) inner.get(m.key).leave.add(item);
        }
      }
    }
    return inner;
  }

  function title(item) {
    const {module, members: all} = item;
    if (all.length === 1) return module.name;
    return `${module.name} – ${all[all.length - 1].name.replace(/^.*\./, "")}`;
  }

  function subtitle(item, side) {
    const row = data.rows[item.module.key];
    if (row) return side === "before" ? row.shape : row.status === "rewritten" ? row.how : row.status;
    const ops = item.module.total;
    return item.members.length > 1 ? `${item.members.length} equal layers of ${ops} ops` : `${ops} op${ops === 1 ? "" : "s"}`;
  }

  function arrange(module, inner, side) {
    const {items, wires, enter, leave} = inner.get(module.key);
    for (const item of items) measure(item, inner, side);
    const rows = rank(items, [...wires.values()], enter);
    place(rows);
    const stubs = [...enter.keys()].some(i => i.rank === 0) ? STUB : 0;
    const right = Math.max(0, ...rows.flat().map(c => c.x + c.w / 2));
    let y = stubs;
    for (const row of rows) {
      const h = Math.max(0, ...row.map(c => c.h));
      for (const cell of row) { cell.y = y + (h - cell.h) / 2; cell.top = y; cell.bottom = y + h; }
      y += h + ROW;
    }
    const bottom = y - ROW + ([...leave].length && module.parent ? STUB : 0);
    return {w: right, h: Math.max(bottom, 0)};
  }

  function measure(item, inner, side) {
    if (item.kind === "box") {
      const {label, type} = item.box;
      item.w = Math.max(64, width(label, 12), width(type, 10)) + 18;
      item.h = type ? 38 : 26;
      return;
    }
    item.opened = open.has(item.id);
    const head = Math.max(width(title(item), 12) + 24, item.opened ? 0 : width(subtitle(item, side), 10));
    if (item.opened) {
      item.size = arrange(item.module, inner, side);
      item.w = Math.max(item.size.w + 2 * PAD, head + 2 * PAD);
      item.h = item.size.h + HEAD + PAD;
    } else {
      item.w = Math.max(90, head + 24);
      item.h = 42;
    }
  }

  // Layers of a layered drawing: rows of cells, long wires broken into cells of no width.
  function rank(items, wires, enter) {
    const place = new Map(items.map((item, i) => [item, i]));
    for (const item of items) { item.rank = 0; item.up = []; item.down = []; item.cells = null; }
    let apart = 0;                 // what is joined with nothing stands in lines of a few
    for (const item of items) if (!wires.some(w => w.from === item || w.to === item)) item.rank = Math.floor(apart++ / 5);
    const forward = wires.filter(w => place.get(w.from) < place.get(w.to));
    for (const w of forward) { w.from.down.push(w); w.to.up.push(w); w.back = false; }
    for (const w of wires) if (!forward.includes(w)) w.back = true;
    for (const item of items) for (const w of item.up) item.rank = Math.max(item.rank, w.from.rank + 1);
    for (const item of [...items].reverse()) {   // what only feeds others stands right above them
      if (!item.up.length && item.down.length && (enter.get(item)?.faint ?? true)) item.rank = Math.min(...item.down.map(w => w.to.rank)) - 1;
    }
    const rows = [];
    const put = (cell, r) => { (rows[r] ||= []).push(cell); };
    for (const item of items) put(item, item.rank);
    for (const w of forward) {
      w.path = [w.from];
      for (let r = w.from.rank + 1; r < w.to.rank; r++) {
        const cell = {dummy: true, w: 6, h: 0, up: [], down: []};
        put(cell, r);
        w.path.push(cell);
      }
      w.path.push(w.to);
    }
    for (let i = 0; i < rows.length; i++) rows[i] ||= [];
    for (const cell of rows.flat()) { cell.over = []; cell.under = []; }
    for (const w of forward) {
      for (let i = 1; i < w.path.length; i++) { w.path[i].over.push(w.path[i - 1]); w.path[i - 1].under.push(w.path[i]); }
    }
    return rows;
  }

  function place(rows) {
    const settle = row => row.forEach((cell, i) => cell.at = i);
    rows.forEach(settle);
    const mean = cells => cells.reduce((sum, c) => sum + c.at, 0) / cells.length;
    for (let sweep = 0; sweep < 8; sweep++) {
      const down = sweep % 2 === 0;
      for (const row of down ? rows : [...rows].reverse()) {
        const next = c => down ? c.over : c.under;
        row.forEach(c => c.want = next(c).length ? mean(next(c)) : c.at);
        row.sort((a, b) => a.want - b.want || a.at - b.at);
        settle(row);
      }
    }
    for (const row of rows) {
      let x = 0;
      for (const cell of row) { cell.x = x + cell.w / 2; x += cell.w + GAP; }
      for (const cell of row) cell.x -= (x - GAP) / 2;
    }
    const centre = cells => cells.reduce((sum, c) => sum + c.x, 0) / cells.length;
    for (let sweep = 0; sweep < 10; sweep++) {
      const down = sweep % 2 === 0;
      for (const row of down ? rows : [...rows].reverse()) {
        spread(row, row.map(c => {
          const next = down ? c.over : c.under;
          return next.length ? centre(next) : c.x;
        }));
      }
    }
    const left = Math.min(...rows.flat().map(c => c.x - c.w / 2), 0);
    const least = rows.flat().length ? Math.min(...rows.flat().map(c => c.x - c.w / 2)) : left;
    for (const cell of rows.flat()) cell.x -= least;
  }

  // The positions nearest to those wanted, in order and without overlap (pooled neighbours).
  function spread(row, wanted) {
    const offset = [0];
    for (let i = 1; i < row.length; i++) offset[i] = offset[i - 1] + (row[i - 1].w + row[i].w) / 2 + GAP;
    const pools = [];
    row.forEach((cell, i) => {
      const weight = cell.dummy ? 2 : 1;
      let pool = {sum: (wanted[i] - offset[i]) * weight, weight, cells: [i]};
      while (pools.length && pools.at(-1).sum / pools.at(-1).weight > pool.sum / pool.weight) {
        const last = pools.pop();
        pool = {sum: last.sum + pool.sum, weight: last.weight + pool.weight, cells: [...last.cells, ...pool.cells]};
      }
      pools.push(pool);
    });
    for (const pool of pools) for (const i of pool.cells) row[i].x = pool.sum / pool.weight + offset[i];
  }

  // --- drawing ---------------------------------------------------------------------------------------

  function el(name, attributes, ...kids) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...kids);
    return node;
  }

  function label(text, x, y, cls, anchor = "middle") {
    const node = el("text", {x, y, class: cls, "text-anchor": anchor});
    node.textContent = text;
    return node;
  }

  function hint(text) {
    const node = el("title", {});
    node.textContent = text;
    return node;
  }

  function button(g, name, act) {
    g.setAttribute("tabindex", "0");
    g.setAttribute("role", "button");
    g.setAttribute("aria-label", name);
    const run = event => { event.stopPropagation(); event.preventDefault(); act(); };
    g.addEventListener("click", run);
    g.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === " ") run(e); });
  }

  function drawBox(item, side) {
    const {box, w, h} = item;
    const g = el("g", {class: `op ${box.kind}${box.again ? " again" : ""}`, transform: `translate(${item.x - w / 2},${item.y})`});
    if (box.changed) g.classList.add("changed");
    if (picked && picked.side === side && picked.index === box.index) g.classList.add("picked");
    g.append(el("rect", {class: "box", width: w, height: h, rx: 6}), label(box.label, w / 2, box.type ? 16 : 17, "name"));
    if (box.type) g.append(label(box.type, w / 2, 30, "sub"));
    g.append(hint(box.text));
    button(g, `${box.label} ${box.type}`, () => { picked = {side, index: box.index}; describe(box, side); draw(); });
    return g;
  }

  function drawModule(item, inner, side) {
    const {module, w, h} = item, row = data.rows[module.key], many = item.members.length > 1;
    const g = el("g", {class: `cluster${module.depth % 2 ? " odd" : ""}`, transform: `translate(${item.x - w / 2},${item.y})`});
    if (row) g.classList.add(row.status.replace(" ", "-"));
    if (item.members.some(m => matched.has(m.key))) g.classList.add("match");
    if (item.members.some(m => m.key === focused)) g.classList.add("focus");
    if (item.opened) g.classList.add("opened");
    else if (item.members.some(m => m.changed)) g.classList.add("changed");
    g.dataset.key = module.key;
    if (many) for (const d of [8, 4]) g.append(el("rect", {class: "stack", x: d, y: d, width: w, height: h, rx: 8}));
    const header = el("g", {});
    header.append(el("rect", {class: "box", width: w, height: h, rx: 8}));
    if (item.opened) header.append(label(`− ${title(item)}`, PAD, 18, "name", "start"));
    else header.append(label(`+ ${title(item)}`, w / 2, 18, "name"), label(subtitle(item, side), w / 2, 33, "sub"));
    if (!item.opened) {            // what is inside, by the colours of the legend
      const kinds = new Set(members(module).map(i => inner.boxes[i].kind));
      COLOURED.filter(kind => kinds.has(kind)).forEach((kind, i) => {
        header.append(el("g", {class: kind}, el("rect", {class: "box", x: 6 + 9 * i, y: 5, width: 6, height: 6, rx: 1})));
      });
    }
    header.append(hint(row ? [module.key, row.status, row.how, row.reason].filter(Boolean).join("\n") : module.key || item.id));
    for (const c of g.classList) if (c !== "cluster") header.classList.add(c);
    header.classList.add("cluster");
    button(header, `${title(item)}: ${item.opened ? "close" : "open"}`, () => toggle(item));
    g.append(header);
    if (many) {
      const chip = el("g", {class: "op other", transform: `translate(${w - 34},-9)`});
      chip.append(el("rect", {class: "box", width: 40, height: 17, rx: 8}), label(`×${item.members.length}`, 20, 12.5, "sub"), hint("Show these layers one by one"));
      button(chip, "Show these layers one by one", () => { item.members.forEach(m => alone.add(m.key)); draw(); });
      g.append(chip);
    }
    if (item.opened) {
      const inside = el("g", {transform: `translate(${PAD + (w - 2 * PAD - item.size.w) / 2},${HEAD})`});
      drawInside(module, inner, inside, side);
      g.append(inside);
    }
    return g;
  }

  function drawInside(module, inner, into, side) {
    const {items, wires, enter, leave} = inner.get(module.key);
    const outs = new Map(), ins = new Map();
    const list = [...wires.values()];
    for (const item of items) {
      outs.set(item, list.filter(w => w.from === item).sort((a, b) => next(a).x - next(b).x));
      ins.set(item, list.filter(w => w.to === item).sort((a, b) => before(a).x - before(b).x));
    }
    for (const wire of list) into.append(drawWire(wire, outs, ins));
    for (const [item, source] of enter) {
      const g = el("g", {class: source.faint ? "faint" : ""}, el("path", {class: "wire", d: `M${item.x - item.w / 2 + 10},${item.y - 12}v9`}), el("path", {class: "head", d: arrow(item.x - item.w / 2 + 10, item.y)}), el("circle", {class: "port", cx: item.x - item.w / 2 + 10, cy: item.y - 13, r: 3}), hint(`from ${source.from}`));
      into.append(g);
    }
    for (const item of leave) {
      if (!module.parent) continue;
      into.append(el("g", {}, el("path", {class: "wire", d: `M${item.x},${item.y + item.h}v10`}), el("circle", {class: "port", cx: item.x, cy: item.y + item.h + 12, r: 3}), hint("read outside")));
    }
    for (const item of items) into.append(item.kind === "box" ? drawBox(item, side) : drawModule(item, inner, side));
  }

  const next = wire => wire.back ? wire.to : wire.path[1];
  const before = wire => wire.back ? wire.from : wire.path.at(-2);
  const arrow = (x, y) => `M${x},${y}l-3.5,-7h7z`;
  const port = (item, list, wire) => item.x + (list.indexOf(wire) - (list.length - 1) / 2) * Math.min(14, (item.w - 20) / Math.max(1, list.length));

  function drawWire(wire, outs, ins) {
    const {from, to} = wire;
    const x0 = port(from, outs.get(from), wire), x1 = port(to, ins.get(to), wire);
    const y0 = from.y + from.h, y1 = to.y - 6;
    let d = `M${x0},${y0}`, at = [x0, y0];
    const bend = (x, y) => { const m = (at[1] + y) / 2; d += `C${at[0]},${m} ${x},${m} ${x},${y}`; at = [x, y]; };
    if (wire.back) d += `C${x0},${y0 + 40} ${x1},${y1 - 40} ${x1},${y1}`;
    else {
      if (from.bottom > y0) { d += `V${from.bottom}`; at = [x0, from.bottom]; }
      for (const cell of wire.path.slice(1, -1)) { bend(cell.x, cell.top); d += `V${cell.bottom}`; at = [cell.x, cell.bottom]; }
      bend(x1, to.top < y1 ? to.top - 6 : y1);
      d += `V${y1}`;
    }
    const faint = wire.faint || wire.back ? " faint" : "";
    return el("g", {}, el("path", {class: `wire${faint}`, d}), el("path", {class: "head", d: arrow(x1, to.y)}), hint(wire.type));
  }

  // --- panes -------------------------------------------------------------------------------------------

  const panes = [...document.querySelectorAll(".pane")].map(figure => ({
    figure, side: figure.dataset.side, view: figure.querySelector(".view"), zoom: null, graphs: [],
  }));
  for (const pane of panes) pane.graphs = data.graphs.map(g => build(g[pane.side]));
  data.graphs.forEach((_, i) => {
    const [before, after] = panes.map(pane => pane.graphs[i]);
    mark(before, after);
    mark(after, before);
  });

  function draw() {
    for (const pane of panes) {
      const graph = pane.graphs[which];
      if (!graph) continue;
      const inner = connect(graph);
      const size = arrange(graph.root, inner, pane.side);
      const w = size.w + 40, h = size.h + 40;
      const svg = el("svg", {viewBox: `0 0 ${w} ${h}`, role: "group", "aria-label": `Graph ${pane.side} the passes`});
      const g = el("g", {transform: "translate(20,20)"});
      drawInside(graph.root, inner, g, pane.side);
      svg.append(g);
      pane.size = [w, h];
      pane.svg = svg;
      const {scrollLeft, scrollTop} = pane.view;
      pane.view.replaceChildren(svg);
      scale(pane);
      pane.view.scrollTo(scrollLeft, scrollTop);
      const nodes = data.graphs[which][`nodes_${pane.side}`];
      pane.figure.querySelector(".count").textContent = `${nodes} nodes`;
    }
  }

  function scale(pane) {
    const [w, h] = pane.size;
    const fit = Math.min(1, Math.max(0.55, (pane.view.clientWidth - 4) / w));
    const z = pane.zoom ?? fit;
    pane.svg.setAttribute("width", w * z);
    pane.svg.setAttribute("height", h * z);
    pane.scale = z;
  }

  for (const pane of panes) {
    const {view} = pane;
    pane.figure.querySelector(".zoom").addEventListener("click", event => {
      const kind = event.target.dataset.zoom;
      if (!kind) return;
      const middle = [(view.scrollLeft + view.clientWidth / 2) / pane.scale, (view.scrollTop + view.clientHeight / 2) / pane.scale];
      pane.zoom = kind === "fit" ? null : Math.min(2.5, Math.max(0.1, pane.scale * (kind === "in" ? 1.25 : 0.8)));
      scale(pane);
      view.scrollTo(middle[0] * pane.scale - view.clientWidth / 2, middle[1] * pane.scale - view.clientHeight / 2);
    });
    let from = null;
    view.addEventListener("pointerdown", e => {
      if (e.pointerType === "mouse" && e.button === 0) from = [e.clientX, e.clientY, view.scrollLeft, view.scrollTop];
    });
    window.addEventListener("pointermove", e => {
      if (!from) return;
      if (Math.abs(e.clientX - from[0]) + Math.abs(e.clientY - from[1]) > 4) view.classList.add("drag");
      view.scrollTo(from[2] - e.clientX + from[0], from[3] - e.clientY + from[1]);
    });
    window.addEventListener("pointerup", () => { from = null; setTimeout(() => view.classList.remove("drag")); });
    view.addEventListener("click", e => { if (view.classList.contains("drag")) { e.stopPropagation(); e.preventDefault(); } }, true);
  }
  window.addEventListener("resize", () => panes.forEach(p => p.svg && scale(p)));

  function toggle(item) {
    if (open.has(item.id)) open.delete(item.id);
    else open.add(item.id);
    draw();
  }

  document.getElementById("collapse").addEventListener("click", () => { open.clear(); open.add(""); alone.clear(); draw(); });
  document.getElementById("expand").addEventListener("click", () => {
    const found = [];
    for (const pane of panes) {
      for (const {items} of connect(pane.graphs[which]).values()) {
        for (const item of items) {
          if (item.kind === "module" && !open.has(item.id) && item.id !== "rotations") found.push(item.id);
        }
      }
    }
    found.forEach(key => open.add(key));
    draw();
  });

  const chooser = document.getElementById("which");
  if (data.graphs.length > 1) {
    data.graphs.forEach((_, i) => chooser.append(new Option(`Graph ${i + 1} of ${data.graphs.length}`, i)));
    chooser.hidden = false;
    chooser.addEventListener("change", () => { which = +chooser.value; draw(); });
  }

  // --- details of a box --------------------------------------------------------------------------------

  const details = document.getElementById("details");

  function describe(box, side) {
    const row = data.rows[box.home.key];
    const facts = [
      ["line", box.text], ["value", box.type], ["module", box.home.key],
      ["reads", box.parameters.join("\n")], ["code", box.source],
      ["backward", box.again ? "recomputed, not kept" : ""],
      ["layer", row ? [row.status, row.how, row.reason].filter(Boolean).join(": ") : ""],
    ];
    const heading = document.createElement("h3"), list = document.createElement("dl"), close = document.createElement("button");
    heading.textContent = box.label;
    close.textContent = "Close";
    close.type = "button";
    close.addEventListener("click", hide);
    for (const [name, value] of facts) {
      if (!value) continue;
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name;
      dd.textContent = value;
      list.append(dt, dd);
    }
    details.replaceChildren(close, heading, list);
    details.className = side === "after" ? "left" : "";   // beside the box, not over it
    details.hidden = false;
  }

  function hide() { details.hidden = true; if (picked) { picked = null; draw(); } }
  document.addEventListener("keydown", e => { if (e.key === "Escape") hide(); });

  // --- the table, and finding a layer ------------------------------------------------------------------

  const body = document.querySelector("#layers tbody"), rows = [...body.rows];
  const search = document.getElementById("search"), found = document.getElementById("found");
  let hits = [], current = 0;

  // Equal layers are one row until somebody looks for a layer.
  const alike = new Map();
  for (const row of rows) {
    const cells = [...row.cells].map(c => c.textContent);
    cells[0] = cells[0].replace(/(^|\.)\d+(?=\.|$)/g, "$1#");
    const key = cells.join("|");
    if (alike.has(key)) { alike.get(key).push(row); row.classList.add("more"); } else alike.set(key, [row]);
  }
  for (const [first, ...more] of alike.values()) {
    if (more.length) first.cells[0].append(Object.assign(document.createElement("span"), {className: "times", textContent: ` ×${more.length + 1}`}));
  }
  body.classList.add("folded");

  function show(key) {
    focused = key;
    alone.delete(show.last);
    show.last = undefined;
    for (const pane of panes) {
      const index = pane.graphs.findIndex(g => g.modules.has(key));
      if (index < 0) continue;
      if (!pane.graphs[which]?.modules.has(key)) { which = index; chooser.value = index; }
      let module = pane.graphs[which].modules.get(key);
      const path = [];
      for (; module; module = module.parent) path.push(module);
      for (const m of path) {
        if (!m.parent) continue;
        const item = itemsOf(m.parent, pane.graphs[which]).find(i => i.kind === "module" && i.members.includes(m));
        if (item && item.module !== m) { alone.add(m.key); show.last = m.key; }
        if (m.key !== key) open.add(m.key);
      }
    }
    draw();
    for (const pane of panes) {
      const g = pane.svg.querySelector(".focus[data-key]");
      if (!g) continue;
      const box = g.getBoundingClientRect(), view = pane.view.getBoundingClientRect();
      pane.view.scrollBy(box.left + box.width / 2 - view.left - view.width / 2, box.top + Math.min(box.height, view.height) / 2 - view.top - view.height / 2);
    }
    const row = rows.find(r => r.dataset.name === key) ?? rows.find(r => r.classList.contains("match"));
    rows.forEach(r => r.classList.toggle("focus", r === row));
    if (row) {
      const box = document.getElementById("table-scroll");
      box.scrollTop = row.offsetTop - box.clientHeight / 2;
    }
  }

  function find() {
    const query = search.value.trim().toLowerCase();
    body.classList.toggle("folded", !query);
    const keys = new Set(rows.map(r => r.dataset.name));
    for (const pane of panes) for (const g of pane.graphs) for (const key of g.modules.keys()) if (key) keys.add(key);
    const all = query ? [...keys].filter(k => k.toLowerCase().includes(query)) : [];
    const ends = k => k.toLowerCase() === query ? 0 : k.toLowerCase().endsWith(query) ? 1 : 2;
    const best = Math.min(3, ...all.map(ends));  // a name that ends with the query, before any other
    hits = all.filter(k => ends(k) === best || data.rows[k] && best === 2);
    matched = new Set(hits);
    rows.forEach(r => {
      const hit = query && r.dataset.name.toLowerCase().includes(query);
      r.classList.toggle("match", Boolean(hit));
      r.classList.toggle("dim", Boolean(query) && !hit);
    });
    current = 0;
    go();
  }

  function go() {
    found.textContent = !search.value.trim() ? "" : hits.length ? `${current + 1} of ${hits.length}` : "no such layer";
    if (hits.length) return show(hits[current]);
    focused = null;
    alone.delete(show.last);
    rows.forEach(r => r.classList.remove("focus"));
    draw();
  }

  let waiting;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(find, 120); });
  search.addEventListener("keydown", e => {
    if (e.key !== "Enter" || !hits.length) return;
    current = (current + (e.shiftKey ? hits.length - 1 : 1)) % hits.length;
    go();
  });
  body.addEventListener("click", e => {
    const row = e.target.closest("tr");
    if (!row) return;
    search.value = row.dataset.name;
    find();
  });

  document.querySelectorAll("#layers th button").forEach((head, column) => head.addEventListener("click", () => {
    const th = head.parentElement, rising = th.getAttribute("aria-sort") !== "ascending";
    document.querySelectorAll("#layers th").forEach(h => h.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const text = r => r.cells[column].dataset.value ?? r.cells[column].textContent;
    const order = [...rows].sort((a, b) => text(a).localeCompare(text(b), "en", {numeric: true}) * (rising ? 1 : -1));
    body.append(...order);
  }));

  document.getElementById("chips").addEventListener("click", e => {
    const chip = e.target.closest("button");
    if (!chip) return;
    for (const other of chip.parentElement.children) other.setAttribute("aria-pressed", String(other === chip));
    rows.forEach(r => r.hidden = chip.dataset.status !== "" && r.dataset.status !== chip.dataset.status);
  });

  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // --- the first look ------------------------------------------------------------------------------------

  // Open the modules around the first layers that the passes changed, and one of these: closed there
  // is little to see.
  for (const pane of panes) {
    let module = pane.graphs[which]?.root, deeper = 1;
    while (module) {
      const inside = itemsOf(module, pane.graphs[which]).filter(i => i.kind === "module" && i.id !== "rotations" && i.module.kids.size);
      const item = inside.find(i => i.module.changed) ?? inside[0];
      if (item) open.add(item.id);
      module = item && (!/\d$/.test(item.id) || deeper--) ? item.module : null;
    }
  }
  draw();
  const wanted = decodeURIComponent(location.hash.slice(1));
  if (wanted) { search.value = wanted; find(); }
})();
