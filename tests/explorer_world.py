"""An explorer's content with planted facts and hostile text, from a seed: no study is needed."""

from __future__ import annotations

from typing import Any

import numpy as np

from prunelens.report.explorer.content import (
    DENSE,
    Column,
    Condition,
    Contexts,
    Effects,
    Explorer,
    OwnLatents,
    Tokens,
    View,
)

NEEDLE_LATENT = 7  # alone fires on the needle, which is in the text once
NEEDLE = (" Nee", "dle")
LOST_LATENT = 11  # the lowest persistence under every condition
SILENT_LATENT = 13  # fires nowhere: no contexts, nothing can be said
MATCHED = (7, 5)  # under c0: the dense latent and the own latent that are mutual
HOSTILE_TOKEN = "<script>alert(1)</script>"
HOSTILE_TOKENS = (
    HOSTILE_TOKEN,
    '"><img src=x onerror=alert(2)>',
    "\u202egnp.exe",
    "\u2028",
    "\n",
    "\x07",
    "   ",
    "\ud83d\ude80".encode("utf-16", "surrogatepass").decode("utf-16"),
)
HOSTILE_STUDY = "</title><script>alert('study')</script>"
HOSTILE_MODEL = '"><svg onload=alert("model")>\u202e'
HOSTILE_CONDITION = "<img src=x onerror=alert('condition')>"
HOSTILE_COLUMN = '"onerror=alert(3) x="<b>measure</b>'
NEEDLE_WINDOW, NEEDLE_POSITION = 1, 20
FILLER = ("the", " quick", " brown", " fox", " jumps", " over", " a", " lazy", " dog", ".", "ing")

Array = np.ndarray[Any, Any]


def explorer_world(
    *,
    seed: int = 0,
    num_latents: int = 300,
    num_conditions: int = 3,
    windows: int = 12,
    context_tokens: int = 64,
    contexts_each: int = 4,
    either_side: int = 12,
    hostile: bool = True,
    own_dictionaries: bool = True,
    neuronpedia: str | None = "gpt2-small/6-res-jb",
) -> Explorer:
    """One view; half of each latent's contexts are samples; every second condition has its own
    dictionary, of as many latents, unless `own_dictionaries` is False.
    """
    random = np.random.default_rng(seed)
    tokens = _tokens(random, windows, context_tokens)
    names = _names(num_conditions, hostile)
    world = _World(random, num_latents, windows, context_tokens, contexts_each, either_side)
    conditions = tuple(
        _condition(world, i, name, tokens, has_own=own_dictionaries and i % 2 == 0)
        for i, name in enumerate(names)
    )
    model = HOSTILE_MODEL if hostile else "tiny-llama"
    view = View(
        id="v0",
        label=f"{model}, layer 3, seed 0",
        model=model,
        layer=3,
        dictionary="seed 0",
        num_latents=num_latents,
        tau=0.7,
        kept_means="persistence above 0.7.",
        columns=world.dense_columns(),
        conditions=conditions,
        contexts=world.contexts([DENSE, *(condition.id for condition in conditions)]),
        effects=world.effects(tokens),
        tokens=tokens,
        neuronpedia=neuronpedia,
    )
    return Explorer(study=HOSTILE_STUDY if hostile else "planted", views=(view,))


def _tokens(random: np.random.Generator, windows: int, context_tokens: int) -> Tokens:
    words = tuple(f" word{i}" for i in range(200))
    vocabulary = FILLER + words + NEEDLE + HOSTILE_TOKENS
    ids = random.integers(0, len(FILLER) + len(words), (windows, context_tokens)).astype(np.uint32)
    planted = [vocabulary.index(token) for token in (*NEEDLE, *HOSTILE_TOKENS)]
    ids[NEEDLE_WINDOW, NEEDLE_POSITION : NEEDLE_POSITION + len(planted)] = planted
    return Tokens(vocabulary, ids)


def _names(number: int, hostile: bool) -> list[str]:
    names = [f"wanda-row-0.{3 + i}0" for i in range(number)]
    if hostile and number > 1:
        names[1] = HOSTILE_CONDITION
    return names


class _World:
    """What is drawn for the dense dictionary; own dictionaries are drawn alike."""

    def __init__(
        self,
        random: np.random.Generator,
        num_latents: int,
        windows: int,
        context_tokens: int,
        contexts_each: int,
        either_side: int,
    ) -> None:
        self.random, self.num_latents = random, num_latents
        self.windows, self.context_tokens = windows, context_tokens
        self.contexts_each, self.either_side = contexts_each, either_side
        rates = 10 ** random.uniform(-5, -1, num_latents)
        rates[SILENT_LATENT] = 0
        self.rates = rates.astype(np.float32)

    def dense_columns(self) -> tuple[Column, ...]:
        means = self.random.gamma(2.0, 1.0, self.num_latents).astype(np.float32)
        return (
            Column("firing_rate", "firing rate", "Share of tokens on which it fires.", self.rates),
            Column("mean_activation", "mean activation", "Where it fires.", means),
        )

    def persistence(self, number: int) -> Array:
        """Correlations that fall with the condition's number; NaN where the latent hardly fires."""
        values = self.random.beta(4, 1 + number, self.num_latents).astype(np.float32)
        values[self.random.random(self.num_latents) < 0.05] = np.nan
        values[NEEDLE_LATENT] = 0.5
        values[LOST_LATENT] = -0.9
        values[SILENT_LATENT] = np.nan
        return values

    def contexts(self, conditions: list[str]) -> Contexts:
        """Latents fire on the middle token and on two before; only one covers the needle."""
        latent = np.repeat(np.arange(self.num_latents, dtype=np.int32), self.contexts_each)
        latent = latent[latent != SILENT_LATENT]
        number = np.tile(np.arange(self.contexts_each), self.num_latents - 1)
        window, position = self._places(latent, number)
        strength = 8.0 / (1 + number)
        activations = {}
        for i, name in enumerate(conditions):
            values = self._around(len(latent)) * strength[:, None].astype(np.float32)
            weaker = self.random.random(len(latent)) * (0.0 if name == DENSE else 0.25 * i)
            values *= (1 - weaker)[:, None].astype(np.float32)
            places = position[:, None] + np.arange(-self.either_side, self.either_side + 1)
            values[(places < 0) | (places >= self.context_tokens)] = np.nan
            activations[name] = values
        is_sample = number >= self.contexts_each // 2
        low = np.where(is_sample, np.floor(strength), np.nan).astype(np.float32)
        return Contexts(
            latent, is_sample, window, position, low, low + 1, self.either_side, activations
        )

    def _places(self, latent: Array, number: Array) -> tuple[Array, Array]:
        window = self.random.integers(0, self.windows, len(latent)).astype(np.int32)
        position = self.random.integers(0, self.context_tokens, len(latent)).astype(np.int32)
        window[window == NEEDLE_WINDOW] += 1  # none but the planted one comes near the needle
        planted = (latent == NEEDLE_LATENT) & (number == 0)
        window[planted], position[planted] = NEEDLE_WINDOW, NEEDLE_POSITION + 1
        return window, position

    def _around(self, rows: int) -> Array:
        values = np.zeros((rows, 2 * self.either_side + 1), dtype=np.float32)
        middle = self.either_side
        values[:, middle] = 1
        values[:, middle - 1] = self.random.uniform(0.2, 0.6, rows)
        values[:, middle - 3] = self.random.uniform(0.0, 0.3, rows)
        return values

    def effects(self, tokens: Tokens) -> Effects:
        shape = (self.num_latents, 6)
        choices = self.random.integers(0, len(tokens.vocabulary), (2, *shape)).astype(np.uint32)
        choices[0, NEEDLE_LATENT, 0] = tokens.vocabulary.index(HOSTILE_TOKEN)
        logits = np.sort(self.random.uniform(0.5, 5, shape), axis=1)[:, ::-1].astype(np.float32)
        return Effects(choices[0], logits, choices[1], -logits)


def _condition(
    world: _World, number: int, name: str, tokens: Tokens, *, has_own: bool
) -> Condition:
    random, num_latents = world.random, world.num_latents
    persistence = world.persistence(number)
    kept = np.where(np.isnan(persistence), np.nan, persistence > 0.7).astype(np.float32)
    cosine = random.uniform(0, 1, num_latents).astype(np.float32)
    label = HOSTILE_COLUMN if name == HOSTILE_CONDITION else "cosine"
    columns = (  # persistence is not the first: the page puts it there
        Column("cosine_shared_init", label, "Cosine with the nearest direction.", cosine),
        Column("persistence", "persistence", "Correlation; low is bad.", persistence),
        Column("jaccard", "Jaccard", "Overlap of the tokens it fires on.", cosine**2),
    )
    match = random.permutation(num_latents).astype(np.int32)
    back = np.full(num_latents, -1, dtype=np.int32)
    mutual = random.random(num_latents) < 0.4
    back[match[mutual]] = np.flatnonzero(mutual)
    if number == 0:
        dense, own = MATCHED
        match[dense] = own
        back[own] = dense
    return Condition(
        id=f"c{number}",
        label=name,
        run=f"model/L3/{name}",
        sparsity=0.3 + 0.1 * number,
        columns=columns,
        kept=kept,
        match=match if has_own else None,
        matched_back=back if has_own else None,
        own=_own(world, f"c{number}", tokens) if has_own else None,
    )


def _own(world: _World, condition: str, tokens: Tokens) -> OwnLatents:
    rates = np.where(world.random.random(world.num_latents) < 0.1, 0, world.rates)
    column = Column("firing_rate", "firing rate", "Share of tokens.", rates.astype(np.float32))
    return OwnLatents((column,), world.contexts([condition]), world.effects(tokens))
