"use strict";
// The frame: head, tabs, search, keys; which page is shown. The address holds all that is chosen.
(() => {
  const P = window.prunelens;
  const { html } = P;
  const { useEffect, useRef, useState } = window.preactHooks;
  const TYPING_PAUSE = 200; // milliseconds before a search begins
  const PAGES = { latents: "List", scatter: "Scatter", compare: "Compare" };
  const TABS = [["latents", "Latents"], ["scatter", "Scatter"], ["compare", "Compare"]];
  const KEYS = [
    ["/", "search"], ["j  k  ↓  ↑", "next and previous row of a list"], ["Enter", "open the latent"],
    ["j  k  →  ←", "on a latent’s page: the next and the previous of the list"],
    ["Escape  Backspace", "back to the list"], ["?", "this help"],
  ];

  const App = ({ study }) => {
    const state = useAddress(study);
    const help = useRef(null);
    const search = useRef(null);
    useKeys(help, search);
    useEffect(() => { document.title = titleOf(study, state); }, [state]);
    return html`
      <a class="skip" href="#main" onClick=${skip}>To the content</a>
      <${Top} study=${study} state=${state} search=${search} onHelp=${() => help.current.showModal()} />
      <main id="main" tabindex="-1"><${Page} study=${study} state=${state} /></main>
      <${Help} study=${study} dialog=${help} />`;
  };

  const Page = ({ study, state }) => {
    const view = P.useLoaded(() => P.view(study, state.view), [state.view]);
    if (!view.value) return html`<${P.Waiting} of=${view} />`;
    const condition = P.condition(view.value, state.c);
    const page = state.latent === null ? P[PAGES[state.tab]] : state.own ? P.OwnLatent : P.Latent;
    return html`<${page} study=${study} view=${view.value} condition=${condition} state=${state} go=${P.go} />`;
  };

  const useAddress = (study) => {
    const [state, set] = useState(() => P.parse(location.hash, study));
    useEffect(() => {
      const onChange = () => set(P.parse(location.hash, study));
      addEventListener("hashchange", onChange);
      return () => removeEventListener("hashchange", onChange);
    }, []);
    return state;
  };

  const titleOf = ({ study }, state) => {
    const what = state.latent === null ? TABS.find(([tab]) => tab === state.tab)[1] : `Latent #${state.latent}`;
    return `${what} · ${P.visible(study)}`;
  };

  // The part behind # is ours, so the link may not go there.
  const skip = (event) => { event.preventDefault(); document.getElementById("main").focus(); };

  // --- head ---------------------------------------------------------------------------------------

  const Top = ({ study, state, search, onHelp }) => {
    const { conditions } = study.views.find(({ id }) => id === state.view);
    const isComparing = state.tab === "compare" && state.latent === null; // which has two choices of its own
    return html`<header class="top">
      <h1><bdi>${P.visible(study.study)}</bdi></h1>
      ${study.views.length > 1 && html`<${P.Choice} label="View" value=${state.view}
        options=${study.views.map(({ id, label }) => [id, P.visible(label)])} onChoose=${(view) => P.go(otherView(state, view))} />`}
      ${conditions.length > 0 && !isComparing && html`<${P.Choice} label="Condition" value=${state.c}
        options=${conditions.map(({ id, label }) => [id, P.visible(label)])} onChoose=${(c) => P.go({ ...state, c, own: "", latent: state.own ? null : state.latent })} />`}
      <nav class="tabs" aria-label="Pages">${TABS.map(([tab, name]) => html`<a href=${P.format({ ...state, tab, latent: null, own: "" })}
        aria-current=${state.latent === null && state.tab === tab ? "page" : null}>${name}</a>`)}</nav>
      <${Search} state=${state} field=${search} />
      <span class="tools">${study.links.map(({ text, address }) => html`<a href=${address} rel="noopener noreferrer">${P.visible(text)}</a>`)}
        <button type="button" onClick=${P.otherTheme} aria-label="Light or dark" title="Light or dark">◐</button>
        <button type="button" onClick=${onHelp} aria-label="Help" title="Help (?)">?</button></span>
    </header>`;
  };

  // Conditions and columns of another view are others.
  const otherView = (state, view) => ({ ...state, view, c: "", a: "dense", b: "", sort: "", y: "", by: "", own: "", latent: null });

  const Search = ({ state, field }) => {
    const [text, setText] = useState(state.q);
    const timer = useRef(0);
    useEffect(() => { if (document.activeElement !== field.current || state.q === "") setText(state.q); }, [state.q]);
    const list = (q) => ({ ...state, q, tab: "latents", latent: null, own: "" });
    const isList = state.tab === "latents" && state.latent === null;
    const later = (q) => {
      setText(q);
      clearTimeout(timer.current);
      timer.current = setTimeout(() => P.go(list(q), { replace: isList }), TYPING_PAUSE);
    };
    const onSubmit = (event) => {
      event.preventDefault();
      clearTimeout(timer.current);
      const index = P.indexIn(text);
      P.go(index === null ? list(text) : { ...state, latent: index, own: "" });
    };
    return html`<form class="search" role="search" onSubmit=${onSubmit}>
      <input type="search" ref=${field} value=${text} onInput=${(event) => later(event.target.value)}
        placeholder="Text or #latent" aria-label="Search text in contexts, or # and an index" title="Key /" /></form>`;
  };

  const Help = ({ study, dialog }) => html`<dialog ref=${dialog} aria-labelledby="help-title">
    <h2 id="help-title">How to read this</h2>
    <p>A <b>latent</b> is one entry of a dictionary (a sparse autoencoder) that was trained on the dense model. Each row says what became of it
      under a pruned <b>condition</b>: ✓ kept, ✗ lost, – cannot be said. Point at a column’s name to read what it means.</p>
    ${study.views.map((view) => html`<p><b>${P.visible(view.label)}</b>. Kept: ${P.visible(view.keptMeans)}</p>`)}
    <p>Search finds latents that fire on a text, in capitals or not. A copied address shows the same to others who have this folder.</p>
    <table><tbody>${KEYS.map(([keys, what]) => html`<tr><th scope="row">${keys.split("  ").map((key) => html`<kbd>${key}</kbd> `)}</th><td>${what}</td></tr>`)}</tbody></table>
    <form method="dialog"><button onClick=${(event) => { event.preventDefault(); dialog.current.close(); }}>Close</button></form>
  </dialog>`;

  // --- keys and colours ---------------------------------------------------------------------------

  P.isTyping = (event) => event.ctrlKey || event.metaKey || event.altKey
    || document.querySelector("dialog[open]") !== null || event.target.closest("input, select, textarea") !== null;

  const useKeys = (help, search) => useEffect(() => {
    const onKey = (event) => {
      if (event.key === "Escape" && event.target === search.current) search.current.blur();
      if (P.isTyping(event)) return;
      if (event.key === "/") { event.preventDefault(); search.current.focus(); search.current.select(); }
      if (event.key === "?") help.current.showModal();
      if (["j", "ArrowDown"].includes(event.key)) focusFirstRow(event);
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);

  const focusFirstRow = (event) => {
    const link = document.querySelector(".table a[data-latent]");
    if (link && !event.target.closest(".table")) { event.preventDefault(); link.focus(); }
  };

  const THEME = "prunelens-theme";
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const themeListeners = new Set();
  const themeChanged = () => themeListeners.forEach((act) => act());

  P.onTheme = (act) => { themeListeners.add(act); return () => themeListeners.delete(act); };

  P.otherTheme = () => {
    const now = document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light");
    setTheme(now === "dark" ? "light" : "dark");
    themeChanged();
  };

  const setTheme = (theme) => {
    document.documentElement.dataset.theme = theme;
    try { localStorage.setItem(THEME, theme); } catch { /* a browser may forbid storage: it lasts until reload */ }
  };

  const rememberedTheme = () => {
    try { return localStorage.getItem(THEME); } catch { return null; }
  };

  // --- begin --------------------------------------------------------------------------------------

  const place = document.getElementById("app");
  const show = (content) => { place.textContent = ""; window.preact.render(content, place); };
  if (["light", "dark"].includes(rememberedTheme())) document.documentElement.dataset.theme = rememberedTheme();
  prefersDark.addEventListener("change", themeChanged);
  P.load("study").then(
    (study) => show(study.views.length ? html`<${App} study=${study} />` : html`<p class="problem">This study has no evidence to show.</p>`),
    (error) => show(html`<${P.Waiting} of=${{ error }} />`),
  );
})();
