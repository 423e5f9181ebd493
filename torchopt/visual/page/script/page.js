// The page: puts the parts together and answers clicks, keys and buttons.

class Page {
  constructor(data) {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    this.setTheme(dark.matches);
    dark.addEventListener("change", () => this.setTheme(dark.matches));
    this.model = new Model(data);
    this.selection = new Selection(this.model);
    this.layouter = new Layouter(() => this.relaid());
    this.scene = new Scene(this.model, this.layouter);
    this.camera = new Camera(() => this.requestDraw());
    this.canvas = byId("picture");
    this.painter = new Painter(this.canvas, this.scene, this.selection, this.camera);
    this.panel = new Panel(this.model, this.selection, (target) => this.go(target));
    this.search = new Search(this.model, this.panel, (target) => this.go(target));
    this.strip = new Strip(this.model, this.selection, (lane) => this.lookAt(this.scene.lanes[lane]));
    this.frames = []; // milliseconds that each drawing took
    this.bind();
    this.painter.resize();
    this.fit(true);
    this.panel.show();
  }

  bind() {
    const hover = (place) => this.hover(place);
    new Pointers(this.canvas, this.camera, { hover, click: (place) => this.click(place) });
    new ResizeObserver(() => {
      this.painter.resize();
      this.draw();
    }).observe(this.canvas);
    const every = this.scene.lanes.map((lane) => lane.index);
    byId("expand").onclick = () => this.setExpanded(every, true);
    byId("collapse").onclick = () => this.setExpanded(every, false);
    byId("fit").onclick = () => this.fit(false, 0);
    byId("closer").onclick = () => this.zoom(1.3);
    byId("farther").onclick = () => this.zoom(1 / 1.3);
    byId("theme").onclick = () => this.setTheme(document.documentElement.dataset.theme !== "dark");
    byId("panel-toggle").onclick = () => this.togglePanel();
    byId("clear").onclick = () => this.clear();
    addEventListener("keydown", (event) => this.key(event));
  }

  // Drawing ----------------------------------------------------------------------------------

  requestDraw() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.asked = false;
    const begin = performance.now();
    this.painter.draw();
    this.strip.show(this.scene, this.painter.view);
    this.frames.push(performance.now() - begin);
    if (this.frames.length > 2000) this.frames.shift();
    if (!this.drawn) performance.mark("torchopt:drawn");
    this.drawn = true;
  }

  changed() {
    this.painter.relight();
    this.panel.show();
    this.requestDraw();
  }

  setTheme(dark) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    if (!this.painter) return;
    this.painter.readColours();
    this.requestDraw();
  }

  // Lanes ------------------------------------------------------------------------------------

  // Change lanes so that what is in the middle stays where it is.
  keepingPlace(change) {
    const { lanes } = this.scene;
    const middle = this.camera.toPicture(this.painter.width / 2, 0)[0];
    const held = this.held || lanes.find(({ x, w }) => x + w >= middle) || lanes[lanes.length - 1];
    const before = held.x;
    change();
    this.camera.x -= (held.x - before) * this.camera.scale;
    this.painter.relight();
    this.requestDraw();
  }

  setExpanded(lanes, expanded, held = null) {
    this.held = held;
    this.keepingPlace(() => this.scene.setExpanded(lanes, expanded));
  }

  relaid() {
    this.keepingPlace(() => this.scene.update());
    if (!this.layouter.pending.size) performance.mark("torchopt:settled");
    if (this.awaited !== undefined) this.showNode(this.awaited);
  }

  toggle(lane) {
    this.setExpanded([lane.index], !lane.expanded, lane);
  }

  lookAt(lane) {
    const { width, height } = this.painter;
    const scale = Math.max(this.camera.scale, 0.75);
    const x = width / 2 - (lane.x + lane.w / 2) * scale;
    const whole = height / 2 - (lane.y + lane.h / 2) * scale;
    this.camera.goTo({ scale, x, y: Math.max(whole, 30) });
  }

  fit(atOnce, least = 0.62) {
    const { width, height } = this.painter;
    this.camera.fit(this.scene.bounds, width, height, { least, atOnce });
  }

  zoom(factor) {
    this.camera.zoom(factor, this.painter.width / 2, this.painter.height / 2);
  }

  // Selecting --------------------------------------------------------------------------------

  // A node by its key, or a parameter that is not reached by its name: select it and go there.
  go(target) {
    if (typeof target === "string") {
      this.selection.selectUnreached(target);
      return this.changed();
    }
    this.selection.select(target);
    const home = this.model.home[target];
    if (home >= 0 && this.scene.boxOf(target).hidden && !this.scene.lanes[home].expanded) {
      this.setExpanded([home], true, this.scene.lanes[home]);
    }
    this.changed();
    return this.showNode(target);
  }

  // Move the camera to a node, now or when its lane has been laid out.
  showNode(key) {
    const box = this.scene.boxOf(key);
    this.awaited = box.lane && box.lane.waiting ? key : undefined;
    if (this.awaited !== undefined) return;
    const { width, height } = this.painter;
    if (box.rail) this.camera.goTo({ scale: this.camera.scale, x: this.camera.x, y: Math.max(this.camera.y, 40) });
    else this.camera.centre(box, width, height);
  }

  clear() {
    this.selection.clear();
    this.changed();
  }

  // What lies at a place of the canvas.
  at([sx, sy]) {
    const [x, y] = this.camera.toPicture(sx, sy);
    const view = this.painter.view;
    for (const rail of this.scene.rails) {
      const box = this.painter.railBox(rail.key, rail.y, Math.max(8, view.left + 8 / this.camera.scale));
      if (Math.abs(y - rail.y) <= 11 && x >= box.x && x <= box.x + box.w) return { key: rail.key };
      const end = Math.max(...this.scene.joins.filter((j) => j.rail === rail.key).map((j) => j.lane.dx + j.port.x + j.port.w));
      if (Math.abs(y - rail.y) <= 5 && x >= 0 && x <= end) return { key: rail.key };
    }
    const lane = this.scene.lanes.find((l) => x >= l.x && x <= l.x + l.w && y >= l.y && y <= l.y + l.h);
    if (lane) {
      const top = this.painter.headerTop(lane);
      if (y >= top && y <= top + HEADER) return { lane, header: true };
    }
    return this.scene.at(x, y);
  }

  onScreen(x, y) {
    const { left, top } = this.canvas.getBoundingClientRect();
    return [left + this.camera.x + x * this.camera.scale, top + this.camera.y + y * this.camera.scale];
  }

  click(place) {
    const { key, lane, header, item } = this.at(place);
    this.hover(null); // what the tip says may no longer be true
    if (key !== undefined) {
      this.selection.select(key);
      this.changed();
    } else if (lane && (header || item)) this.toggle(lane);
    else this.clear();
  }

  hover(place) {
    const found = place ? this.at(place) : {};
    const some = found.key !== undefined || found.header || found.item;
    this.canvas.style.cursor = some ? "pointer" : "grab";
    showTip(this.model, found, place);
  }

  // Keys and small screens ----------------------------------------------------------------------

  togglePanel() {
    const open = document.body.classList.toggle("panel-open");
    byId("panel-toggle").setAttribute("aria-expanded", String(open));
  }

  key(event) {
    if (event.key === "Escape") return this.clear();
    if (event.target instanceof HTMLInputElement || event.ctrlKey || event.metaKey || event.altKey) return;
    const pan = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key];
    const act = {
      "/": () => this.search.field.focus(),
      "+": () => this.zoom(1.3),
      "-": () => this.zoom(1 / 1.3),
      f: () => this.fit(false, 0),
      e: () => byId("expand").click(),
      c: () => byId("collapse").click(),
    }[event.key];
    if (pan) this.camera.pan(...pan);
    else if (act) act();
    else return;
    event.preventDefault();
  }
}
