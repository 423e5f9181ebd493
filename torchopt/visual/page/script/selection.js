// What is lit: the paths from the selected node to the loss, and the cuts.

class Selection {
  constructor(model) {
    this.model = model;
    this.clear();
  }

  clear() {
    this.key = null;
    this.name = null; // of a parameter that the loss does not reach
    this.lit = null; // null: nothing is selected, everything is drawn plainly
  }

  select(key) {
    this.clear();
    this.key = key;
    this.lit = this.model.pathsFrom([key]);
  }

  // The loss does not reach it, so there is no path; what can be shown is the way to the cuts.
  selectUnreached(name) {
    this.clear();
    this.name = name;
    this.lit = this.model.pathsFrom(this.model.cuts);
  }

  get blocked() {
    return this.name !== null;
  }

  isLit(keys) {
    return this.lit !== null && keys.some((key) => this.lit.has(key));
  }

  litEdge({ pairs }) {
    for (let k = 0; k < pairs.length; k += 2) {
      if (this.lit.has(pairs[k]) && this.lit.has(pairs[k + 1])) return true;
    }
    return false;
  }

  // A line between lanes is lit if the source and one of its uses in that lane are.
  litJoin({ keys, lane }) {
    const { home, outputs } = this.model;
    return keys.some(
      (key) =>
        this.lit.has(key) &&
        outputs[key].some((to) => home[to] === lane.index && this.lit.has(to)),
    );
  }

  // Cuts on the lit paths, and the others, where the way back from the loss ends elsewhere.
  cuts() {
    const all = this.model.cuts;
    const on = this.blocked ? all : all.filter((key) => this.lit && this.lit.has(key));
    return { on, off: all.filter((key) => !on.includes(key)) };
  }

  lanes() {
    const found = new Set();
    if (this.lit) for (const key of this.lit) if (this.model.home[key] >= 0) found.add(this.model.home[key]);
    return found;
  }
}
