// The search field: type, walk through the hits with the arrow keys, take one with Enter.

class Search {
  constructor(model, panel, go) {
    Object.assign(this, { model, panel, go, hits: [], active: 0 });
    this.field = byId("search");
    this.list = byId("hits");
    this.field.addEventListener("input", () => this.find());
    this.field.addEventListener("focus", () => this.find());
    this.field.addEventListener("keydown", (event) => this.key(event));
    this.field.addEventListener("blur", () => setTimeout(() => (this.list.hidden = true), 150));
  }

  find() {
    const { hits, total } = this.model.search(this.field.value);
    this.hits = hits;
    this.active = 0;
    this.list.hidden = !this.field.value.trim();
    this.field.setAttribute("aria-expanded", String(!this.list.hidden));
    const rows = hits.map((hit, k) => this.row(hit, k));
    if (!total) rows.push(element("li", { className: "none", textContent: "Nothing has this name." }));
    else if (total > hits.length) {
      const text = `${total - hits.length} more; type on to narrow it down`;
      rows.push(element("li", { className: "none", textContent: text }));
    }
    this.list.replaceChildren(...rows);
    this.mark();
  }

  row(hit, k) {
    const missing = hit.name !== undefined;
    const name = missing ? hit.name : this.model.name(hit.key);
    const aside = missing ? "not reached" : `${this.panel.kind(hit.key)}, ${this.panel.where(hit.key)}`;
    const row = element("li", { id: `hit-${k}`, onmousedown: () => this.take(k) });
    row.setAttribute("role", "option");
    row.append(element("span", { textContent: name }), element("small", { textContent: aside }));
    return row;
  }

  mark() {
    [...this.list.children].forEach((row, k) => {
      row.setAttribute("aria-selected", String(k === this.active));
      if (k === this.active) row.scrollIntoView({ block: "nearest" });
    });
    this.field.setAttribute("aria-activedescendant", this.hits.length ? `hit-${this.active}` : "");
  }

  key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && this.hits.length) {
      event.preventDefault();
      this.active = (this.active + step + this.hits.length) % this.hits.length;
      this.mark();
    } else if (event.key === "Enter" && this.hits.length) this.take(this.active);
    else if (event.key === "Escape") {
      event.stopPropagation();
      if (this.field.value) this.clear();
      else this.field.blur();
    }
  }

  clear() {
    this.field.value = "";
    this.find();
  }

  take(k) {
    const hit = this.hits[k];
    this.list.hidden = true;
    this.field.blur();
    this.go(hit.name !== undefined ? hit.name : hit.key);
  }
}
