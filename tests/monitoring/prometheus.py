"""A real Prometheus server with the shipped configuration, and questions to it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import monitoring
from tests.programs import needs_program

SHIPPED = Path(monitoring.__file__).parent / "prometheus"

needs_prometheus = needs_program("prometheus", "apt-get install prometheus")


class Server:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: Any) -> Any:
        try:
            with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}") as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.get("query", query=expression)["result"])

    def query_range(self, expression: str, seconds: float, step: float = 1) -> list[dict[str, Any]]:
        now = int(time.time())  # whole seconds, so that two answers have the same times
        return list(self.get("query_range", query=expression, start=now - seconds, end=now, step=step)["result"])

    def value(self, expression: str) -> float | None:
        result = self.query(expression)
        return float(result[0]["value"][1]) if result else None


@contextmanager
def prometheus(folder: Path, targets: Path, interval: str = "5s") -> Iterator[Server]:
    """The shipped prometheus.yml, but for the directory of targets and the interval of scrapes and rules."""
    shutil.copytree(SHIPPED, folder / "config")
    for path in folder.glob("config/**/*.yml"):
        text = path.read_text().replace("/tmp/detour/targets", str(targets))
        path.write_text(text.replace("interval: 5s", f"interval: {interval}").replace("15s", interval))
    log_file = folder / "prometheus.log"
    log = log_file.open("wb")
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder}/config/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            "--web.listen-address=127.0.0.1:0",
        ],
        stdout=log,
        stderr=log,
    )
    try:
        listening = wait_until(lambda: re.search(r'"Listening on" address=([\d.:]+)', log_file.read_text()), 30)
        server = Server(f"http://{listening[1]}")
        wait_until(lambda: _ready(server.url), 30)
        yield server
    finally:
        process.terminate()
        process.wait()
        log.close()


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    """The first true answer of `condition`; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return answer


def _ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/-/ready") as answer:
            return bool(answer.status == 200)
    except URLError:
        return False
