"""One ensemble out of several bundles, of unlike models too."""

from collections.abc import Sequence
from typing import Any

from pipeline import models
from pipeline.errors import InputError
from pipeline.models.bundle import Bundle, member_uris

_SHARED = ("task", "classes", "background", "size", "fit")


_COLOUR = ("mean", "std")


def join_bundles(bundles: Sequence[Bundle]) -> tuple[dict[str, Any], list[str]]:
    """Manifest and members' weights of one ensemble of all members, for ``stage``: not calibrated.

    Members may be normalised by other means and deviations: ``normalise`` then has a ``{mean, std}`` for each. What
    lies outside the image in a frame has the mean colour of the first.

    Raises:
        InputError: Fewer than two, or they differ in task, classes, or the input's size or fit.
    """
    if len(bundles) < 2:
        raise InputError(f"wanted two bundles or more to join, found {len(bundles)}; give --bundle again")
    first, known = bundles[0], [{**bundle.manifest, **bundle.manifest["input"]} for bundle in bundles]
    for other, uri in zip(known[1:], [bundle.uri for bundle in bundles[1:]], strict=True):
        for key in _SHARED:
            if other[key] != known[0][key]:
                raise InputError(
                    f"bundles differ in {key}: '{first.uri}' has {known[0][key]}, '{uri}' {other[key]}; join bundles "
                    f"that were trained for the same"
                )
    each = [models.describe(bundle.model_settings(k)) for bundle in bundles for k in range(bundle.members)]
    colours = [colour for bundle in bundles for colour in _colours(bundle)]
    manifest = {key: first.manifest[key] for key in ("task", "classes", "background", "input", "predict")}
    manifest["model"] = each[0] if all(model == each[0] for model in each) else each
    manifest["normalise"] = None if all(colour == colours[0] for colour in colours) else colours
    for key in ("seeds", "metrics"):
        lists = [bundle.manifest[key] for bundle in bundles]
        manifest[key] = [item for items in lists for item in items] if all(isinstance(i, list) for i in lists) else []
    same = all(bundle.manifest["data"] == first.manifest["data"] for bundle in bundles)
    manifest["data"] = first.manifest["data"] if same else {}
    return manifest, [uri for bundle in bundles for uri in member_uris(bundle)]


def _colours(bundle: Bundle) -> list[dict[str, Any]]:
    """What each member's images are normalised by."""
    own = {key: bundle.manifest["input"][key] for key in _COLOUR}
    return bundle.manifest["normalise"] or [own] * bundle.members
