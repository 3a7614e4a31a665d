"""Generators driven by hand: answers from a list or a function, and the requests they made."""

from data_pipeline.calls.requests import Response


def drive(asking, answers):
    """(result, requests) of a stage. `answers` is a function of the request, or a list in order.

    An answer may be a text, which is then a Response that ended by itself.
    """
    answer = answers if callable(answers) else lambda request, left=list(answers): left.pop(0)
    requests = []
    try:
        request = next(asking)
        while True:
            requests.append(request)
            response = answer(request)
            if isinstance(response, str):
                response = Response(text=response)
            request = asking.send(response)
    except StopIteration as end:
        return end.value, requests


def conversation(turns=8, x="Ann", y="Coach"):
    """A conversation as a completion gives it: without the first prefix."""
    names = (x, y)
    lines = [f"{names[i % 2]}: This is what I say in turn number {i + 1}." for i in range(turns)]
    return " " + "\n".join(lines).removeprefix(f"{x}: ")
