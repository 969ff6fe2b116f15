"""A chat endpoint on this machine that answers as a test wants it to."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Backend:
    """A chat endpoint on 127.0.0.1: `answer(text, attempt)` gives a status and a body."""

    def __init__(self):
        self.answer = self.honest
        self.requests = []  # (headers, body) in order of arrival
        self.release = threading.Event()
        self._attempts = Counter()
        self._lock = threading.Lock()
        backend = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw)
                text = body["messages"][-1]["content"]
                with backend._lock:
                    backend.requests.append((dict(self.headers), body))
                    attempt = backend._attempts[text]
                    backend._attempts[text] += 1
                status, reply = backend.answer(text, attempt)
                payload = reply if isinstance(reply, bytes) else reply.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @staticmethod
    def says(content):
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})

    def honest(self, text, _attempt=0):
        label = "refused" if "can't assist" in text else "complied"
        return 200, self.says(json.dumps({"label": label}))

    def close(self):
        self.release.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
