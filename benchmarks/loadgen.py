"""Ask a service on this machine with many connections for a while, and say what came back.

    python benchmarks/loadgen.py --port 8000 --clients 32 --seconds 10 --body request.json

A small HTTP/1.1 client on asyncio's protocols: on two cores the clients run beside the service, and a comfortable library would take
more time than what it measures. Addresses other than 127.0.0.1 cannot be given.
"""
import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path


class Client(asyncio.Protocol):
    "Send requests one after the other on a connection; open a new one when the service closes it."

    def __init__(self, load, number):
        self.load, self.number, self.buffer, self.sent_at, self.transport = load, number, b"", None, None

    def connection_made(self, transport):
        self.transport, self.buffer = transport, b""
        self.send()

    def send(self):
        if self.load.over(): return self.transport.close()
        self.index = self.load.next()
        self.sent_at = time.perf_counter()
        self.transport.write(self.load.requests[self.index])

    def data_received(self, data):
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found: return
        fields = head.lower()
        at = fields.find(b"content-length:")
        length = int(fields[at + 15:].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(body) < length: return
        self.load.answered(int(head[9:12]), time.perf_counter() - self.sent_at, self.index, body)
        self.sent_at, self.buffer = None, b""
        if b"connection: close" in fields: self.transport.close()
        else: self.send()

    def connection_lost(self, error):
        # A request that was sent and never answered is the one thing that must not happen.
        if self.sent_at is not None: self.load.lost(time.perf_counter() - self.sent_at)
        self.sent_at = None
        self.load.reopen(self)


class Load:
    """Keep `clients` connections busy for `seconds`.

    Parameters
    ----------
    port : int
    bodies : list of bytes
        Bodies of the requests, in turn.
    clients : int
    seconds : float
    path : str
    check : callable, optional
        Called with the number of the body and the answer's body of each 200; returns True if it is right.
    headers : dict of str to str
    """

    def __init__(self, port, bodies, clients=32, seconds=5.0, path="/predict", check=None, headers={}):
        more = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        self.requests = [f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{more}Content-Length: {len(b)}\r\n\r\n".encode() + b for b in bodies]
        self.port, self.clients, self.seconds, self.check = port, clients, seconds, check
        self.statuses, self.times, self.turn, self.wrong, self.losses, self.refused, self.waiting = Counter(), [], 0, 0, [], 0, 0

    def over(self): return time.perf_counter() > self.end

    def next(self):
        self.turn += 1
        return (self.turn - 1) % len(self.requests)

    def answered(self, status, seconds, index, body):
        self.statuses[status] += 1
        self.times.append(seconds)
        if status == 200 and self.check is not None and not self.check(index, body): self.wrong += 1

    def lost(self, seconds): self.losses.append(seconds)

    def reopen(self, client):
        if self.over(): self.left.discard(client.number)
        else: self.loop.create_task(self._connect(client.number))
        if not self.left: self.done.set()

    async def _connect(self, number):
        while not self.over():
            try: return await self.loop.create_connection(lambda: Client(self, number), "127.0.0.1", self.port)
            except OSError: self.refused += 1
            await asyncio.sleep(0.02)
        self.left.discard(number)
        if not self.left: self.done.set()

    async def go(self):
        "Run, and return what came back as a dictionary."
        self.loop, self.done, self.left = asyncio.get_running_loop(), asyncio.Event(), set(range(self.clients))
        start = time.perf_counter()
        self.end = start + self.seconds
        for i in range(self.clients): self.loop.create_task(self._connect(i))
        await asyncio.wait_for(self.done.wait(), self.seconds + 60)
        return self.summary(time.perf_counter() - start)

    def summary(self, seconds):
        t = sorted(self.times)
        at = lambda q: round(1e3 * t[min(len(t) - 1, int(q * len(t)))], 2) if t else None
        return dict(seconds=round(seconds, 2), answers=len(t), per_second=round(len(t) / seconds, 1), statuses=dict(sorted(self.statuses.items())),
                    p50_ms=at(0.5), p99_ms=at(0.99), max_ms=at(1), lost=len(self.losses), refused=self.refused, wrong=self.wrong)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--port", type=int, required=True)
    p.add_argument("--clients", type=int, default=32)
    p.add_argument("--seconds", type=float, default=5)
    p.add_argument("--path", default="/predict")
    p.add_argument("--body", type=Path, required=True, help="file with a JSON body a line")
    a = p.parse_args()
    print(json.dumps(asyncio.run(Load(a.port, a.body.read_bytes().splitlines(), a.clients, a.seconds, a.path).go())))


if __name__ == "__main__": main()
