// One key each for what is done often; none of them where somebody is writing.

function startKeys() {
  const help = $("#help");
  const go = (id) => () => {
    const section = document.getElementById(id);
    if (!section) return;
    bring(section);
    (id === "graph" ? $('.pane:not([hidden]) .label[tabindex="0"]', section) : id === "verdict" ? section : null)?.focus({ preventScroll: true });
  };
  const keys = {
    j: () => nextFinding(1),
    k: () => nextFinding(-1),
    s: thereAndBack,
    "/": () => nearestSearch()?.focus(),
    g: go("graph"),
    t: () => { go("sources")(); $("#source-search")?.focus({ preventScroll: true }); },
    f: go("findings"),
    v: go("verdict"),
    d: changeTheme,
    "?": () => help.showModal(),
    "+": () => zoomBy(1.25),
    "=": () => zoomBy(1.25),
    "-": () => zoomBy(0.8),
    0: () => graphs.before && shownGraphs().forEach((graph) => graph.setZoom(1)),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const field = event.target.closest("input, select, textarea");
    if (field) {
      if (event.key === "Escape") leave(field);
      return;
    }
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  $("#help-open").addEventListener("click", () => help.showModal());
  $("#help-close").addEventListener("click", () => help.close());
  $("#theme").addEventListener("click", changeTheme);
}

function leave(field) {
  if (field.value && field.type === "search") {
    field.value = "";
    field.dispatchEvent(new Event("input"));
  } else field.blur();
}

function zoomBy(factor) {
  if (graphs.before) for (const graph of shownGraphs()) graph.setZoom(graph.zoom * factor);
}

function thereAndBack() {
  const chosen = document.activeElement.closest?.(".box");
  const box = chosen && shownGraphs().find((graph) => graph.canvas.contains(chosen))?.boxes[chosen.dataset.index];
  if (box?.finding) showFinding(box.finding);
  else if (chosen && currentFinding) showFinding(currentFinding.id);
  else if (currentFinding && !$("[data-show]", currentFinding)?.hidden && graphs.before) showInGraph(currentFinding.id);
}

/** Return the search field that is nearest to the middle of the screen. */
function nearestSearch() {
  const away = (field) => {
    const { top, bottom } = (field.closest("section") ?? field).getBoundingClientRect();
    const middle = innerHeight / 2;
    return top <= middle && bottom >= middle ? 0 : Math.min(Math.abs(top - middle), Math.abs(bottom - middle));
  };
  return $$('input[type="search"]').sort((a, b) => away(a) - away(b))[0];
}

function changeTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("gradscope-theme", root.dataset.theme);
  } catch { /* then it lasts as long as the page */ }
}
