"""The Space under one visitor and under ten: times through its API, errors and memory, all on this machine.

python benchmarks/bench_space.py --rows 10000 --seconds 60 --output space.json

Serves the embedded demo with `--rows` indexed scenes (prepared once in `--folder`) by `sparc space` in a process of
its own, measures each request alone, then lets `--visitors` at once use it for `--seconds`. With Chromium and
playwright, the time to the first paint is measured too.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
from gradio_client import Client, handle_file

from sparc_hf.demo.run import DemoArguments, run_demo
from sparc_hf.demo.scenes import make_scene

SIMILARITY = "similarity of image and caption"
CAPTIONS = ("a red circle", "two blue squares on a dark background", "a striped star", "a large green heart")


def requests(images: list[str], rows: int) -> dict:
    """Return name -> what asks a client for it once, with different input each time."""
    draws = random.Random(0)
    return {
        "latent": lambda client: client.predict(str(draws.randrange(256)), api_name="/latent"),
        "latent_maps": lambda client: client.predict(str(draws.randrange(256)), True, api_name="/latent_maps"),
        "find_latents": lambda client: client.predict(
            draws.choice(("red", "", "star")), "energy", api_name="/find_latents"
        ),
        "explain similarity": lambda client: client.predict(
            handle_file(draws.choice(images)), draws.choice(CAPTIONS), SIMILARITY, api_name="/explain"
        ),
        "explain concept": lambda client: client.predict(
            handle_file(draws.choice(images)), draws.choice(CAPTIONS), str(draws.randrange(256)), api_name="/explain"
        ),
        "retrieve caption to image": lambda client: client.predict(
            None, draws.choice(CAPTIONS), "", "clip_txt", "clip_img", api_name="/retrieve"
        ),
        "retrieve image to caption": lambda client: client.predict(
            handle_file(draws.choice(images)), "", "", "clip_img", "clip_txt", api_name="/retrieve"
        ),
        "retrieve image to image": lambda client: client.predict(
            None, "", str(draws.randrange(rows)), "dino", "clip_img", api_name="/retrieve"
        ),
        "compare": lambda client: client.predict(draws.choice(("single", "joint")), api_name="/compare"),
    }


def serve(folder: Path, port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "sparc_hf.cli", "space", "--port", str(port)]
    command += ["--model", str(folder / "model"), "--features", str(folder / "features" / "test")]
    command += ["--cache", str(folder / "cache")]
    return subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)


def wait_for(url: str, process: subprocess.Popen) -> float:
    started = time.perf_counter()
    while process.poll() is None:
        try:
            httpx.get(url, timeout=5).raise_for_status()
            return time.perf_counter() - started
        except httpx.HTTPError:
            time.sleep(0.1)
    raise SystemExit("the Space did not start")


def alone(url: str, asked: dict, rounds: int) -> dict[str, dict[str, float]]:
    """Return name -> median and worst seconds of requests that have the server to themselves."""
    client = Client(url, verbose=False)
    found = {}
    for name, ask in asked.items():
        times = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            ask(client)
            times.append(time.perf_counter() - started)
        found[name] = {"first": times[0], "median": statistics.median(times[1:]), "worst": max(times[1:])}
    return found


def own_memory(process: psutil.Process) -> int:
    """Return bytes of a process that are not mapped files, which the system can drop."""
    found = process.memory_info()
    return found.rss - found.shared


def crowd(url: str, asked: dict, visitors: int, seconds: float, server: psutil.Process) -> dict:
    """Return counts, times and memory of many visitors at once."""
    times: dict[str, list[float]] = {name: [] for name in asked}
    errors: list[str] = []
    memory = [own_memory(server)]
    end = time.perf_counter() + seconds

    def visit(number: int) -> None:
        draws = random.Random(number)
        client = Client(url, verbose=False)
        while time.perf_counter() < end:
            name = draws.choice(list(asked))
            started = time.perf_counter()
            try:
                asked[name](client)
                times[name].append(time.perf_counter() - started)
            except Exception as error:
                errors.append(f"{name}: {error!r}"[:300])

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(visitors)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        memory.append(own_memory(server))
    every = [one for found in times.values() for one in found]
    return {
        "visitors": visitors,
        "seconds": seconds,
        "answered": len(every),
        "errors": errors,
        "median": statistics.median(every),
        "95 %": statistics.quantiles(every, n=20)[-1],
        "worst": max(every),
        "median of each": {name: statistics.median(found) for name, found in times.items() if found},
        "memory before, MB": round(memory[0] / 2**20),
        "memory most, MB": round(max(memory) / 2**20),
        "memory at each tenth, MB": [round(memory[len(memory) * part // 10] / 2**20) for part in range(10)],
    }


def first_paint(url: str, chromium: str) -> list[float] | None:
    """Return seconds from asking for the page until the list of latents shows, of fresh browsers; None without one."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if not Path(chromium).exists():
        return None
    times = []
    options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as play:
        for _ in range(3):
            browser = play.chromium.launch(executable_path=chromium, args=options)
            page = browser.new_page()
            started = time.perf_counter()
            page.goto(url)
            page.wait_for_selector("#latents a")
            times.append(time.perf_counter() - started)
            browser.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--visitors", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/space"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not (args.folder / "evaluation" / "results.json").exists():
        run_demo(DemoArguments(output=str(args.folder), test_rows=args.rows))
    with tempfile.TemporaryDirectory() as pictures:
        images = [str(Path(pictures) / f"{number}.png") for number in range(20)]
        for number, path in enumerate(images):
            make_scene(2_500_000 + number, 0).image.save(path)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}/"
        server = serve(args.folder, port)
        try:
            result: dict = {"rows": args.rows, "start, making the index": wait_for(url, server)}
            server.terminate()
            server.wait()
            server = serve(args.folder, port)
            result["start, with the index made"] = wait_for(url, server)
            result["first paint"] = first_paint(url, args.chromium)
            asked = requests(images, args.rows)
            result["alone"] = alone(url, asked, args.rounds)
            result["crowd"] = crowd(url, asked, args.visitors, args.seconds, psutil.Process(server.pid))
        finally:
            server.terminate()
            server.wait()
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if result["crowd"]["errors"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
