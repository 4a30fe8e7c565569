"use strict";
// What is looked at, as the part of the address behind #: #/v0/latents?c=c1&q=needle
// All of it is there, so that an address can be shared and the back button works.
(() => {
  const P = window.prunelens;
  const TABS = ["latents", "scatter", "compare"];
  // Names in the address and what they are when they are left out ("": what the page chooses).
  const DEFAULTS = {
    c: "", q: "", sort: "", dir: "asc", kept: "", low: "", high: "", loss: "",
    all: "", y: "", a: "dense", b: "", show: "lost", by: "",
  };

  // -> {view, tab, own, latent, ...DEFAULTS}; own: the condition whose own dictionary is meant.
  P.parse = (hash, study) => {
    const [path, query] = split(hash.replace(/^#?\/?/, ""), "?");
    const parts = path.split("/").filter(Boolean);
    const given = new URLSearchParams(query);
    const state = { ...DEFAULTS, ...place(parts, study) };
    for (const name of Object.keys(DEFAULTS)) if (given.has(name)) state[name] = given.get(name);
    return settled(state, study);
  };

  P.format = (state) => {
    const query = new URLSearchParams();
    for (const [name, usual] of Object.entries(DEFAULTS)) {
      if (state[name] !== usual) query.set(name, state[name]);
    }
    const tab = state.latent === null ? state.tab : `${state.own ? `${state.own}/` : ""}latent/${state.latent}`;
    const written = query.toString();
    return `#/${state.view}/${tab}${written ? `?${written}` : ""}`;
  };

  // replace: no new entry for the back button, for what changes while one types.
  P.go = (state, { replace = false } = {}) => {
    const hash = P.format(state);
    if (hash === location.hash) return;
    if (replace) location.replace(hash); else location.hash = hash;
  };

  const split = (text, at) => {
    const where = text.indexOf(at);
    return where < 0 ? [text, ""] : [text.slice(0, where), text.slice(where + 1)];
  };

  const place = (parts, study) => {
    const [view, ...rest] = study.views.some(({ id }) => id === parts[0]) ? parts : [study.views[0].id, ...parts];
    const isOwn = rest[1] === "latent";
    const [word, index] = isOwn ? rest.slice(1) : rest;
    const latent = word === "latent" && /^\d+$/.test(index || "") ? Number(index) : null;
    return { view, tab: TABS.includes(word) ? word : "latents", own: isOwn ? rest[0] : "", latent };
  };

  // Conditions that there are; the page's choice where the address has none.
  const settled = (state, study) => {
    const { conditions } = study.views.find(({ id }) => id === state.view);
    const ids = conditions.map(({ id }) => id);
    const hasOwn = (own) => conditions.some((condition) => condition.id === own && condition.hasOwn);
    const first = ids[0] || "";
    const known = (id, usual) => (id === "dense" || ids.includes(id) ? id : usual);
    return {
      ...state,
      latent: state.own && !hasOwn(state.own) ? null : state.latent,
      c: [state.c, state.own, first].find((id) => ids.includes(id)) || "",
      a: known(state.a, "dense"),
      b: known(state.b, ids[ids.length - 1] || "dense"),
      dir: state.dir === "desc" ? "desc" : "asc",
    };
  };
})();
