"""Threads beside one another, or in turns."""

import threading

import pytest
import torch

from pipeline.scoring.cuda_streams import ModelStreams


def inside_at_once(lanes: ModelStreams) -> int:
    """The most of three threads that were inside ``model`` together."""
    inside, most, guard = 0, 0, threading.Lock()
    met = threading.Event()

    def work() -> None:
        nonlocal inside, most
        with lanes.thread_stream(), lanes.model_stream():
            with guard:
                inside += 1
                most = max(most, inside)
                if inside == 3:
                    met.set()
            met.wait(0.3)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most


def test_a_cpu_serves_all_threads_at_once_unless_they_take_turns():
    cpu = torch.device("cpu")
    assert inside_at_once(ModelStreams(cpu)) == 3
    assert inside_at_once(ModelStreams(cpu, turns=True)) == 1


def test_an_error_leaves_the_lane_free():
    lanes = ModelStreams(torch.device("cpu"), turns=True)
    with pytest.raises(ValueError, match="inside"), lanes.thread_stream(), lanes.model_stream():
        raise ValueError("inside")
    assert inside_at_once(lanes) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_streams_hand_over_in_order():
    lanes = ModelStreams(torch.device("cuda"))
    with lanes.thread_stream():
        values = torch.zeros(2**22, device="cuda")
        for _ in range(50):
            values += 1
        with lanes.model_stream():
            doubled = values * 2
        host = doubled.max().item()
    assert host == 100
