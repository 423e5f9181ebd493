// The part of the picture that stays in sight while the lanes move: lane titles and rails.

// Where a lane's title stands: at the top of what can be seen of the lane.
Painter.prototype.headerTop = function headerTop({ y, h }) {
  return Math.max(y, Math.min(this.view.top, y + h - HEADER));
};

Painter.prototype.drawHeader = function drawHeader(lane) {
  const { context, colour, selection } = this;
  const { model } = this.scene;
  const top = this.headerTop(lane);
  if (top > lane.y) {
    context.fillStyle = colour.lane;
    context.globalAlpha = 0.94;
    context.fillRect(lane.x + 1, top, lane.w - 2, HEADER);
    context.globalAlpha = 1;
  }
  const lit = selection.lit && selection.lanes().has(lane.index);
  const title = model.titles[lane.index];
  if (!this.readable) return this.drawFarTitle(lane, title, lit);
  const x = lane.x + 14;
  this.chevron(x, top + 16, lane.expanded);
  context.font = `600 ${FONT}`;
  this.onPatch(title, x + 14, top + 16, lit ? this.accent : colour.text, 1.08);
  context.font = FONT;
  const count = plural(model.autogradNodes(model.members[lane.index]), "node");
  this.onPatch(lane.waiting ? "laying out …" : count, x + 14, top + 33, colour.muted, 1);
};

// Text on a patch of the lane's colour, for lines pass behind it.
Painter.prototype.onPatch = function onPatch(text, x, y, style, stretch) {
  const { context, colour } = this;
  context.fillStyle = colour.lane;
  context.fillRect(x - 3, y - 8, textWidth(text) * stretch + 6, 16);
  context.fillStyle = style;
  context.fillText(text, x, y);
};

Painter.prototype.chevron = function chevron(x, y, down) {
  const { context, colour } = this;
  context.strokeStyle = colour.muted;
  context.lineWidth = 1.8;
  context.beginPath();
  const turn = (a, b) => (down ? [x + 4 + b, y + a] : [x + 4 + a, y + b]);
  context.moveTo(...turn(-2, -4));
  context.lineTo(...turn(2, 0));
  context.lineTo(...turn(-2, 4));
  context.stroke();
};

// From afar only the number of the step, as large as the lane's head allows.
Painter.prototype.drawFarTitle = function drawFarTitle(lane, title, lit) {
  const { context, colour } = this;
  const size = Math.min(13 / this.camera.scale, lane.w / 4, 0.8 * HEADER);
  context.font = FONT.replace("12px", `600 ${size}px`);
  context.fillStyle = lit ? this.accent : colour.text;
  const text = title.replace("Step ", "").replace("Outer loss", "Loss");
  const width = context.measureText(text).width;
  context.fillText(text, lane.x + (lane.w - width) / 2, lane.y + HEADER / 2 + 4);
  context.font = FONT;
};

// In each row, a line for each of the leaves that it uses.
Painter.prototype.drawRails = function drawRails() {
  const { context, colour, selection, scene, view } = this;
  for (const { key, y, uses } of scene.rails) {
    if (y < view.top - RAIL || y > view.bottom + RAIL) continue;
    const ends = uses.map((join) => join.x);
    const lit = selection.isLit([key]);
    context.globalAlpha = selection.lit && !lit ? 0.3 : 1;
    context.strokeStyle = lit ? this.accent : colour["rail-border"];
    context.fillStyle = context.strokeStyle;
    context.lineWidth = lit ? 3 : 2;
    context.beginPath();
    context.moveTo(8, y);
    context.lineTo(Math.max(...ends), y);
    context.stroke();
    for (const { x, lit: litUse } of uses) {
      context.fillStyle = selection.lit && !litUse ? colour["rail-border"] : context.strokeStyle;
      context.beginPath();
      context.arc(x, y, 4, 0, 2 * Math.PI);
      context.fill();
    }
    this.drawRailName(key, y, lit, this.railLeft());
  }
  context.globalAlpha = 1;
};

// The name of a rail stays in sight while the picture moves.
Painter.prototype.railLeft = function railLeft() {
  return Math.max(0, this.view.left + 8 / this.camera.scale);
};

Painter.prototype.railBox = function railBox(key, y, left) {
  return { x: left, y: y - 11, w: this.scene.railWidth(key), h: 22 };
};

Painter.prototype.drawRailName = function drawRailName(key, y, lit, left) {
  const { context, colour, selection } = this;
  const { model } = this.scene;
  const box = this.railBox(key, y, left);
  context.beginPath();
  context.roundRect(box.x, box.y, box.w, box.h, 11);
  context.fillStyle = colour.page;
  const alpha = context.globalAlpha;
  context.globalAlpha = 1;
  context.fill();
  context.globalAlpha = alpha;
  context.fillStyle = colour.rail;
  context.fill();
  context.strokeStyle = lit ? this.accent : colour["rail-border"];
  context.lineWidth = selection.key === key ? 3 : 1.5;
  context.stroke();
  if (this.readable) {
    const name = shorten(model.name(key), 24);
    context.fillStyle = colour.text;
    context.fillText(name, left + 12, y);
    context.fillStyle = colour.muted;
    context.fillText(`  ${model.shape(key)}`, left + 12 + textWidth(name), y);
  }
  if (model.nodes[key].cuts.length) this.drawCut(box, 1);
};
