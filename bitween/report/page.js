document.querySelectorAll("th").forEach(th => th.addEventListener("click", () => {
  const table = th.closest("table"), at = [...th.parentNode.children].indexOf(th), down = th.classList.contains("up");
  table.querySelectorAll("th").forEach(x => x.classList.remove("up", "down"));
  th.classList.add(down ? "down" : "up");
  const key = row => { const c = row.children[at], v = c.dataset.v; return v === undefined ? c.textContent : +v };
  const rows = [...table.tBodies[0].rows].sort((a, b) => { const x = key(a), y = key(b); return typeof x == "number" ? x - y : x.localeCompare(y, "en", {numeric: true}) });
  if (down) rows.reverse();
  rows.forEach(row => table.tBodies[0].append(row));
}));
