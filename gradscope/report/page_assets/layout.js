// Where boxes stand inside their parent, and how the edges between them run.
// Rows go down in the order of the data; what does not depend on each other stands side by side.

const WIDEST_ROW = 4;
const LANE = 9; // between two edges that run past boxes
const MOST_LANES = 8;

/** Return the rows of some sibling boxes: lists of indices, each after all that it depends on. */
function rowsOf(children, edges) {
  const before = new Map(children.map((index) => [index, []]));
  const after = new Map(children.map((index) => [index, []]));
  for (const [from, to] of edges) {
    if (from >= to) continue;
    before.get(to).push(from);
    after.get(from).push(to);
  }
  const level = new Map();
  let last = -1;
  for (const index of children) {
    const sources = before.get(index);
    // What has no edge at all keeps its place in the order of execution.
    const alone = !sources.length && !after.get(index).length;
    const own = sources.length ? 1 + Math.max(...sources.map((each) => level.get(each))) : alone ? last + 1 : 0;
    level.set(index, own);
    last = alone ? own : Math.max(last, own);
  }
  // A box that nothing leads to stands right above the first that uses it.
  for (const index of children) {
    if (before.get(index).length || !after.get(index).length) continue;
    level.set(index, Math.max(0, Math.min(...after.get(index).map((each) => level.get(each))) - 1));
  }
  const byLevel = new Map();
  for (const index of children) {
    const key = level.get(index);
    if (!byLevel.has(key)) byLevel.set(key, []);
    byLevel.get(key).push(index);
  }
  const rows = [];
  for (const key of [...byLevel.keys()].sort((a, b) => a - b)) {
    const row = byLevel.get(key);
    for (let start = 0; start < row.length; start += WIDEST_ROW) rows.push(row.slice(start, start + WIDEST_ROW));
  }
  return rows;
}

/** Give each edge that runs past other rows a lane of its own at the right: `[[from, to], ...]` in rows. */
function lanesOf(spans) {
  const ends = []; // the row in which each lane is free again
  return spans.map(([from, to]) => {
    const [top, bottom] = from < to ? [from, to] : [to, from];
    let lane = ends.findIndex((end) => end <= top);
    if (lane < 0) lane = ends.length < MOST_LANES ? ends.length : MOST_LANES - 1;
    ends[lane] = bottom;
    return lane;
  });
}

/** Return the path from the bottom of one box to the top of another in the next row. */
function straight(a, b) {
  const [x1, y1, x2, y2] = [a.x + a.width / 2, a.y + a.height, b.x + b.width / 2, b.y];
  const bend = (y2 - y1) / 2;
  const d = x1 === x2 ? `M${x1} ${y1}V${y2}` : `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}`;
  return { d, middle: [(x1 + x2) / 2, (y1 + y2) / 2] };
}

/** Return the path out of the right side of one box, down (or up) beside the others, and into another's. */
function around(a, b, x) {
  const [y1, y2] = [a.y + a.height / 2 + 4, b.y + b.height / 2 - 4];
  const r = Math.min(8, Math.abs(y2 - y1) / 2) * Math.sign(y2 - y1 || 1);
  const s = Math.abs(r);
  const d =
    `M${a.x + a.width} ${y1}H${x - s}Q${x} ${y1} ${x} ${y1 + r}` +
    `V${y2 - r}Q${x} ${y2} ${x - s} ${y2}H${b.x + b.width}`;
  return { d, middle: [x, (y1 + y2) / 2] };
}
