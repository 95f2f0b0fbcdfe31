"use strict";
(() => {
  const root = document.documentElement;
  const files = JSON.parse(document.getElementById("data").textContent).files;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("script");  // shows what needs it
  for (const button of all("button:disabled")) button.disabled = false;

  // ---- theme: the system's until the button is used, then remembered
  const THEME = "genmodels-leaderboard-theme";
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => { try { return localStorage.getItem(THEME); } catch { return null; } };
  const remember = (value) => { try { localStorage.setItem(THEME, value); } catch { /* private windows */ } };
  const dark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const told = () => button.setAttribute("aria-pressed", String(dark()));
  if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; remember(root.dataset.theme); told(); });
  system.addEventListener("change", told);
  told();

  // ---- downloads
  for (const element of all("[data-file]")) {
    element.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([files[element.dataset.file]], { type: "text/csv;charset=utf-8" }));
      link.download = element.dataset.file;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }

  // ---- boards
  class Board {
    constructor(section) {
      this.section = section;
      this.id = section.id;
      this.table = section.querySelector("table.main");
      this.heads = all("thead th", this.table);
      this.bodies = all("tbody", this.table).map((body) => [body, all("tr", body)]);
      this.rows = this.bodies.flatMap(([, rows]) => rows);
      this.search = section.querySelector(".search input");
      this.kinds = all("input[name=kind]", section);
      this.columns = all("input[name=column]", section);
      this.output = section.querySelector("output");
      this.search.addEventListener("input", () => { this.filter(); keep(); });
      for (const box of this.kinds) box.addEventListener("change", () => { this.filter(); keep(); });
      for (const box of this.columns) box.addEventListener("change", () => { this.hide(); keep(); });
      for (const head of this.heads) head.querySelector("button")?.addEventListener("click", () => this.turn(head));
      for (const row of this.rows) {
        row.addEventListener("mouseenter", () => this.light(row.dataset.row, true));
        row.addEventListener("mouseleave", () => this.light(row.dataset.row, false));
      }
    }

    turn(head) {
      const first = "down" in head.dataset ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      this.sort(head.dataset.key, head.getAttribute("aria-sort") === first ? other : first);
      keep();
    }

    // Rows without a value come last both ways; equal ones keep the order of the ranks; quoted rows stay below.
    sort(key, way) {
      const head = this.heads.find((h) => h.dataset.key === key);
      const number = head.dataset.sort === "number", sign = way === "ascending" ? 1 : -1;
      const of = (row) => row.querySelector(`[data-key="${CSS.escape(key)}"]`).dataset.value;
      const compare = (a, b) => number ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
      for (const [body, rows] of this.bodies) {
        const present = rows.filter((row) => of(row) !== undefined), absent = rows.filter((row) => of(row) === undefined);
        body.append(...present.sort((a, b) => sign * compare(of(a), of(b)) || a.dataset.row - b.dataset.row), ...absent);
      }
      for (const h of this.heads) h.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", way);
      this.table.dataset.by = key === "rank" && way === "ascending" ? "rank" : "other";
      this.by = [key, way];
    }

    filter() {
      const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const off = this.kinds.filter((box) => !box.checked).map((box) => box.value);
      for (const row of this.rows) {
        const kinds = row.dataset.kinds.split(" ");
        row.hidden = !words.every((word) => row.dataset.words.includes(word)) || kinds.every((kind) => off.includes(kind));
        for (const mark of this.marks(row.dataset.row)) mark.classList.toggle("gone", row.hidden);
      }
      const left = this.rows.filter((row) => !row.hidden).length, every = `${this.rows.length} row${this.rows.length === 1 ? "" : "s"}`;
      this.output.textContent = left === this.rows.length ? every : `${left} of ${every}`;
    }

    hide() {
      for (const box of this.columns) {
        for (const cell of all(`[data-key="${CSS.escape(box.value)}"]`, this.table)) cell.hidden = !box.checked;
      }
    }

    marks(row) { return all(`svg.plot [data-row="${row}"]`, this.section); }

    light(row, on) { for (const mark of this.marks(row)) mark.classList.toggle("lit", on); }

    // ---- what the address keeps
    save(into) {
      const off = (boxes) => boxes.filter((box) => !box.checked).map((box) => box.value).join(",");
      const [key, way] = this.by;
      const parts = { sort: key === "rank" && way === "ascending" ? "" : `${key}:${way}`, q: this.search.value, without: off(this.kinds), hide: off(this.columns) };
      for (const [name, value] of Object.entries(parts)) if (value) into.set(`${this.id}.${name}`, value);
    }

    load(from) {
      const get = (name) => from.get(`${this.id}.${name}`) ?? "";
      const off = (boxes, names) => { for (const box of boxes) box.checked = !names.includes(box.value); };
      const cut = get("sort").lastIndexOf(":"), key = get("sort").slice(0, Math.max(cut, 0)), way = get("sort").slice(cut + 1);
      const known = this.heads.some((head) => head.dataset.key === key && head.dataset.sort !== "none");
      this.search.value = get("q");
      off(this.kinds, get("without").split(","));
      off(this.columns, get("hide").split(","));
      this.sort(...(known && ["ascending", "descending"].includes(way) ? [key, way] : ["rank", "ascending"]));
      this.filter();
      this.hide();
    }
  }

  const boards = all("section.board").map((section) => new Board(section));
  const keep = () => {
    const state = new URLSearchParams();
    for (const board of boards) board.save(state);
    history.replaceState(null, "", `#${state}`);
  };
  const restore = () => {
    const text = location.hash.slice(1);
    if (text && !text.includes("=")) return;  // a link to a part of the page
    for (const board of boards) board.load(new URLSearchParams(text));
  };
  for (const board of boards) board.load(new URLSearchParams());
  restore();
  addEventListener("hashchange", restore);

  // ---- one dialog for provenance and for pictures; Escape closes it and gives the focus back
  const lens = document.getElementById("lens"), seen = document.getElementById("seen");
  const show = (title, content, image) => {
    const heading = document.createElement(image ? "p" : "h2");
    heading.textContent = title;
    seen.replaceChildren(...(image ? [content, heading] : [heading, content]));
    lens.classList.toggle("image", image);
    lens.setAttribute("aria-label", title);
    lens.showModal();
    lens.scrollTop = 0;
  };
  lens.addEventListener("click", (event) => { if (event.target === lens) lens.close(); });
  lens.addEventListener("close", () => seen.replaceChildren());
  for (const opener of all("[data-open]")) {
    opener.addEventListener("click", () => {
      const details = opener.closest("section").querySelector(`.provenance[data-row="${opener.dataset.open}"]`);
      show(`Provenance of ${details.querySelector("summary").textContent}`, details.querySelector(".body").cloneNode(true), false);
    });
  }
  for (const opener of all(".picture")) {
    opener.addEventListener("click", () => {
      const caption = opener.closest("figure").querySelector("figcaption").textContent;
      show(caption, opener.querySelector("img").cloneNode(), true);
    });
  }
})();
