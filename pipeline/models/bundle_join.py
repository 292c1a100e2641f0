"""One ensemble out of several bundles, of unlike models too."""

from collections.abc import Sequence
from typing import Any

from pipeline import models
from pipeline.errors import InputError
from pipeline.models.bundle import Bundle, member_uris

_SHARED = ("task", "classes", "background", "size", "fit")
"""What all bundles must agree in."""
_NORMALISATION = ("mean", "std")


def join_bundles(bundles: Sequence[Bundle]) -> tuple[dict[str, Any], list[str]]:
    """Manifest and members' weights of one ensemble of all members, for ``stage``: not calibrated.

    Members may be normalised by other means and deviations: ``normalise`` then has a ``{mean, std}`` for each. What
    lies outside the image in a frame has the mean colour of the first.

    Raises:
        InputError: Fewer than two, or they differ in task, classes, or the input's size or fit.
    """
    if len(bundles) < 2:
        raise InputError(f"wanted two bundles or more to join, found {len(bundles)}; give --bundle again")
    first = bundles[0]
    settings = [{**bundle.manifest, **bundle.manifest["input"]} for bundle in bundles]
    for bundle_settings, uri in zip(settings[1:], [bundle.uri for bundle in bundles[1:]], strict=True):
        for key in _SHARED:
            if bundle_settings[key] != settings[0][key]:
                raise InputError(
                    f"bundles differ in {key}: '{first.uri}' has {settings[0][key]}, '{uri}' {bundle_settings[key]}; "
                    f"join bundles that were trained for the same"
                )
    # Bundles of one model stay one model: only unlike members need a list.
    described = [models.describe(bundle.model_settings(k)) for bundle in bundles for k in range(bundle.members)]
    normalisations = [colour for bundle in bundles for colour in _normalisations(bundle)]
    manifest = {key: first.manifest[key] for key in ("task", "classes", "background", "input", "predict")}
    manifest["model"] = described[0] if all(model == described[0] for model in described) else described
    manifest["normalise"] = None if all(colour == normalisations[0] for colour in normalisations) else normalisations
    for key in ("seeds", "metrics"):
        lists = [bundle.manifest[key] for bundle in bundles]
        # One entry a member, or none at all: a bundle without them would shift the others' entries.
        complete = all(isinstance(values, list) for values in lists)
        manifest[key] = [value for values in lists for value in values] if complete else []
    same_data = all(bundle.manifest["data"] == first.manifest["data"] for bundle in bundles)
    manifest["data"] = first.manifest["data"] if same_data else {}
    return manifest, [uri for bundle in bundles for uri in member_uris(bundle)]


def _normalisations(bundle: Bundle) -> list[dict[str, Any]]:
    """``{mean, std}`` that the images of each member are normalised by."""
    colour = {key: bundle.manifest["input"][key] for key in _NORMALISATION}
    return bundle.manifest["normalise"] or [colour] * bundle.members
