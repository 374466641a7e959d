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
  // And then as far down as what uses it allows: a table stands by the step that it is added to.
  for (const index of [...children].reverse()) {
    const users = after.get(index);
    if (users.length) level.set(index, Math.min(...users.map((each) => level.get(each))) - 1);
  }
  const byLevel = new Map();
  for (const index of children) {
    const key = level.get(index);
    if (!byLevel.has(key)) byLevel.set(key, []);
    byLevel.get(key).push(index);
  }
  const rows = [];
  const at = new Map(); // where a box stands in its row, counted from the middle
  for (const key of [...byLevel.keys()].sort((a, b) => a - b)) {
    // In the order of what they come from, so that lines do not cross.
    const row = byLevel.get(key).map((index) => [mean(before.get(index).map((each) => at.get(each))), index]);
    row.sort((a, b) => a[0] - b[0]);
    row.forEach(([, index], number) => at.set(index, number - (row.length - 1) / 2));
    for (let start = 0; start < row.length; start += WIDEST_ROW)
      rows.push(row.slice(start, start + WIDEST_ROW).map(([, index]) => index));
  }
  return rows;
}

const mean = (numbers) => (numbers.length ? numbers.reduce((sum, each) => sum + each, 0) / numbers.length : 0);

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

// A place is {x, y, width, height} of a box inside its parent, with {top, bottom} of the row it stands in and
// whether it is the last of it. Lines bend between rows only, so that they cross no other box.

/** Return the path from the foot of one box to the head of another in the next row. */
function straight(a, b) {
  const [x1, x2] = [a.x + a.width / 2, b.x + b.width / 2];
  const [y1, y2] = [a.bottom, b.top];
  const middle = (y1 + y2) / 2;
  if (Math.abs(x1 - x2) < 4) return { d: `M${x2} ${a.y + a.height}V${b.y}`, middle: [x2, middle] };
  const last = b.y === y2 ? "" : `V${b.y}`; // a stretch of no length would turn the arrow
  const d = `M${x1} ${a.y + a.height}V${y1}C${x1} ${middle} ${x2} ${middle} ${x2} ${y2}${last}`;
  return { d, middle: [(x1 + x2) / 2, middle] };
}

/** Return the path that runs beside the rows at `x`: out of the side of the one box and into the other's.
    Where others stand between a box and that side, it goes out by the foot and in by the head. */
function around(a, b, x) {
  const [start, y1] = a.last ? [`M${a.x + a.width} ${foot(a)}`, foot(a)]
    : [`M${a.x + a.width / 2} ${a.y + a.height}V${a.bottom + 7}`, a.bottom + 7];
  const [end, y2] = b.last ? [`H${b.x + b.width}`, head(b)] : [`H${b.x + b.width / 2}V${b.y}`, b.top - 9];
  const r = Math.min(8, Math.abs(y2 - y1) / 2);
  const down = y2 < y1 ? -r : r;
  const d = `${start}H${x - r}Q${x} ${y1} ${x} ${y1 + down}V${y2 - down}Q${x} ${y2} ${x - r} ${y2}${end}`;
  return { d, middle: [x, (y1 + y2) / 2] };
}

// Out near the foot and in near the head, however high the box is.
const foot = (box) => box.y + box.height - Math.min(box.height / 2 - 4, 14);
const head = (box) => box.y + Math.min(box.height / 2 - 4, 14);
