// The server's own accept loop. gRPC 1.51's stops for ever when file descriptors run out once
// (CVE-2023-4785), and knows no limit of connections.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <future>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "kernels/base/mutex.h"
#include "server/net/connection_ledger.h"
#include "server/net/socket.h"

namespace headstart {

struct ListenerLimits {
  int64_t max_connections = 1024;
  int64_t max_connections_per_peer = 256;  // from one IP address
};

enum class ShedReason : uint8_t { kMaxConnections, kMaxConnectionsPerPeer, kNoFileDescriptors };
inline constexpr std::array<absl::string_view, 3> kShedReasonNames = {
    "max_connections", "max_connections_per_peer", "no_file_descriptors"};

struct ListenerStats {
  int64_t open = 0;
  int64_t accepted = 0;
  std::array<int64_t, kShedReasonNames.size()> shed = {};
  std::array<int64_t, kCutReasonNames.size()> cut = {};
};

// Both ends of a connection of the server with itself, not blocking.
struct OwnConnection {
  Descriptor client;
  Descriptor server;
};

class Listener {
 public:
  // Gets a connected, non-blocking socket to keep.
  using Handler = std::function<void(int fd)>;

  // Listens on every address of the host; connections wait until Start. With a ledger, which
  // outlives this, connections over which comes what it does not account for are cut.
  static absl::StatusOr<std::unique_ptr<Listener>> Create(const HostPort& address,
                                                          const ListenerLimits& limits,
                                                          ConnectionLedger* ledger = nullptr);
  // The same with sockets that listen already, one at least.
  static absl::StatusOr<std::unique_ptr<Listener>> Create(std::vector<Descriptor> sockets,
                                                          const ListenerLimits& limits,
                                                          ConnectionLedger* ledger = nullptr);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  // Accepts from now on, on a thread of its own, and hands over what is within the limits. The rest
  // is closed at once.
  void Start(Handler handler);
  // Stops listening. Idempotent.
  void Stop();

  int port() const { return local_.port; }
  int fd() const { return sockets_.empty() ? -1 : sockets_.front().get(); }
  ListenerStats stats();

  // Connects to this listener over the machine's own address, past the limits and the handler: for
  // looking whether connections are still taken. The loop hands the accepted end back by its source
  // address, which the kernel gives to nobody else while we hold it; and a secret that goes in at
  // one end and comes out at the other one proves that both are of one connection.
  absl::StatusOr<OwnConnection> ConnectToSelf(absl::Duration timeout);

 private:
  // One that was handed over. It belongs to others, who don't say when they close it; its inode
  // does.
  struct Connection {
    uint64_t device = 0;
    uint64_t inode = 0;
    std::string peer_ip;
    std::string name;  // in the ledger
    bool cut = false;
  };

  // A ConnectToSelf that waits for the other end.
  struct Expected {
    Endpoint source;
    std::promise<Descriptor> accepted;
  };

  Listener(std::vector<Descriptor> sockets, Descriptor wake, const ListenerLimits& limits,
           ConnectionLedger* ledger);
  void Loop();
  void AcceptAll(int listen_fd);
  // False when there is nothing to accept.
  bool AcceptOne(int listen_fd);
  bool AcceptWithReserve(int listen_fd);
  void Admit(int fd, const Endpoint& peer);
  // Counts the connection in, or says why not.
  bool Register(int fd, const Endpoint& peer);
  void Shed(ShedReason reason);
  // True when the connection was expected, and is handed to who waits for it.
  bool GiveToSelf(int fd, const Endpoint& peer);
  absl::Status ConnectExpected(int fd, Expected* expected, absl::Duration timeout);
  void Sweep() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Cuts connections that the ledger objects to, and the worst one when all together are too much.
  void Watch() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Cut(int fd, Connection* connection, CutReason reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int WatchMs();
  void Remove(std::unordered_map<int, Connection>::iterator connection)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::vector<Descriptor> sockets_;
  const Descriptor wake_;
  Descriptor reserve_;  // given up for a moment when no other descriptor is left
  const Endpoint local_;
  const ListenerLimits limits_;
  ConnectionLedger* const ledger_;  // null: nothing is watched
  Handler handler_;
  std::thread thread_;

  Mutex mutex_;
  std::unordered_map<int, Connection> connections_ ABSL_GUARDED_BY(mutex_);  // by descriptor
  std::map<std::string, int64_t> by_peer_ ABSL_GUARDED_BY(mutex_);
  std::list<Expected*> expected_ ABSL_GUARDED_BY(mutex_);
  ListenerStats stats_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headstart
