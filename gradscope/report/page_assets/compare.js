// The run as it is and the run without the cuts, one or both of them on the page.

const graphs = {};
const PAPER = { width: 680, height: 900 }; // CSS pixels between the margins of a printed page

/** Say on the boxes of the second run what the same box was in the first; return how many changed. */
function markChanges(before, after) {
  let [changed, shared] = [0, 0];
  for (const box of after.boxes) {
    const was = before.boxes[before.byKey.get(box.key)];
    if (!was || box.kind === "group") continue;
    shared += 1;
    if (was.status !== "blocked" || box.status !== "flows") continue;
    changed += 1;
    box.changed = "was ✗";
  }
  return { changed, shared };
}

function startGraphs() {
  const panes = $("#panes");
  if (!panes) return;
  graphs.before = new Graph(DATA.graph, "As it is");
  panes.append(graphs.before.pane);
  if (DATA.healed) {
    graphs.after = new Graph(DATA.healed, $('[data-view="after"]').textContent);
    const { changed, shared } = markChanges(graphs.before, graphs.after);
    $(".pane-title", graphs.after.pane).append(
      el("span", { class: "delta" }, `${changed} of ${shared} boxes: ✗ blocked → ✓ flows`));
    panes.append(graphs.after.pane);
    graphs.before.onfold = (key, open) => follow(graphs.after, key, open);
    graphs.after.onfold = (key, open) => follow(graphs.before, key, open);
    tieScrolling(graphs.before, graphs.after);
  }
  for (const graph of Object.values(graphs)) graph.onselect = describe;
  showView("before");
  for (const button of $$(".segments button")) button.addEventListener("click", () => showView(button.dataset.view));
  startToolbar();
  // Labels wrap on a narrow screen: everything stands elsewhere then.
  matchMedia("screen and (max-width: 760px)").addEventListener("change", () => showView(panes.dataset.view));
  addEventListener("beforeprint", () => shownGraphs().forEach(toPaper));
  addEventListener("afterprint", () => showView(panes.dataset.view));
}

function follow(graph, key, open) {
  const index = graph.byKey.get(key);
  if (index !== undefined) graph.toggle(index, open, false);
}

/** Side by side, both move together. */
function tieScrolling(first, second) {
  for (const [one, other] of [[first, second], [second, first]])
    one.view.addEventListener("scroll", () => {
      if ($("#panes").dataset.view !== "both" || !one.view.matches(":hover")) return;
      const share = one.view.scrollTop / Math.max(1, one.view.scrollHeight - one.view.clientHeight);
      other.view.scrollTop = share * (other.view.scrollHeight - other.view.clientHeight);
    }, { passive: true });
}

const shownGraphs = () => Object.entries(graphs)
  .filter(([name]) => ["both", name].includes($("#panes").dataset.view)).map(([, graph]) => graph);

function showView(name) {
  $("#panes").dataset.view = name;
  for (const button of $$(".segments button")) button.setAttribute("aria-pressed", String(button.dataset.view === name));
  for (const [key, graph] of Object.entries(graphs)) {
    graph.pane.hidden = name !== "both" && name !== key;
    if (!graph.pane.hidden) graph.draw();
  }
  // Side by side, both in one size.
  const zoom = Math.min(...shownGraphs().map(fitting));
  for (const graph of shownGraphs()) {
    graph.setZoom(zoom);
    graph.view.scrollLeft = (graph.view.scrollWidth - graph.view.clientWidth) / 2;
  }
}

/** As much smaller as the width asks for, and never too small to read. */
function fitting(graph) {
  return Math.min(1, Math.max(0.55, (graph.view.clientWidth - 4) / graph.canvas.offsetWidth));
}

/** Onto one page where that can still be read; else as wide as the page, and cut where it ends. */
function toPaper(graph, _, shown) {
  const wide = PAPER.width / shown.length / graph.canvas.offsetWidth;
  const high = PAPER.height / graph.canvas.offsetHeight;
  graph.setZoom(Math.min(1, wide, Math.max(high, 0.4)));
}

function startToolbar() {
  const zooms = {
    in: (graph) => graph.setZoom(graph.zoom * 1.25),
    out: (graph) => graph.setZoom(graph.zoom / 1.25),
    one: (graph) => graph.setZoom(1),
    fit: (graph) => graph.fit(),
  };
  for (const button of $$("[data-zoom]"))
    button.addEventListener("click", () => shownGraphs().forEach(zooms[button.dataset.zoom]));
  for (const button of $$("[data-fold]"))
    button.addEventListener("click", () =>
      Object.values(graphs).forEach((graph) => (button.dataset.fold === "open" ? graph.openAll() : graph.fold())));
  const search = $("#graph-search");
  search.addEventListener("input", () => tellHits(shownGraphs().map((graph) => graph.search(search.value))[0]));
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    for (const graph of shownGraphs()) graph.nextHit(event.shiftKey ? -1 : 1);
    tellHits(shownGraphs()[0].hits.length);
  });
}

function tellHits(count) {
  const graph = shownGraphs()[0];
  const at = graph.hit >= 0 ? `${graph.hit + 1} of ` : "";
  $("#graph-hits").textContent = $("#graph-search").value.trim() ? `${at}${count} ${count === 1 ? "box" : "boxes"}` : "";
}

/** Say under the graph what is known of the chosen box. */
function describe(graph, index) {
  const box = graph.boxes[index];
  const inside = box.module ? DATA.sources.filter(([name]) => name.startsWith(`${box.module}.`)).length : 0;
  const rows = [
    ["status", box.status === "none" ? "· carries no gradient" : `${SIGNS[box.status]} ${box.status}${box.changed ? " (was ✗ blocked)" : ""}`],
    ["module", box.module], ["class", box.type], ["gives out", box.detail], ["where", box.place],
    ["parameters", box.parameters ? `${box.parameters}${box.frozen ? ", frozen" : ""}` : ""],
  ].filter(([, value]) => value);
  const panel = $("#selected");
  panel.hidden = false;
  const parts = [
    el("bdi", { class: "mono chosen" }, box.label),
    el("dl", {}, ...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, el("bdi", {}, value))))),
    box.finding && el("button", { type: "button", onclick: () => showFinding(box.finding) }, `To ${box.finding}`),
    inside && el("button", { type: "button", onclick: () => filterSources(`${box.module}.`) }, `Its ${inside} sources`),
    box.place && el("button", { type: "button", class: "quiet", onclick: () => copy(box.place) }, "Copy file:line"),
  ];
  panel.replaceChildren(...parts.filter(Boolean));
}
