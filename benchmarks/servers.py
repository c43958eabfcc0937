"""Compare HTTP servers under load and under slow clients, and write benchmarks/SERVERS.md.

    python benchmarks/servers.py

The app answers at once, so that what is measured is the server. All traffic stays on 127.0.0.1; every stage takes seconds.
"""
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
BODY = json.dumps({"expression": {"CD19": 8.5, "MS4A1": 9.2, "CD79A": 7.8, "CD79B": 7.5}}).encode()
SLOW, WAIT = 250, 40   # slow connections; seconds in which they should be closed


async def app(scope, receive, send):
    "Read the body and answer."
    if scope["type"] != "http": return
    while (m := await receive()).get("more_body"): pass
    if m["type"] == "http.disconnect": return
    if scope["path"] == "/slow": await asyncio.sleep(2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


def uvicorn_command(port):
    return [sys.executable, "-m", "uvicorn", "servers:app", "--port", str(port), "--log-level", "error", "--lifespan", "off"]


def uvicorn_deadline_command(port):
    return [sys.executable, "-c", "import servers, sys; from scimlora.server import run_app; run_app(servers.app, servers.listen(int(sys.argv[1])), header_seconds=10)", str(port)]


def granian_command(port):
    return [sys.executable, "-m", "granian", "--interface", "asginl", "--port", str(port), "--no-log", "--http1-header-read-timeout", "10000", "servers:app"]


SERVERS = {"uvicorn": uvicorn_command, "uvicorn with scimlora's deadline": uvicorn_deadline_command, "granian": granian_command}


def listen(port): return socket.create_server(("127.0.0.1", port), backlog=2048)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]


def healthy(port, seconds):
    "Seconds until an answer comes, or None."
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=seconds) as r: r.read()
    except OSError: return None
    return time.perf_counter() - start


def ask(port, clients, seconds):
    "The load generator's figures, from a process of its own."
    body = HERE.parent / "runs" / "servers.json"
    body.parent.mkdir(exist_ok=True)
    body.write_bytes(BODY)
    command = [sys.executable, str(HERE / "loadgen.py"), "--port", str(port), "--clients", str(clients), "--seconds", str(seconds), "--body", str(body)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def slow(port, sent):
    "Open slow connections that send `sent` and no more; how long a health check takes meanwhile, and how many are closed in time."
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(SLOW)]
    for c in connections: c.sendall(sent)
    time.sleep(0.5)
    health, end, closed = healthy(port, 5), time.monotonic() + WAIT, 0
    for c in connections:
        c.settimeout(max(0.01, end - time.monotonic()))
        try:
            while c.recv(4096): pass
            closed += 1
        except ConnectionError: closed += 1
        except TimeoutError: pass
        c.close()
    return health, closed


def ends_in_flight(process, port):
    "Whether a request in flight is answered after SIGTERM, and the seconds until the process is gone."
    with socket.create_connection(("127.0.0.1", port)) as c:
        c.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.5)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        c.settimeout(10)
        try: answer = c.recv(4096)
        except OSError: answer = b""
    try: process.wait(15)
    except subprocess.TimeoutExpired: process.kill()
    return answer.startswith(b"HTTP/1.1 200"), time.monotonic() - start


def measure(command):
    "All figures of one server."
    port = free_port()
    process = subprocess.Popen(command(port), cwd=HERE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while healthy(port, 1) is None: assert time.monotonic() < end and process.poll() is None
        ask(port, 32, 1)
        load = ask(port, 32, 5)
        head = slow(port, b"POST /predict HTTP/1.1\r\nHost: x\r\nX-")
        body = slow(port, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        return load, head, body, ends_in_flight(process, port)
    finally:
        if process.poll() is None: process.kill()
        process.wait()


def row(name, figures):
    "A line of the table."
    load, head, body, (answered, seconds) = figures
    shown = lambda h: "none within 5 s" if h is None else f"{1e3 * h:.0f} ms"
    return (f"| {name} | {load['per_second']:,.0f} | {load['p99_ms']} | {shown(head[0])} | {head[1]} of {SLOW} | {shown(body[0])} | {body[1]} of {SLOW} | "
            f"{'answered' if answered else 'lost'}, gone after {seconds:.1f} s |")


def main():
    rows = [row(name, measure(command)) for name, command in SERVERS.items()]
    text = "\n".join([
        "# HTTP servers", "", "Written by `python benchmarks/servers.py`: an app that answers at once, 32 clients in a process beside it, then "
        f"{SLOW} connections that stop in the middle of a header or of a body, and how many of them the server closes within {WAIT} s.", "",
        f"uvicorn {version('uvicorn')} with httptools {version('httptools')} and uvloop {version('uvloop')}; granian {version('granian')}, header deadline set to 10 s; "
        f"{os.cpu_count()} cores.", "",
        "| server | requests/s | 99 % (ms) | health beside slow headers | closed | health beside slow bodies | closed | SIGTERM with a request in flight |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |", *rows, "",
        "No server here has a deadline for a body: that one is the app's (`scimlora.limits`).", ""])
    (HERE / "SERVERS.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__": main()
