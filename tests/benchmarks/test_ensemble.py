"""The benchmark of ensembles with little data: what it counts, never how fast it is."""

import json

import pytest

from benchmarks.speed import ensemble

TINY = ["--small", "--count", "6", "--members", "2", "--size", "64x48", "--side", "64"]


@pytest.mark.long
def test_one_pass_reads_and_decodes_once(capsys: pytest.CaptureFixture[str], ray_local: None):
    figures, ratios = ensemble.main(TINY)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(record) == ["benchmark", "machine", "figures", "ratios"]
    assert record["benchmark"] == "ensemble"
    assert record["ratios"] == ratios
    assert set(figures) == {ensemble.ONE, ensemble.OURS, ensemble.RIVAL}
    (one,), (each,) = figures[ensemble.ONE], figures[ensemble.OURS]
    assert (one["decoded"], each["decoded"]) == (6, 12)
    assert each["bytes_read"] == 2 * one["bytes_read"] > 0
    assert one["decode_s"] > 0
    assert ratios[f"bytes_read: {ensemble.OURS} / {ensemble.ONE}"] == 2
    assert all(found["wall_s"] > 0 for runs in figures.values() for found in runs)
