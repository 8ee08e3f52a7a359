"""An endpoint of OpenAI's chat completions on 127.0.0.1, whose replies are those of a function."""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-a-key-that-nobody-may-see"


def shown(messages):
    """The answers that a judge is shown, A and B."""
    question = messages[1]["content"]
    return [re.search(rf"<answer_{x}>\n(.*?)\n</answer_{x}>", question, re.DOTALL)[1] for x in "AB"]


class ChatServer:
    """Replies `reply(messages)` to each request; before that, with the statuses in `failures`, one a request."""

    def __init__(self, reply: Callable[[list[dict[str, str]]], str | None], seconds: float = 0.0):
        self.reply, self.seconds = reply, seconds
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []
        self.body: bytes | None = None
        """Sent in place of any chat completion."""
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"chat": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    chat: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): ...

    def do_POST(self):
        chat, key = self.chat, self.headers.get("Authorization")
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock:
            chat.requests.append(request)
            chat.keys.append(key)
            chat.at_once += 1
            chat.most_at_once = max(chat.most_at_once, chat.at_once)
            status = chat.failures.pop(0) if chat.failures else 200
        time.sleep(chat.seconds)
        with chat.lock:
            chat.at_once -= 1
        if self.path != "/v1/chat/completions":
            status = 404
        if status != 200:
            return self._send(status, json.dumps({"error": {"message": f"No: {key} is refused."}}).encode())
        if chat.body is not None:
            return self._send(200, chat.body)
        message = {"role": "assistant", "content": chat.reply(request["messages"])}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "choices": choices}
        return self._send(200, json.dumps(reply).encode())

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if body[:1] == b"{" else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
