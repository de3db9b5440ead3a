// A telephone has no room for wide tables: site.css lets those of short cells scroll and shows the others, of three
// columns and more, as lists, for which each cell has to know its column. Pictures open by themselves, to be enlarged.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".md-typeset table:not([class])")) {
    const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim());
    const rows = [...table.querySelectorAll("tbody tr")].map((row) => [...row.cells]);
    if (heads.length < 3) continue;
    const short = rows.every((cells) => cells.slice(1).every((cell) => cell.textContent.trim().length <= 16));
    table.setAttribute(short ? "data-scroll" : "data-rows", "");
    for (const cells of rows) cells.forEach((cell, i) => cell.setAttribute("data-head", heads[i]));
  }
  for (const image of document.querySelectorAll(".md-content p > img")) {
    const link = document.createElement("a");
    link.href = image.src;
    image.replaceWith(link);
    link.append(image);
  }
});
