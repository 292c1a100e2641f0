"""``dubito calibrate``: what a bundle's doubt is worth, from the calibration split; a new bundle, the same weights."""

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

            made = calibrate.calibrate(changed, absolute(data), settings, sink=terminal)
        written = bundles.write_bundle(out, made.manifest, bundles.member_uris(source))
        terminal.close()
        terminal.say(f"bundle {written.uri} (id {written.id}): {calibrate.describe_calibration(written)}")

    return run_job("calibrate", story)
