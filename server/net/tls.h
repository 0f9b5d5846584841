// The listener's certificates: read, checked and replaced as one set.
#pragma once

#include <grpcpp/security/server_credentials.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/base/mutex.h"
#include "server/options.h"

namespace headstart {

// PEM texts that belong together.
struct TlsSet {
  std::string cert_chain;
  std::string key;
  std::string client_ca;                          // empty: clients are asked for no certificate
  absl::Time not_after;                           // of the chain's first certificate
  std::optional<absl::Time> client_ca_not_after;  // of the one that ends last

  friend bool operator==(const TlsSet&, const TlsSet&) = default;
};

// The files of the options, when they are whole: all PEM, the key is that of the chain's first
// certificate, which is valid at `now`, and so is one of the client CA. INVALID_ARGUMENT names the
// file that is not.
absl::StatusOr<TlsSet> ReadTlsSet(const ServerTlsOptions& options, absl::Time now);

struct TlsStats {
  int64_t loaded = 0;    // looks that found another set and took it
  int64_t rejected = 0;  // looks at files that were not whole
  absl::Time not_after;
  std::optional<absl::Time> client_ca_not_after;
};

// What the server shows and trusts in handshakes. A set that was good stays until another one is.
// Thread-safe.
class TlsIdentity {
 public:
  // An error of ReadTlsSet.
  static absl::StatusOr<std::unique_ptr<TlsIdentity>> Load(const ServerTlsOptions& options);

  // Looks at the files again. True: they are new, and new connections get them. An error: they are
  // not whole.
  absl::StatusOr<bool> Reload();

  // For one server, which this outlives.
  std::shared_ptr<grpc::ServerCredentials> MakeCredentials();

  // The set that handshakes use, when it has changed since the last call.
  std::optional<TlsSet> TakeChanged();

  TlsStats stats() const;

 private:
  TlsIdentity(const ServerTlsOptions& options, TlsSet set);

  const ServerTlsOptions options_;
  mutable Mutex mutex_;
  TlsSet set_ ABSL_GUARDED_BY(mutex_);
  bool changed_ ABSL_GUARDED_BY(mutex_) = true;
  int64_t loaded_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t rejected_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace headstart
