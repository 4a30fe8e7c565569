"use strict";
// The numbers of a view and of its conditions, read when needed and unpacked when looked at.
(() => {
  const P = window.prunelens;
  const views = new Map(); // id -> promise
  const owns = new Map(); // view/condition -> promise
  const texts = new Map(); // view -> promise
  const allPlaces = new Map(); // view -> promise

  const once = (cache, name, make) => {
    if (!cache.has(name)) cache.set(name, make().catch((error) => { cache.delete(name); throw error; }));
    return cache.get(name);
  };

  // A property that is computed when first asked for.
  const later = (object, name, make) => Object.defineProperty(object, name, {
    configurable: true,
    get() {
      const value = make();
      Object.defineProperty(object, name, { value });
      return value;
    },
  });

  const column = ({ key, label, help, values }) =>
    later({ key, label: P.visible(label), help: P.visible(help) }, "values", () => floats(P.unpack(values)));

  // An index of -1 is one that there is not.
  const floats = (values) => (values instanceof Float32Array ? values : Float32Array.from(values, (v) => (v < 0 ? NaN : v)));

  // -> study.js's words with columns; conditions also have kept [1, 0, -1] and match, or null.
  P.view = (study, id) => once(views, id, async () => {
    const words = study.views.find((view) => view.id === id);
    const data = await P.load(`${id}/latents`);
    const conditions = words.conditions.map((condition, i) => withNumbers(condition, data.conditions[i]));
    const view = { ...words, columns: data.columns.map(column), conditions };
    view.rate = rateOf(view.columns);
    return view;
  });

  const withNumbers = (condition, data) => {
    const columns = data.columns.map(column);
    const persistence = columns.find(({ key }) => key === "persistence") || columns[0] || null;
    const ordered = columns.filter((each) => each !== persistence);
    if (persistence) ordered.unshift(persistence);
    const numbers = { ...condition, columns: ordered, persistence };
    later(numbers, "kept", () => P.unpack(data.kept));
    return later(numbers, "match", () => P.unpack(data.match));
  };

  const rateOf = (columns) => columns.find(({ key }) => key === "firing_rate") || null;

  // The dictionary trained on a condition's own activations: {numLatents, columns, matchedBack}.
  P.own = (view, id) => once(owns, `${view.id}/${id}`, async () => {
    const data = await P.load(`${view.id}/${id}/latents`);
    const columns = data.columns.map(column);
    return { numLatents: data.numLatents, columns, rate: rateOf(columns), matchedBack: P.unpack(data.matchedBack) };
  });

  // The eval text: {vocabulary, contextTokens, ids}.
  P.text = (view) => once(texts, view.id, async () => {
    const data = await P.load(`${view.id}/tokens`);
    return { ...data, ids: P.unpack(data.ids) };
  });

  // Where every context lies and on which of its tokens its latent fires.
  P.places = (view) => once(allPlaces, view.id, async () => {
    const data = await P.load(`${view.id}/places`);
    const [offsets, windows, positions, fires] = ["offsets", "windows", "positions", "fires"].map((name) => P.unpack(data[name]));
    return { ...data, offsets, windows, positions, fires };
  });

  // A latent's contexts and effects; folder is v0 or v0/c1.
  P.evidence = async (study, folder, latent) => {
    const number = Math.floor(latent / study.latentsPerShard);
    const shard = await P.load(`${folder}/contexts-${String(number).padStart(4, "0")}`);
    return { eitherSide: shard.eitherSide, ...shard.latents[latent - shard.first] };
  };

  P.condition = (view, id) => view.conditions.find((condition) => condition.id === id) || null;
})();
