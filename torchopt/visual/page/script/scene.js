// The whole picture: lanes in rows, rails of meta-parameters above each row, lines between lanes.

class Scene {
  constructor(model, layouter, room) {
    Object.assign(this, { model, layouter, room });
    this.lanes = model.members.map((_, index) => ({ index, expanded: model.laneCount === 1, contents: [] }));
    this.railKeys = model.byName(model.rails);
    this.gutter = largest(this.railKeys.map((key) => this.railWidth(key) - 16));
    this.update();
  }

  railWidth(key) {
    return textWidth(shorten(this.model.name(key), 24)) + textWidth(`  ${this.model.shape(key)}`) + 24;
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
      const { box } = lane.content;
      const wide = Math.max(textWidth(this.model.titles[lane.index]) + 60, 150);
      lane.w = Math.max(box.width + 2 * PAD, wide);
      lane.h = HEADER + box.height + 2 * PAD;
    }
    this.arrange();
  }

  // Break the lanes into rows that fill the room, and draw the lines between them.
  arrange() {
    const band = this.railKeys.length * RAIL + 30;
    const rows = bestRows(this.lanes, this.room, this.gutter, band);
    this.rows = rows.map((lanes, index) => ({ index, lanes, over: 0 }));
    for (const row of this.rows) for (const lane of row.lanes) lane.row = row;
    this.joins = this.findJoins();
    this.placeRows();
    for (const join of this.joins) join.path = this.joinPath(join);
  }

  // One line for each source and each box that stands for it in another lane.
  findJoins() {
    const joins = new Map();
    const tracks = this.lanes.map(() => ({ out: 0, in: 0 }));
    for (const lane of this.lanes) {
      for (const [key, port] of lane.content.portOf) {
        const home = this.model.home[key];
        const source = home < 0 ? null : this.lanes[home].content.itemOf.get(key);
        const name = `${lane.index} ${port.index} ${home < 0 ? `rail ${key}` : `${home} ${source.index}`}`;
        const known = joins.get(name);
        if (known) known.keys.push(key);
        else joins.set(name, { lane, port, source, home: this.lanes[home], keys: [key], rail: home < 0 ? key : null });
      }
    }
    const list = [...joins.values()];
    for (const join of list.filter(({ rail }) => rail === null)) {
      const { lane, home } = join;
      join.outTrack = tracks[home.index].out++ % 5;
      if (lane.index - home.index === 1 && lane.row === home.row) continue;
      join.inTrack = tracks[lane.index].in++ % 3;
      const firstRow = home.row === lane.row ? lane.row : this.rows[home.row.index + 1];
      join.far = { row: lane.row, overTrack: lane.row.over++, firstRow };
      join.far.firstTrack = firstRow === lane.row ? join.far.overTrack : firstRow.over++;
    }
    return list;
  }

  placeRows() {
    let top = 0;
    for (const row of this.rows) {
      const used = this.joins.filter((join) => join.rail !== null && join.lane.row === row);
      const usesOf = (key) => used.filter((join) => join.rail === key);
      row.rails = this.railKeys.map((key) => ({ key, row, uses: usesOf(key) })).filter(({ uses }) => uses.length);
      row.rails.forEach((rail, k) => (rail.y = top + k * RAIL + RAIL / 2));
      row.busTop = top + row.rails.length * RAIL + 8;
      const over = Math.min(row.over, TRACKS) * TRACK;
      const y = top + row.rails.length * RAIL + over + (row.rails.length ? 22 : over ? 14 : 0);
      let x = this.gutter;
      for (const lane of row.lanes) {
        const { box } = lane.content;
        Object.assign(lane, { x, y });
        lane.dx = x + (lane.w - box.width) / 2 - box.left; // from places in the lane to the picture's
        lane.dy = y + HEADER + PAD - box.top;
        x += lane.w + GAP;
      }
      row.right = x - GAP;
      top = y + largest(row.lanes.map(({ h }) => h)) + ROW_GAP;
    }
    this.rails = this.rows.flatMap(({ rails }) => rails);
    // lines that wrap into another row run outside of the lanes
    const wraps = this.joins.filter(({ far, home }) => far && home.row !== far.row);
    const right = largest(wraps.map(({ home, outTrack }) => home.x + home.w + 12 + outTrack * TRACK));
    const passed = wraps.filter(({ far }) => far.firstRow !== far.row);
    const left = passed.length ? 10 + TRACK * largest(passed.map(({ far }) => far.firstTrack % TRACKS)) : 0;
    const entered = this.joins.filter(({ far }) => far).map(({ lane, inTrack }) => 10 - lane.x + inTrack * TRACK);
    const x = -Math.max(left, largest(entered));
    const w = Math.max(right, ...this.rows.map((row) => row.right)) - x;
    this.bounds = { x, y: 0, w, h: top - ROW_GAP };
  }

  joinPath(join) {
    const { lane, port, source, home, rail, keys } = join;
    const path = new Path2D();
    const row = Math.max(0, port.keys.indexOf(keys[0]));
    const spread = port.type === "ports" ? (row % ROWS_SHOWN) * TRACK - 3 * TRACK : 0;
    const end = [lane.dx + port.x + port.w / 2 + spread, lane.dy + port.y];
    join.x = end[0];
    if (rail !== null) {
      path.moveTo(end[0], lane.row.rails.find(({ key }) => key === rail).y);
      path.lineTo(...end);
    } else {
      const start = [home.dx + source.x + source.w, home.dy + source.y + source.h / 2];
      angular(path, wayBetween(join, start, end, 0));
    }
    arrow(path, end, [0, 1]);
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
      const { y } = this.rails.find((rail) => rail.key === key); // in the first row that uses it
      return { x: 0, y: y - 11, w: this.railWidth(key), h: 22, rail: true };
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
