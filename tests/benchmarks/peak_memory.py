"""Peak memory in tensors, as torch's own profiler sees it."""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints its comings and goings; read at import of torch

import torch


def peak_bytes(run: Callable[[], None], held: int = 0) -> int:
    """Return the most bytes that lived in tensors at a time while `run` ran, on top of the `held` ones before.

    They are what torch's allocator was asked for, read from the profiler's trace; so compiled code counts as well.
    """
    gc.collect()  # or what an earlier run left behind would be freed, and subtracted, in this one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return held + peak
