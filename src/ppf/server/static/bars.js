// Bars of what stays: one column a layer, one group a kind of unit. Made once, then only heights and numbers change.

const NAMES = { attn: "Attention heads (KV groups)", ffn: "FFN channels", expert: "Channels of the experts" };
const roleOf = (site) => site.kind.replace(/\d+$/, ""); // the experts of a layer share a column
const MOST_LETTERED = 24;

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export class Bars {
  constructor(place, table, kept) {
    this.table = table;
    place.replaceChildren();
    this.kinds = [...new Set(kept.map(roleOf))].map((kind) => this.group(place, kind, kept));
  }

  group(place, kind, kept) {
    const layers = new Map();
    kept.forEach((site, index) => {
      if (roleOf(site) === kind) layers.set(site.layer, [...(layers.get(site.layer) || []), index]);
    });
    const places = [...layers];
    const box = element("div", `kind ${kind}`);
    const head = element("div", "kind-head");
    const total = element("span");
    head.append(element("span", "", NAMES[kind] || kind), total);
    const columns = element("div", places.length > MOST_LETTERED ? "columns many" : "columns");
    columns.setAttribute("role", "img");
    const parts = places.map(([layer, indices]) => {
      const [column, count, well, fill] = [element("div", "column"), element("span"), element("div", "well"), element("div", "fill")];
      well.append(fill);
      column.append(count, well, element("span", "", String(layer)));
      columns.append(column);
      return { layer, indices, column, count, fill };
    });
    box.append(head, columns);
    place.append(box);
    return { name: NAMES[kind] || kind, kind, total, columns, parts };
  }

  draw(kept) {
    for (const { name, total, columns, parts } of this.kinds) {
      let [stay, all] = [0, 0];
      for (const { layer, indices, column, count, fill } of parts) {
        const [left, of] = ["kept", "of"].map((name) => indices.reduce((sum, index) => sum + kept[index][name], 0));
        stay += left;
        all += of;
        fill.style.height = `${(100 * left) / of}%`;
        count.textContent = String(left);
        column.title = `layer ${layer}: ${left} of ${of}`;
      }
      total.textContent = `${stay.toLocaleString("en")} of ${all.toLocaleString("en")} stay`;
      columns.setAttribute("aria-label", `${name}: ${total.textContent}`);
    }
    this.drawTable(kept);
  }

  /** The same for who cannot see bars; only while it is open. */
  drawTable(kept) {
    if (!this.table.closest("details").open) return;
    const kinds = this.kinds.map(({ kind }) => kind);
    const layers = new Map();
    for (const site of kept) {
      if (!layers.has(site.layer)) layers.set(site.layer, {});
      const cells = layers.get(site.layer);
      const cell = (cells[roleOf(site)] ||= { kept: 0, of: 0 });
      cell.kept += site.kept;
      cell.of += site.of;
    }
    const head = element("tr");
    for (const name of ["layer", ...this.kinds.map((one) => one.name)]) head.append(element("th", "", name));
    const rows = [...layers].map(([layer, cells]) => {
      const row = element("tr");
      for (const text of [String(layer), ...kinds.map((kind) => (cells[kind] ? `${cells[kind].kept} of ${cells[kind].of}` : ""))]) row.append(element("td", "", text));
      return row;
    });
    this.table.replaceChildren(head, ...rows);
  }
}
