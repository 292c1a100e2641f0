"""The benchmark of many workers: what it counts, by hand; and that it runs."""

import json
import math
import subprocess
import sys
import threading
import time

import pytest
import torch

from benchmarks.scale import workers
from benchmarks.scale.cpu_time import Busy
from benchmarks.scale.workers import Batch


def test_a_batch_that_was_on_counts_by_its_share():
    batches = [Batch(0, 2, 8), Batch(2, 4, 8), Batch(5, 6, 8)]
    assert workers.done(batches, 0, 6) == 24
    assert workers.done(batches, 1, 3) == 4 + 4
    assert workers.done(batches, 4, 5) == 0


def test_the_steady_time_is_while_all_are_at_work():
    first, second = [Batch(0, 1, 8), Batch(1, 2, 8), Batch(2, 3, 8)], [Batch(0.5, 2, 8), Batch(2, 4, 8)]
    assert workers.steady([first, second]) == (0.5, 3)
    with pytest.raises(RuntimeError, match=r"2 workers were never all at work: give each more images \(--images\)"):
        workers.steady([first, [Batch(3.5, 4, 8)]])


def test_linear_is_as_many_times_the_rate_of_one():
    def run(*rates: float):
        return {"rates": list(rates), "busy": 1.0}

    found = workers.summarise({1: [run(10, 12), run(11)], 4: [run(40), run(42), run(22)]})
    assert [each["img/s"] for each in found.values()] == [11, 40]
    assert [each["linear"] for each in found.values()] == [1, 40 / 44]


def test_a_starved_worker_shows_as_less_than_linear():
    """Two workers of which one waits as long as it works: three quarters of what two should do."""
    at_work = [Batch(at, at + 1, 10) for at in range(8)]
    starved = [Batch(at, at + 1, 10) for at in range(0, 8, 2)]

    def job(number: int, _: object):
        return [at_work, starved][:number]

    runs = {number: [workers.run(job, number, workers.Path(), 0.1)] for number in (1, 2)}
    assert workers.summarise(runs)[2]["linear"] == pytest.approx(0.75, abs=0.1)
    assert runs[1][0]["busy"] == pytest.approx(1)
    assert runs[2][0]["busy"] == pytest.approx(0.75, abs=0.1)


def test_the_model_sleeps_for_one_batch_at_a_time(tmp_path):
    model = workers.SleepingModel(0.01, tmp_path / "notes")
    threads = [threading.Thread(target=model, args=(torch.zeros(10, 3, 4, 4),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, two = sorted(json.loads(line) for line in (tmp_path / "notes").read_text().splitlines())
    assert one[1] <= two[0]
    assert one[2] == two[2] == 10
    assert min(each[1] - each[0] for each in (one, two)) >= 0.1
    assert model(torch.zeros(1, 3, 4, 4)).shape == (1, 2, 4, 4)


def test_cpu_times_are_told_apart(monkeypatch):
    monkeypatch.setattr("benchmarks.scale.cpu_time.EVERY_S", 0.1)
    begin, own = time.time(), time.process_time()
    with Busy() as busy:
        child = subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"])
        while time.process_time() < own + 0.3:
            math.sqrt(2)
    found = busy.between(begin, time.time())
    assert child.returncode == 0
    # What the looking takes is taken off, so the driver may have a little less than the loop.
    assert found["driver"] == pytest.approx(0.3, abs=0.15)
    assert found["all"] - found["driver"] == pytest.approx(0.5, abs=0.2)


@pytest.mark.long
def test_both_jobs_run_with_more_than_one_worker(capsys: pytest.CaptureFixture[str], ray_local: None):
    figures, ratios = workers.main(["--workers", "1", "2", "--images", "256", "--image-ms", "20"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["benchmark"], line["figures"], line["ratios"]) == ("workers", figures, ratios)
    for name in (workers.INFERENCE, workers.TRAINING):
        for count in ("1", "2"):
            found = figures[name][count]
            assert 0.5 < found["busy"] <= 1.01
            assert found["all CPU ms"] > found["driver CPU ms"] > 0
        assert ratios[f"{name}: linear, 1 workers"] == 1
        assert ratios[f"{name}: linear, 2 workers"] > 0.5
