// The graph: who feeds whom, which lane a node is drawn in, what lies on a path to the loss.

class Model {
  constructor(data) {
    this.nodes = data.nodes;
    this.edges = data.edges;
    this.given = data.homes;
    this.unreached = data.unreached || [];
    this.inputs = this.nodes.map(() => []);
    this.outputs = this.nodes.map(() => []);
    for (const [from, to] of this.edges) {
      this.outputs[from].push(to);
      this.inputs[to].push(from);
    }
    this.laneCount = 1 + this.nodes.reduce((most, node) => Math.max(most, node.lane), 0);
    this.placeInLanes();
    this.titles = this.members.map((keys, lane) => this.titleOf(keys, lane));
    const results = this.nodes.filter((node) => node.kind === "result").map((node) => node.key);
    this.roots = results.length ? results : this.keys((key) => !this.outputs[key].length);
    this.reachesLoss = this.closure(this.roots, this.inputs);
    this.cuts = this.keys((key) => this.nodes[key].cuts.length > 0);
  }

  keys(test) {
    return this.nodes.map((node) => node.key).filter(test);
  }

  // A leaf that several lanes use gets a rail above all of them, for it belongs to none: that is
  // what a meta-parameter looks like.
  placeInLanes() {
    this.home = [...this.given];
    this.rails = [];
    for (const { key, kind } of this.nodes) {
      if (kind !== "leaf" || !this.outputs[key].length) continue;
      if (new Set(this.outputs[key].map((to) => this.home[to])).size > 1) this.rails.push(key);
    }
    for (const key of this.rails) this.home[key] = -1;
    this.members = Array.from({ length: this.laneCount }, () => []);
    for (const { key } of this.nodes) if (this.home[key] >= 0) this.members[this.home[key]].push(key);
  }

  closure(start, neighbours) {
    const seen = new Uint8Array(this.nodes.length);
    const open = [...start];
    for (const key of open) seen[key] = 1;
    while (open.length) {
      for (const next of neighbours[open.pop()]) {
        if (!seen[next]) {
          seen[next] = 1;
          open.push(next);
        }
      }
    }
    return seen;
  }

  // Everything on a path from one of these nodes to the loss.
  pathsFrom(keys) {
    const after = this.closure(keys, this.outputs);
    return new Set(this.keys((key) => after[key] && this.reachesLoss[key]));
  }

  // The number that the optimizers of a lane count, if they agree; else that of the lane.
  titleOf(keys, lane) {
    if (this.laneCount === 1) return "Graph";
    if (lane === this.laneCount - 1) return "Outer loss";
    const steps = keys.map((key) => this.nodes[key]).filter((node) => node.kind === "step");
    const counts = new Set(steps.map(({ label }) => (label.match(/ step (\d+)$/) || [])[1]));
    const [count] = counts;
    return `Step ${counts.size === 1 && count !== undefined ? count : lane + 1}`;
  }

  name(key) {
    const node = this.nodes[key];
    return node.name || node.label;
  }

  // Sorted as a reader would: 2.weight before 10.weight.
  byName(keys) {
    const order = new Intl.Collator("en", { numeric: true });
    return [...keys].sort((a, b) => order.compare(this.name(a), this.name(b)));
  }

  shape(key) {
    const { shape } = this.nodes[key];
    if (!shape) return "";
    return shape.length ? shape.join("×") : "scalar";
  }

  // Autograd nodes behind these drawn nodes.
  autogradNodes(keys) {
    return keys.reduce((sum, key) => sum + this.nodes[key].members, 0);
  }

  search(text) {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return { hits: [], total: 0 };
    const rank = (name, label) => {
      const named = (name || "").toLowerCase();
      if (named === wanted) return 0;
      if (named.startsWith(wanted)) return 1;
      if (named.includes(wanted)) return 2;
      return label.toLowerCase().includes(wanted) ? 3 : -1;
    };
    const hits = this.nodes.map(({ key, name, label }) => ({ key, rank: rank(name, label) }));
    for (const name of this.unreached) hits.push({ name, rank: rank(name, "") });
    const found = hits.filter((hit) => hit.rank >= 0).sort((a, b) => a.rank - b.rank);
    return { hits: found.slice(0, 50), total: found.length };
  }
}
