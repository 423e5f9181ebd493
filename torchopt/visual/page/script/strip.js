// The strip below: the whole loop at once, to see where it is lit or cut and to go to a step. Where
// there are more steps than buttons have room, most buttons stand for a run of them; those around
// the step that was chosen last have one each.

const NARROW = 30; // a button of one step
const WIDE = 74; // a button of a run: "901\u2013950"

class Strip {
  constructor(model, selection, go) {
    Object.assign(this, { model, selection, go, focus: 0, width: 0, buttons: [], runs: [] });
    this.cutLanes = new Set(model.cuts.map((key) => model.home[key]));
    this.root = byId("strip");
    this.root.hidden = model.laneCount === 1;
  }

  // The lanes in runs [first, last], as many as there is room for.
  runsFor(width) {
    const count = this.model.laneCount;
    const single = (from, to) => Array.from({ length: to - from }, (_, k) => [from + k, from + k]);
    if (count * NARROW <= width) return single(0, count);
    const near = Math.max(1, Math.floor(width / 3 / NARROW));
    const begin = Math.min(Math.max(0, this.focus - (near >> 1)), count - 1 - near);
    const end = begin + near;
    const room = Math.max(2, Math.floor((width - (near + 1) * NARROW) / WIDE));
    const [before, after] = [begin, count - 1 - end]; // the loss has a button of its own
    const left = before && Math.max(1, Math.min(room - (after > 0), Math.round((room * before) / (before + after))));
    const runs = (from, to, most) => {
      const size = Math.ceil((to - from) / Math.max(1, most));
      const firsts = Array.from({ length: Math.ceil((to - from) / size) || 0 }, (_, k) => from + k * size);
      return firsts.map((first) => [first, Math.min(first + size, to) - 1]);
    };
    const last = [count - 1, count - 1];
    return [...runs(0, begin, left), ...single(begin, end), ...runs(end, count - 1, room - left), last];
  }

  build(width) {
    const held = this.root.contains(document.activeElement);
    this.width = width;
    this.runs = this.runsFor(width);
    this.buttons = this.runs.map((run) => this.button(run));
    this.root.replaceChildren(...this.buttons);
    if (held) this.buttons[this.runs.findIndex(([first, last]) => first <= this.focus && this.focus <= last)].focus();
  }

  button([first, last]) {
    const short = (lane) => this.model.titles[lane].replace(/^Step |^Outer /, "");
    const many = first < last;
    const name = many ? `Steps ${short(first)} to ${short(last)}` : this.model.titles[first];
    const cut = [...this.cutLanes].some((lane) => first <= lane && lane <= last);
    const title = cut ? `${name}: a path is cut here` : name;
    const button = element("button", { type: "button", title, onclick: () => this.choose(first) });
    button.append(element("span", { textContent: many ? `${short(first)}\u2013${short(last)}` : short(first) }));
    button.setAttribute("aria-label", title);
    button.classList.toggle("run", many);
    button.classList.toggle("has-cut", cut);
    return button;
  }

  // Give the steps around a lane buttons of their own, at the next drawing.
  near(lane) {
    this.focus = lane;
    this.width = 0;
  }

  choose(lane) {
    this.near(lane);
    this.go(lane);
  }

  show(scene, view) {
    const width = this.root.clientWidth - 28;
    if (width !== this.width && !this.root.hidden) this.build(width);
    const lit = this.selection.lanes();
    const seen = ({ x, y, w, h }) => x < view.right && x + w > view.left && y < view.bottom && y + h > view.top;
    this.buttons.forEach((button, k) => {
      const [first, last] = this.runs[k];
      const lanes = scene.lanes.slice(first, last + 1);
      const isLit = lanes.some(({ index }) => lit.has(index));
      const state = button.classList;
      state.toggle("lit", isLit);
      state.toggle("blocked", isLit && this.selection.blocked);
      state.toggle("open", lanes.some(({ expanded }) => expanded));
      state.toggle("seen", lanes.some(seen));
    });
  }
}
