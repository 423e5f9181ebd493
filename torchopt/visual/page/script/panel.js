// The panel beside the picture: what there is, and what is selected.

class Panel {
  constructor(model, selection, go) {
    Object.assign(this, { model, selection, go, root: byId("panel-body") });
  }

  kind(key) {
    return this.model.home[key] < 0 ? "meta-parameter" : KINDS[this.model.nodes[key].kind];
  }

  where(key) {
    return this.model.home[key] < 0 ? "all lanes that use it" : this.model.titles[this.model.home[key]];
  }

  nodeButton(key, aside = this.model.shape(key)) {
    const colour = this.model.home[key] < 0 ? "rail" : this.model.nodes[key].kind;
    const button = element("button", { type: "button", className: "entry", onclick: () => this.go(key) });
    button.append(element("i", { className: `swatch ${colour}` }), element("span", { textContent: this.model.name(key) }));
    if (aside) button.append(element("small", { textContent: aside }));
    return button;
  }

  section(title, entries, most = 12) {
    if (!entries.length) return null;
    const heading = element("h3", { textContent: title }, element("small", { textContent: ` ${entries.length}` }));
    const shown = entries.slice(0, most).map((make) => make());
    const box = element("section", {}, heading, ...shown);
    if (entries.length > most) {
      const more = element("button", { type: "button", className: "more" });
      more.textContent = `Show all ${entries.length}`;
      more.onclick = () => more.replaceWith(...entries.slice(most).map((make) => make()));
      box.append(more);
    }
    return box;
  }

  nodes(title, keys, aside) {
    return this.section(title, keys.map((key) => () => this.nodeButton(key, aside && aside(key))));
  }

  // What is said of several nodes of a lane is said once.
  cutList(title, keys) {
    const together = new Map();
    for (const key of keys) {
      const name = JSON.stringify([this.where(key), this.model.nodes[key].cuts]);
      together.set(name, [...(together.get(name) || []), key]);
    }
    const entry = (group) => () => {
      const words = this.model.nodes[group[0]].cuts.map((text) => element("p", { textContent: text }));
      const buttons = group.map((key) => this.nodeButton(key, this.where(key)));
      return element("div", { className: "cut" }, ...buttons, ...words);
    };
    return this.section(title, [...together.values()].map(entry));
  }

  unreached() {
    const entry = (name) => () => {
      const button = element("button", { type: "button", className: "entry", onclick: () => this.go(name) });
      button.append(element("i", { className: "swatch missing" }), element("span", { textContent: name }));
      return button;
    };
    return this.section("Not reached by the loss", this.model.unreached.map(entry));
  }

  show() {
    const { key, name } = this.selection;
    const parts = key !== null ? this.node(key) : name !== null ? this.missing(name) : this.overview();
    this.root.replaceChildren(...parts.filter((part) => part !== null));
    this.root.scrollTop = 0;
    byId("panel").classList.toggle("chosen", key !== null || name !== null);
  }

  overview() {
    const { nodes, home, rails, cuts } = this.model;
    const leaves = this.model.keys((key) => nodes[key].kind === "leaf" && home[key] >= 0);
    const values = this.model.keys((key) => nodes[key].kind === "value");
    const hint = "Select a parameter to highlight every path from the loss to it.";
    return [
      element("p", { className: "hint", textContent: hint }),
      this.nodes("Used in several steps", this.model.byName(rails)),
      this.nodes("Parameters", this.model.byName(leaves)),
      this.nodes("Intermediate values", this.model.byName(values)),
      this.cutList("Cuts", cuts),
      this.unreached(),
    ];
  }

  node(key) {
    const node = this.model.nodes[key];
    const facts = [
      ["Kind", this.kind(key)],
      ["Shape", this.model.shape(key)],
      ["Data type", (node.dtype || "").replace("torch.", "")],
      ["Where", this.where(key)],
      ["Stands for", node.members > 1 ? plural(node.members, "autograd node") : ""],
    ].filter(([, value]) => value);
    const table = element("dl");
    for (const [term, value] of facts) {
      table.append(element("dt", { textContent: term }), element("dd", { textContent: value }));
    }
    const { on, off } = this.selection.cuts();
    return [
      element("h2", { textContent: this.model.name(key) }),
      table,
      node.detail ? element("p", { className: "detail", textContent: node.detail }) : null,
      element("p", { className: "paths", textContent: this.pathSentence() }),
      this.cutList("Cuts on these paths", on),
      this.cutList("Cuts elsewhere", off),
      this.nodes("Computed from", this.model.inputs[key], (k) => this.where(k)),
      this.nodes("Used by", this.model.outputs[key], (k) => this.where(k)),
    ];
  }

  pathSentence() {
    const titles = [...this.selection.lanes()].map((lane) => this.model.titles[lane]);
    const steps = titles.filter((title) => title.startsWith("Step ")).map((title) => Number(title.slice(5)));
    const through = steps.length ? `, through ${steps.length > 1 ? "steps" : "step"} ${runs(steps)}` : "";
    const count = this.selection.lit.size;
    if (count === 1) return "This is the loss.";
    return `${plural(count, "box")} of the graph on its paths to the loss${through}.`.replace("boxs", "boxes");
  }

  missing(name) {
    const { cuts } = this.model;
    const text = cuts.length
      ? "No path leads from the loss to it. In red: the ways from the loss to the places where paths are cut."
      : "No path leads from the loss to it, and no cut was found: the loss was computed without it, or its " +
        "path ends where nothing was recorded (detach(), item(), torch.no_grad()).";
    return [
      element("h2", { textContent: name }),
      element("p", { className: "paths blocked", textContent: text }),
      this.cutList("Cuts", cuts),
      this.unreached(),
    ];
  }
}
