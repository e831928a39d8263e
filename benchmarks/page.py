"""The report's page: style and script inside, so that the file can be sent to anybody."""

TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fusedres benchmarks</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2129; background: #fff;
       max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
section { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e3e5ea;
         font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th { cursor: pointer; position: sticky; top: 0; background: #fff; }
tbody tr:hover { background: #f5f6f8; }
input { font: inherit; padding: .35rem .6rem; width: 22rem; max-width: 100%; }
</style>
<h1>fusedres benchmarks</h1>
<p><input id="filter" type="search" placeholder="show only rows with ..."></p>
{{body}}
<script>
"use strict";
// A click on a column's head sorts by it: numbers as numbers, a second click the other way.
for (const head of document.querySelectorAll("th")) {
  head.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const down = head.dataset.order === "up";
    for (const other of head.parentNode.children) delete other.dataset.order;
    head.dataset.order = down ? "down" : "up";
    const key = (row) => row.cells[column].textContent;
    const compare = (a, b) => {
      const x = parseFloat(key(a)), y = parseFloat(key(b));
      return isNaN(x) || isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
    };
    const rows = [...body.rows].sort(compare);
    body.append(...(down ? rows.reverse() : rows));
  });
}
document.getElementById("filter").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const row of document.querySelectorAll("tbody tr"))
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
});
</script>
</html>
"""
