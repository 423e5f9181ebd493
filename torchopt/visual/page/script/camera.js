// Where we look: a place and a scale, moved by pointers, wheel and keys.

const LEAST = 0.005;
const MOST = 3;

class Camera {
  constructor(moved) {
    Object.assign(this, { x: 0, y: 0, scale: 1, moved, flight: null, byHand: false });
  }

  visible(width, height) {
    const { x, y, scale } = this;
    return { left: -x / scale, top: -y / scale, right: (width - x) / scale, bottom: (height - y) / scale };
  }

  toPicture(sx, sy) {
    return [(sx - this.x) / this.scale, (sy - this.y) / this.scale];
  }

  pan(dx, dy) {
    Object.assign(this, { flight: null, byHand: true });
    this.x += dx;
    this.y += dy;
    this.moved();
  }

  zoom(factor, sx, sy) {
    Object.assign(this, { flight: null, byHand: true });
    const scale = Math.min(MOST, Math.max(LEAST, this.scale * factor));
    this.x = sx - ((sx - this.x) * scale) / this.scale;
    this.y = sy - ((sy - this.y) * scale) / this.scale;
    this.scale = scale;
    this.moved();
  }

  // Go there, in a short flight unless the reader prefers none.
  goTo(target, atOnce = false) {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const near = ["x", "y", "scale"].every((name) => Math.abs(target[name] - this[name]) < 1e-3);
    if (atOnce || still || near) {
      Object.assign(this, target, { flight: null });
      this.moved();
      return;
    }
    const start = { x: this.x, y: this.y, scale: this.scale };
    const flight = (this.flight = { begin: performance.now() });
    const advance = (now) => {
      if (this.flight !== flight) return;
      const part = Math.min(1, Math.max(0, (now - flight.begin) / 220));
      const eased = 1 - (1 - part) ** 3;
      for (const name of ["x", "y", "scale"]) {
        this[name] = start[name] + (target[name] - start[name]) * eased;
      }
      if (part === 1) this.flight = null;
      else requestAnimationFrame(advance);
      this.moved();
    };
    requestAnimationFrame(advance);
  }

  // A box in the middle, or as near to it as can be without a margin beyond that of the picture.
  centre(box, bounds, room, atOnce) {
    const scale = Math.max(this.scale, 0.75);
    const { left, right, top, bottom } = margins(room);
    const place = (start, size, begin, extent, whole, before, after) => {
      const middle = whole / 2 - (start + size / 2) * scale;
      const [first, last] = [before - begin * scale, whole - after - (begin + extent) * scale];
      return last < first ? Math.max(last, Math.min(first, middle)) : middle;
    };
    const x = place(box.x, box.w, bounds.x, bounds.w, room.width, left, right);
    const y = place(box.y, box.h, bounds.y, bounds.h, room.height, top, bottom);
    this.goTo({ scale, x, y }, atOnce);
  }

  // Show the whole box; if that would make it too small, its beginning.
  fit(box, room, { least = LEAST, most = LARGEST, atOnce = false } = {}) {
    const scale = Math.max(least, Math.min(most, scaleFor(box.w, box.h, room)));
    const place = (start, size, whole, before, after) => {
      const free = whole - before - after - size * scale;
      return before + Math.max(0, free / 2) - start * scale;
    };
    const { left, right, top, bottom } = margins(room);
    const x = place(box.x, box.w, room.width, left, right);
    const y = place(box.y, box.h, room.height, top, bottom);
    this.goTo({ scale, x, y: Math.min(y, 60 - box.y * scale) }, atOnce);
  }
}

// Pointers on the canvas: one drags, two pinch, a press without a drag is a click.
class Pointers {
  constructor(canvas, camera, on) {
    Object.assign(this, { canvas, camera, on, held: new Map(), travelled: 0 });
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.up(event, name === "pointerup"));
    }
    canvas.addEventListener("pointerleave", () => on.hover(null));
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
  }

  place(event) {
    const { left, top } = this.canvas.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    if (!this.held.size) this.travelled = 0;
    this.held.set(event.pointerId, this.place(event));
  }

  move(event) {
    const now = this.place(event);
    const before = this.held.get(event.pointerId);
    if (!before) return this.on.hover(now);
    const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
    this.travelled += Math.hypot(dx, dy);
    this.held.set(event.pointerId, now);
    if (this.held.size === 2) return this.pinch(event.pointerId, before, now);
    if (this.travelled > 4) this.camera.pan(dx, dy);
  }

  pinch(moving, before, now) {
    const [other] = [...this.held].filter(([id]) => id !== moving).map(([, place]) => place);
    const distance = ([x, y]) => Math.hypot(x - other[0], y - other[1]) || 1;
    this.camera.zoom(distance(now) / distance(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    this.camera.pan((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
  }

  up(event, released) {
    const clicked = released && this.held.size === 1 && this.travelled <= 4;
    this.held.delete(event.pointerId);
    if (clicked) this.on.click(this.place(event));
  }

  wheel(event) {
    event.preventDefault();
    const unit = event.deltaMode === 1 ? 16 : 1;
    if (event.ctrlKey || event.metaKey) {
      this.camera.zoom(Math.exp(-event.deltaY * unit * 0.004), ...this.place(event));
    } else if (event.shiftKey && !event.deltaX) this.camera.pan(-event.deltaY * unit, 0);
    else this.camera.pan(-event.deltaX * unit, -event.deltaY * unit);
  }
}
