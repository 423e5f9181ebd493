// The page: puts the parts together and answers clicks, keys and buttons.

class Page {
  constructor(data) {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    this.setTheme(dark.matches);
    dark.addEventListener("change", () => this.setTheme(dark.matches));
    this.model = new Model(data);
    this.selection = new Selection(this.model);
    this.layouter = new Layouter(() => this.relaid());
    this.canvas = byId("picture");
    this.scene = new Scene(this.model, this.layouter, this.room);
    this.camera = new Camera(() => this.requestDraw());
    this.painter = new Painter(this.canvas, this.scene, this.selection, this.camera);
    this.panel = new Panel(this.model, this.selection, (target) => this.go(target));
    this.search = new Search(this.model, this.panel, (target) => this.go(target));
    this.strip = new Strip(this.model, this.selection, (lane) => this.lookAt(this.scene.lanes[lane]));
    this.focus = null; // a lane or a node that is to be seen where the whole would be too small
    this.frames = []; // milliseconds that each drawing took
    this.bind();
    this.painter.resize();
    this.refit(null, true);
    this.panel.show();
  }

  bind() {
    const hover = (place) => this.hover(place);
    new Pointers(this.canvas, this.camera, { hover, click: (place) => this.click(place) });
    new ResizeObserver(() => this.resized()).observe(this.canvas);
    const every = this.scene.lanes.map((lane) => lane.index);
    byId("expand").onclick = () => this.setExpanded(every, true);
    byId("collapse").onclick = () => this.setExpanded(every, false);
    byId("fit").onclick = () => this.refit();
    byId("closer").onclick = () => this.zoom(1.3);
    byId("farther").onclick = () => this.zoom(1 / 1.3);
    byId("theme").onclick = () => this.setTheme(document.documentElement.dataset.theme !== "dark");
    byId("panel-toggle").onclick = () => this.togglePanel();
    byId("clear").onclick = () => this.clear();
    addEventListener("keydown", (event) => this.key(event));
  }

  get room() {
    return { width: this.canvas.clientWidth, height: this.canvas.clientHeight };
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

  // Change the lanes; what is in the middle stays where it is if the reader has moved the picture.
  change(lanesChange) {
    const { camera, scene } = this;
    const [mx, my] = camera.toPicture(this.painter.width / 2, this.painter.height / 2);
    const distance = ({ x, y, w, h }) => Math.hypot(x + w / 2 - mx, y + h / 2 - my);
    const held = scene.lanes.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const [x, y] = [held.x, held.y];
    scene.room = this.room;
    lanesChange();
    this.painter.relight();
    if (camera.byHand) {
      camera.x -= (held.x - x) * camera.scale;
      camera.y -= (held.y - y) * camera.scale;
    }
    this.requestDraw();
  }

  setExpanded(lanes, expanded, focus = null) {
    this.change(() => this.scene.setExpanded(lanes, expanded));
    this.refit(focus);
  }

  relaid() {
    this.change(() => this.scene.update());
    if (!this.layouter.pending.size) performance.mark("torchopt:settled");
    if (!this.camera.byHand) this.refit(this.focus);
  }

  resized() {
    this.painter.resize();
    if (!this.camera.byHand) {
      this.change(() => this.scene.arrange());
      this.refit(this.focus, true);
    }
    this.draw();
  }

  toggle(lane) {
    this.setExpanded([lane.index], !lane.expanded, { lane });
  }

  lookAt(lane) {
    const { width, height } = this.room;
    const scale = Math.max(this.camera.scale, 0.75);
    const x = width / 2 - (lane.x + lane.w / 2) * scale;
    const whole = height / 2 - (lane.y + lane.h / 2) * scale;
    this.camera.byHand = true;
    this.camera.goTo({ scale, x, y: Math.max(whole, 60 - lane.y * scale) });
  }

  // Show everything; where nothing could be read then, a lane or a node.
  refit(focus = null, atOnce = false) {
    const { bounds } = this.scene;
    this.focus = focus;
    this.camera.byHand = false;
    const whole = !focus || scaleFor(bounds.w, bounds.h, this.room) >= READABLE;
    if (whole) this.camera.fit(bounds, this.room, { atOnce });
    else if (focus.lane) this.camera.fit(focus.lane, this.room, { least: READABLE, atOnce });
    else this.showNode(focus.key, atOnce);
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
      this.change(() => this.scene.setExpanded([home], true));
    }
    if (home >= 0) this.strip.near(home);
    this.refit({ key: target });
    return this.changed();
  }

  // Move the camera to a node; once more when its lane has been laid out.
  showNode(key, atOnce) {
    const box = this.scene.boxOf(key);
    if (box.rail) this.camera.fit(this.scene.bounds, this.room, { least: READABLE, atOnce });
    else this.camera.centre(box, this.scene.bounds, this.room, atOnce);
  }

  clear() {
    this.selection.clear();
    this.changed();
  }

  // What lies at a place of the canvas.
  at([sx, sy]) {
    const [x, y] = this.camera.toPicture(sx, sy);
    for (const rail of this.scene.rails) {
      const box = this.painter.railBox(rail.key, rail.y, this.painter.railLeft());
      if (Math.abs(y - rail.y) <= 11 && x >= box.x && x <= box.x + box.w) return { key: rail.key };
      const end = largest(rail.uses.map(({ lane, port }) => lane.dx + port.x + port.w));
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
      if (!this.camera.byHand) this.refit({ key });
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
      f: () => this.refit(),
      e: () => byId("expand").click(),
      c: () => byId("collapse").click(),
    }[event.key];
    if (pan) this.camera.pan(...pan);
    else if (act) act();
    else return;
    event.preventDefault();
  }
}
