// The connections of one client.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/client_options.h"
#include "grpcpp/channel.h"
#include "grpcpp/security/credentials.h"

namespace headstart {

// Thread-safe. Channels connect when they are used for the first time, and stay connected for later
// calls; calls at the same time share them.
class Connections {
 public:
  // INVALID_ARGUMENT: no target, or a TLS file that can't be read.
  static absl::StatusOr<std::unique_ptr<Connections>> Create(const PrefillClientOptions& options);

  // To the target, for everything but fetching.
  const std::shared_ptr<grpc::Channel>& main() const { return main_; }

  // Connection `index`, from 0 on, of those for fetching from one server.
  std::shared_ptr<grpc::Channel> ForFetch(const std::string& target, int index);

 private:
  Connections(const PrefillClientOptions& options,
              std::shared_ptr<grpc::ChannelCredentials> credentials);

  const PrefillClientOptions options_;
  const std::shared_ptr<grpc::ChannelCredentials> credentials_;
  const std::shared_ptr<grpc::Channel> main_;
  absl::Mutex mutex_;
  std::map<std::string, std::vector<std::shared_ptr<grpc::Channel>>> fetch_
      ABSL_GUARDED_BY(mutex_);  // by target
};

}  // namespace headstart
