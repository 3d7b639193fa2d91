"""A chat server on the loopback that answers as a test says, and remembers what it was asked.

    with ChatServer(lambda n, body: "4") as server:                # n: number of the request
        ask_all(Server(server.url, "m", "a-key-of-12"), ...)
    server.asked[0].body["messages"], server.asked[0].time, server.most   # most: at the same time

What the function returns: a text (an answer), a dict (its message), a Reply (any other reply), or
CUT (the connection ends half way).
"""

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CUT = object()


@dataclass
class Reply:
    """A reply to the letter."""

    code: int = 200
    body: bytes | dict = b""
    headers: dict = field(default_factory=dict)


@dataclass
class Asked:
    """A request: its JSON, key, path, and when it came (seconds, time.monotonic)."""

    body: dict
    key: str
    path: str
    time: float


class ChatServer:
    """See above. `delay` seconds are waited before each reply."""

    def __init__(self, answer, delay: float = 0.0, port: int = 0):
        self.answer, self.delay, self.port = answer, delay, port
        self.asked, self.most, self.now, self.lock = [], 0, 0, threading.Lock()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def handle(self, http):
        body = json.loads(http.rfile.read(int(http.headers["content-length"])))
        with self.lock:
            n = len(self.asked)
            key = http.headers["authorization"].removeprefix("Bearer ")
            self.asked.append(Asked(body, key, http.path, time.monotonic()))
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.delay)
            self.send(http, self.answer(n, body))
        except (BrokenPipeError, ConnectionResetError):
            pass  # who asked has gone
        finally:
            with self.lock:
                self.now -= 1

    def send(self, http, said):
        said = {"content": said} if isinstance(said, str) else said
        if isinstance(said, dict):
            finish = said.get("finish", "stop")
            choice = {"index": 0, "message": {"role": "assistant", **said}, "finish_reason": finish}
            said = Reply(body={"choices": [choice], "usage": {"completion_tokens": 7}})
        if said is CUT:
            http.send_response(200)
            http.send_header("content-type", "application/json")
            http.send_header("content-length", "1000")
            http.end_headers()
            http.wfile.write(b'{"choices": [')
            return
        text = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
        http.send_response(said.code)
        for name, value in {"content-type": "application/json", **said.headers}.items():
            http.send_header(name, value)
        http.send_header("content-length", str(len(text)))
        http.end_headers()
        http.wfile.write(text)
