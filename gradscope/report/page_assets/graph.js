// One graph: nested boxes that open and shut, the edges over them, search, zoom, selection.

class Graph {
  constructor({ boxes, edges }, title) {
    this.boxes = boxes;
    this.title = title;
    this.zoom = 1;
    this.children = new Map([[-1, []], ...boxes.map((_, index) => [index, []])]);
    boxes.forEach((box, index) => this.children.get(box.up).push(index));
    this.edges = new Map();
    for (const edge of edges) {
      const up = boxes[edge[0]].up;
      if (!this.edges.has(up)) this.edges.set(up, []);
      this.edges.get(up).push(edge);
    }
    this.open = new Set(boxes.flatMap((box, index) => (box.open ? [index] : [])));
    this.first = new Set(this.open);
    this.byKey = new Map(boxes.map((box, index) => [box.key, index]));
    this.elements = new Map(); // index -> {item, label, body, lane}, of what is drawn
    this.hits = [];
    this.onselect = this.onfold = () => {};
    this.#frame();
  }

  // --- building -----------------------------------------------------------------------------------

  #frame() {
    this.canvas = el("div", { class: "canvas", role: "tree", "aria-label": this.title });
    this.sizer = el("div", { class: "sizer" }, this.canvas);
    this.view = el("div", { class: "view" }, this.sizer);
    this.pane = el("div", { class: "pane" }, el("h3", { class: "pane-title" }, this.title), this.view);
    this.canvas.addEventListener("click", (event) => this.#clicked(event));
    this.canvas.addEventListener("keydown", (event) => this.#pressed(event));
    this.canvas.addEventListener("focusin", (event) => this.#focused(event));
    this.#pannable();
  }

  /** Draw everything anew; only what is open is in the document. */
  draw() {
    this.elements.clear();
    this.canvas.replaceChildren(this.#body(-1));
    this.#connectAll();
    this.#mark(this.current ?? 0);
  }

  #body(up) {
    const body = el("div", { class: "body", role: up < 0 ? "presentation" : "group" });
    const edges = this.edges.get(up) ?? [];
    const rows = rowsOf(this.children.get(up), edges);
    const rowOf = new Map(rows.flatMap((row, number) => row.map((index) => [index, number])));
    const skipping = edges.filter(([from, to]) => rowOf.get(to) !== rowOf.get(from) + 1);
    skipping.sort((a, b) => rowOf.get(a[0]) - rowOf.get(b[0]));
    const lanes = lanesOf(skipping.map(([from, to]) => [rowOf.get(from), rowOf.get(to)]));
    const lane = new Map(skipping.map((edge, number) => [edge, lanes[number]]));
    const most = lanes.length ? Math.max(...lanes) + 1 : 0;
    // As much room on the left, so that rows stay in the middle.
    if (most) body.style.paddingInline = `${18 + most * LANE}px`;
    for (const row of rows)
      body.append(el("div", { class: "line", role: "presentation" }, ...row.map((index) => this.#item(index))));
    this.elements.set(up, { ...this.elements.get(up), body, lane });
    return body;
  }

  #item(index) {
    const box = this.boxes[index];
    const open = this.open.has(index);
    const label = this.#label(box, index, open);
    const cut = box.finding ? ` cut sev-${DATA.findings[box.finding].severity}` : "";
    const classes = `box k-${box.kind} s-${box.status}${cut}${open ? " open" : ""}`;
    const item = el("div", { class: classes, "data-index": index }, label);
    this.elements.set(index, { item, label });
    if (open) item.append(this.#body(index));
    return item;
  }

  /** The line of a box that is seen, focused and read out; what is inside the box stands behind it. */
  #label(box, index, open) {
    const holds = this.children.get(index).length;
    const inside = holds && !open ? this.#findingsInside(index) : [];
    const about = { role: "treeitem", tabindex: "-1", "aria-level": this.#depth(index), "aria-expanded": holds ? String(open) : null };
    return el("div", { class: "label", ...about },
      holds ? el("span", { class: "twist", "aria-hidden": "true" }, open ? "▾" : "▸") : null,
      el("span", { class: "sign", "aria-hidden": "true" }, box.finding ? SIGNS.cut : SIGNS[box.status]),
      el("bdi", { class: "name" }, box.label),
      box.type ? el("bdi", { class: "type" }, box.type) : null,
      box.frozen ? el("span", { class: "frozen", "aria-hidden": "true" }, SIGNS.frozen) : null,
      box.detail ? el("bdi", { class: "detail" }, box.detail) : null,
      box.finding ? el("a", { class: `tag sev-${this.#gravest([box.finding])}`, href: `#${box.finding}`, tabindex: "-1" }, this.#tag(box.finding)) : null,
      box.changed ? el("span", { class: "changed" }, box.changed) : null,
      inside.length ? el("span", { class: `tag sev-${this.#gravest(inside)}` }, `${SIGNS.cut} ${inside.join(", ")} inside`) : null,
      box.kind === "region" && box.place ? el("bdi", { class: "place" }, box.place) : null,
      el("span", { class: "unseen" }, this.#spoken(box, holds)),
    );
  }

  #tag(id) {
    return `${id} ${DATA.findings[id].rule}`;
  }

  #gravest(ids) {
    const found = ids.map((id) => DATA.findings[id].severity);
    return ["error", "warning", "note"].find((severity) => found.includes(severity));
  }

  /** Say in words what the signs and colours of a label say. */
  #spoken(box, holds) {
    const status = box.finding ? "the cut" : box.status === "none" ? "carries no gradient" : box.status;
    return [status, box.frozen ? "frozen" : "", holds ? `${holds} inside` : ""].filter(Boolean).join(", ");
  }

  #depth(index) {
    let depth = 1;
    for (let up = this.boxes[index].up; up >= 0; up = this.boxes[up].up) depth += 1;
    return depth;
  }

  #findingsInside(index) {
    const found = new Set();
    for (const child of this.#below(index)) if (this.boxes[child].finding) found.add(this.boxes[child].finding);
    return [...found];
  }

  *#below(index) {
    for (const child of this.children.get(index)) {
      yield child;
      yield* this.#below(child);
    }
  }

  // --- edges --------------------------------------------------------------------------------------

  #connectAll() {
    // Read all places first, write afterwards: one layout for the whole graph.
    const drawings = [...this.elements].filter(([, { body }]) => body).map(([up]) => this.#drawing(up));
    for (const [body, drawing] of drawings) body.prepend(drawing);
    this.#resize();
  }

  #connect(up) {
    const [body, drawing] = this.#drawing(up);
    $(":scope > svg", body)?.remove();
    body.prepend(drawing);
  }

  #drawing(up) {
    const { body, lane } = this.elements.get(up);
    const edges = svg("svg", { width: body.offsetWidth, height: body.offsetHeight, class: "edges", "aria-hidden": "true", focusable: "false" });
    const places = new Map(this.children.get(up).map((index) => [index, this.#place(index)]));
    const right = Math.max(...[...places.values()].map(({ x, width }) => x + width));
    for (const edge of this.edges.get(up) ?? []) {
      const [a, b] = [places.get(edge[0]), places.get(edge[1])];
      const run = lane.has(edge) ? around(a, b, right + 15 + lane.get(edge) * LANE) : straight(a, b);
      edges.append(this.#edge(edge, run));
    }
    return [body, edges];
  }

  #place(index) {
    const { item } = this.elements.get(index);
    const row = item.parentElement;
    const box = { x: item.offsetLeft, y: item.offsetTop, width: item.offsetWidth, height: item.offsetHeight };
    return { ...box, top: row.offsetTop, bottom: row.offsetTop + row.offsetHeight, last: item === row.lastElementChild };
  }

  #edge([from, to, status], { d, middle }) {
    const group = svg("g", { class: `edge s-${status}`, "data-from": from, "data-to": to });
    group.append(svg("path", { d, "marker-end": `url(#arrow-${status})` }));
    // The gradient comes from below: it ends where it would enter what cuts it off.
    if (status !== "flows" && this.boxes[from].finding) {
      const severity = this.#gravest([this.boxes[from].finding]);
      const text = svg("text", { x: middle[0], y: middle[1], class: `scissors sev-${severity}` });
      text.textContent = SIGNS.cut;
      group.append(svg("circle", { cx: middle[0], cy: middle[1], r: 8 }), text);
    }
    return group;
  }

  // --- opening and shutting -----------------------------------------------------------------------

  toggle(index, open = !this.open.has(index), tell = true) {
    if (!this.children.get(index).length || this.open.has(index) === open) return;
    if (open) this.open.add(index);
    else this.open.delete(index);
    const { item } = this.elements.get(index) ?? {};
    if (item?.isConnected) this.#redraw(index, item);
    if (tell) this.onfold(this.boxes[index].key, open);
  }

  /** Draw one box anew, and the edges of all that it stands in: their sizes changed. */
  #redraw(index, item) {
    const focused = item.contains(document.activeElement);
    const chosen = this.current === index;
    const fresh = this.#item(index);
    item.replaceWith(fresh);
    const inside = [index, ...this.#below(index)].filter((each) => this.elements.get(each)?.body?.isConnected);
    for (const each of inside) this.#connect(each);
    for (let up = this.boxes[index].up; ; up = this.boxes[up].up) {
      this.#connect(up);
      if (up < 0) break;
    }
    this.#resize();
    this.#highlight();
    if (chosen || focused) this.#mark(index);
    if (focused) this.elements.get(index).label.focus({ preventScroll: true });
  }

  openAll() {
    this.open = new Set(this.boxes.flatMap((_, index) => (this.children.get(index).length ? [index] : [])));
    this.draw();
  }

  fold() {
    this.open = new Set(this.first);
    this.draw();
  }

  /** Open all that a box stands in, choose it and bring it into sight. */
  reveal(index) {
    for (let up = this.boxes[index].up; up >= 0; up = this.boxes[up].up) this.open.add(up);
    if (!this.elements.get(index)?.item?.isConnected) this.draw();
    const { item, label } = this.elements.get(index);
    this.select(index);
    this.#center(item);
    flash(item);
    return label;
  }

  /** Return the box of a finding, or where it has none of its own that of the module it lies in; else -1. */
  ofFinding(id) {
    const own = this.boxes.findIndex((box) => box.finding === id);
    const { module } = DATA.findings[id];
    return own >= 0 || !module ? own : this.boxes.findIndex((box) => box.kind === "module" && box.module === module);
  }

  // --- choosing -----------------------------------------------------------------------------------

  select(index) {
    this.#mark(index);
    for (const chosen of $$(".box.selected", this.canvas)) {
      chosen.classList.remove("selected");
      chosen.firstChild.removeAttribute("aria-selected");
    }
    const { item, label } = this.elements.get(index);
    item.classList.add("selected");
    label.setAttribute("aria-selected", "true");
    this.onselect(this, index);
  }

  /** One box at a time is reached by Tab; the arrows go on from there. */
  #mark(index) {
    for (const label of $$('.label[tabindex="0"]', this.canvas)) label.tabIndex = -1;
    let shown = index;
    while (shown >= 0 && !this.elements.get(shown)?.item?.isConnected) shown = this.boxes[shown].up;
    this.current = Math.max(shown, 0);
    const entry = this.elements.get(this.current);
    if (entry) entry.label.tabIndex = 0;
  }

  #focused(event) {
    const item = event.target.closest(".box");
    if (item) this.#mark(Number(item.dataset.index));
  }

  #clicked(event) {
    if (this.dragged || event.target.closest("a")) return;
    const item = event.target.closest(".box");
    if (!item) return;
    const index = Number(item.dataset.index);
    const onLabel = event.target.closest(".label")?.parentElement === item;
    if (onLabel) this.toggle(index);
    this.select(index);
    this.elements.get(index).label.focus({ preventScroll: true });
  }

  #pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const index = this.current;
    const steps = {
      ArrowDown: () => this.#step(1),
      ArrowUp: () => this.#step(-1),
      ArrowRight: () => (this.#isShut(index) ? this.toggle(index) : this.#focus(this.#shown(index)[0])),
      ArrowLeft: () => (this.open.has(index) ? this.toggle(index) : this.#focus(this.boxes[index].up)),
      Home: () => this.#focus(0),
      End: () => this.#focus(this.#visible().at(-1)),
      Enter: () => { this.toggle(index); this.select(index); },
      " ": () => { this.toggle(index); this.select(index); },
    };
    if (!steps[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    steps[event.key]();
  }

  #isShut(index) {
    return this.children.get(index).length > 0 && !this.open.has(index);
  }

  #shown(index) {
    return this.open.has(index) ? this.children.get(index) : [];
  }

  #visible() {
    return $$(".box", this.canvas).map((item) => Number(item.dataset.index));
  }

  #step(by) {
    const visible = this.#visible();
    this.#focus(visible[visible.indexOf(this.current) + by]);
  }

  #focus(index) {
    if (index === undefined || index < 0) return;
    const { item, label } = this.elements.get(index);
    label.focus({ preventScroll: true });
    this.#center(item, false);
    this.select(index);
  }

  // --- searching ----------------------------------------------------------------------------------

  search(words) {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (box) => {
      const text = `${box.label} ${box.module ?? ""} ${box.type ?? ""} ${box.place ?? ""} ${box.finding ?? ""} ${box.detail ?? ""}`;
      return wanted.every((word) => text.toLowerCase().includes(word));
    };
    this.hits = wanted.length ? this.boxes.flatMap((box, index) => (matches(box) ? [index] : [])) : [];
    this.hit = -1;
    this.#highlight();
    return this.hits.length;
  }

  nextHit(by = 1) {
    if (!this.hits.length) return;
    this.hit = (this.hit + by + this.hits.length) % this.hits.length;
    this.reveal(this.hits[this.hit]);
    this.#highlight();
  }

  #highlight() {
    for (const item of $$(".box.hit", this.canvas)) item.classList.remove("hit");
    for (const index of this.hits) this.elements.get(index)?.item?.classList.add("hit");
  }

  // --- zooming and moving -------------------------------------------------------------------------

  setZoom(zoom, about = null) {
    const old = this.zoom;
    this.zoom = Math.min(2.5, Math.max(0.15, zoom));
    const point = about ?? { x: this.view.clientWidth / 2, y: this.view.clientHeight / 2 };
    const [left, top] = [this.view.scrollLeft + point.x, this.view.scrollTop + point.y];
    this.#resize();
    this.view.scrollLeft = (left * this.zoom) / old - point.x;
    this.view.scrollTop = (top * this.zoom) / old - point.y;
  }

  fit() {
    const wide = (this.view.clientWidth - 4) / this.canvas.offsetWidth;
    // The frame is as high as what is in it, so what counts is how high it may become.
    const high = (parseFloat(getComputedStyle(this.view).maxHeight) - 6) / this.canvas.offsetHeight;
    this.setZoom(Math.min(1, wide, Math.max(high, 0.3)));
  }

  #resize() {
    this.canvas.style.transform = `scale(${this.zoom})`;
    this.sizer.style.width = `${this.canvas.offsetWidth * this.zoom}px`;
    this.sizer.style.height = `${this.canvas.offsetHeight * this.zoom}px`;
  }

  #center(item, always = true) {
    const [view, box] = [this.view.getBoundingClientRect(), item.getBoundingClientRect()];
    const seen = box.top >= view.top && box.top + 30 <= view.bottom && box.left >= view.left && box.left + 60 <= view.right;
    if (seen && !always) return;
    this.view.scrollTop += box.top - view.top - Math.min(view.height / 4, Math.max(8, (view.height - box.height) / 2));
    this.view.scrollLeft += box.left - view.left - Math.max(8, (view.width - box.width) / 2);
  }

  #pannable() {
    let start = null;
    this.view.addEventListener("pointerdown", (event) => {
      this.dragged = false;
      if (event.pointerType !== "mouse" || event.button) return; // fingers scroll by themselves
      start = { x: event.clientX, y: event.clientY, left: this.view.scrollLeft, top: this.view.scrollTop };
    });
    addEventListener("pointermove", (event) => {
      if (!start) return;
      const [dx, dy] = [event.clientX - start.x, event.clientY - start.y];
      if (Math.hypot(dx, dy) > 4) this.dragged = true;
      if (!this.dragged) return;
      this.view.classList.add("dragging");
      this.view.scrollLeft = start.left - dx;
      this.view.scrollTop = start.top - dy;
    });
    addEventListener("pointerup", () => {
      start = null;
      this.view.classList.remove("dragging");
    });
    this.view.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const frame = this.view.getBoundingClientRect();
      const about = { x: event.clientX - frame.left, y: event.clientY - frame.top };
      this.setZoom(this.zoom * Math.exp(-event.deltaY / 300), about);
    }, { passive: false });
  }
}
