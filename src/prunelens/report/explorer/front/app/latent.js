"use strict";
// The page of one latent: of the view's dictionary, or of a condition's own.
(() => {
  const P = window.prunelens;
  const { html } = P;
  const { Fragment } = window.preact;
  const { useEffect, useMemo, useRef } = window.preactHooks;

  P.Latent = ({ study, view, condition, state, go }) => {
    const { rows } = P.useSelection(view, condition, state);
    const order = useMemo(() => {
      if (!rows) return [];
      const { field, dir } = P.sorting(view, condition, state);
      return P.sorted(rows, field, dir).map(({ i }) => i);
    }, [rows, state.sort, state.dir]);
    const at = (latent) => ({ ...state, latent });
    const [previous, next] = neighbours(order, state.latent, view.numLatents);
    useKeys({ previous: previous !== null && at(previous), next: next !== null && at(next), list: at(null) }, go);
    P.lastLatent = state.latent;
    if (state.latent >= view.numLatents) return html`<${Missing} latent=${state.latent} numLatents=${view.numLatents} of="the view" />`;
    return html`<article class="latent">
      <${Head} title=${`Latent #${state.latent}`} back=${at(null)} previous=${previous !== null && at(previous)} next=${next !== null && at(next)} />
      <${Label} study=${study} view=${view} latent=${state.latent} />
      <${P.Strip} view=${view} latent=${state.latent} chosen=${state.c} link=${(c) => P.format({ ...state, c })} />
      <p class="soft">Kept: ${P.visible(view.keptMeans)}</p>
      <${Facts} columns=${view.columns} latent=${state.latent} />
      ${condition && html`<${Match} view=${view} condition=${condition} state=${state} />`}
      <${EveryNumber} view=${view} latent=${state.latent} />
      <${Evidence} study=${study} view=${view} folder=${view.id} latent=${state.latent} who="dense"
        lines=${lines(view, state)} toggle=${html`<${AllConditions} view=${view} state=${state} go=${go} />`} />
    </article>`;
  };

  P.OwnLatent = ({ study, view, state, go }) => {
    const condition = P.condition(view, state.own);
    const own = P.useLoaded(() => P.own(view, state.own), [view.id, state.own]);
    const numLatents = own.value ? own.value.numLatents : 0;
    const at = (latent) => ({ ...state, latent });
    const [previous, next] = neighbours([], state.latent, numLatents);
    const list = { ...state, own: "", latent: null };
    useKeys({ previous: previous !== null && at(previous), next: next !== null && at(next), list }, go);
    if (!own.value) return html`<${P.Waiting} of=${own} />`;
    const name = P.visible(condition.label);
    if (state.latent >= numLatents) return html`<${Missing} latent=${state.latent} numLatents=${numLatents} of=${name} />`;
    return html`<article class="latent own">
      <${Head} title=${`Latent #${state.latent} of ${name}`} back=${list} previous=${previous !== null && at(previous)} next=${next !== null && at(next)} />
      <p>Of the dictionary that was trained on this condition’s own activations. <${Back} view=${view} own=${own.value} state=${state} /></p>
      <${Facts} columns=${own.value.columns} latent=${state.latent} />
      <${Evidence} study=${study} view=${view} folder=${`${view.id}/${state.own}`} latent=${state.latent} who=${state.own}
        lines=${[{ key: state.own, name }]} />
    </article>`;
  };

  // --- around it ----------------------------------------------------------------------------------

  // Before and after it in the list as it is filtered and sorted; by index where it is not listed.
  const neighbours = (order, latent, numLatents) => {
    const place = order.indexOf(latent);
    if (place >= 0) return [place > 0 ? order[place - 1] : null, place + 1 < order.length ? order[place + 1] : null];
    return [latent > 0 && latent <= numLatents ? latent - 1 : null, latent + 1 < numLatents ? latent + 1 : null];
  };

  const useKeys = (places, go) => {
    const latest = useRef(places);
    latest.current = places;
    useEffect(() => {
      const names = { j: "next", ArrowRight: "next", k: "previous", ArrowLeft: "previous", Escape: "list", Backspace: "list" };
      const onKey = (event) => {
        const place = P.isTyping(event) ? null : latest.current[names[event.key]];
        if (place) { event.preventDefault(); go(place); }
      };
      addEventListener("keydown", onKey);
      return () => removeEventListener("keydown", onKey);
    }, []);
  };

  const Missing = ({ latent, numLatents, of }) => html`<p class="problem" role="alert">
    There is no latent #${latent} in the dictionary of ${of}; it has #0 to #${numLatents - 1}.</p>`;

  const Head = ({ title, back, previous, next }) => {
    const heading = useRef(null);
    useEffect(() => { heading.current.focus({ preventScroll: true }); scrollTo(0, 0); }, [title]);
    const step = (place, text, key) => (place
      ? html`<a class="button" href=${P.format(place)} title=${`Key ${key}`}>${text}</a>`
      : html`<span class="button off">${text}</span>`);
    return html`<header class="head">
      <a class="button" href=${P.format(back)} title="Key Escape">All latents</a>
      <h2 tabindex="-1" ref=${heading}>${title}</h2>
      <span class="steps">${step(previous, "← Previous", "k")}${step(next, "Next →", "j")}</span>
    </header>`;
  };

  // Neuronpedia's page, and its label where the server was asked to fetch labels.
  const Label = ({ study, view, latent }) => {
    const isThere = study.labels && view.neuronpedia;
    const label = P.useLoaded(() => (isThere ? P.load(`labels/${view.id}/${latent}`) : Promise.resolve(null)), [view.id, latent]);
    if (!view.neuronpedia) return null;
    const address = `https://www.neuronpedia.org/${view.neuronpedia.split("/").map(encodeURIComponent).join("/")}/${latent}`;
    const text = label.value && typeof label.value.text === "string" ? label.value.text : "";
    return html`<p>${text && html`<q class="explanation">${P.visible(text)}</q> `}
      <a href=${address} target="_blank" rel="noopener noreferrer">On Neuronpedia ↗</a></p>`;
  };

  // --- numbers ------------------------------------------------------------------------------------

  const Facts = ({ columns, latent }) => html`<dl class="facts">${columns.map((column) => html`<div title=${column.help}>
    <dt>${column.label}</dt><dd>${P.number(column.values[latent])}</dd></div>`)}</dl>`;

  const Match = ({ view, condition, state }) => {
    const own = P.useLoaded(() => (condition.hasOwn ? P.own(view, condition.id) : Promise.resolve(null)), [view.id, condition.id]);
    const match = condition.match ? condition.match[state.latent] : -1;
    if (!condition.hasOwn || match < 0) return null;
    const back = own.value && own.value.matchedBack;
    const isMutual = back && back[match] === state.latent;
    const kind = back ? `, ${isMutual ? "and each is the other’s nearest" : `not mutual at ${P.brief(view.tau)} or more`}` : "";
    return html`<p>Nearest in the dictionary trained under ${P.visible(condition.label)}: <a
      href=${P.format({ ...state, own: condition.id, latent: match })}>#${match}</a>${kind}.</p>`;
  };

  const Back = ({ view, own, state }) => {
    const back = own.matchedBack ? own.matchedBack[state.latent] : undefined;
    if (back === undefined) return null;
    if (back < 0) return html`<b>New</b>: no latent of the dense dictionary is its mutual nearest at ${P.brief(view.tau)} or more.`;
    return html`It and <a href=${P.format({ ...state, own: "", c: state.own, latent: back })}>#${back}</a> of the dense dictionary are each other’s nearest.`;
  };

  const EveryNumber = ({ view, latent }) => {
    const labels = new Map(view.conditions.flatMap(({ columns }) => columns.map(({ key, label, help }) => [key, { label, help }])));
    const value = ({ columns }, key) => {
      const column = columns.find((each) => each.key === key);
      return column ? P.number(column.values[latent]) : "";
    };
    if (!labels.size) return null;
    return html`<details><summary>All numbers under every condition</summary><div class="scroll" tabindex="0"><table>
      <thead><tr><th></th>${view.conditions.map(({ label }) => html`<th scope="col">${P.visible(label)}</th>`)}</tr></thead>
      <tbody>${[...labels].map(([key, { label, help }]) => html`<tr><th scope="row" title=${help}>${label}</th>
        ${view.conditions.map((condition) => html`<td>${value(condition, key)}</td>`)}</tr>`)}</tbody>
    </table></div></details>`;
  };

  // --- evidence -----------------------------------------------------------------------------------

  const lines = (view, state) => [
    { key: "dense", name: "dense" },
    ...view.conditions.filter(({ id }) => state.all || id === state.c).map(({ id, label }) => ({ key: id, name: P.visible(label) })),
  ];

  const AllConditions = ({ view, state, go }) => view.conditions.length > 1 && html`<label class="choice toggle">
    <input type="checkbox" checked=${Boolean(state.all)} onChange=${(event) => go({ ...state, all: event.target.checked ? "1" : "" }, { replace: true })} />
    <span>Under all conditions</span></label>`;

  const Evidence = ({ study, view, folder, latent, who, lines: shown, toggle }) => {
    const found = P.useLoaded(() => Promise.all([P.text(view), P.evidence(study, folder, latent)]), [folder, latent]);
    if (!found.value) return html`<${P.Waiting} of=${found} />`;
    const [text, { contexts, eitherSide, promoted, suppressed }] = found.value;
    const strongest = Math.max(0, ...contexts.flatMap(({ a }) => (a[who] || []).map(([, value]) => value || 0)));
    const same = { text, eitherSide, shown, strongest };
    const top = contexts.filter(({ s }) => !s);
    return html`
      <${Effects} vocabulary=${text.vocabulary} promoted=${promoted} suppressed=${suppressed} />
      <section><div class="row"><h3>Where it fires most</h3>${toggle}</div>
        ${contexts.length === 0 && html`<p class="soft">It does not fire on the eval text.</p>`}
        ${top.map((context) => html`<${Context} context=${context} ...${same} />`)}</section>
      ${[...intervals(contexts)].map(([name, some]) => html`<section><h3>Activation ${name}</h3>
        ${some.map((context) => html`<${Context} context=${context} ...${same} />`)}</section>`)}`;
  };

  // The sample, by the interval of activations that each context stands for; the highest first.
  const intervals = (contexts) => {
    const groups = new Map();
    const sampled = contexts.filter(({ s }) => s).sort((one, other) => other.s[0] - one.s[0]);
    for (const context of sampled) {
      const name = `${P.brief(context.s[0])} to ${P.brief(context.s[1])}`;
      groups.set(name, [...(groups.get(name) || []), context]);
    }
    return groups;
  };

  const Effects = ({ vocabulary, promoted, suppressed }) => {
    if (!promoted) return null;
    const list = (title, help, pairs) => html`<section><h3 title=${help}>${title}</h3><ol class="chips">
      ${pairs.map(([id, logit]) => html`<li><bdi class="token">${P.visible(vocabulary[id])}</bdi> <span class="soft">${signed(logit)}</span></li>`)}
    </ol></section>`;
    return html`<div class="columns">
      ${list("Promotes as next token", "Logit over the mean of all tokens’ logits.", promoted)}
      ${list("Suppresses", "Logit under the mean of all tokens’ logits.", suppressed)}</div>`;
  };

  const signed = (logit) => `${logit > 0 ? "+" : ""}${P.brief(logit)}`;

  const Context = ({ context, text, eitherSide, shown, strongest }) => {
    const tokens = tokensOf(context, text, eitherSide);
    return html`<div class="context" data-window=${context.w} data-position=${context.p}>${shown.map(({ key, name }) => html`<${Line} key=${key}
      name=${name} tokens=${tokens} pairs=${context.a[key]} unread=${context.n} strongest=${strongest} middle=${eitherSide} />`)}</div>`;
  };

  // [offset, text] of the context's tokens that lie in the window.
  const tokensOf = ({ w, p }, { vocabulary, contextTokens, ids }, eitherSide) => {
    const tokens = [];
    for (let offset = 0; offset <= 2 * eitherSide; offset += 1) {
      const position = p - eitherSide + offset;
      if (position >= 0 && position < contextTokens) tokens.push([offset, vocabulary[ids[w * contextTokens + position]]]);
    }
    return tokens;
  };

  const Line = ({ name, tokens, pairs, unread, strongest, middle }) => {
    if (!pairs) return html`<div class="line"><span class="who">${name}</span><span class="soft">not read</span><span></span></div>`;
    const activations = new Map([...unread.map((offset) => [offset, null]), ...pairs]);
    const peak = Math.max(0, ...pairs.map(([, value]) => value || 0));
    return html`<div class="line"><span class="who">${name}</span>
      <span class="tokens">${tokens.map(([offset, token]) => html`<${Token} text=${token}
        value=${activations.has(offset) ? activations.get(offset) : 0} strongest=${strongest} isMiddle=${offset === middle} />`)}</span>
      <span class=${`peak${peak ? "" : " soft"}`} title="strongest activation on these tokens">${peak ? P.brief(peak) : "silent"}</span></div>`;
  };

  const Token = ({ text, value, strongest, isMiddle }) => {
    const shown = P.visible(text);
    const style = isMiddle ? "token middle" : "token";
    if (value === null) return html`<bdi class=${`${style} unread`} title="not read">${shown}</bdi>`;
    if (!value) return html`<${Fragment}><bdi class=${style}>${shown}</bdi><//>`;
    const share = strongest > 0 ? Math.min(1, value / strongest) : 0;
    return html`<bdi class=${`${style} fires`} style=${{ "--share": share.toFixed(3) }} title=${P.brief(value)}>${shown}</bdi>`;
  };
})();
