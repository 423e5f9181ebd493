// The whole picture: lanes side by side, rails of meta-parameters above, lines between them.

const HEADER = 44;
const PAD = 18;
const GAP = 56;
const RAIL = 26;
const TRACK = 6; // between parallel lines

class Scene {
  constructor(model, layouter) {
    this.model = model;
    this.layouter = layouter;
    const expanded = model.nodes.length <= 300;
    this.lanes = model.members.map((_, index) => ({ index, expanded, contents: [] }));
    this.rails = model.byName(model.rails).map((key, k) => ({ key, y: k * RAIL + RAIL / 2 }));
    const names = this.rails.map(({ key }) => textWidth(shorten(model.name(key), 24)));
    this.gutter = this.rails.length ? Math.max(...names) + 110 : 0;
    this.update();
  }

  content(lane, expanded) {
    const k = Number(expanded);
    lane.contents[k] ||= new LaneContent(this.model, lane.index, expanded);
    return lane.contents[k];
  }

  // The lane in its present state; in its collapsed one while the worker looks for a layout.
  contentNow(lane) {
    for (const expanded of lane.expanded ? [true, false] : [false]) {
      const content = this.content(lane, expanded);
      if (content.box) return content;
      const solution = this.layouter.get(content, !expanded);
      if (solution) {
        settle(content, solution);
        return content;
      }
    }
    throw new Error("a collapsed lane is laid out at once");
  }

  update() {
    for (const lane of this.lanes) {
      lane.content = this.contentNow(lane);
      lane.waiting = lane.content !== lane.contents[Number(lane.expanded)];
    }
    this.joins = this.findJoins();
    this.placeLanes();
    for (const join of this.joins) join.path = this.joinPath(join);
  }

  // One line for each source and each box that stands for it in another lane.
  findJoins() {
    const joins = new Map();
    const tracks = this.lanes.map(() => ({ out: 0, in: 0 }));
    let over = 0;
    for (const lane of this.lanes) {
      for (const [key, port] of lane.content.portOf) {
        const home = this.model.home[key];
        const source = home < 0 ? null : this.lanes[home].content.itemOf.get(key);
        const name = `${lane.index} ${port.index} ${home < 0 ? `rail ${key}` : `${home} ${source.index}`}`;
        const known = joins.get(name);
        if (known) known.keys.push(key);
        else joins.set(name, { lane, port, source, home, keys: [key], rail: home < 0 ? key : null });
      }
    }
    const list = [...joins.values()];
    for (const join of list) {
      join.outTrack = join.home < 0 ? 0 : tracks[join.home].out++ % 5;
      join.far = join.home >= 0 && join.lane.index - join.home !== 1;
      if (join.far) {
        join.inTrack = tracks[join.lane.index].in++ % 3;
        join.overTrack = over++ % 10;
      }
    }
    this.over = Math.min(over, 10);
    return list;
  }

  placeLanes() {
    const top = this.rails.length * RAIL + this.over * TRACK + (this.rails.length ? 22 : 0);
    let x = this.gutter;
    for (const lane of this.lanes) {
      const { box } = lane.content;
      const wide = Math.max(textWidth(this.model.titles[lane.index]) + 60, 150);
      lane.w = Math.max(box.width + 2 * PAD, wide);
      Object.assign(lane, { x, y: top, h: HEADER + box.height + 2 * PAD });
      lane.dx = x + (lane.w - box.width) / 2 - box.left; // from places in the lane to the picture's
      lane.dy = top + HEADER + PAD - box.top;
      x += lane.w + GAP;
    }
    const bottom = Math.max(...this.lanes.map((lane) => lane.y + lane.h));
    this.bounds = { x: 0, y: 0, w: x - GAP, h: bottom };
  }

  joinPath({ lane, port, source, home, rail, far, outTrack, inTrack, overTrack, keys }) {
    const path = new Path2D();
    const row = Math.max(0, port.keys.indexOf(keys[0]));
    const spread = port.type === "ports" ? (row % ROWS_SHOWN) * TRACK - 3 * TRACK : 0;
    const [x, y] = [lane.dx + port.x + port.w / 2 + spread, lane.dy + port.y];
    if (rail !== null) {
      path.moveTo(x, this.rails.find(({ key }) => key === rail).y);
      path.lineTo(x, y);
    } else {
      const from = this.lanes[home];
      const start = [from.dx + source.x + source.w, from.dy + source.y + source.h / 2];
      const gap = from.x + from.w + 10 + outTrack * TRACK;
      const above = y - 12;
      const way = [start, [gap, start[1]]];
      if (far) {
        const bus = this.rails.length * RAIL + 8 + overTrack * TRACK;
        const down = lane.x - 8 - inTrack * TRACK;
        way.push([gap, bus], [down, bus], [down, above]);
      } else way.push([gap, above]);
      angular(path, [...way, [x, above], [x, y]]);
    }
    arrow(path, [x, y], [0, 1]);
    return path;
  }

  setExpanded(lanes, expanded) {
    for (const index of lanes) this.lanes[index].expanded = expanded;
    this.update();
  }

  // The box of a node as it is shown now, in the picture's coordinates, with its row in a list.
  boxOf(key) {
    const home = this.model.home[key];
    if (home < 0) {
      const { y } = this.rails.find((rail) => rail.key === key);
      return { x: 8, y: y - 11, w: this.gutter - 60, h: 22, rail: true };
    }
    const lane = this.lanes[home];
    const item = lane.content.itemOf.get(key);
    const box = { x: lane.dx + item.x, y: lane.dy + item.y, w: item.w, h: item.h, item, lane };
    const row = item.type === "list" ? item.rows.findIndex((r) => r.key === key) : -1;
    if (row >= 0) Object.assign(box, { y: box.y + 24 + ROW * row, h: ROW });
    return { ...box, hidden: item.keys.length > 1 && row < 0 };
  }

  // What lies at a point of the picture: {key}, {lane, item} or {lane, header}.
  at(x, y) {
    const lane = this.lanes.find((l) => x >= l.x && x <= l.x + l.w && y >= l.y && y <= l.y + l.h);
    if (!lane) return {};
    const [ix, iy] = [x - lane.dx, y - lane.dy];
    const item = lane.content.items.find(
      (i) => ix >= i.x && ix <= i.x + i.w && iy >= i.y && iy <= i.y + i.h,
    );
    if (!item) return { lane };
    if (item.keys.length === 1) return { lane, item, key: item.keys[0] };
    const row = item.rows[Math.floor((iy - item.y - 24) / ROW)];
    return { lane, item, key: item.type !== "group" && row ? row.key : undefined };
  }
}
