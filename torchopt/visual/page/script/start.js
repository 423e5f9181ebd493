// The box of text that follows the pointer; and the start.

function tipText(model, { key, lane, header, item }) {
  if (key !== undefined) {
    const node = model.nodes[key];
    const named = node.name && node.name !== node.label ? [node.label] : [];
    const type = [model.shape(key), (node.dtype || "").replace("torch.", "")].filter(Boolean).join("  ");
    return { title: model.name(key), lines: [...named, type, node.detail].filter(Boolean), cuts: node.cuts };
  }
  if (header || (item && item.type === "group")) {
    const act = lane.expanded ? "collapse" : "expand";
    return { title: model.titles[lane.index], lines: [`Click to ${act}`], cuts: [] };
  }
  return null;
}

function showTip(model, found, place) {
  const tip = byId("tip");
  const text = place && tipText(model, found);
  tip.hidden = !text;
  if (!text) return;
  tip.replaceChildren(
    element("b", { textContent: text.title }),
    ...text.lines.map((line) => element("div", { textContent: line })),
    ...text.cuts.map((line) => element("div", { className: "cut-text", textContent: `Cut: ${line}` })),
  );
  const { left, top, right, bottom } = byId("stage").getBoundingClientRect();
  const [x, y] = [place[0] + 14, place[1] + 16];
  tip.style.left = `${Math.max(4, Math.min(x, right - left - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(y, bottom - top - tip.offsetHeight - 8))}px`;
}

performance.mark("torchopt:start");
const page = new Page(JSON.parse(byId("graph").textContent));
page.draw();

// What the page shows, for scripts and tests; it changes nothing.
window.torchoptGraph = Object.freeze({
  state: () => ({
    selected: page.selection.key,
    unreached: page.selection.name,
    lit: page.selection.lit ? [...page.selection.lit].sort((a, b) => a - b) : null,
    cuts: page.selection.cuts(),
    expanded: page.scene.lanes.filter((lane) => lane.expanded).map((lane) => lane.index),
    waiting: page.layouter.pending.size,
    inFlight: page.camera.flight !== null,
    worker: page.layouter.started ? "yes" : page.layouter.started === null ? "refused" : "unused",
    scale: page.camera.scale,
  }),
  // The middle of a node or of a lane's title on the canvas, in pixels of the page.
  place: (key) => {
    const box = page.scene.boxOf(key);
    const shown = box.rail ? page.painter.railBox(key, box.y + 11, page.painter.railLeft()) : box;
    return page.onScreen(shown.x + shown.w / 2, shown.y + shown.h / 2);
  },
  header: (lane) => {
    const { x } = page.scene.lanes[lane];
    return page.onScreen(x + 40, page.painter.headerTop(page.scene.lanes[lane]) + 16);
  },
  // What is drawn, as [left, top, right, bottom] in pixels of the page: lanes, boxes, names of rails.
  boxes: () => {
    const onPage = ({ x, y, w, h }) => [...page.onScreen(x, y), ...page.onScreen(x + w, y + h)];
    const { lanes, rails } = page.scene;
    const items = lanes.flatMap(({ content, dx, dy }) => content.items.map(({ x, y, w, h }) => ({ x: x + dx, y: y + dy, w, h })));
    const names = rails.map(({ key, y }) => page.painter.railBox(key, y, page.painter.railLeft()));
    return { lanes: lanes.map(onPage), items: items.map(onPage), rails: names.map(onPage) };
  },
  hidden: (key) => Boolean(page.scene.boxOf(key).hidden),
  frames: () => page.frames.slice(),
});
