// Boxes get places from dagre: at once when there are few, otherwise in a worker, so that the page
// stays fluid. Steps of an unrolled loop look alike, so solutions are kept by the problem's text.

const AT_ONCE = 40; // boxes
const MOST_TOGETHER = 400;
const BAND = 150;
const LONGEST = 4; // ranks; a layered layout bends its columns around edges that span more

// Runs in the worker too, so it uses nothing but its arguments and dagre. Dagre takes the mean of
// four ways to align boxes; a side branch at every rank makes that drift sideways, and one of the
// four alone is straight then.
function solveBand({ sizes, edges, tops }, band) {
  const inside = new Set(band);
  const own = edges.filter(([a, b]) => inside.has(a) && inside.has(b));
  const attempt = (align) => {
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", nodesep: 14, ranksep: 20, edgesep: 8, align });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const k of band) graph.setNode(String(k), { width: sizes[k][0], height: sizes[k][1] });
    graph.setNode("top", { width: 1, height: 1 });
    for (const k of tops) if (inside.has(k)) graph.setEdge("top", String(k), { weight: 100 });
    for (const [a, b] of own) graph.setEdge(String(a), String(b), {});
    dagre.layout(graph);
    return graph;
  };
  let best = attempt(undefined);
  if (band.length > 40) {
    for (const other of [attempt("UR"), attempt("UL")]) {
      if (other.graph().width < 0.7 * best.graph().width) best = other;
    }
  }
  return best;
}

// Band below band, each moved sideways so that the edges from above come down straight.
function solve(problem) {
  const { sizes, edges, bands } = problem;
  const place = [];
  const bandOf = [];
  const points = new Array(edges.length);
  let top = 0;
  bands.forEach((band, k) => {
    const graph = solveBand(problem, band);
    for (const item of band) bandOf[item] = k;
    const entering = edges.filter(([a, b]) => bandOf[b] === k && bandOf[a] < k);
    const slide = entering.reduce((sum, [a, b]) => sum + place[a][0] - graph.node(String(b)).x, 0);
    const dx = entering.length ? slide / entering.length : 0;
    for (const item of band) {
      const { x, y } = graph.node(String(item));
      place[item] = [x + dx, y + top];
    }
    edges.forEach(([a, b], e) => {
      if (bandOf[b] !== k) return;
      if (bandOf[a] === k) {
        points[e] = graph.edge(String(a), String(b)).points.map(({ x, y }) => [x + dx, y + top]);
        return;
      }
      const [start, end] = [place[a][1] + sizes[a][1] / 2, place[b][1] - sizes[b][1] / 2];
      const middle = (start + end) / 2;
      points[e] = [[place[a][0], start], [place[a][0], middle], [place[b][0], middle], [place[b][0], end]];
    });
    top += graph.graph().height + 20;
  });
  return { place, points };
}

// All boxes, or bands of neighbouring ranks when there are so many that dagre would take minutes.
function bandsOf(rank) {
  const order = [...rank.keys()];
  if (order.length <= MOST_TOGETHER) return [order];
  order.sort((a, b) => rank[a] - rank[b] || a - b);
  const bands = [[]];
  for (const [k, item] of order.entries()) {
    const last = bands[bands.length - 1];
    const starts = k && rank[order[k - 1]] !== rank[item];
    if (starts && last.length >= BAND) bands.push([item]);
    else last.push(item);
  }
  return bands;
}

// The longest way from an input; a source stands just above the first that uses it.
function ranks(count, edges) {
  const [waiting, after] = [new Array(count).fill(0), Array.from({ length: count }, () => [])];
  for (const [a, b] of edges) {
    waiting[b] += 1;
    after[a].push(b);
  }
  const rank = new Array(count).fill(0);
  const sources = [...rank.keys()].filter((k) => !waiting[k]);
  const open = [...sources];
  while (open.length) {
    const a = open.pop();
    for (const b of after[a]) {
      rank[b] = Math.max(rank[b], rank[a] + 1);
      if (--waiting[b] === 0) open.push(b);
    }
  }
  for (const k of sources) if (after[k].length) rank[k] = Math.min(...after[k].map((b) => rank[b])) - 1;
  return rank;
}

class Layouter {
  constructor(done) {
    this.done = done; // called when a solution has come from the worker
    this.solutions = new Map();
    this.pending = new Map();
    this.solved = 0;
  }

  // The solution, or null while the worker looks for it.
  get(content, atOnce) {
    const problem = this.problem(content);
    const text = JSON.stringify(problem);
    if (!this.solutions.has(text)) {
      const worker = atOnce || problem.sizes.length <= AT_ONCE ? null : this.worker();
      if (!worker) this.keep(text, solve(problem));
      else if (!this.pending.has(text)) {
        this.pending.set(text, problem);
        worker.postMessage({ text, problem });
      }
    }
    return this.solutions.get(text) || null;
  }

  problem({ items, edges }) {
    const pairs = edges.map(({ from, to }) => [from.index, to.index]);
    const rank = ranks(items.length, pairs);
    const isPort = (k) => items[k].type === "port" || items[k].type === "ports";
    const tops = [...items.keys()].filter(isPort);
    for (const k of tops) rank[k] = 0;
    const small = items.length <= 12;
    const short = ([a, b]) => small || rank[b] - rank[a] <= LONGEST;
    edges.forEach((edge, k) => (edge.long = !short(pairs[k])));
    const sizes = items.map((item) => [item.w, item.h]);
    return { sizes, edges: pairs.filter(short), tops, bands: bandsOf(rank) };
  }

  keep(text, solution) {
    this.solutions.set(text, solution);
    this.pending.delete(text);
    this.solved += 1;
  }

  worker() {
    if (this.started === undefined) {
      const library = document.getElementById("layout-library").textContent;
      const answer = "onmessage = ({ data }) => postMessage([data.text, solve(data.problem)]);";
      const source = new Blob([library, `\n${solveBand}\n${solve}\n${answer}`]);
      try {
        this.started = new Worker(URL.createObjectURL(source));
        this.started.onmessage = ({ data: [text, solution] }) => {
          this.keep(text, solution);
          this.done();
        };
        this.started.onerror = (event) => {
          event.preventDefault();
          this.withoutWorker();
        };
      } catch {
        this.started = null; // a browser that refuses workers here: everything is solved at once
      }
    }
    return this.started;
  }

  withoutWorker() {
    this.started = null;
    for (const [text, problem] of this.pending) this.keep(text, solve(problem));
    this.done();
  }
}
