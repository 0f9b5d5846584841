"""What a decode pod does: one prompt through the pod's gRPC port, its KV on two connections from the address that the pod
names. Prints the number of tokens whose KV came, and the number of connections.

usage: pod_client.py HOST:PORT [FOLDER]    FOLDER: tls.crt, tls.key and ca.crt of a client
"""

import pathlib
import sys

from headstart import PrefillClient, Tls


def tls(folder):
    return Tls(*(str(pathlib.Path(folder) / name) for name in ("ca.crt", "tls.crt", "tls.key")))


with PrefillClient(sys.argv[1], tls=tls(sys.argv[2]) if len(sys.argv) > 2 else None, connections=2,
                   allowed_fetch_hosts=["127.0.0.1"]) as client:
    result = client.prefill(list(range(100)))
    print(result.num_tokens, result.connections)
