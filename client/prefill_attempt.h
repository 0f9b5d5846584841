// One attempt at a prompt: the call of Prefill, and the fetches of its KV where that is detached.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "client/cancel_token.h"
#include "client/client_options.h"
#include "client/connections.h"
#include "client/kv_assembly.h"
#include "client/kv_receiver.h"
#include "client/part_fetch.h"
#include "client/prefill_client.h"
#include "headstart/v1/prefill.pb.h"
#include "kernels/base/instant.h"

namespace headstart {

class PrefillAttempt {
 public:
  // The KV comes on the stream of Prefill, or detached on `num_connections` > 1 others. Of a
  // request that is detached already it does not come. What is passed by reference outlives this
  // object.
  PrefillAttempt(const PrefillClientOptions& options, Connections& connections,
                 const v1::PrefillRequest& request, const KvReceiverOptions& receive,
                 int num_connections, Instant deadline, CancelToken& cancel);

  // Called once. Errors are those of PrefillClient::Prefill.
  absl::Status Run();

  int64_t num_chunks() const { return assembly_.num_chunks(); }
  // Of an attempt that went well.
  PrefillOutcome Outcome() const;

 private:
  bool fetches() const { return num_connections_ > 1; }
  // Reads the stream of Prefill to its end.
  absl::Status ReceivePrefill();
  absl::Status StartFetch();
  // The end of the whole, given that of Prefill.
  absl::Status JoinFetch(const absl::Status& prefill);
  void ReleaseKv();

  const PrefillClientOptions& options_;
  Connections& connections_;
  const int num_connections_;
  const Instant start_;
  const Instant deadline_;
  CancelToken cancel_;  // of this attempt: the first error ends all streams
  v1::PrefillRequest request_;
  KvAssembly assembly_;
  KvReceiver receiver_;
  std::string server_;  // the gRPC target of the server that has accepted
  Instant accepted_at_;
  PartFetch fetch_;
};

}  // namespace headstart
