"""``dubito join``: one ensemble of the members of several bundles."""

from jobs.session import ray_session, run_job
from pipeline.runtime.progress import JobOutput


def run(bundles: list[str], out: str, data: str, risk: float | None, delta: float, sets: list[str]) -> int:
    """Run the job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline.config import merge, parse_sets
        from pipeline.errors import InputError
        from pipeline.models import bundle, bundle_join
        from pipeline.storage import absolute
        from pipeline.uncertainty.calibration.settings import CalibrateSettings

        if risk is not None and not data:
            raise InputError("--risk wants a dataset with a calibration split: add --data URI")
        manifest, weights = bundle_join.join_bundles([bundle.open_bundle(uri) for uri in bundles])
        manifest["predict"] = merge(manifest["predict"], parse_sets(sets))
        joined = bundle.stage(out, manifest, weights)
        if data:
            with ray_session():
                from pipeline.scoring import calibrate

                settings = CalibrateSettings.parse({"risk": risk, "delta": delta}, "options")
                joined = calibrate.calibrate(joined, absolute(data), settings, sink=terminal)
                calibration = f": {calibrate.describe_calibration(joined)}"
        else:
            calibration = ""
        stored = bundle.commit(joined)
        terminal.close()
        terminal.say(f"bundle {stored.uri} (id {stored.id}, {stored.members} members){calibration}")

    return run_job("join", story)
