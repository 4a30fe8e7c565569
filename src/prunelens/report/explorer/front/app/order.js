"use strict";
// Which latents are listed and in which order.
(() => {
  const P = window.prunelens;
  const searchers = new Map(); // view -> promise of a search function
  const WORD_BITS = 32;

  // One row per latent: i, the number of conditions that keep it, then one field per column:
  // d0, d1, … of the dictionary, c0, c1, … of the condition.
  P.rows = (view, condition) => {
    const columns = P.fields(view, condition).map(({ field, values }) => [field, values]);
    const counts = P.keptCounts(view);
    return Array.from({ length: view.numLatents }, (_, i) => {
      const row = { i, strip: counts[i] };
      for (const [field, values] of columns) row[field] = values[i];
      return row;
    });
  };

  // How many conditions keep each latent.
  P.keptCounts = (view) => {
    const counts = new Uint8Array(view.numLatents);
    for (const { kept } of view.conditions) kept.forEach((fate, i) => { counts[i] += fate === 1; });
    return counts;
  };

  // Columns with the name that stands in addresses, in the order of the list.
  P.fields = (view, condition) => {
    const named = (columns, letter) => columns.map((column, i) => ({
      ...column, values: column.values, field: `${letter}${i}`, name: `${letter}.${column.key}`,
    }));
    const dense = named(view.columns, "d");
    const rate = dense.filter(({ key }) => key === "firing_rate");
    const conditioned = condition ? named(condition.columns, "c") : [];
    return [...rate, ...conditioned, ...dense.filter((column) => !rate.includes(column))];
  };

  // Undefined last, in both directions; equal ones by index.
  P.compare = (a, b, direction) => {
    const [noA, noB] = [Number.isNaN(a), Number.isNaN(b)];
    if (noA || noB) return (noA - noB) * (direction === "desc" ? -1 : 1);
    return a - b;
  };

  P.sorted = (rows, field, direction) => {
    const sign = direction === "desc" ? -1 : 1;
    return [...rows].sort((a, b) => sign * P.compare(a[field], b[field], direction) || a.i - b.i);
  };

  // The filters of the address, apart from the search.
  P.passes = (view, condition, state) => {
    const fate = { kept: 1, lost: 0, unsaid: -1 }[state.kept];
    const [low, high, loss] = [state.low, state.high, state.loss].map((text) => (text === "" ? NaN : Number(text)));
    const rates = view.rate && view.rate.values;
    const persistence = condition && condition.persistence && condition.persistence.values;
    return (i) => (fate === undefined || !condition || condition.kept[i] === fate)
      && (!rates || ((Number.isNaN(low) || rates[i] >= low) && (Number.isNaN(high) || rates[i] <= high)))
      && (!persistence || Number.isNaN(loss) || 1 - persistence[i] >= loss);
  };

  // The latent that "#123" means, or null.
  P.indexIn = (query) => (/^\s*#\d+\s*$/.test(query) ? Number(query.trim().slice(1)) : null);

  // -> {has(i), latents, occurrences} for a text; null for none.
  P.search = async (view, query) => {
    const index = P.indexIn(query);
    if (index !== null) return { has: (i) => i === index, latents: index < view.numLatents ? 1 : 0, occurrences: null };
    if (query.trim() === "") return null;
    if (!searchers.has(view.id)) searchers.set(view.id, searcher(view).catch((error) => { searchers.delete(view.id); throw error; }));
    return (await searchers.get(view.id))(query);
  };

  const searcher = async (view) => {
    const [text, where] = await Promise.all([P.text(view), P.places(view)]);
    const joined = joinedText(text);
    return (query) => latentsAt(view, text, where, tokensWith(joined, query));
  };

  // The whole text in small letters; starts[t]: where token t begins. No match crosses windows.
  const joinedText = ({ vocabulary, ids, contextTokens }) => {
    const small = vocabulary.map((token) => token.toLowerCase());
    const starts = new Uint32Array(ids.length + 1);
    const parts = new Array(ids.length);
    let length = 0;
    for (let t = 0; t < ids.length; t += 1) {
      const ends = (t + 1) % contextTokens === 0;
      parts[t] = ends ? `${small[ids[t]]}\0` : small[ids[t]];
      starts[t] = length;
      length += parts[t].length;
    }
    starts[ids.length] = length;
    return { all: parts.join(""), starts };
  };

  // How many times the text occurs, and the tokens that it lies on; before[t]: those before token t.
  const tokensWith = ({ all, starts }, query) => {
    const wanted = query.toLowerCase();
    const hit = new Uint8Array(starts.length - 1);
    let [occurrences, token] = [0, 0];
    for (let at = all.indexOf(wanted); at >= 0; at = all.indexOf(wanted, at + 1)) {
      occurrences += 1;
      token = lastStart(starts, at, token);
      for (let t = token; t < hit.length && starts[t] < at + wanted.length; t += 1) hit[t] = 1;
    }
    const before = new Uint32Array(starts.length);
    for (let t = 0; t < hit.length; t += 1) before[t + 1] = before[t] + hit[t];
    return { hit, before, occurrences };
  };

  // The last token that begins at or before a place; `from` is known to begin before it.
  const lastStart = (starts, place, from) => {
    let [low, high] = [from, starts.length - 2];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (starts[middle] <= place) low = middle; else high = middle - 1;
    }
    return low;
  };

  // Latents with a context in which they fire on a token of the text.
  const latentsAt = (view, { contextTokens }, where, { hit, before, occurrences }) => {
    const found = new Uint8Array(view.numLatents);
    let latents = 0;
    for (let i = 0; i < view.numLatents; i += 1) {
      for (let row = where.offsets[i]; row < where.offsets[i + 1] && !found[i]; row += 1) {
        if (firesOn(where, row, contextTokens, hit, before)) { found[i] = 1; latents += 1; }
      }
    }
    return { has: (i) => found[i] === 1, latents, occurrences };
  };

  const firesOn = ({ windows, positions, fires, words, eitherSide }, row, contextTokens, hit, before) => {
    const window = windows[row] * contextTokens;
    const begin = window + positions[row] - eitherSide;
    const first = Math.max(begin, window);
    const last = Math.min(begin + 2 * eitherSide + 1, window + contextTokens);
    if (before[last] === before[first]) return false;
    for (let t = first; t < last; t += 1) {
      const offset = t - begin;
      const word = fires[row * words + Math.floor(offset / WORD_BITS)];
      if (hit[t] && (word >>> (offset % WORD_BITS)) & 1) return true;
    }
    return false;
  };
})();
