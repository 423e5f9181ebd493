// Lines: the curves of edges inside a lane, and the lines that join lanes.

const ARROW = 4;

function arrow(path, [x, y], [dx, dy]) {
  const length = Math.hypot(dx, dy) || 1;
  const [ux, uy] = [(dx / length) * ARROW, (dy / length) * ARROW];
  path.moveTo(x - ux - uy * 0.7, y - uy + ux * 0.7);
  path.lineTo(x, y);
  path.lineTo(x - ux + uy * 0.7, y - uy - ux * 0.7);
}

// A smooth curve along dagre's points.
function curve(path, points) {
  const last = points.length - 1;
  path.moveTo(...points[0]);
  for (let k = 1; k < last; k += 1) {
    const [[x, y], [nx, ny]] = [points[k], points[k + 1]];
    const end = k === last - 1 ? [nx, ny] : [(x + nx) / 2, (y + ny) / 2];
    path.quadraticCurveTo(x, y, ...end);
  }
  if (last === 1) path.lineTo(...points[1]);
  const [[x, y], [bx, by]] = [points[last], points[last - 1]];
  arrow(path, points[last], [x - bx, y - by]);
}

// An edge over many ranks leaves and arrives at the side. Those of one box of another lane run
// down on the left along one line, those into a box that gathers many up on the right; any other
// is an arc, the longer, the wider, so that arcs nest.
function routeLong(content, left, right) {
  const long = content.edges.filter((edge) => edge.long);
  const isPort = ({ from }) => from.type === "port" || from.type === "ports";
  const ports = [...new Set(long.filter(isPort).map((edge) => edge.from))];
  const arriving = new Map();
  for (const edge of long) if (!isPort(edge)) arriving.set(edge.to, (arriving.get(edge.to) || 0) + 1);
  const gathering = [...arriving.keys()].filter((to) => arriving.get(to) > 4);
  for (const edge of long) {
    const onLeft = isPort(edge);
    const side = (item) => [onLeft ? item.x : item.x + item.w, item.y + item.h / 2];
    const [start, end] = [side(edge.from), side(edge.to)];
    const way = { start, end, onLeft, straight: true };
    if (onLeft) {
      const { x, y, w, h } = edge.from; // down first: other such boxes stand beside it
      way.start = [x + w / 2, y + h];
      way.turn = y + h + 5 + 4 * (ports.indexOf(edge.from) % 3);
      way.x = left - 14 - 8 * ports.indexOf(edge.from);
    }
    else if (gathering.includes(edge.to)) way.x = right + 14 + 8 * gathering.indexOf(edge.to);
    else {
      way.straight = false;
      way.x = Math.max(start[0], end[0]) + Math.min(110, 16 + 2.2 * Math.sqrt(Math.abs(end[1] - start[1])));
    }
    way.reach = way.straight ? way.x : way.x - 0.25 * (way.x - (start[0] + end[0]) / 2);
    edge.way = way;
  }
}

function traceEdge(path, edge) {
  if (!edge.long) return curve(path, edge.points);
  const { start, end, x, turn, onLeft, straight } = edge.way;
  const across = onLeft ? [[start[0], turn], [x, turn]] : [[x, start[1]]];
  if (straight) angular(path, [start, ...across, [x, end[1]], end]);
  else {
    path.moveTo(...start);
    path.bezierCurveTo(x, start[1], x, end[1], ...end);
  }
  arrow(path, end, [onLeft ? 1 : -1, 0]);
}

// A line of right angles with rounded corners.
function angular(path, points) {
  path.moveTo(...points[0]);
  for (let k = 1; k < points.length - 1; k += 1) path.arcTo(...points[k], ...points[k + 1], 6);
  path.lineTo(...points[points.length - 1]);
}

// Edges in groups of near ones, each with its box, so that what is out of sight is not drawn.
function chunks(edges) {
  const boxes = edges.map((edge) => {
    const ys = edge.long ? [edge.way.start[1], edge.way.end[1]] : edge.points.map((p) => p[1]);
    return { edge, top: Math.min(...ys), bottom: Math.max(...ys) };
  });
  boxes.sort((a, b) => a.top - b.top);
  const groups = [];
  for (let k = 0; k < boxes.length; k += 64) {
    const group = boxes.slice(k, k + 64);
    const path = new Path2D();
    for (const { edge } of group) traceEdge(path, edge);
    groups.push({ path, top: group[0].top, bottom: Math.max(...group.map((b) => b.bottom)) });
  }
  return groups;
}

// Give a lane's boxes and edges the places that were found for them.
function settle(content, { place, points }) {
  for (const [k, item] of content.items.entries()) {
    item.x = place[k][0] - item.w / 2;
    item.y = place[k][1] - item.h / 2;
  }
  const most = (pick, list) => list.reduce((a, b) => pick(a, b));
  const sides = [
    most(Math.min, content.items.map((item) => item.x)),
    most(Math.max, content.items.map((item) => item.x + item.w)),
  ];
  routeLong(content, ...sides);
  let next = 0;
  for (const edge of content.edges) if (!edge.long) edge.points = points[next++];
  const reaches = content.edges.filter((edge) => edge.long).map((edge) => edge.way.reach);
  const left = most(Math.min, [sides[0], ...reaches]);
  const right = most(Math.max, [sides[1], ...reaches]);
  const top = most(Math.min, content.items.map((item) => item.y));
  const bottom = most(Math.max, content.items.map((item) => item.y + item.h));
  content.box = { left, top, width: right - left, height: bottom - top };
  content.chunks = chunks(content.edges);
}
