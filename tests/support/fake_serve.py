"""In the place of vLLM's server, for tests of how a judge starts, asks and ends it: a process on a Unix socket that always answers A.

It ends when a question holds the word `die`, as often as the file named in FAKE_DEATHS says, and at once where that says `never`.
"""

from __future__ import annotations

import json
import os
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from onlinerl.processes import die_with_parent

OPTIONS = dict(part.removeprefix("--").split("=", 1) for part in sys.argv[1:] if "=" in part)
ONE = threading.Lock()
DEATHS = Path(os.environ["FAKE_DEATHS"])


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._say({"data": [{"id": OPTIONS["served-model-name"]}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with ONE:
            left = int(DEATHS.read_text())
            if "die" in body["messages"][0]["content"].split() and left:
                DEATHS.write_text(str(left - 1))
                print("there is no more memory", flush=True)
                os._exit(3)
        message = {"role": "assistant", "content": '{"verdict": "A"}' if "response_format" in body else "A"}
        self._say(
            {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
        )

    def _say(self, answer: dict) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """It has no address to name."""


class Threads(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


if __name__ == "__main__":
    die_with_parent(0.1)
    if DEATHS.read_text() == "never":
        sys.exit("unknown model")
    Threads(OPTIONS["uds"], Answers).serve_forever()
