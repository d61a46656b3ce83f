"use strict";
// Draws and filters what the JSON block holds. Texts become text nodes, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const RATINGS = ["unsafe", "review", "safe"];
  const KINDS = ["image", "text", "image+text"];
  const KIND_WORDS = { "image": "picture", "text": "text", "image+text": "picture with text" };
  const PAGE = 40, LONG = 320, SHORT = 200;
  const $ = (id) => document.getElementById(id);
  const number = new Intl.NumberFormat("en");
  const plural = (n, one, many) => `${number.format(n)} ${n === 1 ? one : many}`;

  function el(tag, options = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(options)) {
      if (key === "class") node.className = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.filter((c) => c != null && c !== ""));
    return node;
  }
  const button = (options, ...children) => el("button", { type: "button", ...options }, ...children);

  // ------------------------------------------------------------ nodes
  const nodes = data.nodes;
  nodes.forEach((n) => { n.children = []; n.total = n.counts[0] + n.counts[1] + n.counts[2]; });
  const roots = [];
  nodes.forEach((n, i) => (n.parent < 0 ? roots : nodes[n.parent].children).push(i));
  const risky = (n) => ["domain", "category", "concept"].includes(n.kind);
  const riskRoots = roots.filter((i) => risky(nodes[i]));
  const hue = new Map(riskRoots.map((i, k) => [i, Math.round((k * 360) / riskRoots.length + 8) % 360]));
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const domainColour = (i) => {
    const h = hue.get(nodes[i].root);
    return h === undefined ? css("--muted") : `hsl(${h} 58% ${css("--domain-light")})`;
  };
  const pathOf = (i) => (i < 0 ? [] : [...pathOf(nodes[i].parent), nodes[i].name]);

  // ------------------------------------------------------------ state
  const NONE = -2; // the filter "no node applies"
  const state = { node: null, rating: "", kind: "", words: [], only: null, order: "risk", shown: PAGE };
  const items = data.items;
  items.forEach((item) => {
    item.set = new Set(item.in);
    const names = item.in.map((i) => `${nodes[i].id} ${nodes[i].name}`);
    const parts = [item.name, item.id, item.source, item.text, item.read, item.why, ...names];
    item.hay = parts.join("\n").toLowerCase();
  });
  const dots = data.dots.map((d) => d[2] >= 0
    ? { x: d[0], y: d[1], item: d[2], rating: RATINGS.indexOf(items[d[2]].rating), kind: items[d[2]].kind, name: items[d[2]].name, set: items[d[2]].set, hay: items[d[2]].hay }
    : { x: d[0], y: d[1], item: -1, rating: d[3], kind: KINDS[d[4]], name: d[5], set: new Set(d[6]), hay: [d[5], ...d[6].map((i) => `${nodes[i].id} ${nodes[i].name}`)].join("\n").toLowerCase() });

  function matches(rating, thing, index) {
    if (state.only && !(index >= 0 && state.only.has(index))) return false;
    if (state.rating && rating !== state.rating) return false;
    if (state.kind && thing.kind !== state.kind) return false;
    if (state.node === NONE ? thing.set.size : state.node !== null && !thing.set.has(state.node)) return false;
    return state.words.every((w) => thing.hay.includes(w));
  }
  const filtered = () => state.node !== null || state.rating || state.kind || state.words.length || state.only;

  const ORDERS = {
    risk: () => 0, // as embedded
    probability: (a, b) => (b.p ?? -1) - (a.p ?? -1),
    novel: (a, b) => Math.min(a.novel ?? 2, a.far ?? 2) - Math.min(b.novel ?? 2, b.far ?? 2),
    input: (a, b) => a.row - b.row,
  };

  function change(update) {
    Object.assign(state, update, { shown: PAGE });
    render();
  }
  const toggleNode = (i) => change({ node: state.node === i ? null : i, only: null });

  // ------------------------------------------------------------ tree
  const rows = new Map();
  function bar(counts) {
    const total = counts[0] + counts[1] + counts[2];
    if (!total) return null;
    const strip = el("span", { class: "bar", "aria-hidden": "true" });
    counts.forEach((n, k) => {
      if (!n) return;
      const part = el("i", { class: RATINGS[k] });
      part.style.width = `${(100 * n) / total}%`;
      strip.append(part);
    });
    return strip;
  }
  const spoken = (counts) => RATINGS.map((r, k) => `${counts[k]} ${r}`).join(", ");

  function treeRow(key, label, counts, children, extra = {}) {
    const total = counts[0] + counts[1] + counts[2];
    const list = children.length ? el("ul", { hidden: true }, ...children) : null;
    const twist = button({ class: list ? "twist" : "twist none", "aria-expanded": "false", "aria-label": `Show what is below ${label}`, onclick: () => open(twist.getAttribute("aria-expanded") !== "true"), tabindex: list ? null : "-1" });
    const open = (on) => { if (list) { list.hidden = !on; twist.setAttribute("aria-expanded", String(on)); } };
    const name = el("span", { class: "label" });
    if (extra.colour !== undefined) {
      const swatch = el("i", { class: "swatch", "aria-hidden": "true" });
      swatch.dataset.node = extra.colour;
      name.append(swatch);
    }
    name.append(label);
    if (extra.off) name.append(el("span", { class: "off" }, "off in this policy"));
    const pick = button({ class: total ? "pick" : "pick zero", "aria-pressed": "false", onclick: () => { toggleNode(key); if (state.node === key) open(true); } },
      name, el("span", { class: "total" }, number.format(total)), el("span", { class: "vh" }, `: ${spoken(counts)}`), bar(counts));
    const row = el("div", { class: "row" }, twist, pick);
    rows.set(key, { row, pick, open });
    return el("li", {}, row, list);
  }
  function branch(i) {
    const n = nodes[i];
    const kids = n.kind === "safe_domain" ? n.children.filter((k) => nodes[k].total) : n.children;
    const off = risky(n) && !n.active && (n.parent < 0 || nodes[n.parent].active);
    return treeRow(i, n.name, n.counts, kids.map(branch), { colour: n.parent < 0 ? i : undefined, off });
  }
  $("tree").append(el("ul", { "aria-label": "Taxonomy" },
    ...roots.filter((i) => risky(nodes[i]) || nodes[i].total).map(branch),
    treeRow(NONE, "No node applies", data.unplaced, [])));
  if (matchMedia("(max-width: 980px)").matches) $("tree-box").open = false;

  // ------------------------------------------------------------ cards
  const markOf = (rating) => el("i", { class: `mark ${rating}`, "aria-hidden": "true" });
  const p2 = (p) => (p < 0.01 ? "< 0.01" : p > 0.99 ? "> 0.99" : p.toFixed(2));
  const capital = (s) => s[0].toUpperCase() + s.slice(1);

  function thumb(item) {
    if (item.thumb === "withheld") return el("div", { class: "thumb empty withheld" }, "Picture not stored here");
    if (!item.thumb) return el("div", { class: item.kind === "text" ? "thumb empty text" : "thumb empty", "aria-hidden": "true" }, item.kind === "text" ? "Text" : item.error ? "Unreadable" : "Picture not kept here");
    const image = el("img", { alt: "", src: `data:image/jpeg;base64,${item.thumb}`, decoding: "async" });
    const word = el("span", {}, "Show");
    const box = button({ class: "thumb", "aria-pressed": "false", "aria-label": `Show the picture ${item.name}`, onclick: () => {
      const on = box.getAttribute("aria-pressed") !== "true";
      box.setAttribute("aria-pressed", String(on));
      image.alt = on ? item.name : "";
      word.textContent = on ? "Blur" : "Show";
    } }, image, word);
    return box;
  }

  function quote(text, who) {
    if (!text) return null;
    const body = el("span", { class: "hostile" }, text);
    const box = el("div", { class: "quote" }, who ? el("span", { class: "who" }, who) : null, body);
    if (text.length > LONG) {
      const brief = `${text.slice(0, SHORT).trimEnd()}…`;
      const more = button({ "aria-expanded": "false", onclick: () => {
        const on = more.getAttribute("aria-expanded") !== "true";
        more.setAttribute("aria-expanded", String(on));
        body.textContent = on ? text : brief;
        more.textContent = on ? "Show less" : `Show all ${number.format(text.length)} characters`;
      } }, `Show all ${number.format(text.length)} characters`);
      body.textContent = brief;
      box.append(" ", more);
    }
    return box;
  }

  function nodeLine([i, label, score, inside]) {
    const meter = el("i");
    meter.style.width = `${100 * (score ?? 0)}%`;
    const name = i < 0 ? el("span", {}, label) : button({ title: "Filter by this node", onclick: () => change({ node: i, only: null }) }, label);
    return el("li", {}, name,
      el("span", { class: "score" }, el("span", { class: "meter", "aria-hidden": "true" }, meter), el("span", {}, score === null ? "–" : p2(score)), el("span", { class: "in" }, inside ? "inside its cone" : "outside its cone")));
  }

  function nearLine([i, name, rating, distance]) {
    const label = el("bdi", {}, name);
    return el("li", {}, markOf(rating),
      i < 0 ? label : button({ onclick: () => reveal(i) }, label),
      el("span", { class: "d" }, `${distance < 0.0005 ? "same point" : distance.toFixed(2)}`), el("span", { class: "vh" }, `rated ${rating}`));
  }

  function card(item, index) {
    const rate = el("span", { class: `badge ${item.rating}` }, markOf(item.error ? "error" : item.rating), capital(item.rating),
      item.p === null ? null : el("span", { class: "p", title: "Calibrated probability of risk" }, p2(item.p)));
    const lines = item.paths.length ? el("ul", { class: "nodes" }, ...item.paths.map(nodeLine)) : null;
    if (item.more) lines.append(el("li", { class: "meta" }, `and ${plural(item.more, "more node", "more nodes")}`));
    const near = item.near.length ? el("ul", { class: "near" }, ...item.near.map(nearLine)) : null;
    const facts = [["Nodes", lines], ["Channel", item.channel], ["Novelty", item.novelty], ["Nearest", near]]
      .filter((f) => f[1]).map((f) => el("div", {}, el("dt", {}, f[0]), el("dd", {}, f[1])));
    const radius = item.radius === null ? "" : ` · radius ${item.radius.toFixed(2)}`;
    const place = item.source.endsWith(item.name) && item.source !== item.name ? item.source : item.id;
    return el("li", { class: "card", id: `item-${index}`, tabindex: "-1" }, thumb(item),
      el("article", { "aria-label": `${item.name}, ${item.rating}` },
        el("div", { class: "line1" }, el("div", {}, el("h3", {}, el("bdi", {}, item.name)),
          el("p", { class: "meta" }, el("bdi", {}, place), ` · ${KIND_WORDS[item.kind]}${radius}`)), rate),
        quote(item.text, ""),
        quote(item.read, "Text read in the picture"),
        item.why ? el("p", { class: item.error ? "why problem hostile" : "why hostile" }, item.why) : null,
        facts.length ? el("dl", { class: "reasons" }, ...facts) : null));
  }

  function reveal(index) {
    state.only = null;
    let found = current().findIndex((e) => e.index === index);
    if (found < 0) { Object.assign(state, { node: null, rating: "", kind: "", words: [] }); $("search").value = ""; found = current().findIndex((e) => e.index === index); }
    state.shown = Math.max(PAGE, found + 5);
    render();
    const target = $(`item-${index}`);
    if (!target) return;
    document.querySelectorAll(".found").forEach((c) => c.classList.remove("found"));
    target.classList.add("found");
    target.scrollIntoView({ block: "center" });
    target.focus({ preventScroll: true });
  }

  const current = () => items.map((item, index) => ({ item, index }))
    .filter((e) => matches(e.item.rating, e.item, e.index))
    .sort((a, b) => ORDERS[state.order](a.item, b.item) || a.index - b.index);

  let drawn = [];
  function renderQueue() {
    const list = current();
    const visible = list.slice(0, state.shown);
    const same = visible.length >= drawn.length && drawn.every((i, k) => visible[k].index === i);
    const box = $("cards");
    if (!same) box.replaceChildren();
    box.append(...visible.slice(same ? drawn.length : 0).map((e) => card(e.item, e.index)));
    drawn = visible.map((e) => e.index);
    if (!list.length) { box.replaceChildren(el("li", { class: "blank" }, items.length ? "No item fits these filters." : "The scan found no items.")); drawn = []; }
    const left = data.total - items.length;
    const missing = left ? ` ${plural(left, "item is", "items are")} not in this file (safe ones and lower probabilities go first); results.jsonl holds all.` : "";
    $("count").textContent = (filtered() ? `${plural(list.length, "item fits", "items fit")} the filters, of ${number.format(items.length)}.` : `${plural(items.length, "item", "items")}: unsafe first, then review, errors and safe.`) + missing;
    const more = $("more");
    more.hidden = list.length <= visible.length;
    more.textContent = `Show ${Math.min(PAGE, list.length - visible.length)} more (${number.format(list.length - visible.length)} left)`;
  }
  $("more").addEventListener("click", () => {
    const first = drawn.length;
    state.shown += PAGE;
    renderQueue();
    const next = $("cards").children[first];
    if (next) next.focus({ preventScroll: true });
  });

  function chip(label, off) { return button({ class: "chip", "aria-label": `Remove filter: ${label}`, onclick: () => change(off) }, label); }
  function renderFilters() {
    const chips = [];
    if (state.node !== null) chips.push(chip(state.node === NONE ? "No node applies" : pathOf(state.node).join(" › "), { node: null }));
    if (state.rating) chips.push(chip(capital(state.rating), { rating: "" }));
    if (state.kind) chips.push(chip(capital(KIND_WORDS[state.kind]), { kind: "" }));
    if (state.words.length) chips.push(chip(`“${state.words.join(" ")}”`, { words: [] }));
    if (state.only) chips.push(chip(state.onlyLabel, { only: null }));
    $("chips").replaceChildren(...chips);
    $("rating").value = state.rating;
    $("modality").value = state.kind;
    if (!state.words.length && document.activeElement !== $("search")) $("search").value = "";
    document.querySelectorAll(".tile[data-rating]").forEach((t) => t.setAttribute("aria-pressed", String(t.dataset.rating === state.rating)));
    rows.forEach(({ row, pick }, key) => {
      row.classList.toggle("on", key === state.node);
      pick.setAttribute("aria-pressed", String(key === state.node));
    });
    if (state.node !== null && state.node >= 0) for (let i = nodes[state.node].parent; i >= 0; i = nodes[i].parent) rows.get(i)?.open(true);
  }
  function render() { renderFilters(); renderQueue(); draw(); }

  let timer = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => change({ words: $("search").value.toLowerCase().split(/\s+/).filter(Boolean), only: null }), 120);
  });
  $("rating").addEventListener("change", (e) => change({ rating: e.target.value }));
  $("modality").addEventListener("change", (e) => change({ kind: e.target.value }));
  $("order").addEventListener("change", (e) => change({ order: e.target.value }));
  document.querySelectorAll(".tile[data-rating]").forEach((t) => t.addEventListener("click", () => change({ rating: state.rating === t.dataset.rating ? "" : t.dataset.rating })));

  // ------------------------------------------------------------ errors
  const problems = data.errors;
  if (!problems.total) $("error-list").append(el("p", { class: "hint" }, "Every item could be read."));
  else {
    const kinds = problems.types.map(([t, n]) => `${t} ${number.format(n)}`).join(", ");
    const left = problems.total - problems.rows.length;
    $("error-list").append(el("p", { class: "hint" }, `${plural(problems.total, "item", "items")} could not be read, whole or in part (${kinds}). Nothing unreadable is dropped: a person has to look.`),
      el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Item"), el("th", { scope: "col" }, "Problem"))),
        el("tbody", {}, ...problems.rows.map(([source, type, message]) => el("tr", {}, el("td", {}, el("bdi", {}, source)), el("td", { class: "hostile" }, `${type}: ${message}`))))));
    if (left > 0) $("error-list").append(el("p", { class: "hint" }, `${number.format(left)} more in results.jsonl.`));
  }

  // ------------------------------------------------------------ the disk
  const canvas = $("disk"), pen = canvas.getContext("2d"), tip = $("tip");
  const flat = data.geometry === "euclidean";
  const placed = nodes.map((n, i) => i).filter((i) => nodes[i].at);
  const drawnNodes = placed.filter((i) => nodes[i].kind !== "concept");
  const add = (a, b) => [a[0] + b[0], a[1] + b[1]];
  const times = (a, b) => [a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]];
  const conj = (a) => [a[0], -a[1]];
  const size2 = (a) => a[0] * a[0] + a[1] * a[1];
  const over = (a, b) => { const s = size2(b) || 1e-12, t = times(a, conj(b)); return [t[0] / s, t[1] / s]; };

  // the view: an isometry of the disk z -> (alpha z + beta) / (conj(beta) z + conj(alpha)), and a zoom
  let view = { alpha: [1, 0], beta: [0, 0] }, zoom = 1, hover = null, cursor = -1, box = { w: 0, h: 0, r: 1, x: 0, y: 0 };
  const reach = Math.max(0.05, ...dots.map((d) => Math.hypot(d.x, d.y)), ...placed.map((i) => Math.hypot(...nodes[i].at)));
  const fit = Math.min(6, Math.max(1, 0.94 / reach));
  const categories = placed.filter((i) => nodes[i].kind === "category");
  const middle = (list) => (list.length ? [...list].sort((a, b) => a - b)[list.length >> 1] : 0);
  const depth = middle(categories.map((i) => Math.hypot(...nodes[i].at))); // where the categories lie
  const close = depth ? Math.min(12, Math.max(fit, 0.8 / depth)) : fit;
  const mapped = (z) => flat ? add(z, view.beta) : over(add(times(view.alpha, z), view.beta), add(times(conj(view.beta), z), conj(view.alpha)));
  const screen = (z) => { const m = mapped(z); return [box.x + m[0] * box.r * zoom, box.y - m[1] * box.r * zoom]; };
  const unscreen = (x, y) => [(x - box.x) / (box.r * zoom), (box.y - y) / (box.r * zoom)];

  function move(from, to) { // compose the view with the translation that takes one point to the other
    if (flat) { view.beta = add(view.beta, [to[0] - from[0], to[1] - from[1]]); return; }
    const clip = (z) => { const n = Math.hypot(...z), s = n > 0.95 ? 0.95 / n : 1; return [z[0] * s, z[1] * s]; };
    from = clip(from); to = clip(to);
    const a = size2(from), b = size2(to), d = 1 - a * b;
    const t = [(to[0] * (1 - a) - from[0] * (1 - b)) / d, (to[1] * (1 - a) - from[1] * (1 - b)) / d];
    const alpha = add(view.alpha, times(t, conj(view.beta))), beta = add(view.beta, times(t, conj(view.alpha)));
    const n = Math.sqrt(Math.max(1e-9, size2(alpha) - size2(beta)));
    view = { alpha: [alpha[0] / n, alpha[1] / n], beta: [beta[0] / n, beta[1] / n] };
  }

  function geodesic(a, b) { // arc of the circle through a and b that meets the rim at right angles
    const u = mapped(a), v = mapped(b), det = u[0] * v[1] - u[1] * v[0];
    const px = (z) => [box.x + z[0] * box.r * zoom, box.y - z[1] * box.r * zoom];
    pen.beginPath();
    if (flat || Math.abs(det) < 1e-4) { pen.moveTo(...px(u)); pen.lineTo(...px(v)); pen.stroke(); return; }
    const su = (1 + size2(u)) / 2, sv = (1 + size2(v)) / 2;
    const c = [(su * v[1] - sv * u[1]) / det, (sv * u[0] - su * v[0]) / det];
    const radius = Math.sqrt(Math.max(0, size2(c) - 1));
    const start = Math.atan2(-(u[1] - c[1]), u[0] - c[0]), end = Math.atan2(-(v[1] - c[1]), v[0] - c[0]);
    const turn = ((end - start) % (2 * Math.PI) + 3 * Math.PI) % (2 * Math.PI) - Math.PI;
    pen.arc(...px(c), radius * box.r * zoom, start, end, turn < 0);
    pen.stroke();
  }

  function ring(rho, label) { // a circle about the origin stays a circle under the view
    const origin = mapped([0, 0]), n = Math.hypot(...origin), way = n > 1e-6 ? [origin[0] / n, origin[1] / n] : [1, 0];
    let a, b; // ends of the diameter on the ray through the moved origin
    if (flat) { a = add(origin, [rho, 0]); b = add(origin, [-rho, 0]); }
    else {
      const shift = (s) => over([origin[0] + way[0] * s, origin[1] + way[1] * s], [1 + n * s, 0]);
      a = shift(rho); b = shift(-rho);
    }
    const x = box.x + ((a[0] + b[0]) / 2) * box.r * zoom, y = box.y - ((a[1] + b[1]) / 2) * box.r * zoom;
    const r = (Math.hypot(a[0] - b[0], a[1] - b[1]) / 2) * box.r * zoom;
    pen.beginPath(); pen.arc(x, y, r, 0, 2 * Math.PI); pen.stroke();
    const last = ringLabels[ringLabels.length - 1];
    if (r > 52 && (!last || last[2] - (y - r - 2) > 15)) ringLabels.push([label, x, y - r - 2]);
  }
  let ringLabels = [];

  function dotShape(d, x, y, r) {
    pen.beginPath();
    if (d.rating === 0) { pen.moveTo(x, y - r * 1.25); pen.lineTo(x + r * 1.25, y); pen.lineTo(x, y + r * 1.25); pen.lineTo(x - r * 1.25, y); pen.closePath(); }
    else pen.arc(x, y, r, 0, 2 * Math.PI);
  }

  function wrap(text, width) {
    const lines = [];
    for (const word of text.split(" ")) {
      const last = lines.length - 1;
      if (last >= 0 && pen.measureText(`${lines[last]} ${word}`).width <= width) lines[last] += ` ${word}`;
      else lines.push(word);
    }
    return lines;
  }

  function draw() {
    const scale = window.devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
    if (!w) return;
    canvas.width = Math.round(w * scale); canvas.height = Math.round(h * scale);
    const narrow = w < 560, margin = narrow ? 26 : 40;
    box = { w, h, x: w / 2, y: h / 2, r: Math.max(60, Math.min(h / 2 - margin, w / 2 - (narrow ? 30 : 168))) };
    const colours = { ink: css("--ink"), muted: css("--muted"), disk: css("--disk"), line: css("--disk-line"), node: css("--node"), panel: css("--panel"), dots: RATINGS.map((r) => css(`--dot-${r}`)) };
    const font = getComputedStyle(document.body).fontFamily;
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, w, h);
    pen.save();
    pen.beginPath(); pen.arc(box.x, box.y, box.r, 0, 2 * Math.PI);
    pen.fillStyle = colours.disk; pen.fill();
    pen.clip();
    pen.strokeStyle = colours.line; pen.lineWidth = 1; pen.setLineDash([2, 4]);
    pen.font = `11px ${font}`; pen.textAlign = "center"; pen.textBaseline = "bottom";
    ringLabels = [];
    data.rings.forEach(([radius, rho]) => ring(rho, `radius ${+radius.toFixed(2)}`));
    pen.setLineDash([]);

    const focus = hover && hover.node !== undefined ? hover.node : state.node !== null && state.node >= 0 ? state.node : -1;
    const lit = (i) => focus < 0 || i === focus || nodes[i].parent === focus || nodes[focus].parent === i || (nodes[i].parent >= 0 && nodes[nodes[i].parent].parent === focus);
    // edges
    for (const i of placed) {
      const n = nodes[i], parent = n.parent >= 0 ? nodes[n.parent] : null;
      const concept = n.kind === "concept";
      if (concept && !(focus >= 0 && (i === focus || n.parent === focus))) continue;
      const from = parent ? parent.at : [0, 0];
      if (!from) continue;
      pen.strokeStyle = domainColour(i);
      pen.globalAlpha = (lit(i) ? 1 : 0.25) * (parent ? (risky(n) ? 0.75 : 0.28) : 0.35);
      pen.lineWidth = parent ? (risky(n) ? 1.6 : 1) : 1.2;
      geodesic(from, n.at);
    }
    // items: safe first, so that unsafe lies on top
    const many = dots.length > 900, base = narrow ? 2.2 : many ? 2.4 : 3.2;
    for (const rating of [2, 1, 0]) {
      for (const d of dots) {
        if (d.rating !== rating) continue;
        const on = matches(RATINGS[rating], d, d.item), [x, y] = screen([d.x, d.y]);
        pen.globalAlpha = on ? (rating === 2 && many ? 0.6 : 0.85) : 0.1;
        dotShape(d, x, y, base + (rating === 2 ? 0 : 0.8));
        if (rating === 1) { pen.strokeStyle = colours.dots[1]; pen.lineWidth = 2; pen.stroke(); }
        else { pen.fillStyle = colours.dots[rating]; pen.fill(); }
      }
    }
    // nodes, no larger than their spacing allows
    const room = (Math.PI * depth * box.r * zoom) / Math.max(1, categories.length);
    const pip = Math.min(narrow ? 3.4 : 4.2, Math.max(1.7, room)), half = Math.min(narrow ? 4.5 : 5.5, Math.max(3.2, pip * 1.5));
    for (const i of placed) {
      const n = nodes[i], concept = n.kind === "concept";
      if (concept && !(focus >= 0 && (i === focus || n.parent === focus))) continue;
      const [x, y] = screen(n.at), domain = n.parent < 0;
      pen.globalAlpha = lit(i) ? 1 : 0.4;
      pen.beginPath();
      if (domain) pen.roundRect(x - half, y - half, 2 * half, 2 * half, 3);
      else pen.arc(x, y, risky(n) && !concept ? pip : Math.min(2.2, pip), 0, 2 * Math.PI);
      pen.fillStyle = colours.panel; pen.fill();
      pen.strokeStyle = domainColour(i); pen.lineWidth = i === focus ? 4 : domain ? Math.min(3, half * 0.6) : risky(n) && !concept ? Math.min(2.2, pip * 0.65) : Math.min(1.2, pip * 0.5); pen.stroke();
    }
    pen.globalAlpha = 1;
    pen.strokeStyle = colours.disk; pen.lineWidth = 4; pen.lineJoin = "round"; pen.fillStyle = colours.muted;
    for (const label of ringLabels) { pen.strokeText(...label); pen.fillText(...label); }
    if (hover && hover.dot) {
      const [x, y] = screen([hover.dot.x, hover.dot.y]);
      pen.globalAlpha = 1; pen.strokeStyle = colours.ink; pen.lineWidth = 2;
      pen.beginPath(); pen.arc(x, y, 8, 0, 2 * Math.PI); pen.stroke();
    }
    pen.restore();
    pen.globalAlpha = 1;
    pen.strokeStyle = colours.line; pen.lineWidth = 1.5;
    pen.beginPath(); pen.arc(box.x, box.y, box.r, 0, 2 * Math.PI); pen.stroke();
    labels(colours, font, narrow);
  }

  function labels(colours, font, narrow) {
    const sides = { left: [], right: [] };
    pen.font = `${narrow ? 600 : 550} 12.5px ${font}`;
    for (const i of roots) {
      const n = nodes[i];
      if (!n.at) continue;
      const length = Math.hypot(...n.at) || 1;
      let way = mapped(flat ? n.at : [n.at[0] / length, n.at[1] / length]);
      const s = Math.hypot(...way) || 1;
      way = [way[0] / s, way[1] / s];
      const text = narrow ? [n.id] : wrap(n.name, 142);
      const side = way[0] < 0 ? "left" : "right";
      sides[side].push({ i, way, text, height: text.length * 15.5, y: box.y - way[1] * (box.r + 16) });
    }
    pen.textBaseline = "middle";
    for (const [side, list] of Object.entries(sides)) {
      list.sort((a, b) => a.y - b.y);
      const gap = narrow ? 2 : 9;
      let low = 4;
      for (const l of list) { l.top = Math.max(low, l.y - l.height / 2); low = l.top + l.height + gap; }
      let high = box.h - 4;
      for (const l of [...list].reverse()) { l.top = Math.min(l.top, high - l.height); high = l.top - gap; }
      for (const l of list) {
        const sign = side === "left" ? -1 : 1, middle = l.top + l.height / 2;
        const bend = Math.sqrt(Math.max(0, (box.r + 12) ** 2 - (middle - box.y) ** 2));
        const x = narrow ? box.x + l.way[0] * (box.r + 14) : box.x + sign * Math.max(bend, Math.abs(l.way[0]) * (box.r + 12));
        const on = state.node !== null && state.node >= 0 && nodes[state.node].root === l.i;
        pen.strokeStyle = domainColour(l.i); pen.globalAlpha = 0.8; pen.lineWidth = 1.4;
        if (!narrow) {
          pen.beginPath(); pen.moveTo(box.x + l.way[0] * box.r, box.y - l.way[1] * box.r); pen.lineTo(x, middle); pen.lineTo(x + sign * 6, middle); pen.stroke();
        }
        pen.globalAlpha = 1;
        pen.fillStyle = narrow || on ? domainColour(l.i) : colours.ink;
        pen.textAlign = narrow ? "center" : side === "left" ? "right" : "left";
        const tx = narrow ? x : x + sign * 11;
        const ty = narrow ? box.y - l.way[1] * (box.r + 14) : l.top;
        l.text.forEach((line, k) => pen.fillText(line, tx, narrow ? ty : ty + 8 + k * 15.5));
        l.box = narrow ? [tx - 14, ty - 10, 28, 20] : [side === "left" ? tx - 150 : tx, l.top, 150, l.height];
      }
    }
    labelBoxes = [...sides.left, ...sides.right];
  }
  let labelBoxes = [];

  function at(x, y) { // what lies under a position of the canvas
    let best = null, nearest = 144;
    const inside = Math.hypot(x - box.x, y - box.y) <= box.r;
    if (inside) {
      const focus = state.node;
      for (const i of placed) {
        if (nodes[i].kind === "concept" && nodes[i].parent !== focus && i !== focus) continue;
        const [px, py] = screen(nodes[i].at), d = ((px - x) ** 2 + (py - y) ** 2) * (risky(nodes[i]) ? 0.6 : 1.4);
        if (d < nearest) { nearest = d; best = { node: i, px, py }; }
      }
      for (const d of dots) {
        const [px, py] = screen([d.x, d.y]), q = (px - x) ** 2 + (py - y) ** 2 + (matches(RATINGS[d.rating], d, d.item) ? 0 : 100);
        if (q < nearest) { nearest = q; best = { dot: d, px, py }; }
      }
    } else for (const l of labelBoxes) {
      const [bx, by, bw, bh] = l.box;
      if (x >= bx && x <= bx + bw && y >= by - 4 && y <= by + bh + 4) best = { node: l.i, px: x, py: y };
    }
    return best;
  }

  function show(found) {
    const key = (f) => (f ? f.node ?? f.dot : null);
    const changed = key(found) !== key(hover);
    hover = found;
    canvas.classList.toggle("pointing", Boolean(found));
    tip.hidden = !found;
    if (found) {
      if (changed) {
        if (found.dot) tip.replaceChildren(el("b", {}, el("bdi", {}, found.dot.name)), `${capital(RATINGS[found.dot.rating])} · ${KIND_WORDS[found.dot.kind]}${found.dot.item < 0 ? " · not in the queue" : ""}`);
        else {
          const n = nodes[found.node];
          const below = n.parent >= 0 ? `${pathOf(n.parent).join(" › ")} · ` : "";
          tip.replaceChildren(el("b", {}, `${n.id}  ${n.name}`), risky(n) ? `${below}${spoken(n.counts)}${n.active ? "" : " · off in this policy"}` : `${below}harmless`);
        }
      }
      const left = Math.min(Math.max(4, found.px + 14), Math.max(4, box.w - tip.offsetWidth - 4));
      const under = found.py + 16 + tip.offsetHeight > box.h;
      tip.style.left = `${left}px`;
      tip.style.top = `${under ? found.py - tip.offsetHeight - 12 : found.py + 16}px`;
    }
    if (changed) draw();
  }

  function choose(found) {
    if (!found) return;
    if (found.dot) {
      if (found.dot.item < 0) return;
      const item = items[found.dot.item];
      change({ only: new Set([found.dot.item, ...item.near.map((n) => n[0]).filter((i) => i >= 0)]), onlyLabel: `${item.name} and its nearest`, node: null, rating: "", kind: "", words: [] });
    } else toggleNode(found.node);
  }

  let drag = null;
  const local = (e) => { const r = canvas.getBoundingClientRect(); return [e.clientX - r.left, e.clientY - r.top]; };
  canvas.addEventListener("pointerdown", (e) => { drag = { at: local(e), moved: false, mouse: e.pointerType !== "touch" }; if (drag.mouse) canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener("pointermove", (e) => {
    const p = local(e);
    if (!drag) { show(at(...p)); return; }
    if (!drag.moved && Math.hypot(p[0] - drag.at[0], p[1] - drag.at[1]) < 5) return;
    drag.moved = true;
    if (!drag.mouse) return; // a finger scrolls the page
    show(null);
    canvas.classList.add("dragging");
    move(unscreen(...drag.at), unscreen(...p));
    drag.at = p;
    draw();
  });
  canvas.addEventListener("pointerup", (e) => {
    if (drag && !drag.moved) { const found = at(...local(e)); show(found); choose(found); }
    drag = null;
    canvas.classList.remove("dragging");
  });
  canvas.addEventListener("pointercancel", () => { drag = null; canvas.classList.remove("dragging"); });
  canvas.addEventListener("pointerleave", () => { if (!drag) show(null); });
  canvas.addEventListener("blur", () => show(null));

  const walk = drawnNodes.filter((i) => risky(nodes[i]));
  canvas.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (step && walk.length) {
      cursor = cursor < 0 ? (step > 0 ? 0 : walk.length - 1) : (cursor + step + walk.length) % walk.length;
      const [px, py] = screen(nodes[walk[cursor]].at);
      show({ node: walk[cursor], px, py });
      $("disk-said").textContent = `${pathOf(walk[cursor]).join(", ")}: ${spoken(nodes[walk[cursor]].counts)}`;
    } else if ((e.key === "Enter" || e.key === " ") && cursor >= 0) toggleNode(walk[cursor]);
    else if (e.key === "Escape") { show(null); change({ node: null, only: null }); }
    else if (e.key === "+" || e.key === "=") zoomBy(1.3);
    else if (e.key === "-") zoomBy(1 / 1.3);
    else return;
    e.preventDefault();
  });
  canvas.after(el("p", { class: "vh", id: "disk-said", role: "status", "aria-live": "polite" }));

  function zoomBy(factor) { zoom = Math.min(12, Math.max(0.9, zoom * factor)); show(null); draw(); }
  function home(factor) { view = { alpha: [1, 0], beta: [0, 0] }; zoom = factor; show(null); draw(); }
  $("zoom-in").addEventListener("click", () => zoomBy(1.3));
  $("zoom-out").addEventListener("click", () => zoomBy(1 / 1.3));
  $("zoom-reset").addEventListener("click", () => home(fit));
  $("zoom-nodes").addEventListener("click", () => home(close));

  function legend() {
    const entry = (mark, text) => el("li", {}, mark, text);
    const keys = roots.filter((i) => nodes[i].at).map((i) => {
      const swatch = el("i", { class: "swatch", "aria-hidden": "true" });
      swatch.dataset.node = i;
      return el("li", { class: "key" }, button({ onclick: () => toggleNode(i) }, swatch, `${nodes[i].id}  ${nodes[i].name}`));
    });
    $("legend").append(entry(markOf("unsafe"), "unsafe"), entry(markOf("review"), "review"), entry(markOf("safe"), "safe"),
      entry(el("i", { class: "ring" }), "domain"), entry(el("i", { class: "pip" }), "category"), ...keys);
    const some = dots.length < data.points ? ` ${number.format(dots.length)} of ${number.format(data.points)} items are drawn, some of every rating.` : "";
    const space = flat ? "Distance from the centre is the norm in flat space." : "A Poincaré disk: distance from the centre is the geodesic radius, edges are geodesics.";
    $("disk-help").textContent = `${space} General nodes lie near the centre, instances outside. The angle only arranges: items stand towards the nodes they resemble.${some} Drag to look around, choose a point to filter.`;
  }
  function paint() { document.querySelectorAll("[data-node]").forEach((s) => { s.style.background = domainColour(Number(s.dataset.node)); }); draw(); }

  legend();
  zoom = fit;
  render();
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  new ResizeObserver(() => draw()).observe(canvas);
  document.documentElement.dataset.ready = "true";
})();
