// Beside what the kernel counts on a connection, what its calls account for. gRPC 1.51 buffers
// header blocks without an end before it looks at their size, and opens calls as fast as they are
// reset (CVE-2023-33953, CVE-2023-44487): neither shows in any call, but both show here.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"

namespace headstart {

// What the kernel says of a TCP connection.
struct Traffic {
  int64_t received = 0;
  int64_t sent = 0;  // and acknowledged
};
// None when `fd` is no connection of TCP.
std::optional<Traffic> TrafficOf(int fd);

enum class CutReason : uint8_t { kUnaccountedBytes, kAbandonedCalls };
inline constexpr std::array<absl::string_view, 2> kCutReasonNames = {"unaccounted_bytes",
                                                                     "abandoned_calls"};

struct ConnectionBudget {
  // What may have come that no call accounts for: a message that is still coming, for each call
  // that waits for one and once more for calls that are not seen before theirs, and a MiB.
  int64_t message_bytes = 16 << 20;
  int64_t metadata_bytes = 8 << 10;  // of each call
  // Of all connections together.
  int64_t total_bytes = 256 << 20;
};

// Thread-safe. Connections are named by their peer's address and port: "127.0.0.1:5000",
// "[::1]:5000".
class ConnectionLedger {
 public:
  explicit ConnectionLedger(const ConnectionBudget& budget) : budget_(budget) {}

  // ---- what calls account for; `peer` as gRPC names it, "ipv4:127.0.0.1:5000". Those of
  // connections that are not watched count nothing.

  void OnCall(absl::string_view peer);  // a call was opened, and its message is awaited
  void OnFirstMessage(absl::string_view peer, int64_t bytes);
  void OnMessage(absl::string_view peer, int64_t bytes);
  void OnCallWithoutMessage(absl::string_view peer);  // it ended

  // ---- the listener

  // False where one of that name is open.
  bool Open(const std::string& name);
  void Close(const std::string& name);

  struct Finding {
    std::optional<CutReason> cut;  // the connection must go
    int64_t unaccounted = 0;
  };
  // What a connection looks like now.
  Finding Check(const std::string& name, const Traffic& traffic, Instant now);

  const ConnectionBudget& budget() const { return budget_; }

 private:
  struct Account {
    int64_t waiting_calls = 0;
    double accounted = 0;  // bytes
    double abandoned = 0;  // calls, of late
    int64_t sent = 0;
    Instant checked_at;
  };

  // Null when there is none.
  Account* Find(absl::string_view peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const ConnectionBudget budget_;
  Mutex mutex_;
  std::map<std::string, Account, std::less<>> accounts_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headstart
