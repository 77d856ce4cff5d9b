// Browsing the samples: filter, search, sort and turn pages. Without it the page shows the first rows, as they came.
(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  // Rows as `report_samples.Group` has them; only those of one page are ever in the document.
  const rows = JSON.parse(byId("samples").textContent).map(
    ([step, split, prompt, answer, mean, kept, count, responses]) =>
      ({ step, split, prompt, answer, mean, kept, count, responses }));
  const list = byId("groups"), controls = byId("controls"), pager = byId("pager");
  const pageSize = Number(list.dataset.size);
  const reward = (row) => row.mean ?? -Infinity;
  const orders = {
    newest: (a, b) => b.step - a.step,
    oldest: (a, b) => a.step - b.step,
    highest: (a, b) => reward(b) - reward(a) || 0,
    lowest: (a, b) => reward(a) - reward(b) || 0,
    kept: (a, b) => b.kept - a.kept,
  };
  let found = rows, page = 0;

  const haystack = (row) =>
    row.haystack ??= [row.prompt, row.answer, ...row.responses.map(([, , text]) => text)].join("\n").toLowerCase();

  const filter = () => {
    const [words, split, step, kept] = ["search", "split", "step", "kept"].map((id) => byId(id).value);
    const wanted = words.trim().toLowerCase();
    found = rows.filter((row) =>
      (!split || row.split === split) && (!step || row.step === Number(step)) &&
      (!kept || (row.kept > 0) === (kept === "some")) && (!wanted || haystack(row).includes(wanted)));
    found.sort(orders[byId("sort").value]);
    page = 0;
    show();
  };

  const fill = (id, texts) => {
    const node = byId(id).content.firstElementChild.cloneNode(true);
    for (const [slot, text] of Object.entries(texts)) node.querySelector(`[data-slot=${slot}]`).textContent = text;
    return node;
  };

  const makeResponse = ([kind, head, text]) => {
    const node = fill("response-template", { head, text });
    if (kind) node.classList.add(kind);
    return node;
  };

  const makeGroup = (row) => {
    const mean = row.mean === null ? "-" : String(Number(row.mean.toPrecision(3)));
    const node = fill("group-template", {
      split: row.split, step: row.step, prompt: row.prompt, mean, count: `${row.kept} of ${row.count}`,
      answer: row.answer && `Expected: ${row.answer}`,
    });
    node.addEventListener("toggle", () => {
      const place = node.querySelector("[data-slot=responses]");
      if (node.open && !place.childElementCount) place.replaceChildren(...row.responses.map(makeResponse));
    });
    return node;
  };

  const show = () => {
    const first = page * pageSize, shown = found.slice(first, first + pageSize);
    list.replaceChildren(...shown.map(makeGroup));
    byId("found").textContent = shown.length ?
      `${first + 1} to ${first + shown.length} of ${found.length}` : "No prompt matches.";
    byId("back").disabled = page === 0;
    byId("forth").disabled = first + pageSize >= found.length;
  };

  const turn = (by) => {
    page += by;
    show();
    controls.scrollIntoView();
  };

  let waiting;
  byId("search").addEventListener("input", () => { // not at every key: a search goes through all texts
    clearTimeout(waiting);
    waiting = setTimeout(filter, 150);
  });
  for (const id of ["split", "step", "kept", "sort"]) byId(id).addEventListener("change", filter);
  byId("back").addEventListener("click", () => turn(-1));
  byId("forth").addEventListener("click", () => turn(1));
  controls.hidden = pager.hidden = false;
  filter();
})();
