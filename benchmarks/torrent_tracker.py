"""A BitTorrent tracker that knows one torrent: whoever announces itself is told of all others. For `spread_rivals`.

python benchmarks/torrent_tracker.py ADDRESS PORT
"""

from __future__ import annotations

import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

INTERVAL_S = 2
PEERS: dict[tuple[str, int], None] = {}


class Announce(BaseHTTPRequestHandler):
    """Answers ``/announce``. Source: BEP 3, and BEP 23 for the compact list."""

    def do_GET(self) -> None:
        port = int(parse_qs(urlsplit(self.path).query, encoding="latin-1")["port"][0])
        PEERS[self.client_address[0], port] = None
        peers = b"".join(socket.inet_aton(address) + port.to_bytes(2, "big") for address, port in PEERS)
        body = b"d8:intervali%de5:peers%d:%be" % (INTERVAL_S, len(peers), peers)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Announce).serve_forever()
