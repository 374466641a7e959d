// All sources as a table: filtered and sorted as data, drawn a screen at a time.

const ROWS_AT_ONCE = 150;
const RANK = { blocked: 0, wrong: 1, nondifferentiable: 2, partial: 3, zero: 4, unused: 5, flows: 6 };
const COLUMNS = [
  { name: "Source", of: ([name]) => name, order: (a, b) => a[0].localeCompare(b[0], "en", { numeric: true }) },
  { name: "Kind", of: ([, kind]) => kind },
  { name: "Status", of: ([, , status]) => status, order: (a, b) => (RANK[a[2]] ?? 9) - (RANK[b[2]] ?? 9) },
  { name: "Frozen", of: ([, , , frozen]) => (frozen ? "❄ frozen" : "") },
  { name: "Findings", of: ([, , , , findings]) => findings.join(" ") },
  { name: "Gradient norm", of: ([, , , , , norm]) => norm, order: (a, b) => size(a[5]) - size(b[5]) },
];
const table = { rows: [], drawn: 0, by: null, down: false };

const size = (norm) => (typeof norm === "number" ? norm : norm === null ? -1 : Infinity);

function startTable() {
  if (!$("#source-table")) return;
  // A column in which nothing is said is not shown.
  table.columns = COLUMNS.filter((column) => column.name === "Source" || DATA.sources.some((row) => {
    const value = column.of(row);
    return value !== "" && value !== null;
  }));
  $("#source-table thead").append(el("tr", {}, ...table.columns.map((column) =>
    el("th", { scope: "col", "aria-sort": "none", class: `c-${column.name.split(" ")[0].toLowerCase()}` },
      el("button", { type: "button", onclick: () => sortBy(column) }, column.name)))));
  $("#source-search").addEventListener("input", refill);
  $("#source-status").addEventListener("change", refill);
  const scroller = $("#sources .scroller");
  scroller.addEventListener("scroll", () => {
    if (scroller.scrollTop + scroller.clientHeight > scroller.scrollHeight - 400) drawMore();
  }, { passive: true });
  addEventListener("beforeprint", () => drawMore(Infinity));
  refill();
}

function sortBy(column) {
  table.down = table.by === column && !table.down;
  table.by = column;
  table.columns.forEach((each, number) => {
    const sort = each !== column ? "none" : table.down ? "descending" : "ascending";
    $$("#source-table th")[number].setAttribute("aria-sort", sort);
  });
  refill();
}

function refill() {
  const words = $("#source-search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const status = $("#source-status").value;
  table.rows = DATA.sources.filter((row) => {
    if (status && row[2] !== status) return false;
    const text = `${row[0]} ${row[1]} ${row[2]} ${row[3] ? "frozen" : ""} ${row[4].join(" ")}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  if (table.by) {
    const order = table.by.order ?? ((a, b) => String(table.by.of(a)).localeCompare(String(table.by.of(b)), "en", { numeric: true }));
    table.rows.sort(table.down ? (a, b) => order(b, a) : order);
  }
  $("#source-table tbody").replaceChildren();
  table.drawn = 0;
  drawMore();
  $("#sources .scroller").scrollTop = 0;
  const [shown, all] = [table.rows.length, DATA.sources.length];
  $("#source-count").textContent = shown === all ? `${all} in all` : `${shown} of ${all}`;
}

function drawMore(most = ROWS_AT_ONCE) {
  const rows = table.rows.slice(table.drawn, table.drawn + most);
  table.drawn += rows.length;
  $("#source-table tbody").append(...rows.map((row) => el("tr", {}, ...table.columns.map((column) => cell(column, row)))));
}

function cell(column, row) {
  const value = column.of(row);
  if (column.name === "Source") {
    // A long name breaks after a dot.
    const parts = value.split(/(?<=\.)/).flatMap((part) => [el("wbr"), part]);
    return el("th", { scope: "row" }, el("bdi", { class: "mono" }, ...parts));
  }
  if (column.name === "Status") {
    const sign = value === "flows" ? SIGNS.flows : value === "unused" ? SIGNS.none : value === "blocked" ? SIGNS.blocked : "!";
    return el("td", { class: `s-${value}` }, el("span", { class: "sign", "aria-hidden": "true" }, sign), ` ${value}`);
  }
  if (column.name === "Findings")
    return el("td", {}, ...row[4].flatMap((id) => [el("a", { href: `#${id}` }, id), " "]));
  if (column.name === "Gradient norm")
    return el("td", { class: "number" }, typeof value === "number" ? value.toPrecision(3) : value ?? "");
  return el("td", { class: `c-${column.name.toLowerCase()}` }, value);
}

/** Show the sources whose name, status or findings hold these words. */
function filterSources(words, status = "") {
  $("#source-search").value = words;
  $("#source-status").value = status;
  refill();
  bring($("#sources"));
  $("#source-search").focus({ preventScroll: true });
}
