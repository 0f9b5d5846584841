"""The two sides of each peer of transfer_peers.py. A side lives in a process of its own.

Every side has: address(), what the other side has to know; connect(address of the other side); move(), which returns
when this side has nothing left to do for one whole transfer; close(). Pages go from the source's memory to the same
offsets of the sink's. In a pair with a passive side the other one does everything, and move() of the passive returns
at once.
"""

import ctypes
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

HOST = "127.0.0.1"
POLL_SECONDS = 1e-4


@dataclass(frozen=True)
class Job:
    bytes: int
    block_bytes: int
    connections: int

    def shares(self):
        """(begin, end) of each connection, cut between blocks."""
        blocks = -(-self.bytes // self.block_bytes)
        cuts = (blocks * i // self.connections for i in range(self.connections + 1))
        borders = [min(self.bytes, cut * self.block_bytes) for cut in cuts]
        return list(zip(borders, borders[1:]))

    def blocks(self, share):
        """(offset, bytes) of each block of a share."""
        begin, end = share
        return [(at, min(self.block_bytes, end - at)) for at in range(begin, end, self.block_bytes)]


class Side:
    """What most sides do: nothing, until they say otherwise."""

    def __init__(self, job, memory):
        self.job = job
        self.memory = memory
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    @staticmethod
    def environment(job):
        """Variables that the process needs from its start."""
        return {}

    def address(self):
        return None

    def connect(self, other):
        pass

    def move(self):
        pass

    def close(self):
        pass


# ---- plain TCP: a thread and a socket for each share; Python gives its lock back in every system call


class TcpSide(Side):
    def __init__(self, job, memory):
        super().__init__(job, memory)
        self.view = memoryview(memory)
        self.sockets = []
        self.threads = ThreadPoolExecutor(job.connections)

    def move(self):
        list(self.threads.map(self.move_share, self.sockets, self.job.shares()))

    def close(self):
        self.threads.shutdown()
        for connection in self.sockets:
            connection.close()
        self.view.release()


class TcpSource(TcpSide):
    def __init__(self, job, memory):
        super().__init__(job, memory)
        self.listener = socket.create_server((HOST, 0), backlog=job.connections)

    def address(self):
        return self.listener.getsockname()

    def connect(self, other):
        for _ in range(self.job.connections):
            self.sockets.append(self.listener.accept()[0])

    def move_share(self, connection, share):
        for at, count in self.job.blocks(share):
            connection.sendall(self.view[at : at + count])

    def close(self):
        super().close()
        self.listener.close()


class TcpSink(TcpSide):
    def connect(self, other):
        for _ in range(self.job.connections):
            self.sockets.append(socket.create_connection(other))

    def move_share(self, connection, share):
        for at, count in self.job.blocks(share):
            while count:
                got = connection.recv_into(self.view[at : at + count], count, socket.MSG_WAITALL)
                if not got:
                    raise ConnectionError("the source closed the connection")
                at += got
                count -= got


# ---- NIXL over UCX: an agent, which is one worker and one connection, for each share


class NixlSide(Side):
    @staticmethod
    def environment(job):
        # Nothing but TCP over the loopback device: no shared memory, no CMA.
        return {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}

    def __init__(self, job, memory):
        super().__init__(job, memory)
        from nixl_cu13 import nixl_agent, nixl_agent_config

        self.agents = []
        self.registered = []
        for i in range(job.connections):
            agent = nixl_agent(f"{type(self).__name__}{i}", nixl_agent_config(backends=["UCX"]))
            self.registered.append(agent.register_memory([(self.base, job.bytes, 0, "")], "DRAM"))
            self.agents.append(agent)

    def address(self):
        return [agent.get_agent_metadata() for agent in self.agents], self.base

    def close(self):
        for agent, registered in zip(self.agents, self.registered):
            agent.deregister_memory(registered)


class NixlActive(NixlSide):
    """Transfers are prepared by connect(), so that move() only posts them."""

    def __init__(self, job, memory):
        super().__init__(job, memory)
        self.handles = []
        self.threads = ThreadPoolExecutor(job.connections)

    def connect(self, other):
        metadata, other_base = other
        for agent, remote, share in zip(self.agents, metadata, self.job.shares()):
            name = agent.add_remote_agent(remote)
            agent.make_connection(name)
            local, distant = (
                agent.get_xfer_descs([(base + at, count, 0) for at, count in self.job.blocks(share)], "DRAM")
                for base in (self.base, other_base)
            )
            self.handles.append((agent, agent.initialize_xfer(self.OPERATION, local, distant, name), name))

    def move(self):
        list(self.threads.map(self.move_share, self.handles))

    def move_share(self, entry):
        agent, handle, _ = entry
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(POLL_SECONDS)
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"a NIXL transfer ended as {state}")

    def close(self):
        self.threads.shutdown()
        for agent, handle, name in self.handles:
            agent.release_xfer_handle(handle)
            agent.remove_remote_agent(name)
        super().close()


class NixlReader(NixlActive):
    OPERATION = "READ"


class NixlWriter(NixlActive):
    OPERATION = "WRITE"


# ---- Mooncake's transfer engine: the engine splits what it gets over its connections itself


class MooncakeSide(Side):
    @staticmethod
    def environment(job):
        return {
            "MC_TCP_LANES_PER_PEER": str(job.connections),
            "MC_NUM_TCP_IO_THREADS": str(job.connections),
            # Room for all blocks at once.
            "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
            "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
            "MC_TCP_ADMISSION_TIMEOUT_MS": "120000",
            "MC_TRANSFER_TIMEOUT": "300",
        }

    def __init__(self, job, memory):
        super().__init__(job, memory)
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        # Both ends find each other without a metadata server.
        if self.engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("Mooncake's engine does not start")
        if self.engine.register_memory(self.base, job.bytes) != 0:
            raise RuntimeError("Mooncake does not take the memory")

    def address(self):
        return f"{HOST}:{self.engine.get_rpc_port()}", self.base

    def close(self):
        self.engine.unregister_memory(self.base)


class MooncakeActive(MooncakeSide):
    def connect(self, other):
        self.other, other_base = other
        blocks = self.job.blocks((0, self.job.bytes))
        self.local = [self.base + at for at, _ in blocks]
        self.distant = [other_base + at for at, _ in blocks]
        self.counts = [count for _, count in blocks]

    def move(self):
        code = self.transfer()(self.other, self.local, self.distant, self.counts)
        if code != 0:
            raise RuntimeError(f"a Mooncake transfer ended with {code}")


class MooncakeReader(MooncakeActive):
    def transfer(self):
        return self.engine.batch_transfer_sync_read


class MooncakeWriter(MooncakeActive):
    def transfer(self):
        return self.engine.batch_transfer_sync_write


# name: (source, sink)
PEERS = {
    "tcp": (TcpSource, TcpSink),
    "nixl-read": (NixlSide, NixlReader),
    "nixl-write": (NixlWriter, NixlSide),
    "mooncake-read": (MooncakeSide, MooncakeReader),
    "mooncake-write": (MooncakeWriter, MooncakeSide),
}
