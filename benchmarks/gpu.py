"""The promises on real hardware, in one command and within eight minutes.

    python benchmarks/gpu.py --output gpu.json

1. provoke: every way to run out of memory that can be provoked, each in a process of its own: the genuine exception,
   what autobatch makes of it, and whether a smaller step succeeds afterwards. Written as a fixture for the tests too.
2. search: six models in float32 and mixed precision, XLA on and off: trials, failures, seconds, size found over the
   true largest; Accelerate's and Lightning's searches, where installed, over the same trial function.
3. intruder: a training whose target does not fit; in its middle another process takes half of the free memory and the
   model begins to need more. It goes on, or it does not.
4. overhead: benchmarks/step_overhead.py on this device.
5. nvml: what autobatch reads against what nvidia-smi prints.

Needs no network. Without a GPU the same runs in limited arenas on the CPU, which shows that it works and no more.
Sections end at their share of the time; what was not reached is printed as such.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECTIONS = HERE / "gpu_sections.py"
SHARES = {"provoke": 0.2, "search": 0.4, "intruder": 0.15, "overhead": 0.17, "nvml": 0.08}
"""Of the minutes that there are."""

PROVOCATIONS = (
    "eager",
    "eager_with_wait",
    "graph",
    "xla",
    "keras_fit",
    "keras_fit_xla",
    "convolution_workspace",
    "optimizer_slots",
    "gradients",
    "copy_to_device",
    "library_handle",
)
ALONE = ("another_process",)
"""Takes the whole card, so nothing else runs beside it."""

SEARCH_MODELS = ("transformer_encoder", "resnet50", "vae", "unet", "gpt", "mobilenet_v3_small")
VARIANTS = (("float32", False), ("mixed_float16", False), ("float32", True), ("mixed_float16", True))


def ask(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Run one part of gpu_sections.py; its last complete answer, or how it ended without one."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(SECTIONS), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        process.kill()

    timer = threading.Timer(max(seconds, 1.0), stop)
    timer.start()
    try:
        printed, stderr = process.communicate()
    finally:
        timer.cancel()
    answer: dict[str, Any] = {}
    for line in printed.splitlines():
        if line.startswith("{"):
            answer = json.loads(line)
    answer["process_seconds"] = time.perf_counter() - started
    if timed_out.is_set():
        answer["stopped"] = f"after {seconds:.0f} s"
    elif process.returncode:
        answer["returncode"], answer["stderr_tail"] = process.returncode, stderr[-3000:]
    return answer


def ask_all(jobs: dict[str, list[str]], seconds: float, at_once: int) -> dict[str, dict[str, Any]]:
    """Run parts beside each other until the time is up; those that would start after it are not run."""
    ends = time.perf_counter() + seconds

    def one(arguments: list[str]) -> dict[str, Any]:
        left = ends - time.perf_counter()
        return ask(arguments, left) if left > 10 else {"stopped": "before it began: no time was left"}

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        futures = {name: pool.submit(one, arguments) for name, arguments in jobs.items()}
        return {name: future.result() for name, future in futures.items()}


def provoke(seconds: float, at_once: int) -> dict[str, Any]:
    found = ask_all({name: ["provoke", name] for name in PROVOCATIONS}, seconds * 0.75, at_once)
    for name in ALONE:
        found[name] = ask(["provoke", name], seconds * 0.25)
    headings = f"{'exception':<26} {'taken for':<11} {'bytes named':>12} {'seconds':>8}"
    print(f"{'way to run out':<24} {headings}  smaller after")
    for name, row in found.items():
        if "kind" not in row:
            print(f"{name:<24} {row.get('stopped') or row.get('said') or 'exit ' + str(row.get('returncode'))}")
            continue
        exception = row["classes"][0].rpartition(".")[2]
        requested = "-" if row["requested_bytes"] is None else f"{row['requested_bytes'] / 2**20:.0f} MiB"
        after = "fits" if row["smaller_fits"] else "FAILS"
        held = f", {row['held_after_bytes'] / 2**20:.0f} MiB held" if row["held_after_bytes"] is not None else ""
        seconds_waited = f"{row['failed_after_seconds']:>8.1f}"
        print(f"{name:<24} {exception:<26} {row['kind']:<11} {requested:>12} {seconds_waited}  {after}{held}")
    return found


def search(seconds: float, at_once: int) -> dict[str, Any]:
    jobs = {
        f"{model}, {precision}{', XLA' if xla else ''}": ["search", model, precision, str(int(xla)), f"{seconds:.0f}"]
        for precision, xla in VARIANTS
        for model in SEARCH_MODELS
    }
    found = ask_all(jobs, seconds, at_once)
    print(f"{'model':<40} {'search':<24} {'trials':>6} {'failed':>6} {'seconds':>8} {'found':>6} {'of true':>8}")
    for name, row in found.items():
        true = row.get("true_largest")
        for each in row.get("recordings", ()):
            peak, again = each["peak_bytes"], each["replayed_peak_bytes"]
            told = "nothing recorded" if each["steps"] is None else f"{each['steps']} allocations and releases recorded"
            if peak and again:
                told += (
                    f", replayed peak {again / peak:.3f} of the measured, up to {each['replayed_largest']} would fit"
                )
            print(f"{name:<40} {each['micro_batch']} samples, {each['outcome']}, {each['seconds']:.1f} s: {told}")
        for searcher, result in row.get("searches", {}).items():
            share = "-" if not true or not result["returned"] else f"{result['returned'] / true:.3f}"
            star = "" if result["returned_was_run_and_fits"] else " not run, or does not fit"
            print(
                f"{name:<40} {searcher:<24} {result['trials']:>6} {result['failures']:>6} {result['seconds']:>8.1f} "
                f"{result['returned'] or 0:>6} {share:>8}{star}"
            )
        if "searches" not in row or "stopped" in row or "returncode" in row:
            print(f"{name:<40} {row.get('stopped') or 'exit ' + str(row.get('returncode'))}")
    return found


def intruder(seconds: float, at_once: int) -> dict[str, Any]:
    found = ask(["intruder"], seconds)
    if "recoveries" in found:
        print(
            f"plan {found['plan']}; the intruder took {found['intruder_bytes'] / 2**20:.0f} MiB before update "
            f"{found['intruder_at_update']}; recovered {len(found['recoveries'])} times: "
            + ", ".join(f"{before} -> {after} in update {update}" for update, before, after in found["recoveries"])
            + f"; {found['updates']} of {found['updates_expected']} updates of {found['effective_batch']} samples; "
            f"weights differ by {found['relative_error']:.1e} from a training at the final micro-batch without intruder"
        )
    else:
        print(found)
    return found


def overhead(seconds: float, at_once: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "overhead.json"
        command = [sys.executable, str(HERE / "step_overhead.py"), "--repeats", "7", "--built", "3"]
        command += ["--output", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired as error:
            printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            print(f"{printed}stopped after {seconds:.0f} s")
            return {"stopped": f"after {seconds:.0f} s", "printed": printed}
        print(done.stdout)
        if done.returncode:
            print(done.stderr[-2000:])
            return {"returncode": done.returncode, "stderr_tail": done.stderr[-3000:]}
        return dict(json.loads(path.read_text()))


def nvml(seconds: float, at_once: int) -> dict[str, Any]:
    found = ask(["nvml"], seconds)
    print(json.dumps(found, indent=1))
    return found


def write_fixture(found: dict[str, Any], path: Path, device: str) -> None:
    """The provoked exceptions in the form of tests/memory/messages/recorded.json."""
    messages = [{"name": name, **row["record"]} for name, row in found.items() if "record" in row]
    path.write_text(json.dumps({"recorded_with": device, "messages": messages}, indent=1) + "\n")
    print(f"{len(messages)} messages written to {path}: to keep them, put it into tests/memory/messages/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the results; a fixture of messages goes beside it")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together (default 8)")
    parser.add_argument("--sections", default=",".join(SHARES), help="those to run, with commas between")
    parser.add_argument("--at-once", type=int, help="processes beside each other (default 5 on a GPU, 2 without)")
    options = parser.parse_args()
    chosen = options.sections.split(",")
    unknown = [name for name in chosen if name not in SHARES]
    if unknown:
        parser.error(f"--sections knows {', '.join(SHARES)}. Received: {', '.join(unknown)}")
    about = ask(["about"], 120)
    if "device" not in about:
        sys.exit(f"TensorFlow does not start: {about}")
    print(f"{about['device_name']} ({about['device']}), TensorFlow {about['tensorflow']}, Keras {about['keras']}")
    at_once = options.at_once or (5 if about["on_gpu"] else 2)
    results: dict[str, Any] = {"about": about, "python": platform.python_version(), "sections": {}}
    scale = options.minutes * 60 / sum(SHARES[name] for name in chosen)
    sections = {"provoke": provoke, "search": search, "intruder": intruder, "overhead": overhead, "nvml": nvml}
    for name in chosen:
        started = time.perf_counter()
        print(f"\n== {name}", flush=True)
        results["sections"][name] = sections[name](SHARES[name] * scale, at_once)
        print(f"({time.perf_counter() - started:.0f} s)", flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    if options.output and "provoke" in chosen:
        name = f"recorded_{'gpu' if about['on_gpu'] else 'cpu_arena'}.json"
        device = f"{about['device_name']}, TensorFlow {about['tensorflow']}, Keras {about['keras']}"
        write_fixture(results["sections"]["provoke"], options.output.with_name(name), device)


if __name__ == "__main__":
    main()
