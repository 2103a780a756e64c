"""What makes an expert matter, as shares that sum to 1 within a layer."""

from __future__ import annotations

from typing import Literal

import numpy as np

from finetune.errors import Problem, RoutingError, shorten
from finetune.routing.profile import RoutingProfile, Sums, load_share

Score = Literal["tokens", "gate", "mass", "gradient", "contrast", "random"]
_ARRAY = {"gate": "gate_mass_LE", "mass": "output_mass_LE", "gradient": "gradient_LE"}
_KEY = {"gate": "gate_mass", "mass": "output_mass", "gradient": "gradient"}


def shares(
    profile: RoutingProfile, score: Score = "tokens", *, against: RoutingProfile | None = None, seed: int = 0
) -> Sums:
    """The share (L, E) of each expert in its layer's score; every row sums to 1.

    tokens: of the tokens sent to it. gate, mass, gradient: of the profile's sums of these.
    contrast: of the tokens, each counted by how much likelier it is here to come from this data than from `against`:
        u * u / (u + g) for shares u and g. An expert that both use alike counts half.
    random: of numbers drawn from `seed`.

    Raises RoutingError when the profile does not hold what the score needs, or `against` is of another model.
    """
    if score == "tokens":
        return load_share(profile.token_counts_LE)
    if score == "random":
        layers = [np.random.default_rng([seed, index]).random(profile.num_experts) for index in profile.layer_indices]
        return _normalized(np.stack(layers), profile, score)
    if score == "contrast":
        return _contrast(profile, against)
    array: Sums | None = getattr(profile, _ARRAY[score])
    if array is None:
        hint = "measure it with `finetune profile`, or score by tokens"
        if score == "gradient":
            section = "'experts={score: gradient, select: {top_fraction: 0.25}}'"
            hint = f"measure it with `finetune profile RECIPE {section}`, or score by tokens"
        raise RoutingError(Problem("routing profile", f"has no {_KEY[score]}, which score {score} needs", hint))
    return _normalized(array, profile, score)


def _contrast(profile: RoutingProfile, against: RoutingProfile | None) -> Sums:
    if against is None:
        hint = "name the routing profile of general data: --against general.json, or experts.against in a recipe"
        raise RoutingError(Problem("score contrast", "needs a profile to contrast with", hint))
    mine, other = _of_model(profile), _of_model(against)
    known = [name for name in mine if mine[name] is not None and other[name] is not None]
    strange = [
        f"{name} {shorten(other[name])} instead of {shorten(mine[name])}" for name in known if other[name] != mine[name]
    ]
    if strange:
        hint = "make both profiles with the same model"
        raise RoutingError(Problem("against", f"is a profile of another model: {', '.join(strange)}", hint))
    used, general = load_share(profile.token_counts_LE), load_share(against.token_counts_LE)
    both = used + general
    return _normalized(used * np.divide(used, both, where=both > 0, out=np.zeros_like(used)), profile, "contrast")


def _of_model(profile: RoutingProfile) -> dict[str, object]:
    """What identifies the model; None where it is not known."""
    return {
        "layers": list(profile.layer_indices),
        "experts": profile.num_experts,
        "experts per token": profile.experts_per_token,
        "fingerprint": profile.source.get("model_fingerprint"),
    }


def _normalized(score_LE: Sums, profile: RoutingProfile, score: str) -> Sums:
    total = score_LE.sum(axis=1, keepdims=True)
    empty = [profile.layer_indices[row] for row in np.flatnonzero(total[:, 0] <= 0)]
    if empty:
        hint = "measure more rows, or score by tokens"
        raise RoutingError(Problem("routing profile", f"gives every expert the {score} 0 in some layers", hint, empty))
    return score_LE / total
