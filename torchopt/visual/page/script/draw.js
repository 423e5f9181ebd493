// Drawing on the canvas. Only what is in sight is drawn, and text only where it could be read.

const COLOURS = [
  "page", "lane", "line", "text", "muted", "edge", "lit", "cut",
  "operation", "step", "leaf", "value", "result", "rail",
];

class Painter {
  constructor(canvas, scene, selection, camera) {
    Object.assign(this, { canvas, scene, selection, camera, hover: null });
    this.context = canvas.getContext("2d", { alpha: false });
    this.readColours();
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    this.colour = Object.fromEntries(
      COLOURS.flatMap((name) => [name, `${name}-border`]).map((name) => [
        name,
        style.getPropertyValue(`--${name}`).trim(),
      ]),
    );
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.ratio = ratio;
  }

  // Prepare the lit lines once for each selection and each layout.
  relight() {
    for (const { content } of this.scene.lanes) {
      content.lit = null;
      if (!this.selection.lit) continue;
      content.lit = new Path2D();
      for (const edge of content.edges) {
        if (this.selection.litEdge(edge)) traceEdge(content.lit, edge);
      }
    }
    for (const join of this.scene.joins) join.lit = this.selection.lit && this.selection.litJoin(join);
  }

  draw() {
    const { context, camera, colour, ratio } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = colour.page;
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.readable = camera.scale > 0.42;
    this.view = camera.visible(this.width, this.height);
    this.toPicture = () =>
      context.setTransform(
        camera.scale * ratio, 0, 0, camera.scale * ratio, camera.x * ratio, camera.y * ratio,
      );
    this.toPicture();
    context.font = FONT;
    context.textBaseline = "middle";
    const inSight = this.scene.lanes.filter(
      ({ x, y, w, h }) => this.crosses(x - GAP, y - 400, w + 2 * GAP, h + 400 + ROW_GAP),
    );
    for (const lane of inSight) this.drawLane(lane);
    this.drawJoins(inSight);
    for (const lane of inSight) this.drawContent(lane);
    for (const lane of inSight) this.drawHeader(lane);
    this.drawRails();
  }

  crosses(x, y, w, h) {
    const { left, right, top, bottom } = this.view;
    return x <= right && x + w >= left && y <= bottom && y + h >= top;
  }

  get accent() {
    return this.selection.blocked ? this.colour.cut : this.colour.lit;
  }

  drawLane({ x, y, w, h }) {
    const { context, colour } = this;
    context.beginPath();
    context.roundRect(x, y, w, h, 10);
    context.fillStyle = colour.lane;
    context.fill();
    context.strokeStyle = colour.line;
    context.lineWidth = 1;
    context.stroke();
  }

  drawJoins(inSight) {
    const { context, colour, selection } = this;
    const lanes = new Set(inSight.map((lane) => lane.index));
    const seen = ({ lane, home, far }) => far || lanes.has(lane.index) || (home && lanes.has(home.index));
    const joins = this.scene.joins.filter(seen);
    this.stroke(joins.filter((join) => !join.lit).map((j) => j.path), colour.edge, 1, 1);
    this.stroke(joins.filter((join) => join.lit).map((j) => j.path), this.accent, 2, selection.lit ? 1 : 0);
  }

  stroke(paths, style, width, alpha) {
    const { context } = this;
    context.globalAlpha = this.selection.lit && style === this.colour.edge ? 0.35 : alpha;
    context.strokeStyle = style;
    context.lineWidth = Math.max(width, 0.6 / this.camera.scale);
    for (const path of paths) context.stroke(path);
    context.globalAlpha = 1;
  }

  drawContent({ content, dx, dy }) {
    const { context, view, colour } = this;
    context.save();
    context.translate(dx, dy);
    const [top, bottom] = [view.top - dy, view.bottom - dy];
    const near = content.chunks.filter((c) => c.bottom >= top - 20 && c.top <= bottom + 20);
    if (this.camera.scale > 0.12) this.stroke(near.map((c) => c.path), colour.edge, 1.1, 1);
    if (content.lit) this.stroke([content.lit], this.accent, 2, 1);
    for (const item of content.items) {
      if (item.y <= bottom && item.y + item.h >= top - 12) this.drawItem(item);
    }
    context.restore();
  }

  kindOf(item) {
    if (item.type === "port" || item.type === "ports") return "port";
    return this.scene.model.nodes[item.keys[0]].kind;
  }

  drawItem(item) {
    const { context, selection, colour } = this;
    const kind = this.kindOf(item);
    const lit = selection.isLit(item.keys);
    context.globalAlpha = selection.lit && !lit ? 0.3 : 1;
    this.outline(item, kind);
    if (selection.lit && !lit) this.cover(); // pale, but no line shows through
    context.fillStyle = colour[kind === "port" ? "page" : kind];
    context.fill();
    const chosen = selection.key !== null && item.keys.includes(selection.key);
    context.strokeStyle = lit ? this.accent : kind === "port" ? colour.line : colour[`${kind}-border`];
    context.lineWidth = chosen && kind !== "port" ? 3 : lit || kind === "step" ? 2 : 1.2;
    context.stroke();
    if (this.readable) this.drawText(item, kind);
    context.globalAlpha = 1;
    const cuts = kind === "port" ? 0 : item.keys.filter((k) => this.scene.model.nodes[k].cuts.length);
    if (cuts.length) this.drawCut(item, cuts.length);
  }

  cover() {
    const { context } = this;
    const alpha = context.globalAlpha;
    context.globalAlpha = 1;
    context.fillStyle = this.colour.lane;
    context.fill();
    context.globalAlpha = alpha;
  }

  outline({ x, y, w, h }, kind) {
    const { context } = this;
    context.beginPath();
    if (kind === "step") {
      context.moveTo(x + 9, y);
      for (const [px, py] of [[w - 9, 0], [w, h / 2], [w - 9, h], [9, h], [0, h / 2]]) {
        context.lineTo(x + px, y + py);
      }
      context.closePath();
    } else context.roundRect(x, y, w, h, kind === "leaf" || kind === "port" ? Math.min(13, h / 2) : 5);
  }

  drawText(item, kind) {
    const { context, colour, selection } = this;
    const { x, y, w, h, rows, heading, type } = item;
    const list = type === "list" || type === "ports";
    const main = kind === "result" ? colour.page : colour.text;
    const centre = (text, cy, style) => {
      context.fillStyle = style;
      context.fillText(text, x + (w - textWidth(text)) / 2, cy);
    };
    if (heading) centre(heading, y + 13, list ? colour.muted : main);
    if (!list) {
      const { text, aside } = rows[0];
      const start = x + (w - textWidth(text) - textWidth(aside || "")) / 2;
      const cy = heading ? y + h - 13 : y + h / 2;
      context.fillStyle = heading || kind === "port" ? colour.muted : main;
      context.fillText(text, start, cy);
      context.fillStyle = colour.muted;
      if (aside) context.fillText(aside, start + textWidth(text), cy);
      return;
    }
    rows.forEach(({ key, text, aside }, k) => {
      const cy = y + 24 + ROW * (k + 0.5);
      const lit = selection.lit && selection.lit.has(key);
      context.fillStyle = lit ? this.accent : key === undefined ? colour.muted : main;
      context.fillText(text, x + 12, cy);
      context.fillStyle = colour.muted;
      if (aside) context.fillText(aside, x + w - 12 - textWidth(aside.trim()), cy);
    });
  }

  // A break mark, and the word, for colour alone says too little.
  drawCut({ x, y, w }, count) {
    const { context, colour } = this;
    const [cx, cy] = [x + w - 4, y - 2];
    const text = count > 1 ? `${count} cuts` : "cut";
    context.globalAlpha = 1;
    context.fillStyle = colour.cut;
    context.beginPath();
    context.roundRect(cx - 9, cy - 9, textWidth(text) + 26, 18, 9);
    context.fill();
    context.strokeStyle = "#fff";
    context.lineWidth = 1.8;
    context.beginPath();
    for (const dx of [-2.5, 2.5]) {
      context.moveTo(cx + dx - 2, cy + 5);
      context.lineTo(cx + dx + 2, cy - 5);
    }
    context.stroke();
    context.fillStyle = "#fff";
    if (this.readable) context.fillText(text, cx + 10, cy + 0.5);
  }
}
