"""``dubito calibrate``: a new bundle of the same weights, calibrated on the calibration split."""

from jobs.session import ray_session, run_job
from pipeline.runtime.progress import JobOutput


def run(bundle: str, data: str, out: str, kind: str, risk: float | None, delta: float, sets: list[str]) -> int:
    """Run the job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline.config import merge, parse_sets
        from pipeline.models import bundle as bundles
        from pipeline.storage import absolute
        from pipeline.uncertainty.calibration.settings import CalibrateSettings

        settings = CalibrateSettings.parse({"kind": kind, "risk": risk, "delta": delta}, "options")
        source = bundles.open_bundle(bundle)
        changed = bundles.with_changes(source, predict=merge(source.manifest["predict"], parse_sets(sets)))
        with ray_session():
            from pipeline.scoring import calibrate

            calibrated = calibrate.calibrate(changed, absolute(data), settings, sink=terminal)
        stored = bundles.write_bundle(out, calibrated.manifest, bundles.member_uris(source))
        terminal.close()
        terminal.say(f"bundle {stored.uri} (id {stored.id}): {calibrate.describe_calibration(stored)}")

    return run_job("calibrate", story)
