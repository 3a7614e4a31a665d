"""A chat model on a loopback socket whose answers a function writes."""

import contextlib
import http.server
import json
import threading


@contextlib.contextmanager
def scripted(reply):
    """(base_url, the bodies asked so far); `reply(body)` returns the text of an answer."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "messages" not in body:  # a model that only converses
                return self.answer(404, {"error": {"message": "use chat"}})
            text = "Hello"
            if body["max_tokens"] > 1:  # not the probe
                asked.append(body)
                text = reply(body)
            choice = {"message": {"content": text}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 500, "completion_tokens": 10}
            return self.answer(200, {"choices": [choice], "usage": usage})

        def answer(self, status, value):
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
