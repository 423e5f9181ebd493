// The strip below: one small button for each lane, to see the whole loop at once and to go there.

class Strip {
  constructor(model, selection, go) {
    Object.assign(this, { model, selection });
    this.cutLanes = new Set(model.cuts.map((key) => model.home[key]));
    this.buttons = model.members.map((keys, lane) => {
      const name = model.titles[lane];
      const title = this.cutLanes.has(lane) ? `${name}: a path is cut here` : name;
      const text = name.replace(/^Step |^Outer /, "");
      const button = element("button", { type: "button", title, onclick: () => go(lane) });
      button.append(element("span", { textContent: text }));
      button.setAttribute("aria-label", title);
      return button;
    });
    byId("strip").append(...this.buttons);
    byId("strip").hidden = model.laneCount === 1;
  }

  show(scene, view) {
    const lit = this.selection.lanes();
    scene.lanes.forEach((lane, k) => {
      const state = this.buttons[k].classList;
      state.toggle("lit", lit.has(k));
      state.toggle("blocked", lit.has(k) && this.selection.blocked);
      state.toggle("has-cut", this.cutLanes.has(k));
      state.toggle("open", lane.expanded);
      state.toggle("seen", lane.x < view.right && lane.x + lane.w > view.left);
    });
  }
}
