"use strict";
// Two conditions beside each other: what the second lost, kept, regained, and has anew.
(() => {
  const P = window.prunelens;
  const { html } = P;
  const { useMemo } = window.preactHooks;

  P.Compare = ({ view, state, go }) => {
    const [a, b] = [state.a, state.b].map((id) => P.condition(view, id)); // null: dense
    const own = P.useLoaded(() => (b && b.hasOwn ? P.own(view, b.id) : Promise.resolve(null)), [view.id, state.b]);
    const groups = useMemo(() => groupsOf(view, a, b, own.value), [view, a, b, own.value]);
    const shown = groups.find(({ key }) => key === state.show) || groups[0];
    return html`<section class="fill" aria-labelledby="compare-title">
      <h2 id="compare-title" class="said">Compare two conditions</h2>
      <${Choices} view=${view} state=${state} go=${go} />
      <p class="soft">Kept: ${P.visible(view.keptMeans)} <${Unsaid} number=${unsaid(view, a, b)} /></p>
      <nav class="groups" aria-label="Groups">${groups.map((group) => html`<${Group} group=${group} state=${state} isShown=${group === shown} />`)}</nav>
      <p class="count">${shown.help}</p>
      ${shown.key === "new" && own.error ? html`<${P.Waiting} of=${own} />` : html`<${GroupTable} view=${view} a=${a} b=${b} own=${own.value} group=${shown} state=${state} go=${go} />`}
    </section>`;
  };

  const Choices = ({ view, state, go }) => {
    const options = [["dense", "dense"], ...view.conditions.map(({ id, label }) => [id, P.visible(label)])];
    const change = (name) => (id) => go({ ...state, [name]: id });
    return html`<form class="filters" onSubmit=${(event) => event.preventDefault()}>
      <${P.Choice} label="From" value=${state.a} options=${options} onChoose=${change("a")} />
      <${P.Choice} label="to" value=${state.b} options=${options} onChoose=${change("b")} />
      <button type="button" onClick=${() => go({ ...state, a: state.b, b: state.a })}>Swap</button></form>`;
  };

  const Unsaid = ({ number }) => (number ? `Of ${P.count(number, "latent")} it cannot be said under both; they are in no group.` : null);

  const Group = ({ group, state, isShown }) => html`<a class="group" href=${P.format({ ...state, show: group.key })} aria-current=${isShown ? "true" : null}>
    <span class="number">${group.rows ? group.rows.length.toLocaleString("en") : "–"}</span> ${group.label}</a>`;

  // --- groups -------------------------------------------------------------------------------------

  // The dense model keeps its own latents; nothing can be said of those of which no condition can say it.
  const fateIn = (condition) => (i) => (condition ? condition.kept[i] : 1);

  const groupsOf = (view, a, b, own) => {
    const [inA, inB] = [fateIn(a), fateIn(b)];
    const all = Array.from({ length: view.numLatents }, (_, i) => i);
    const those = (keptA, keptB) => all.filter((i) => inA(i) === keptA && inB(i) === keptB);
    const [nameA, nameB] = [a, b].map((each) => (each ? P.visible(each.label) : "dense"));
    return [
      { key: "lost", label: "lost", rows: those(1, 0), help: `Kept under ${nameA}, lost under ${nameB}.` },
      { key: "kept", label: "kept", rows: those(1, 1), help: `Kept under both.` },
      { key: "regained", label: "regained", rows: those(0, 1), help: `Lost under ${nameA}, kept under ${nameB}.` },
      { key: "new", label: "new", rows: newOnes(own), help: newHelp(b, own, nameB, view) },
    ];
  };

  const unsaid = (view, a, b) => {
    const [inA, inB] = [fateIn(a), fateIn(b)];
    let number = 0;
    for (let i = 0; i < view.numLatents; i += 1) number += inA(i) < 0 || inB(i) < 0;
    return number;
  };

  // Latents of the condition's own dictionary that fire and that no dense latent is the mutual nearest of.
  const newOnes = (own) => {
    if (!own || !own.matchedBack) return null;
    const fires = (i) => !own.rate || own.rate.values[i] > 0;
    return Array.from(own.matchedBack.keys()).filter((i) => own.matchedBack[i] < 0 && fires(i));
  };

  const newHelp = (b, own, name, view) => {
    if (!b) return "The dense model’s dictionary is the one that all are compared with.";
    if (!b.hasOwn) return `No dictionary was trained under ${name}.`;
    return `Latents of the dictionary trained under ${name} that fire and have no mutual nearest dense latent at ${P.brief(view.tau)} or more.`;
  };

  // --- their list ---------------------------------------------------------------------------------

  const GroupTable = ({ view, a, b, own, group, state, go }) => {
    const isNew = group.key === "new";
    const columns = useMemo(() => (isNew ? ownColumns(own) : bothColumns(view, a, b)), [view, a, b, own, isNew]);
    const rows = useMemo(() => (group.rows || []).map((i) => rowOf(i, columns)), [group, columns]);
    const sort = sorting(columns, state.by);
    const onSort = (field, dir) => go({ ...state, by: dir === "desc" ? `-${field}` : field }, { replace: true });
    const place = (latent) => ({ ...state, latent, own: isNew ? state.b : "", c: isNew || b ? state.b : state.c });
    return html`<${P.Table} key=${`${state.a}/${state.b}/${isNew}/${columns.length}`} label=${group.help} columns=${columns} rows=${rows}
      sort=${sort} onSort=${onSort} linkTo=${(latent) => P.format(place(latent))} onOpen=${(latent) => go(place(latent))} />`;
  };

  // "-b0" in the address: by that column, downwards. Else the most lost first; of new ones, the most frequent.
  const sorting = (columns, by) => {
    const field = by.replace("-", "");
    if (columns.some((column) => column.field === field && !column.isUnsorted)) return { field, dir: by.startsWith("-") ? "desc" : "asc" };
    const rate = columns.find(({ field: name, key }) => name.startsWith("o") && key === "firing_rate");
    if (rate) return { field: rate.field, dir: "desc" };
    return { field: columns.some((column) => column.field === "b0") ? "b0" : "i", dir: "asc" };
  };

  const index = { field: "i", label: "latent", help: "Its index in its dictionary." };

  const rowOf = (i, columns) => {
    const row = { i };
    for (const { field, values } of columns) if (values) row[field] = values[i];
    return row;
  };

  const ownColumns = (own) => [index, ...(own ? own.columns : []).map((column, i) => ({ ...column, values: column.values, field: `o${i}` }))];

  const bothColumns = (view, a, b) => {
    const measure = (condition, letter) => (condition && condition.persistence
      ? [{ ...condition.persistence, values: condition.persistence.values, field: `${letter}0`, label: `${condition.persistence.label} (${P.visible(condition.label)})` }]
      : []);
    const rate = view.rate ? [{ ...view.rate, values: view.rate.values, field: "rate" }] : [];
    const strip = { field: "strip", label: "kept", help: "Under every condition.", values: P.keptCounts(view), cell: ({ i }) => P.marks(view, i) };
    return [index, P.glimpses(view), strip, ...measure(a, "a"), ...(a === b ? [] : measure(b, "b")), ...rate];
  };
})();
