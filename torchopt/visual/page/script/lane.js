// What is drawn in one lane, collapsed or expanded: boxes and the edges between them.

const FONT = '12px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif';
const ROW = 18;
const ROWS_SHOWN = 8;

const textWidth = (() => {
  const context = document.createElement("canvas").getContext("2d");
  const known = new Map();
  return (text) => {
    let width = known.get(text);
    if (width === undefined) {
      context.font = FONT;
      known.set(text, (width = context.measureText(text).width));
    }
    return width;
  };
})();

const shorten = (text, most = 30) =>
  text.length <= most ? text : `${text.slice(0, most - 9)}…${text.slice(-8)}`;

const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

class LaneContent {
  constructor(model, lane, expanded) {
    this.model = model;
    this.items = [];
    this.itemOf = new Map(); // node -> its box
    this.portOf = new Map(); // node of another lane -> the box that stands for it here
    this.addMembers(model.members[lane], expanded);
    this.addPorts(lane, expanded);
    this.addEdges(lane);
  }

  add(type, keys, rows, heading = "") {
    const wide = Math.max(...rows.map((row) => textWidth(row.text) + textWidth(row.aside || "")));
    const item = { type, keys, rows, heading, index: this.items.length };
    item.w = Math.ceil(Math.max(wide + 24, heading ? textWidth(heading) + 20 : 0));
    item.h = type === "port" ? 20 : 26;
    if (type === "group") item.h = 40;
    if (type === "list" || type === "ports") item.h = 24 + ROW * rows.length + 4;
    this.items.push(item);
    return item;
  }

  row(key) {
    const { kind, name } = this.model.nodes[key];
    const shape = name && (kind === "leaf" || kind === "value") ? this.model.shape(key) : "";
    return { key, text: shorten(this.model.name(key)), aside: shape && `  ${shape}` };
  }

  addNode(key) {
    this.itemOf.set(key, this.add("node", [key], [this.row(key)]));
  }

  addList(type, keys, heading, map) {
    const rows = keys.slice(0, ROWS_SHOWN).map((key) => this.row(key));
    if (keys.length > ROWS_SHOWN + 1) rows.push({ text: `${keys.length - ROWS_SHOWN} more …` });
    else if (keys.length > ROWS_SHOWN) rows.push(this.row(keys[ROWS_SHOWN]));
    const item = this.add(type, keys, rows, heading);
    for (const key of keys) map.set(key, item);
  }

  addMembers(keys, expanded) {
    const buckets = { leaf: [], value: [], operation: [] };
    for (const key of keys) {
      const bucket = expanded ? undefined : buckets[this.model.nodes[key].kind];
      if (bucket) bucket.push(key);
      else this.addNode(key);
    }
    for (const kind of ["leaf", "value"]) {
      const found = this.model.byName(buckets[kind]);
      if (found.length > 1) {
        const heading = plural(found.length, kind === "leaf" ? "parameter" : "value");
        this.addList("list", found, heading, this.itemOf);
      } else found.forEach((key) => this.addNode(key));
    }
    const operations = buckets.operation;
    if (operations.length < 3) return operations.forEach((key) => this.addNode(key));
    const steps = keys.some((key) => this.model.nodes[key].kind === "step");
    const count = plural(this.model.autogradNodes(operations), "operation");
    const rows = [{ text: steps ? "forward and gradient" : "forward" }];
    const group = this.add("group", operations, rows, count);
    operations.forEach((key) => this.itemOf.set(key, group));
  }

  addPorts(lane, expanded) {
    const sources = new Set();
    for (const key of this.itemOf.keys()) {
      for (const from of this.model.inputs[key]) {
        if (this.model.home[from] !== lane) sources.add(from);
      }
    }
    const order = (key) => [this.model.home[key] < 0 ? 1 : 0, key];
    const sorted = [...sources].sort((a, b) => order(a)[0] - order(b)[0] || a - b);
    if (!expanded && sorted.length > 3) {
      this.addList("ports", sorted, `${sorted.length} inputs`, this.portOf);
      return;
    }
    for (const key of sorted) {
      const text = this.portText(key);
      this.portOf.set(key, this.add("port", [key], [{ key, text }]));
    }
  }

  portText(key) {
    const { kind } = this.model.nodes[key];
    if (kind === "step") return this.model.titles[this.model.home[key]].toLowerCase();
    return shorten(this.model.name(key), 22);
  }

  addEdges(lane) {
    const edges = new Map();
    for (const [key, to] of this.itemOf) {
      for (const input of this.model.inputs[key]) {
        const own = this.model.home[input] === lane;
        const from = own ? this.itemOf.get(input) : this.portOf.get(input);
        if (from === to) continue;
        const name = from.index * this.items.length + to.index;
        if (!edges.has(name)) edges.set(name, { from, to, pairs: [] });
        edges.get(name).pairs.push(input, key);
      }
    }
    this.edges = [...edges.values()];
  }
}
