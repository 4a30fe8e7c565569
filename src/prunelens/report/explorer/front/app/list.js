"use strict";
// The list of all latents: filters above, rows below.
(() => {
  const P = window.prunelens;
  const { html } = P;
  const { useMemo, useRef } = window.preactHooks;
  const FATE_CHOICES = [["", "kept or lost"], ["lost", "✗ lost"], ["kept", "✓ kept"], ["unsaid", "– cannot be said"]];
  const FILTERS = ["kept", "low", "high", "loss"];
  const newest = { key: "", rows: [] }; // the rows of the condition that was looked at last

  P.List = ({ view, condition, state, go }) => {
    const { rows, found } = P.useSelection(view, condition, state);
    const shown = useRef(null); // while a text is searched, the rows of the last one stay
    if (rows) shown.current = rows;
    const sort = P.sorting(view, condition, state);
    const columns = useMemo(() => listColumns(view, condition), [view, condition]);
    return html`<section class="fill" aria-labelledby="list-title">
      <h2 id="list-title" class="said">Latents</h2>
      <${Filters} view=${view} condition=${condition} state=${state} go=${go} />
      <${Count} view=${view} rows=${rows} found=${found} query=${state.q} />
      ${shown.current && html`<${P.Table} key=${`${view.id}/${state.c}`} label="Latents" columns=${columns} rows=${shown.current} sort=${sort}
        focusOn=${P.lastLatent} onSort=${(field, dir) => go(P.withSort(view, condition, state, field, dir), { replace: true })}
        linkTo=${(latent) => P.format({ ...state, latent, own: "" })}
        onOpen=${(latent) => go({ ...state, latent, own: "" })} />`}
    </section>`;
  };

  // The latents that the address lists: {rows, found}; rows is null while the text is searched.
  P.useSelection = (view, condition, state) => {
    const searched = P.useLoaded(() => P.search(view, state.q), [view.id, state.q]);
    const found = "value" in searched ? searched.value : undefined;
    const rows = useMemo(() => {
      if (found === undefined) return null;
      const passes = P.passes(view, condition, state);
      return allRows(view, condition).filter(({ i }) => passes(i) && (!found || found.has(i)));
    }, [view, condition, found, ...FILTERS.map((name) => state[name])]);
    return { rows, found: searched };
  };

  // The sorted column, as the table calls it; lowest persistence first where the address has none.
  P.sorting = (view, condition, state) => {
    const fields = sortable(view, condition);
    const usual = condition && condition.persistence ? fields.find(({ field }) => field === "c0") : fields[0];
    const column = fields.find(({ name }) => name === state.sort) || usual;
    return { field: column.field, dir: state.dir };
  };

  P.withSort = (view, condition, state, field, dir) => {
    const { name } = sortable(view, condition).find((column) => column.field === field);
    return { ...state, sort: name, dir };
  };

  const sortable = (view, condition) => [{ field: "i", name: "i" }, { field: "strip", name: "strip" }, ...P.fields(view, condition)];

  const allRows = (view, condition) => {
    const key = `${view.id}/${condition ? condition.id : ""}`;
    if (newest.key !== key) Object.assign(newest, { key, rows: P.rows(view, condition) });
    return newest.rows;
  };

  const listColumns = (view, condition) => {
    const names = view.conditions.map(({ label }) => P.visible(label)).join(", ");
    return [
      { field: "i", label: "latent", help: "Its index in the dictionary." },
      P.glimpses(view),
      { field: "strip", label: "kept", help: `Kept (✓), lost (✗) or not to be said (–) under: ${names}.`, cell: ({ i }) => P.marks(view, i) },
      ...P.fields(view, condition),
    ];
  };

  const Filters = ({ view, condition, state, go }) => {
    const change = (name) => (value) => go({ ...state, [name]: value }, { replace: true });
    const isFiltered = FILTERS.some((name) => state[name] !== "");
    const none = Object.fromEntries(FILTERS.map((name) => [name, ""]));
    const measure = condition && condition.persistence;
    return html`<form class="filters" onSubmit=${(event) => event.preventDefault()} aria-label="Filters">
      ${condition && html`<${P.Choice} label="Fate" value=${state.kept} options=${FATE_CHOICES} onChoose=${change("kept")} />`}
      ${view.rate && html`<${Bound} label="Firing rate from" value=${state.low} onChange=${change("low")} />
        <${Bound} label="to" value=${state.high} onChange=${change("high")} />`}
      ${measure && html`<${Bound} label="Loss at least" help=${`1 − ${measure.label}`} value=${state.loss} onChange=${change("loss")} />`}
      ${isFiltered && html`<button type="button" onClick=${() => go({ ...state, ...none }, { replace: true })}>Clear filters</button>`}
    </form>`;
  };

  const Bound = ({ label, help, value, onChange }) => html`<label class="choice" title=${help || null}><span>${label}</span>
    <input type="number" step="any" min="0" value=${value} onInput=${(event) => onChange(event.target.value)} /></label>`;

  const Count = ({ view, rows, found, query }) => {
    if (found.error) return html`<${P.Waiting} of=${found} />`;
    if (!rows) return html`<p class="count" role="status">Searching …</p>`;
    const some = `${rows.length.toLocaleString("en")} of ${P.count(view.numLatents, "latent")}`;
    return html`<p class="count" role="status">${some}${found.value && foundText(found.value, query)}</p>`;
  };

  const foundText = ({ occurrences, latents }, query) => (occurrences === null
    ? ` · ${P.visible(query.trim())}${latents ? "" : ": there is no such latent"}`
    : ` · “${P.visible(query)}” occurs ${P.count(occurrences, "time")} in the text; ${P.count(latents, "latent fires", "latents fire")} there`);
})();
