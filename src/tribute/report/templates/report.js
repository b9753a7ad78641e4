"use strict";
(() => {
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const status = document.getElementById("sorted");

  const valueOf = (row, column, isNumber) => {
    const cell = row.cells[column];
    if (!isNumber) return cell.textContent.trim();
    return cell.dataset.value === undefined || cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
  };

  const compare = (a, b, isNumber, sign) => {
    if (!isNumber) return sign * collator.compare(a, b);
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return a === b ? 0 : sign * (a < b ? -1 : 1);
  };

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (!head.dataset.sort) return;
      const isNumber = head.dataset.sort === "number";
      const label = head.querySelector(".label");
      const button = document.createElement("button");
      button.type = "button";
      button.className = "label";
      button.append(...label.childNodes);
      label.replaceWith(button);
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const opposite = before === "ascending" ? "descending" : "ascending";
        const order = before ? opposite : head.dataset.first;
        const sign = order === "ascending" ? 1 : -1;
        const values = new Map(original.map((row) => [row, valueOf(row, column, isNumber)]));
        // Always from the order of the page, so that equal rows stay in it.
        const sorted = [...original].sort((a, b) => compare(values.get(a), values.get(b), isNumber, sign));
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", order);
        body.append(...sorted);
        status.textContent = `Sorted by ${button.textContent.trim()}, ${order}.`;
      });
    });
    table.classList.add("sortable");
  }
})();
