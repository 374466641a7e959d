// The findings: which are shown, from one to the next, to the graph and back.

let currentFinding = null;

const shownFindings = () => $$(".finding").filter((card) => !card.hidden);

function startFindings() {
  for (const chip of $$("[data-severity][aria-pressed]"))
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      filterFindings();
    });
  $("#finding-search")?.addEventListener("input", filterFindings);
  for (const button of $$("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));
  for (const button of $$("[data-issue]"))
    button.addEventListener("click", () => copy(DATA.findings[button.dataset.issue].issue));
  for (const button of $$("[data-show]")) {
    // Not every finding stands in the graph: a parameter that no optimiser has, a file that a scan read.
    button.hidden = !graphs.before || graphs.before.ofFinding(button.dataset.show) < 0;
    button.addEventListener("click", () => showInGraph(button.dataset.show));
  }
  for (const button of $$("[data-filter]")) button.addEventListener("click", () => filterSources(button.dataset.filter));
  for (const button of $$("[data-filter-status]"))
    button.addEventListener("click", () => filterSources("", button.dataset.filterStatus));
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    const target = link && document.getElementById(link.getAttribute("href").slice(1));
    if (!target) return;
    event.preventDefault();
    if (target.classList.contains("finding")) return showFinding(target.id);
    if (target.tagName === "DETAILS") target.open = true;
    bring(target);
    remember(target.id);
  });
  const asked = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (asked?.classList.contains("finding")) showFinding(asked.id);
}

function filterFindings() {
  const chosen = $$('[data-severity][aria-pressed="true"]').map((chip) => chip.dataset.severity);
  const words = ($("#finding-search")?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  for (const card of $$(".finding")) {
    const text = words.length ? card.textContent.toLowerCase() : "";
    card.hidden = !chosen.includes(card.dataset.severity) || !words.every((word) => text.includes(word));
  }
  const [shown, all] = [shownFindings().length, $$(".finding").length];
  $("#finding-count").textContent = shown === all ? "" : `${shown} of ${all} are shown`;
}

function showFinding(id) {
  const card = document.getElementById(id);
  if (!card) return;
  card.hidden = false;
  $("details", card).open = true;
  currentFinding = card;
  card.focus({ preventScroll: true });
  bring(card);
  flash(card);
  remember(id);
}

function nextFinding(by) {
  const cards = shownFindings();
  const at = cards.indexOf(currentFinding);
  const next = cards[at < 0 ? (by > 0 ? 0 : cards.length - 1) : at + by];
  if (next) showFinding(next.id);
  else say(by > 0 ? "That was the last finding" : "This is the first finding");
}

function showInGraph(id) {
  const graph = shownGraphs().find((each) => each.ofFinding(id) >= 0) ?? graphs.before;
  if (graph.pane.hidden) showView("before");
  currentFinding = document.getElementById(id);
  bring($("#graph"));
  graph.reveal(graph.ofFinding(id)).focus({ preventScroll: true });
}

function remember(id) {
  try {
    history.replaceState(null, "", `#${id}`);
  } catch { /* a page in a frame has no address of its own */ }
}
