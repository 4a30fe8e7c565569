"use strict";
// A list of latents that holds only the rows in sight (Tabulator). Its formatters return nodes with
// text in them: Tabulator would take a string for HTML.
(() => {
  const P = window.prunelens;
  const { html } = P;
  const { useEffect, useRef } = window.preactHooks;

  // columns: [{field, label, help, cell?(row) -> Node, width?, isUnsorted?}]; rows: [{i, …}]; sort: {field, dir}.
  // The first column is the link to the latent; focusOn: the latent that one comes back from. Give it a new `key` when the columns change.
  P.Table = (props) => {
    const place = useRef(null);
    const table = useRef(null);
    const latest = useRef(props);
    latest.current = props;
    useEffect(() => {
      table.current = build(place.current, latest);
      return () => table.current.destroy();
    }, []);
    useEffect(() => whenBuilt(table.current, () => showRows(table.current, latest.current)), [props.rows]);
    useEffect(() => whenBuilt(table.current, () => showSort(table.current, latest.current, place.current)), [props.sort.field, props.sort.dir]);
    return html`<div class="table" onKeyDown=${(event) => onKey(event, table.current)}><div aria-label=${props.label} ref=${place}></div></div>`;
  };

  const build = (place, latest) => {
    const { columns, rows, sort } = latest.current;
    const table = new window.Tabulator(place, {
      data: rows,
      index: "i",
      height: "100%",
      layout: "fitDataFill",
      columns: columns.map((column, i) => definition(column, i === 0, latest)),
      columnDefaults: { headerSortTristate: false, resizable: false },
      nestedFieldSeparator: false,
      headerSortClickElement: "header",
      initialSort: [{ column: sort.field, dir: sort.dir }],
      placeholder: "No latent is like this.",
      placeholderHeaderFilter: "",
      debugInvalidOptions: false,
    });
    table.shown = rows;
    table.on("tableBuilt", () => {
      table.isBuilt = true;
      (table.todo || []).forEach((act) => act());
      const { focusOn } = latest.current; // after that, or the scrolling would be undone
      if (rows.some(({ i }) => i === focusOn)) focusRow(table, table.getRow(focusOn));
    });
    table.on("dataSorted", (sorters) => onSorted(sorters, latest.current));
    table.on("rowClick", (event, row) => { if (!event.target.closest("a")) latest.current.onOpen(row.getData().i); });
    table.on("renderComplete", () => { if (place.querySelector(".tabulator-row")) firstRows(); });
    return table;
  };

  // Tabulator builds itself later; what comes before waits.
  const whenBuilt = (table, act) => {
    if (table.isBuilt) act(); else table.todo = [...(table.todo || []), act];
  };

  const showRows = (table, { rows }) => {
    if (table.shown === rows) return;
    table.shown = rows;
    table.replaceData(rows);
  };

  // Another order is looked at from its top.
  const showSort = (table, { sort }, place) => {
    const [now] = table.getSorters();
    if (!now || now.field !== sort.field || now.dir !== sort.dir) table.setSort(sort.field, sort.dir);
    place.querySelector(".tabulator-tableholder").scrollTop = 0;
  };

  const onSorted = (sorters, { sort, onSort }) => {
    if (sorters.length && (sorters[0].field !== sort.field || sorters[0].dir !== sort.dir)) onSort(sorters[0].field, sorters[0].dir);
  };

  const firstRows = () => {
    if (!performance.getEntriesByName("prunelens-first-rows").length) performance.mark("prunelens-first-rows");
  };

  const definition = (column, isFirst, latest) => ({
    title: column.field,
    field: column.field,
    frozen: isFirst,
    headerHozAlign: column.cell ? "left" : "right",
    hozAlign: column.cell ? "left" : "right",
    minWidth: isFirst ? 84 : 76,
    widthGrow: column.width ? 0 : 1,
    width: column.width,
    headerSort: !column.isUnsorted,
    titleFormatter: () => heading(column),
    formatter: (cell) => contents(cell, column, isFirst, latest),
    sorter: (a, b, rowA, rowB, _, dir) => P.compare(a, b, dir)
      || (rowA.getData().i - rowB.getData().i) * (dir === "desc" ? -1 : 1),
    headerSortStartingDir: column.startsDown ? "desc" : "asc",
  });

  // A button, so that the keyboard reaches it; its click goes on to Tabulator.
  const heading = ({ label, help, isUnsorted }) => {
    const button = document.createElement(isUnsorted ? "span" : "button");
    if (!isUnsorted) button.type = "button";
    button.className = "heading";
    button.textContent = label;
    if (help) button.title = `${label}: ${help}`;
    return button;
  };

  const contents = (cell, column, isFirst, latest) => {
    const row = cell.getData();
    if (!isFirst) return column.cell ? column.cell(row) : document.createTextNode(P.number(cell.getValue()));
    const link = document.createElement("a");
    link.href = latest.current.linkTo(row.i);
    link.dataset.latent = row.i;
    link.textContent = `#${row.i}`;
    return link;
  };

  const onKey = (event, table) => {
    const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
    const link = document.activeElement.closest("a[data-latent]");
    if (!step || !link || event.ctrlKey || event.metaKey || event.altKey) return;
    const row = table.getRow(Number(link.dataset.latent));
    const next = row && (step > 0 ? row.getNextRow() : row.getPrevRow());
    event.preventDefault();
    event.stopPropagation();
    if (next) focusRow(table, next);
  };

  const focusRow = (table, row) => table.scrollToRow(row, "nearest", false).then(() => {
    const link = row.getElement().querySelector("a[data-latent]");
    if (link) link.focus({ preventScroll: true });
  });

  // The cells of the survival strip, as marks in their colours.
  P.marks = (view, latent) => {
    const strip = document.createElement("span");
    strip.className = "marks";
    strip.setAttribute("role", "img");
    const said = [];
    for (const condition of view.conditions) {
      const { mark, word, style } = P.FATES[condition.kept[latent]];
      const cell = document.createElement("span");
      cell.className = `fate ${style}`;
      cell.textContent = mark;
      strip.append(cell);
      said.push(`${P.visible(condition.label)}: ${word}`);
    }
    strip.setAttribute("aria-label", said.join(", "));
    strip.title = said.join("\n");
    return strip;
  };
})();
