// Lanes are broken into rows, as words are into lines, so that they fill the room that there is.

const HEADER = 44;
const PAD = 18;
const GAP = 56;
const ROW_GAP = 30;
const RAIL = 26;
const TRACK = 6; // between parallel lines
const TRACKS = 10; // beside each other; more share them
const LARGEST = 1.2; // as large as a small picture is shown
const EASY = 0.9; // the scale from which on more rows gain nothing
const READABLE = 0.5; // the least scale at which a fitted picture is of use

const largest = (numbers) => numbers.reduce((a, b) => Math.max(a, b), 0);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

// What is left free around everything: the buttons stand on the right, or below on a small screen.
function margins({ width }) {
  return width < 600
    ? { left: 12, right: 12, top: 14, bottom: 56 }
    : { left: 20, right: 56, top: 22, bottom: 22 };
}

// The scale at which a box fills the room.
function scaleFor(w, h, room) {
  const { left, right, top, bottom } = margins(room);
  return Math.min((room.width - left - right) / w, (room.height - top - bottom) / h, LARGEST);
}

function broken(lanes, width) {
  const rows = [];
  let used = Infinity;
  for (const lane of lanes) {
    if (used + lane.w > width) {
      rows.push([]);
      used = 0;
    }
    rows[rows.length - 1].push(lane);
    used += lane.w + GAP;
  }
  return rows;
}

// At most so many rows, as narrow as they can be.
function narrowest(lanes, count) {
  let low = largest(lanes.map(({ w }) => w));
  let high = sum(lanes.map(({ w }) => w + GAP));
  for (let k = 0; k < 12; k += 1) {
    const middle = (low + high) / 2;
    if (broken(lanes, middle).length > count) low = middle;
    else high = middle;
  }
  return broken(lanes, high);
}

// The rows that can be shown largest; as few as will do.
function bestRows(lanes, room, gutter, band) {
  let best = null;
  for (let k = 1; k <= Math.min(lanes.length, 80); k += 1) {
    const rows = narrowest(lanes, k);
    const w = gutter + largest(rows.map((row) => sum(row.map((lane) => lane.w + GAP)) - GAP));
    const h = sum(rows.map((row) => band + largest(row.map((lane) => lane.h)) + ROW_GAP)) - ROW_GAP;
    const scale = scaleFor(w, h, room);
    if (!best || scale > 1.06 * best.scale) best = { rows, scale };
    if (best.scale >= EASY) break;
  }
  return best.rows;
}

// The way from a box to one in another lane. It leaves to the right of its lane and comes from
// above; where it passes over lanes it runs above their row, and further rows are passed on the left.
function wayBetween({ lane, home: from, outTrack, inTrack, far }, start, [x, y], left) {
  const gap = from.x + from.w + 10 + outTrack * TRACK;
  const above = y - 12;
  const way = [start, [gap, start[1]]];
  if (!far) return [...way, [gap, above], [x, above], [x, y]];
  const down = lane.x - 8 - inTrack * TRACK;
  const bus = ({ busTop }, track) => busTop + (track % TRACKS) * TRACK;
  const { row, overTrack, firstRow, firstTrack } = far;
  if (firstRow !== row) {
    const over = bus(firstRow, firstTrack);
    const beside = left - 8 - (firstTrack % TRACKS) * TRACK;
    way.push([gap, over], [beside, over], [beside, bus(row, overTrack)]);
  } else way.push([gap, bus(row, overTrack)]);
  return [...way, [down, bus(row, overTrack)], [down, above], [x, above], [x, y]];
}
