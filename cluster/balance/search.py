"""The search for a better placement, and the price that a better one must be worth. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.balance.draft import Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a change gains, in seconds of waiting per second, and the slots that it loads."""

    gain_s: float
    num_slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """See BalanceGoal, where these come from. chance: the part of a layer's mean that may be due to chance.
    slot_s: how long loading a slot takes."""

    min_gain: float
    chance: float
    horizon_s: float
    slot_s: float

    def cost_s(self, offer: Offer) -> float:
        return offer.num_slots * self.slot_s

    def is_worth(self, offer: Offer, mean_s: float) -> bool:
        """mean_s: of the layer that the offer is about."""
        least_gain_s = max(self.chance, self.min_gain * offer.num_slots) * mean_s
        return offer.gain_s >= least_gain_s and offer.gain_s * self.horizon_s > self.cost_s(offer)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """draft: the best placement found, or where the search began. turned_down: what would have gained most of all
    that was not worth its price."""

    draft: Draft
    num_changes: int
    turned_down: Offer | None


def search(draft: Draft, price: Price) -> Found:
    """Improves one layer after the other, always the one whose busiest shard is furthest above the mean."""
    num_changes = 0
    turned_down: Offer | None = None
    open_layers = set(draft.layers)
    while open_layers:
        layer = max(sorted(open_layers), key=lambda layer: draft.layers[layer].max_s - draft.layers[layer].mean_s)
        found = _better(draft, layer, price)
        if isinstance(found, Draft):
            draft, num_changes = found, num_changes + 1
            continue
        open_layers.discard(layer)
        if found is not None and (turned_down is None or found.gain_s > turned_down.gain_s):
            turned_down = found
    return Found(draft=draft, num_changes=num_changes, turned_down=turned_down)


def _better(draft: Draft, layer: int, price: Price) -> Draft | Offer | None:
    """Takes steps until they are worth their price together: several shards may be equally busy, and the layer is
    faster only once all of them are less so. Else the best offer on the way that was not worth it."""
    best: Offer | None = None
    trial, mean_s = draft, draft.layers[layer].mean_s
    for _ in range(_num_busiest(draft, layer, price)):
        improved = trial.improved(layer)
        if improved is None:
            break
        trial = improved
        offer = _offer(draft, trial)
        if price.is_worth(offer, mean_s):
            return trial
        if offer.gain_s > 0 and (best is None or offer.gain_s > best.gain_s):
            best = offer
    return best


def _num_busiest(draft: Draft, layer: int, price: Price) -> int:
    """Shards that all have to become less busy before a change to the layer can be worth anything."""
    now = draft.layers[layer]
    least_gain_s = max(price.chance, price.min_gain) * now.mean_s
    return int((now.busy_S > now.max_s - least_gain_s).sum())


def _offer(before: Draft, after: Draft) -> Offer:
    return Offer(gain_s=before.wait_s - after.wait_s, num_slots=after.num_added - before.num_added)
