"""What a decode pod does: one prompt through the pod's gRPC port. Prints the number of tokens whose KV came.

usage: pod_client.py HOST:PORT [FOLDER]    FOLDER: tls.crt, tls.key and ca.crt of a client
"""

import pathlib
import sys

import grpc
from headstart import PrefillClient


def credentials(folder):
    read = lambda name: (pathlib.Path(folder) / name).read_bytes()
    return grpc.ssl_channel_credentials(read("ca.crt"), read("tls.key"), read("tls.crt"))


with PrefillClient(sys.argv[1], credentials=credentials(sys.argv[2]) if len(sys.argv) > 2 else None) as client:
    print(client.prefill(list(range(100))).kv.shape[3])
