"""Simulated judges: HTTP clients of `annotate serve`, and a process that starts and kills it."""

import contextlib
import html
import http.client
import os
import re
import signal
import subprocess
import sys
from urllib.parse import quote, urlencode, urlsplit

from cosmo.engine.web import app, run
from data_pipeline.annotation.serving import routes
from data_pipeline.annotation.serving.study import Study
from tests.data_pipeline.annotation_samples import GOOD


def form_of(answers):
    """The fields of a form in which a browser sends these answers."""
    form = {}
    for key, value in answers.items():
        if isinstance(value, bool):
            form |= {key: "on"} if value else {}
        elif isinstance(value, list):
            form |= {f"{key}-{n}": "on" for n in value}
        elif isinstance(value, dict):
            form |= {f"{key}-{n}": text for n, text in value.items()}
        else:
            form[key] = value
    return form


@contextlib.contextmanager
def served(made, path, judges=("ann", "bob"), **settings):
    """Serve a task from a thread; yield (study, {judge: Judge}, address)."""
    study = Study(made, path, **settings)
    tokens = {judge: f"token-of-{judge}-0123456789" for judge in judges}
    pages = routes.application(study, tokens, app.allowed_hosts("127.0.0.1"))
    with contextlib.closing(study), run.background(pages) as url:
        yield study, {judge: Judge(url, token) for judge, token in tokens.items()}, url


class Reply:
    """A response: status, headers, text."""

    def __init__(self, response):
        self.status, self.headers = response.status, response.headers
        self.text = response.read().decode()

    @property
    def item(self):
        """The item of the page; None on a page without one."""
        found = re.search(r'data-item="([^"]*)"', self.text)
        return html.unescape(found[1]) if found else None

    @property
    def words(self):
        """The page's text without its markup."""
        return html.unescape(re.sub(r"<[^>]*>", " ", self.text))


class Judge:
    """One judge's browser, without a script."""

    def __init__(self, url, token):
        self.netloc, self.token = urlsplit(url).netloc, token

    def ask(self, method, path, body=None, headers=None):
        """Send a request on a connection of its own; OSError or HTTPException where it breaks."""
        connection = http.client.HTTPConnection(self.netloc, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            return Reply(connection.getresponse())

    def open(self):
        """Open the judge's link."""
        return self.ask("GET", f"/judge?token={quote(self.token)}")

    def post(self, form, headers=None):
        """Send a form."""
        kind = {"content-type": "application/x-www-form-urlencoded"}
        body = urlencode({"token": self.token, **form})
        return self.ask("POST", "/judge", body, {**kind, **(headers or {})})

    def agree(self):
        """Give consent."""
        return self.post({"action": "consent", "consent": "on"})

    def send(self, item, answers):
        """Send answers to an item."""
        return self.post({"action": "answer", "item": item, **form_of(answers)})

    def finish(self, page, most=1000):
        """Answer until nothing is left; return the items in their order."""
        self.agree()
        items = []
        while (found := self.open().item) is not None and len(items) < most:
            reply = self.send(found, GOOD[page])
            assert reply.status == 303, reply.words
            items.append(found)
        return items


# A process that has all imported, and forks a server for each line that it reads.
_FORKS = """
import os, sys
from data_pipeline import __main__ as command
import cosmo.engine.web.run
import data_pipeline.annotation.serving.routes
import data_pipeline.annotation.commands.serve
for _ in sys.stdin:
    child = os.fork()
    if not child:
        sys.stdin = open(os.devnull)
        os._exit(command.main(sys.argv[1:]))
    print("process", child, flush=True)
    os.waitpid(child, 0)
    print("ended", child, flush=True)
"""


class Server:
    """`annotate serve` in a process that is killed and started again. `wait` returns its port."""

    def __init__(self, *arguments):
        self.forks = subprocess.Popen(
            [sys.executable, "-c", _FORKS, "annotate", "serve", *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.process = None

    def start(self):
        """Start it; return its address."""
        self.process = None
        self.forks.stdin.write("start\n")
        self.forks.stdin.flush()
        for line in self.forks.stdout:
            if line.startswith("process "):
                self.process = int(line.split()[1])
            if line == f"ended {self.process}\n":
                raise AssertionError("the server did not start")
            if line.startswith("listening on "):
                return line.split()[-1]
        raise AssertionError("the server did not start")

    def kill(self):
        """Kill it, so that nothing of it can run on."""
        os.kill(self.process, signal.SIGKILL)

    def end(self):
        """Kill all."""
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        self.forks.kill()
        self.forks.communicate()
